//! Power losses and kills at every kind of moment: nothing that a flush acknowledged is lost, and
//! nothing is read that was never written.
//!
//! `THINPLY_CRASH_STATES` says how many crashes to recover and judge, about (default 60,000). A
//! failure names its test and seed; `THINPLY_CRASH_SEED` runs that one alone.

#![cfg(not(simulation))]

use testkit::crash::Random;
use testkit::crash::client::{fresh, run, run_kept};
use testkit::crash::disk::PAGE;
use testkit::crash::folder::{Fault, Plan};
use testkit::crash::lives::{
    Outcome, campaign, life, ring, some_fault, wanted_states, with_bursts,
};
use testkit::crash::script::{Op, enumerated, several};

/// Runs a script once, and lets the power go after each of its steps.
fn one(script: &[Op], times: u64, random: &mut Random, seed: u64) -> Outcome {
    let (disk, oracle) = fresh();
    let run = run(disk, oracle, script, None, seed)?;
    run.sample(0, times, random).map_err(|what| format!("{what}, of {script:?}"))
}

#[test]
fn every_script_of_up_to_three_operations() {
    let passes = wanted_states().div_ceil(1_000_000);
    campaign("short scripts", 0, u64::MAX, |seed| {
        let mut number = (seed / passes) as usize;
        for length in 1..=3 {
            if let Some(script) = enumerated(length, number) {
                return one(&script, 1, &mut Random::new(seed), seed);
            }
            number -= 19usize.pow(length);
        }
        Ok(0)
    });
}

#[test]
fn random_lives() {
    campaign("random lives", 40, 20, |seed| {
        let mut random = Random::new(seed);
        life(&mut random, seed, |random| several(random, false), |_| None)
    });
}

/// Every call of a script in turn fails or is cut short, once and for ever. What fails says which
/// file it was; what was acknowledged survives, also the power loss that comes at the end.
#[test]
fn every_call_of_fifty_scripts_fails() {
    campaign("every call", 0, u64::MAX, |seed| {
        if seed >= 50 {
            return Ok(0);
        }
        let mut random = Random::new(seed);
        let script = several(&mut random, true);
        let mut states = 0;
        for fault in [Fault::Io, Fault::Full, Fault::Short] {
            for for_ever in [false, true] {
                for after in 0.. {
                    let plan = Plan { fault, after, for_ever };
                    let told = |what| format!("{what}, of {script:?} with {plan:?}");
                    let (disk, oracle) = fresh();
                    let run = run(disk, oracle, &script, Some(plan), seed).map_err(told)?;
                    if !run.failed {
                        break;
                    }
                    let last = run.events.len().saturating_sub(1);
                    states += run.sample(last, 2, &mut random).map_err(told)?;
                }
            }
        }
        Ok(states)
    });
}

/// The process dies, the machine runs on, and another process goes on with what a keeper has: all
/// that was answered is there, flushed or not, also where the power goes then.
#[test]
fn deaths_of_the_process() {
    campaign("deaths", 40, 20, |seed| {
        let mut random = Random::new(seed);
        let (disk, oracle) = fresh();
        let script = several(&mut random, true);
        let plan = if seed % 3 == 0 { some_fault(&mut random) } else { None };
        let told = |what| format!("{what}, of {script:?} with {plan:?}");
        let run = run_kept(disk, oracle, &script, plan, seed).map_err(told)?;
        // The run itself counts too: a seed that answers nothing would be the last.
        Ok(1 + run.sample_deaths(4, &mut random).map_err(told)?)
    });
}

/// A call fails or is cut short, with the disk full or broken, once or for ever, and all goes on as
/// long as it can.
#[test]
fn lives_with_faults() {
    campaign("faults", 30, 20, |seed| {
        let mut random = Random::new(seed);
        life(&mut random, seed, |random| several(random, true), some_fault)
    });
}

/// Pieces of any length are appended, each durable before the next one.
#[test]
fn appending_to_the_same_block() {
    campaign("appending", 5, 5, |seed| {
        let mut random = Random::new(seed);
        let script = |random: &mut Random| {
            let mut offset = *random.pick(&[0, 62, 4062, 32510]) * PAGE;
            (0..20)
                .map(|_| {
                    let length = 1 + random.below(900);
                    offset += length;
                    Op::WriteThrough { offset: offset - length, length }
                })
                .collect()
        };
        life(&mut random, seed, script, |_| None)
    });
}

/// More commits than the ring has places, and crashes around its end.
#[test]
fn the_ring_goes_round() {
    campaign("ring", 5, 2, |seed| ring(&mut Random::new(seed), seed));
}

/// Flushes that find more fresh blocks than a record holds.
#[test]
fn checkpoints() {
    campaign("checkpoints", 5, 2, |seed| life(&mut Random::new(seed), seed, with_bursts, |_| None));
}

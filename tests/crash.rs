//! Power losses and kills at every kind of moment: nothing that a flush acknowledged is lost, and
//! nothing is read that was never written.
//!
//! `THINPLY_CRASH_STATES` says how many crashes to recover and judge, about (default 60,000). A
//! failure names its test and seed; `THINPLY_CRASH_SEED` runs that one alone.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use common::crash::Random;
use common::crash::disk::{Disk, PAGE};
use common::crash::folder::{Fault, Plan};
use common::crash::judge::judge;
use common::crash::oracle::Oracle;
use common::crash::script::{Op, enumerated, fresh, run};

type Outcome = Result<u64, String>;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().expect("a number"))
}

/// Runs seeds, on all processors, until their states are so many percent of those that are wanted,
/// and at least the first `least` seeds. A seed beyond the last one answers zero.
fn campaign(name: &str, percent: u64, least: u64, seed: impl Fn(u64) -> Outcome + Sync) {
    if let Some(only) = number("THINPLY_CRASH_SEED") {
        println!("{name}, seed {only}: {} states", seed(only).unwrap());
        return;
    }
    let wanted = number("THINPLY_CRASH_STATES").unwrap_or(60_000) * percent / 100;
    let (started, next, states) = (Instant::now(), AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= least && states.load(Ordering::Relaxed) >= wanted {
                return;
            }
            match seed(number) {
                Ok(0) => return,
                Ok(count) => drop(states.fetch_add(count, Ordering::Relaxed)),
                Err(what) => panic!("{name}, seed {number}: {what}"),
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, Into::into);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let (states, seconds) = (states.into_inner(), started.elapsed().as_secs_f64());
    println!("{name}: {states} crash states recovered and judged, {seconds:.0} s");
    assert!(states >= wanted, "{name}: too few");
}

/// Runs a script once, and lets the power go after each of its steps.
fn one(script: &[Op], times: u64, random: &mut Random, seed: u64) -> Outcome {
    let (disk, oracle) = fresh();
    let run = run(disk, oracle, script, None, seed)?;
    run.sample(0, times, random).map_err(|what| format!("{what}, of {script:?}"))
}

/// Rounds of operations, crashes and recoveries on one disk.
fn life(
    random: &mut Random,
    seed: u64,
    script: impl Fn(&mut Random) -> Vec<Op>,
    plan: impl Fn(&mut Random) -> Option<Plan>,
) -> Outcome {
    let (mut disk, mut oracle): (Disk, Oracle) = fresh();
    let mut states = 0;
    for round in 0..4 {
        let (script, plan) = (script(random), plan(random));
        let told = |what| format!("round {round}: {what}, of {script:?} with {plan:?}");
        let run = run(disk, oracle, &script, plan, seed * 4 + round).map_err(told)?;
        states += run.sample(0, 2, random).map_err(told)?;
        let (crashed, allowed) = run.end(random);
        let survivor = judge(crashed, &allowed, random).map_err(told)?;
        oracle = allowed;
        survivor.settle(&mut oracle);
        disk = survivor.disk;
    }
    Ok(states)
}

/// Up to 24 operations.
fn several(random: &mut Random, aligned: bool) -> Vec<Op> {
    (0..1 + random.below(24)).map(|_| Op::random(random, aligned)).collect()
}

#[test]
fn every_script_of_up_to_three_operations() {
    let passes = number("THINPLY_CRASH_STATES").unwrap_or(60_000).div_ceil(1_000_000);
    campaign("short scripts", 0, u64::MAX, |seed| {
        let mut number = (seed / passes) as usize;
        for length in 1..=3 {
            if let Some(script) = enumerated(length, number) {
                return one(&script, 1, &mut Random::new(seed), seed);
            }
            number -= 18usize.pow(length);
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

/// A call fails or is cut short, with the disk full or broken, once or for ever, and all goes on as
/// long as it can.
#[test]
fn lives_with_faults() {
    campaign("faults", 30, 20, |seed| {
        let mut random = Random::new(seed);
        let plan = |random: &mut Random| {
            let fault = *random.pick(&[Fault::Io, Fault::Full, Fault::Short]);
            Some(Plan { fault, after: random.below(100), for_ever: random.one_in(3) })
        };
        life(&mut random, seed, |random| several(random, true), plan)
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
    campaign("ring", 5, 2, |seed| {
        let mut random = Random::new(seed);
        let (disk, oracle) = fresh();
        let mut script = vec![Op::Commits(250 + random.below(8))];
        script.extend(several(&mut random, false));
        let run = run(disk, oracle, &script, None, seed)?;
        let from = run.events.len() - run.events.len().min(60);
        run.sample(from, 1, &mut random).map_err(|what| format!("{what}, of {script:?}"))
    });
}

/// Flushes that find more fresh blocks than a record holds.
#[test]
fn checkpoints() {
    campaign("checkpoints", 5, 2, |seed| {
        let mut random = Random::new(seed);
        let script = |random: &mut Random| {
            let mut script = several(random, false);
            for _ in 0..1 + random.below(3) {
                script.insert(random.below(script.len() as u64) as usize, Op::Burst);
            }
            script
        };
        life(&mut random, seed, script, |_| None)
    });
}

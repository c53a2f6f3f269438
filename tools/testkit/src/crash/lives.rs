//! Campaigns: seed after seed, each the life of a disk.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::Random;
use super::client::{fresh, run};
use super::disk::Disk;
use crate::number;

use super::folder::{Fault, Plan};
use super::judge::{Run, judge};
use super::oracle::Oracle;
use super::script::{Op, several};

/// How many crashes were recovered and judged.
pub type Outcome = Result<u64, String>;

/// How many crashes a whole test shall recover and judge, about.
pub fn wanted_states() -> u64 {
    number("THINPLY_CRASH_STATES").unwrap_or(60_000)
}

/// Runs seeds, on all processors, until their states are so many percent of those that are wanted,
/// and at least the first `least` seeds. A seed beyond the last one answers zero.
pub fn campaign(name: &str, percent: u64, least: u64, seed: impl Fn(u64) -> Outcome + Sync) {
    if let Some(only) = number("THINPLY_CRASH_SEED") {
        println!("{name}, seed {only}: {} states", seed(only).unwrap());
        return;
    }
    let wanted = wanted_states() * percent / 100;
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

/// Rounds of operations, crashes and recoveries on one disk: one of four has no links. `script` says what to do in a round,
/// and `run` does it.
pub fn rounds<S: Debug>(
    random: &mut Random,
    seed: u64,
    script: impl Fn(&mut Random) -> S,
    plan: impl Fn(&mut Random) -> Option<Plan>,
    run: impl Fn(Disk, Oracle, &S, Option<Plan>, u64) -> Result<Run, String>,
) -> Outcome {
    let (mut disk, mut oracle): (Disk, Oracle) = fresh();
    disk.without_links = seed % 4 == 3;
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

/// As [`rounds`], with one client.
pub fn life(
    random: &mut Random,
    seed: u64,
    script: impl Fn(&mut Random) -> Vec<Op>,
    plan: impl Fn(&mut Random) -> Option<Plan>,
) -> Outcome {
    rounds(random, seed, script, plan, |disk, oracle, script, plan, seed| {
        run(disk, oracle, script, plan, seed)
    })
}

/// A fault of any kind, somewhere.
pub fn some_fault(random: &mut Random) -> Option<Plan> {
    let fault = *random.pick(&[Fault::Io, Fault::Full, Fault::Short]);
    Some(Plan { fault, after: random.below(100), for_ever: random.one_in(3) })
}

/// More commits than the ring has places, and crashes around its end.
pub fn ring(random: &mut Random, seed: u64) -> Outcome {
    let (disk, oracle) = fresh();
    let mut script = vec![Op::Commits(250 + random.below(8))];
    script.extend(several(random, false));
    let run = run(disk, oracle, &script, None, seed)?;
    let from = run.events.len() - run.events.len().min(60);
    run.sample(from, 1, random).map_err(|what| format!("{what}, of {script:?}"))
}

/// Operations among which flushes find more fresh blocks than a record holds.
pub fn with_bursts(random: &mut Random) -> Vec<Op> {
    let mut script = several(random, false);
    for _ in 0..1 + random.below(3) {
        script.insert(random.below(script.len() as u64) as usize, Op::Burst);
    }
    script
}

//! The crash simulator with several clients at once, under a scheduler that a seed decides, and with
//! planted bugs that it must find. Runs in a build of its own: `tests/run simulation`.
//!
//! `THINPLY_CRASH_STATES` and `THINPLY_CRASH_SEED` work as in `tests/crash/crash.rs`.
#![cfg(simulation)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use thinply::planted::{Bug, plant};

use testkit::crash::Random;
use testkit::crash::client::{fresh, run_together};
use testkit::crash::desk::{Script, run_at_desk};
use testkit::crash::disk::PAGE;
use testkit::crash::folder::Plan;
use testkit::crash::lives::{Outcome, campaign, life, ring, rounds, some_fault, with_bursts};
use testkit::crash::script::{BLOCKS, Op, several};

/// Each planted bug, and how many seeds are enough to find it.
const BUGS: [(Bug, u64); 20] = [
    (Bug::RecordNotSynced, 100),
    (Bug::BitBeforeItsData, 100),
    (Bug::FreshBitInCheckpoint, 1000),
    (Bug::ConfirmSkipped, 100),
    (Bug::ChecksumWithoutLock, 1000),
    (Bug::FlushJoinsTheRunningOne, 100),
    (Bug::JoinedFlushAlwaysSucceeds, 1000),
    (Bug::RingPlaceReusedEarly, 100),
    (Bug::FailedAttemptKeepsItsNumber, 6000),
    (Bug::FailedSyncRetried, 1000),
    (Bug::FailedSyncForgotten, 1000),
    (Bug::FailedRecordKeepsItsBlocks, 1000),
    (Bug::PunchAfterItsBit, 2000),
    (Bug::BitBeforeItsWrite, 1000),
    (Bug::NewestSlotOverwritten, 100),
    (Bug::LastRecordTrusted, 100),
    (Bug::CacheTrusted, 1000),
    (Bug::EpochNotSynced, 100),
    (Bug::NameNotSynced, 1000),
    (Bug::CopyUpWithoutStripe, 1000),
];

/// Those of the room where disks are in use.
const DESK_BUGS: [(Bug, u64); 5] = [
    (Bug::LeaseGivenTwice, 1000),
    (Bug::MomentMissesABlock, 1000),
    (Bug::FlushJoinedTooLate, 2000),
    (Bug::CloseRacesAnOpen, 1000),
    (Bug::ChangeOnAClosingDisk, 1000),
];

/// Those of going on where a process died.
const DEATH_BUGS: [(Bug, u64); 5] = [
    (Bug::MarkedAfterTheAnswer, 1000),
    (Bug::AnsweredBeforeThePageCache, 1000),
    (Bug::SettledBeforeItsSync, 1000),
    (Bug::ResentOverANewerOne, 1000),
    (Bug::LockFreeInTheGap, 100),
];

/// One at a time: a planted bug is there for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs `act` with its threads scheduled by `seed`. A deadlock or a panic is a failure.
fn scheduled(seed: u64, act: impl Fn() -> Outcome + Send + Sync + 'static) -> Outcome {
    // Made once for all, and so not in a run that shall go the same way again.
    static PREPARED: Once = Once::new();
    PREPARED.call_once(|| drop(unprepared(0, || Ok(fresh().0.time()))));
    unprepared(seed, act)
}

fn unprepared(seed: u64, act: impl Fn() -> Outcome + Send + Sync + 'static) -> Outcome {
    let mut config = Config::default();
    config.stack_size = 1 << 20;
    config.max_steps = MaxSteps::None;
    config.failure_persistence = FailurePersistence::None;
    let outcome = Arc::new(Mutex::new(None));
    let answer = outcome.clone();
    let runner = Runner::new(RandomScheduler::new_from_seed(seed, 1), config);
    let whole = || runner.run(move || *answer.lock().unwrap() = Some(act()));
    catch_unwind(AssertUnwindSafe(whole)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|&text| text.to_owned());
        format!("panic: {:?}", panic.downcast_ref::<String>().cloned().or(text))
    })?;
    let outcome = outcome.lock().unwrap().take();
    outcome.ok_or("no end")?
}

/// Up to nine operations for each of two to four clients, on few blocks.
fn crew(random: &mut Random) -> Vec<Vec<Op>> {
    let first = random.below(BLOCKS.len() as u64 - 3) as usize;
    let blocks = &BLOCKS[first..first + 3];
    let mut script = || -> Vec<Op> {
        let ops = (0..1 + random.below(9)).map(|_| Op::random(random, true, blocks));
        ops.filter(|op| !matches!(op, Op::Close)).collect()
    };
    let clients = 2 + script().len() % 3;
    (0..clients).map(|_| script()).collect()
}

/// A client that brings about a checkpoint, and others that write to blocks which are still absent.
fn checkpoint_under_load(random: &mut Random) -> Vec<Vec<Op>> {
    let mut writes = || -> Vec<Op> {
        let blocks = (0..4 + random.below(9)).map(|_| *random.pick(&BLOCKS[..15]));
        blocks.map(|block| Op::Write { offset: block * PAGE, length: PAGE }).collect()
    };
    vec![vec![Op::Burst, Op::Flush, Op::Snapshot], writes(), writes(), writes()]
}

/// Little but what seals the top or closes it.
fn sealing(random: &mut Random) -> Vec<Op> {
    let ops = (0..2 + random.below(6)).map(|_| match random.below(4) {
        0 => Op::Snapshot,
        1 => Op::Close,
        2 => Op::WriteThrough { offset: random.below(3) * PAGE, length: PAGE },
        _ => Op::random(random, true, &BLOCKS),
    });
    ops.collect()
}

fn together(
    random: &mut Random,
    seed: u64,
    scripts: fn(&mut Random) -> Vec<Vec<Op>>,
    plan: fn(&mut Random) -> Option<Plan>,
) -> Outcome {
    rounds(random, seed, scripts, plan, |disk, oracle, scripts, plan, seed| {
        run_together(disk, oracle, scripts, plan, seed)
    })
}

/// People who use one disk by turns or together, look at it and take snapshots of it, at a desk.
fn at_desk(seed: u64) -> Outcome {
    scheduled(seed, move || {
        let mut random = Random::new(seed);
        let plan = if seed.is_multiple_of(4) { some_fault } else { |_: &mut Random| None };
        rounds(&mut random, seed, Script::random, plan, run_at_desk)
    })
}

/// Clients of a disk whose process dies, on a machine that runs on.
fn dying(seed: u64) -> Outcome {
    scheduled(seed, move || {
        let mut random = Random::new(seed);
        let (disk, oracle) = fresh();
        let scripts = crew(&mut random);
        let plan = if seed.is_multiple_of(3) { some_fault(&mut random) } else { None };
        let told = |what| format!("{what}, of {scripts:?} with {plan:?}");
        let run = run_together(disk, oracle, &scripts, plan, seed).map_err(told)?;
        // The run itself counts too: a seed that answers nothing would be the last.
        Ok(1 + run.sample_deaths(8, &mut random).map_err(told)?)
    })
}

/// A life of one of all kinds.
fn any_life(seed: u64) -> Outcome {
    scheduled(seed, move || {
        let mut random = Random::new(seed);
        let random = &mut random;
        match seed % 16 {
            0 if seed.is_multiple_of(64) => ring(random, seed),
            0 => life(random, seed, with_bursts, |_| None),
            1 => together(random, seed, checkpoint_under_load, |_| None),
            2..4 => life(random, seed, |random| several(random, true), some_fault),
            4..6 => life(random, seed, sealing, |_| None),
            6..8 => life(random, seed, sealing, some_fault),
            8..12 => together(random, seed, crew, |_| None),
            _ => together(random, seed, crew, some_fault),
        }
    })
}

#[test]
fn lives_of_several_clients() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    campaign("several clients", 50, 100, any_life);
}

#[test]
fn lives_at_a_desk() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    campaign("people at a desk", 20, 100, at_desk);
}

#[test]
fn deaths_among_several_clients() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    campaign("deaths among several clients", 20, 100, dying);
}

/// The first seed below `seeds` that fails, and how.
fn first_failure(seeds: u64, life: fn(u64) -> Outcome) -> Option<(u64, String)> {
    let next = AtomicU64::new(0);
    let found: Mutex<Option<(u64, String)>> = Mutex::new(None);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds || found.lock().unwrap().is_some() {
                return;
            }
            if let Err(what) = life(seed) {
                let mut found = found.lock().unwrap();
                if found.as_ref().is_none_or(|(first, _)| seed < *first) {
                    *found = Some((seed, what));
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, Into::into);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    found.into_inner().unwrap()
}

fn find(bugs: &[(Bug, u64)], life: fn(u64) -> Outcome) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for &(bug, seeds) in bugs {
        plant(Some(bug));
        match first_failure(seeds, life) {
            Some((seed, what)) => {
                let what: String = what.chars().take(150).collect();
                println!("{bug:?}: found by seed {seed} of {seeds}: {what}");
            }
            None => missed.push(bug),
        }
    }
    plant(None);
    drop(std::panic::take_hook());
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn planted_bugs_are_found() {
    find(&BUGS, any_life);
}

#[test]
fn bugs_planted_about_deaths_are_found() {
    find(&DEATH_BUGS, dying);
}

#[test]
fn bugs_planted_at_the_desk_are_found() {
    find(&DESK_BUGS, at_desk);
}

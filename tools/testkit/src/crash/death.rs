//! Deaths of the process that writes a disk, on a machine that runs on: whoever goes on with what a
//! keeper has finds all that was answered, and nobody sees that there was a gap.

use std::sync::Arc;

use thinply::chain::Chain;
use thinply::device::Device;
use thinply::error::ErrorKind;
use thinply::planted::{Bug, planted};
use thinply::storage::Access;

use super::Random;
use super::client::{Client, resume};
use super::disk::{Change, Disk};
use super::folder::{CrashFolder, Event};
use super::judge::{Run, TOP};
use super::keeper::Estate;
use super::oracle::{Ask, Oracle};
use super::script::{BLOCKS, Op};

/// What a process leaves when it dies, and what was answered by it.
#[derive(Clone)]
struct Death {
    disk: Disk,
    estate: Estate,
    oracle: Oracle,
    /// Something it had begun, which comes to pass a little later.
    late: Option<Change>,
}

impl Run {
    /// Lets the process die after steps of the run, one of `every` on average. Answers how many
    /// deaths and crashes were judged.
    pub fn sample_deaths(&self, every: u64, random: &mut Random) -> Result<u64, String> {
        let (disk, oracle) = (self.disk.clone(), self.oracle.clone());
        let mut death = Death { disk, estate: Estate::default(), oracle, late: None };
        let mut states = 0;
        for (step, event) in self.events.iter().enumerate() {
            let before = death.disk.clone();
            match event {
                Event::Disk(change) => death.disk.apply(change),
                Event::Client(note) => death.oracle.note(note),
                Event::Keeper(told) => death.estate.apply(told),
            }
            if !random.one_in(every) {
                continue;
            }
            let mut this = death.clone();
            if let Event::Disk(change @ Change::Write { .. }) = event {
                (this.disk, this.late) = (before, Some(change.clone()));
            }
            states += judge(this, random)
                .map_err(|what| format!("death at step {step}, {event:?}: {what}"))?;
        }
        Ok(states)
    }
}

/// Others go on where a process died, perhaps through deaths of their own.
fn judge(death: Death, random: &mut Random) -> Result<u64, String> {
    let Death { mut disk, mut estate, oracle, mut late } = death;
    if !planted(Bug::ResentOverANewerOne)
        && let Some(change) = late.take()
    {
        // Who goes on waits for the end of all that the dead one had begun.
        disk.apply(&change);
    }
    for _ in 0..random.below(3) {
        let folder = CrashFolder::after_death(disk, estate);
        folder.lose_power_after(random.below(30));
        drop(resume(&folder, &oracle, 0).open());
        (disk, estate) = (folder.disk(), folder.estate());
    }
    let folder = CrashFolder::after_death(disk.clone(), estate.clone());
    nobody_comes_between(&folder)?;
    folder.record(random.below(1 << 32));
    let client = resume(&folder, &oracle, 1 << 30);
    let number = client.number();
    let mut opened = None;
    // All that was answered is durable from here on.
    let result =
        client.request(number, Ask::Flush, || client.open().map(|chain| opened = Some(chain)));
    if estate.has_lost(&disk) {
        return match result {
            Err(error) if error.kind() == ErrorKind::Poisoned => Ok(1),
            other => Err(format!("went on after a sync that had failed: {other:?}")),
        };
    }
    let Some(chain) = opened else { return Err(format!("going on: {result:?}")) };
    look(&client, &chain)?;
    // What was not answered is asked for again.
    for (offset, data) in oracle.unanswered() {
        client
            .write_data(offset, data, |data| chain.write(offset, data))
            .map_err(|error| format!("again: {error:?}"))?;
        if let Some(change) = late.take() {
            let Change::Write { .. } = change else { continue };
            let op = Op::Write { offset, length: 512 };
            client.run(&chain, &op).map_err(|error| format!("{op:?}: {error:?}"))?;
            folder.happen_late(change);
        }
    }
    for _ in 0..random.below(6) {
        let op = Op::random(random, true, &BLOCKS);
        if !matches!(op, Op::Close) {
            client.run(&chain, &op).map_err(|error| format!("{op:?}: {error:?}"))?;
        }
    }
    look(&client, &chain)?;
    drop(chain);
    let run = Run { disk, oracle, events: folder.take_record(), failed: false };
    Ok(1 + run.sample(0, 1, random)?)
}

/// While nobody writes the disk, nobody else may.
fn nobody_comes_between(folder: &CrashFolder) -> Result<(), String> {
    if folder.estate().is_empty() {
        return Ok(());
    }
    match Chain::open(Arc::new(folder.clone()), TOP, Access::Write, Arc::default()) {
        Err(error) if error.kind() == ErrorKind::InUse => Ok(()),
        other => Err(format!("in the gap: {other:?}")),
    }
}

/// All blocks hold what was answered.
fn look(client: &Client, chain: &Chain) -> Result<(), String> {
    let blocks: Vec<u64> = client.known().oracle.blocks().collect();
    blocks.into_iter().try_for_each(|block| {
        client.read(chain, block).map_err(|error| format!("after the death: {error}"))
    })
}

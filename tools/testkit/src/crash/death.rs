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
use super::disk::Change;
use super::folder::{CrashFolder, Event};
use super::judge::{Left, Run, TOP};
use super::oracle::Ask;
use super::script::{BLOCKS, Op};

impl Run {
    /// Lets the process die after steps of the run, one of `every` on average. Answers how many
    /// deaths and crashes were judged.
    pub fn sample_deaths(&self, every: u64, random: &mut Random) -> Result<u64, String> {
        let mut left = self.beginning();
        let mut states = 0;
        for (step, event) in self.events.iter().enumerate() {
            let before = left.disk.clone();
            left.take(event);
            if !random.one_in(every) {
                continue;
            }
            // Something that it had begun may come to pass a little later.
            let (mut this, mut late) = (left.clone(), None);
            if let Event::Disk(change @ Change::Write { .. }) = event {
                (this.disk, late) = (before, Some(change.clone()));
            }
            states += judge(this, late, random)
                .map_err(|what| format!("death at step {step}, {event:?}: {what}"))?;
        }
        Ok(states)
    }
}

/// Others go on where a process died, perhaps through deaths of their own.
fn judge(left: Left, mut late: Option<Change>, random: &mut Random) -> Result<u64, String> {
    let Left { mut disk, mut estate, oracle } = left;
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
            .write_as(client.number(), offset, data, |data| chain.write(offset, data))
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

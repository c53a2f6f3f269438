//! Crashes of a recorded run, each recovered and judged.

use std::sync::Arc;

use thinply::chain::Chain;
use thinply::device::Device;
use thinply::inspect;
use thinply::storage::{Access, Folder};

use super::Random;
use super::disk::{Bytes, Change, Disk, PAGE};
use super::folder::{CrashFolder, Event};
use super::keeper::Estate;
use super::oracle::Oracle;

/// The layer that is written and judged.
pub const TOP: &str = "top";

/// A run, and what was there before it.
#[derive(Debug)]
pub struct Run {
    pub disk: Disk,
    pub oracle: Oracle,
    pub events: Vec<Event>,
    /// A call failed, as planned.
    pub failed: bool,
}

/// A disk after a crash and its recovery, and what it was seen to hold.
#[derive(Debug)]
pub struct Survivor {
    pub disk: Disk,
    found: Vec<u8>,
}

impl Survivor {
    /// The oracle for what comes next.
    pub fn settle(&self, oracle: &mut Oracle) {
        let mut rest = &self.found[..];
        let blocks: Vec<u64> = oracle.blocks().collect();
        let found: Vec<(u64, Bytes)> = blocks
            .into_iter()
            .map(|block| {
                let (part, after) = rest.split_at(oracle.length(block));
                rest = after;
                let mut bytes = [0; PAGE as usize];
                bytes[..part.len()].copy_from_slice(part);
                (block, Some(Arc::new(bytes)))
            })
            .collect();
        oracle.settle(&found);
    }
}

/// What there is after some of a run's steps.
#[derive(Clone, Debug)]
pub(super) struct Left {
    pub(super) disk: Disk,
    /// What a keeper has.
    pub(super) estate: Estate,
    pub(super) oracle: Oracle,
}

impl Left {
    pub(super) fn take(&mut self, event: &Event) {
        match event {
            Event::Disk(change) => self.disk.apply(change),
            Event::Client(note) => self.oracle.note(note),
            Event::Keeper(told) => self.estate.apply(told),
        }
    }
}

impl Run {
    /// What there was before its first step.
    pub(super) fn beginning(&self) -> Left {
        let (disk, oracle) = (self.disk.clone(), self.oracle.clone());
        Left { disk, estate: Estate::default(), oracle }
    }

    /// Lets the power go, or the process die, `times` times after each step from the one numbered
    /// `from` on. Answers how many crashes were recovered and judged.
    pub fn sample(&self, from: usize, times: u64, random: &mut Random) -> Result<u64, String> {
        let mut left = self.beginning();
        let mut states = 0;
        for (step, event) in self.events.iter().enumerate() {
            left.take(event);
            let nothing_new =
                matches!(event, Event::Keeper(_) | Event::Disk(Change::DropCache { .. }));
            if step < from || nothing_new {
                continue;
            }
            for _ in 0..if left.disk.is_settled() { 1 } else { times } {
                judge(crash(&left.disk, random), &left.oracle, random)
                    .map_err(|what| format!("crash after step {step}, {event:?}: {what}"))?;
                states += 1;
            }
        }
        Ok(states)
    }

    /// One crash somewhere, and what the device may hold then.
    pub fn end(&self, random: &mut Random) -> (Disk, Oracle) {
        let mut left = self.beginning();
        let steps = random.below(self.events.len() as u64 + 1) as usize;
        self.events[..steps].iter().for_each(|event| left.take(event));
        (crash(&left.disk, random), left.oracle)
    }
}

/// A power loss, or now and then a kill, which leaves the page cache.
fn crash(disk: &Disk, random: &mut Random) -> Disk {
    if random.one_in(3) { disk.clone() } else { disk.crashed(random) }
}

fn open(folder: &CrashFolder, name: &str, access: Access) -> Result<Chain, String> {
    Chain::open(Arc::new(folder.clone()), name, access, Arc::default())
        .map_err(|error| format!("opening {name} for {access:?}: {error:?}"))
}

/// Recovers what a crash left, perhaps through crashes inside recovery, and compares it with the
/// oracle; then once more after another crash, which must change nothing.
pub fn judge(disk: Disk, oracle: &Oracle, random: &mut Random) -> Result<Survivor, String> {
    let mut disk = disk;
    for _ in 0..random.below(3) {
        let folder = CrashFolder::new(disk);
        folder.lose_power_after(random.below(30));
        drop(open(&folder, TOP, Access::Write));
        disk = crash(&folder.disk(), random);
    }
    let mut found = Vec::new();
    if random.one_in(2) {
        disk = recover(disk, Access::Read, false, oracle, &mut found)?;
    }
    disk = recover(disk, Access::Write, false, oracle, &mut found)?;
    disk = crash(&disk, random);
    let (access, close) = (*random.pick(&[Access::Read, Access::Write]), random.one_in(2));
    disk = recover(disk, access, close, oracle, &mut found)
        .map_err(|what| format!("recovered once more: {what}"))?;
    if random.one_in(4) {
        let folder = CrashFolder::new(disk.clone());
        for (name, content) in &oracle.snapshots {
            look(&open(&folder, name, Access::Read)?, content, &mut Vec::new())
                .map_err(|what| format!("snapshot {name}: {what}"))?;
        }
    }
    Ok(Survivor { disk, found })
}

/// Opens the top, looks at all of it and leaves it, closed or as a kill does.
fn recover(
    disk: Disk,
    access: Access,
    close: bool,
    oracle: &Oracle,
    found: &mut Vec<u8>,
) -> Result<Disk, String> {
    let folder = CrashFolder::new(disk.clone());
    let chain = open(&folder, TOP, access)?;
    look(&chain, oracle, found)?;
    if close {
        chain.close().map_err(|error| format!("closing: {error:?}"))?;
    }
    drop(chain);
    if access == Access::Write {
        check(&folder)?;
    }
    let after = folder.disk();
    same_parents(&after, &disk)?;
    Ok(after)
}

/// Reads all blocks; the first time they are compared with the oracle, then with `found`.
fn look(chain: &Chain, oracle: &Oracle, found: &mut Vec<u8>) -> Result<(), String> {
    let first = found.is_empty();
    let mut buf = [0; PAGE as usize];
    let mut at = 0;
    for block in oracle.blocks() {
        let part = &mut buf[..oracle.length(block)];
        chain.read(block * PAGE, part).map_err(|error| format!("reading: {error:?}"))?;
        if first {
            oracle.check(block, part)?;
            found.extend_from_slice(part);
        } else if found[at..at + part.len()] != *part {
            return Err(format!("block {block} has changed from one look to the next"));
        }
        at += part.len();
    }
    Ok(())
}

fn check(folder: &CrashFolder) -> Result<(), String> {
    let file = folder.open(TOP, Access::Read).map_err(|error| error.to_string())?;
    let report = inspect::check(&*file).map_err(|error| format!("checking: {error:?}"))?;
    if report.is_clean() { Ok(()) } else { Err(format!("check: {:?}", report.findings)) }
}

/// What lies under the top must stay as it is, byte for byte.
fn same_parents(disk: &Disk, before: &Disk) -> Result<(), String> {
    let top = before.names().get(TOP);
    let sealed = |name: &str, file| name != TOP && !name.starts_with('.') && Some(file) != top;
    for (name, file) in before.names().iter().filter(|(name, file)| sealed(name, file)) {
        match disk.names().get(name) {
            Some(&now) if disk.same_content(now, before, *file) => {}
            _ => return Err(format!("the parent {name} has changed")),
        }
    }
    Ok(())
}

//! What a device may show. Each sector has a history of versions; a crash may take it back to the
//! last version that was promised, and no further, and may not show what was never written there.

use std::collections::BTreeMap;
use std::ops::{AddAssign, Range};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub const SECTOR: u64 = 512;

/// A change of a sector.
#[derive(Clone, Copy, Debug)]
struct Version {
    /// The clock when it was sent; names the bytes. What a device is born with is 0.
    sent: u64,
    /// The clock when its reply came.
    replied: Option<u64>,
    zero: bool,
    /// Replied to with FUA, or seen after a crash.
    promised: bool,
}

const NEWBORN: Version = Version { sent: 0, replied: Some(0), zero: true, promised: true };

impl Version {
    fn is_content(&self, sector: u64, bytes: &[u8]) -> bool {
        let mut expected = [0; SECTOR as usize];
        if !self.zero {
            fill(sector, self.sent, &mut expected);
        }
        bytes == expected
    }
}

/// The bytes of a written version: no two sectors and no two versions are alike.
fn fill(sector: u64, version: u64, out: &mut [u8]) {
    let mut state = sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version.rotate_left(32);
    let (head, rest) = out.split_at_mut(16);
    head[..8].copy_from_slice(&sector.to_le_bytes());
    head[8..].copy_from_slice(&version.to_le_bytes());
    for part in rest.chunks_exact_mut(8) {
        state = state.wrapping_mul(0xd129_0b4d_3f1e_5a2d).wrapping_add(0x2545_f491_4f6c_dd1d);
        part.copy_from_slice(&(state ^ state >> 29).to_le_bytes());
    }
}

#[derive(Clone, Debug)]
struct Sector {
    /// In the order in which they were sent: nobody changes a sector while another one does.
    versions: Vec<Version>,
    /// A request that reads or changes it is under way.
    busy: bool,
}

impl Sector {
    fn new() -> Self {
        Self { versions: vec![NEWBORN], busy: false }
    }

    /// The place of the oldest version that may still show: the last one that is promised in its own
    /// right, or that was replied to before `promise`.
    fn floor(&self, promise: u64) -> usize {
        let kept = |version: &Version| {
            version.promised || version.replied.is_some_and(|replied| replied < promise)
        };
        self.versions.iter().rposition(kept).unwrap_or(0)
    }

    /// The version that `bytes` show, if it may show.
    fn find(&self, number: u64, bytes: &[u8], promise: u64) -> Result<Version, String> {
        let allowed = &self.versions[self.floor(promise)..];
        let found = allowed.iter().rev().find(|version| version.is_content(number, bytes));
        found.copied().ok_or_else(|| {
            format!(
                "sector {number} (block {}) begins {:02x?}, which is {}; allowed was one of \
                 {allowed:?}, since all that was replied to before {promise} was promised",
                number / 8,
                &bytes[..24],
                self.name(number, bytes)
            )
        })
    }

    /// What bytes that may not show are.
    fn name(&self, number: u64, bytes: &[u8]) -> String {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let mut whole = [0; SECTOR as usize];
        fill(word(0), word(8), &mut whole);
        match (bytes == whole, word(0) == number) {
            (true, true) => format!("its version {}", word(8)),
            (true, false) => format!("version {} of sector {}", word(8), word(0)),
            _ if bytes == [0; SECTOR as usize] => "zeros".into(),
            _ => "nothing that was ever written".into(),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct State {
    clock: u64,
    /// What was replied to before is promised: when the last flush that returned was sent.
    promise: u64,
    /// How many views of the past are being made: meanwhile no version is forgotten.
    held: u64,
    /// Those that were ever changed.
    sectors: BTreeMap<u64, Sector>,
    seen: Seen,
}

/// What has come of the requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub changes: u64,
    pub reads: u64,
    pub flushes: u64,
    /// Sectors that showed their last change after a crash.
    pub kept: u64,
    /// Sectors that showed an older one, or what they had before.
    pub undone: u64,
}

impl AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        self.changes += other.changes;
        self.reads += other.reads;
        self.flushes += other.flushes;
        self.kept += other.kept;
        self.undone += other.undone;
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn claim(&mut self, range: &Range<u64>) -> bool {
        if self.sectors.range(range.clone()).any(|(_, sector)| sector.busy) {
            return false;
        }
        for number in range.clone() {
            self.sectors.entry(number).or_insert_with(Sector::new).busy = true;
        }
        true
    }

    fn release(&mut self, range: &Range<u64>, mut each: impl FnMut(u64, &mut Sector)) {
        for (&number, sector) in self.sectors.range_mut(range.clone()) {
            sector.busy = false;
            each(number, sector);
        }
    }
}

/// A moment.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    now: u64,
    promise: u64,
}

/// The history of a device that several clients use. Ranges are of sectors.
#[derive(Debug, Default)]
pub struct History(Mutex<State>);

impl History {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change is about to be sent: its version, or `None` while another request uses a part of the
    /// range.
    pub fn begin(&self, range: &Range<u64>, zero: bool) -> Option<u64> {
        let mut state = self.state();
        if !state.claim(range) {
            return None;
        }
        let (sent, promise, held) = (state.tick(), state.promise, state.held);
        for (_, sector) in state.sectors.range_mut(range.clone()) {
            if held == 0 {
                sector.versions.drain(..sector.floor(promise));
            }
            sector.versions.push(Version { sent, replied: None, zero, promised: false });
        }
        Some(sent)
    }

    /// The bytes of a version.
    pub fn content(range: &Range<u64>, version: u64, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + ((range.end - range.start) * SECTOR) as usize, 0);
        let parts = out[start..].chunks_exact_mut(SECTOR as usize);
        range.clone().zip(parts).for_each(|(sector, part)| fill(sector, version, part));
    }

    /// The change was replied to; with `fua` it is promised at once.
    pub fn end(&self, range: &Range<u64>, fua: bool) {
        let mut state = self.state();
        let now = state.tick();
        state.seen.changes += 1;
        state.release(range, |_, sector| {
            let last = sector.versions.last_mut().unwrap();
            last.replied = Some(now);
            last.promised |= fua;
        });
    }

    /// A read is about to be sent.
    pub fn begin_read(&self, range: &Range<u64>) -> bool {
        self.state().claim(range)
    }

    /// What a read brought: the latest version of every sector.
    pub fn end_read(&self, range: &Range<u64>, bytes: &[u8]) -> Result<(), String> {
        let mut state = self.state();
        state.seen.reads += 1;
        let mut result = Ok(());
        state.release(range, |number, sector| {
            let at = ((number - range.start) * SECTOR) as usize;
            let found = sector.find(number, &bytes[at..at + SECTOR as usize], u64::MAX);
            if let Err(error) = found {
                result = Err(format!("read while serving: {error}"));
            }
        });
        result
    }

    /// A flush is about to be sent.
    pub fn begin_flush(&self) -> u64 {
        self.state().tick()
    }

    /// The flush of [`History::begin_flush`] has returned.
    pub fn end_flush(&self, sent: u64) {
        let mut state = self.state();
        state.promise = state.promise.max(sent);
        state.seen.flushes += 1;
    }

    /// A clean close has returned: everything replied to is promised.
    pub fn closed(&self) {
        let mut state = self.state();
        state.promise = state.tick();
    }

    /// Now, to be compared with a copy that is being made.
    pub fn hold(&self) -> Mark {
        let mut state = self.state();
        state.held += 1;
        Mark { now: state.tick(), promise: state.promise }
    }

    /// What a view that was made since the mark shows: all that was replied to before, and perhaps
    /// what came since.
    pub fn view(&self, mark: Mark) -> Self {
        self.since(mark, mark.now)
    }

    /// What a crash since the mark may have left.
    pub fn crash(&self, mark: Mark) -> Self {
        self.since(mark, mark.promise)
    }

    fn since(&self, mark: Mark, promise: u64) -> Self {
        let mut state = self.state();
        state.held -= 1;
        let mut then = state.clone();
        // What was promised since may have come too late.
        for version in then.sectors.values_mut().flat_map(|sector| &mut sector.versions) {
            version.promised &= version.replied < Some(mark.now);
        }
        (then.promise, then.held) = (promise, 0);
        Self(Mutex::new(then))
    }

    /// The ranges that were ever touched, in pieces of at most `most` sectors.
    pub fn touched(&self, most: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for &number in self.state().sectors.keys() {
            match ranges.last_mut() {
                Some(last) if last.end == number && last.end - last.start < most => last.end += 1,
                _ => ranges.push(number..number + 1),
            }
        }
        ranges
    }

    /// What a range shows after a crash: nobody has a request under way any more. From now on it is
    /// all that may show.
    pub fn settle(&self, range: &Range<u64>, bytes: &[u8]) -> Result<(), String> {
        let mut state = self.state();
        let State { promise, sectors, seen, .. } = &mut *state;
        for (&number, sector) in sectors.range_mut(range.clone()) {
            let at = ((number - range.start) * SECTOR) as usize;
            let found = sector.find(number, &bytes[at..at + SECTOR as usize], *promise)?;
            match sector.versions.last().unwrap() {
                last if last.replied == Some(0) => {}
                last if last.sent == found.sent => seen.kept += 1,
                _ => seen.undone += 1,
            }
            sector.versions = vec![Version { replied: Some(0), promised: true, ..found }];
            sector.busy = false;
        }
        Ok(())
    }

    /// What has come of the requests so far.
    pub fn seen(&self) -> Seen {
        self.state().seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_or_fua_takes_older_versions_away() {
        let bytes = |version| {
            let mut bytes = Vec::new();
            History::content(&(0..1), version, &mut bytes);
            bytes
        };
        let write = |history: &History, fua| {
            let version = history.begin(&(0..1), false).unwrap();
            history.end(&(0..1), fua);
            bytes(version)
        };
        let shows = |history: &History, bytes: &[u8]| {
            let copy = History(Mutex::new(history.state().clone()));
            copy.settle(&(0..1), bytes).is_ok()
        };
        let history = History::default();
        let first = write(&history, false);
        assert!(shows(&history, &first) && shows(&history, &[0; 512]));
        let flush = history.begin_flush();
        let second = write(&history, false);
        assert!(shows(&history, &[0; 512]));
        history.end_flush(flush);
        assert!(shows(&history, &first) && shows(&history, &second) && !shows(&history, &[0; 512]));
        assert!(history.begin_read(&(0..1)));
        assert!(history.end_read(&(0..1), &first).is_err());
        let third = write(&history, true);
        assert!(!shows(&history, &second) && shows(&history, &third));
        let mark = history.hold();
        let fourth = write(&history, true);
        let view = history.view(mark);
        assert!(shows(&view, &third) && shows(&view, &fourth) && !shows(&view, &second));
        assert!(!shows(&history, &third));
        let sent = history.begin(&(0..1), true).unwrap();
        assert!(history.begin(&(0..1), true).is_none() && !history.begin_read(&(0..1)));
        assert!(shows(&history, &[0; 512]) && !shows(&history, &bytes(sent)));
        history.settle(&(0..1), &fourth).unwrap();
        assert!(!shows(&history, &[0; 512]));
    }
}

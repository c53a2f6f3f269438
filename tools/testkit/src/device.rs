//! An in-memory device whose calls can be held, failed and counted, so that tests assert order and
//! concurrency without relying on time.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use thinply::device::{Detail, Device, Disk, Extent, Prefetch, ZeroMode, check_range, push_extent};
use thinply::error::{Error, ErrorKind, Result};
use thinply::memory::{Gather, Scatter};
use thinply::wait::{Attempt, NotDone, Wait};

const BLOCK: u64 = 4096;
/// A wait this long means that the test has failed.
const TOO_LONG: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// The call that may not wait; holding it holds the caller's own thread.
    TryRead,
    Read,
    Write,
    Zero,
    Trim,
    Flush,
    Extents,
    Prefetch,
    /// Of the disk, by its last user.
    Close,
}

#[derive(Default)]
struct State {
    blocks: BTreeMap<u64, Vec<u8>>,
    held: HashMap<Op, bool>,
    entered: HashMap<Op, usize>,
    faults: HashMap<Op, ErrorKind>,
    panics: Vec<Op>,
    last_zero: Option<ZeroMode>,
    /// Writes that returned, and how many of them the last finished flush covers.
    written: usize,
    durable: usize,
}

/// Claims any size and keeps what was written. Everything else is a hole.
pub struct TestDevice {
    size: u64,
    read_only: bool,
    /// Nothing is served without waiting.
    cold: bool,
    /// It can't be told in advance what will be read.
    untold: bool,
    /// Every other block claims to be a hole, wherever nothing was written.
    striped: bool,
    state: Mutex<State>,
    changed: Condvar,
}

impl TestDevice {
    pub fn new(size: u64) -> Self {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { size, read_only: false, cold: false, untold: false, striped: false, state, changed }
    }

    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    pub fn cold(self) -> Self {
        Self { cold: true, ..self }
    }

    pub fn untold(self) -> Self {
        Self { untold: true, ..self }
    }

    pub fn striped(self) -> Self {
        Self { striped: true, ..self }
    }

    /// Has calls of `op` wait from now on.
    pub fn hold(&self, op: Op) {
        self.state.lock().unwrap().held.insert(op, true);
    }

    /// Lets calls of `op` go on.
    pub fn release(&self, op: Op) {
        self.state.lock().unwrap().held.insert(op, false);
        self.changed.notify_all();
    }

    /// Has calls of `op` fail with `kind` from now on.
    pub fn fail(&self, op: Op, kind: ErrorKind) {
        self.state.lock().unwrap().faults.insert(op, kind);
    }

    /// Has calls of `op` succeed again.
    pub fn mend(&self, op: Op) {
        self.state.lock().unwrap().faults.remove(&op);
    }

    /// Has calls of `op` panic from now on.
    pub fn panic(&self, op: Op) {
        self.state.lock().unwrap().panics.push(op);
    }

    /// Waits until `count` calls of `op` have begun.
    pub fn wait_for(&self, op: Op, count: usize) {
        let state = self.state.lock().unwrap();
        let begun = |state: &mut State| state.entered.get(&op).copied().unwrap_or(0) < count;
        let waited = self.changed.wait_timeout_while(state, TOO_LONG, begun).unwrap();
        assert!(!waited.1.timed_out(), "no {count} calls of {op:?}");
    }

    /// How many calls of `op` have begun.
    pub fn count(&self, op: Op) -> usize {
        self.state.lock().unwrap().entered.get(&op).copied().unwrap_or(0)
    }

    /// How many writes a finished flush covers.
    pub fn durable_writes(&self) -> usize {
        self.state.lock().unwrap().durable
    }

    /// The mode of the last zero call that was not refused.
    pub fn last_zero(&self) -> Option<ZeroMode> {
        self.state.lock().unwrap().last_zero
    }

    fn enter(&self, op: Op) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        *state.entered.entry(op).or_default() += 1;
        self.changed.notify_all();
        let held = |state: &mut State| state.held.get(&op).copied().unwrap_or(false);
        state = self.changed.wait_while(state, held).unwrap();
        let panics = state.panics.contains(&op);
        let fault = state.faults.get(&op).copied();
        drop(state);
        assert!(!panics, "planned to panic in {op:?}");
        match fault {
            Some(kind) => Err(Error::new(kind, format!("planned to fail {op:?}"))),
            None => Ok(()),
        }
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) {
        let state = self.state.lock().unwrap();
        for (block, at, range) in pieces(offset, buf.len()) {
            let part = &mut buf[range];
            match state.blocks.get(&block) {
                Some(bytes) => part.copy_from_slice(&bytes[at..at + part.len()]),
                None => part.fill(0),
            }
        }
    }

    fn store(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock().unwrap();
        for (block, at, range) in pieces(offset, data.len()) {
            let part = &data[range];
            let bytes = state.blocks.entry(block).or_insert_with(|| vec![0; BLOCK as usize]);
            bytes[at..at + part.len()].copy_from_slice(part);
        }
    }
}

/// Cuts a range into blocks: the block, where in it, and which bytes of the range.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let inside = (at % BLOCK) as usize;
        let end = length.min(done + BLOCK as usize - inside);
        let range = done..end;
        done = end;
        (!range.is_empty()).then_some((at / BLOCK, inside, range))
    })
}

impl Disk for TestDevice {
    fn close(&self) -> Result<()> {
        self.enter(Op::Close)
    }
}

impl Device for TestDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn try_read(&self, offset: u64, mut into: Scatter<'_>, wait: Wait) -> Attempt {
        check_range(self.size, offset, into.len() as u64)?;
        let mut bytes = vec![0xee; into.len()];
        if wait == Wait::Allowed {
            self.enter(Op::Read)?;
        } else {
            self.enter(Op::TryRead)?;
            if self.cold {
                into.copy_from(&bytes);
                return Err(NotDone::WouldWait);
            }
            if let Some(&kind) = self.state.lock().unwrap().faults.get(&Op::Read) {
                return Err(Error::new(kind, "planned to fail").into());
            }
        }
        self.fill(offset, &mut bytes);
        into.copy_from(&bytes);
        Ok(())
    }

    fn try_write(&self, offset: u64, from: Gather<'_>, wait: Wait) -> Result<u64> {
        if self.cold && wait != Wait::Allowed {
            return Ok(0);
        }
        check_range(self.size, offset, from.len() as u64)?;
        assert!(!self.read_only, "a write reached a read-only device");
        self.enter(Op::Write)?;
        let mut data = vec![0; from.len()];
        from.copy_to(&mut data);
        self.store(offset, &data);
        self.state.lock().unwrap().written += 1;
        Ok(data.len() as u64)
    }

    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        check_range(self.size, offset, length)?;
        assert!(!self.read_only, "a zero reached a read-only device");
        self.enter(Op::Zero)?;
        if mode.fast_only {
            return Err(Error::new(ErrorKind::Unsupported, "not fast here"));
        }
        self.store(offset, &vec![0; length as usize]);
        self.state.lock().unwrap().last_zero = Some(mode);
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> Result<()> {
        check_range(self.size, offset, length)?;
        assert!(!self.read_only, "a trim reached a read-only device");
        self.enter(Op::Trim)?;
        let whole = offset.div_ceil(BLOCK)..(offset + length) / BLOCK;
        if !whole.is_empty() {
            self.state.lock().unwrap().blocks.retain(|block, _| !whole.contains(block));
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let covered = self.state.lock().unwrap().written;
        self.enter(Op::Flush)?;
        self.state.lock().unwrap().durable = covered;
        Ok(())
    }

    fn try_extents(
        &self,
        offset: u64,
        length: u64,
        detail: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
        _: Wait,
    ) -> Attempt {
        check_range(self.size, offset, length)?;
        if detail == Detail::Files {
            self.enter(Op::Extents)?;
        }
        let state = self.state.lock().unwrap();
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let block = at / BLOCK;
            let (hole, next) = if state.blocks.contains_key(&block) {
                (false, block + 1)
            } else if self.striped {
                (block % 2 == 1, block + 1)
            } else {
                let next = state.blocks.range(block..).next();
                (true, next.map_or(u64::MAX / BLOCK, |(&next, _)| next))
            };
            let next = next.saturating_mul(BLOCK).min(end);
            if !push_extent(out, limit, Extent { length: next - at, hole }) {
                break;
            }
            at = next;
        }
        Ok(())
    }

    fn prefetch(&self, offset: u64, length: u64) -> Result<Prefetch> {
        check_range(self.size, offset, length)?;
        self.enter(Op::Prefetch)?;
        Ok(if self.untold { Prefetch::InPart } else { Prefetch::All })
    }
}

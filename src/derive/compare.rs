//! Comparing two disks, on all processors.

use std::ops::ControlFlow;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use super::pair::{BUFFER, Content, PIECE, Pair, Run, fill};
use crate::chain::Kind;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Buffer;
use crate::sync::{Mutex, guard};

/// Where two disks stop being the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// The first byte that differs.
    Content(u64),
    /// The first byte that a layer owns in one disk and none in the other.
    Allocation(u64),
    /// The sizes.
    Size,
}

/// What counts as the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The same bytes, with zeros beyond the end of the shorter disk.
    Content,
    /// The same size too, and the same ranges that some layer owns.
    Strict,
}

/// The first mismatch of two disks; none where they are the same. `progress` is told how many bytes
/// are done, by several threads.
///
/// # Errors
/// Those of reading either disk.
pub fn compare(
    a: &dyn Content,
    b: &dyn Content,
    rule: Rule,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Option<Mismatch>> {
    if rule == Rule::Strict && a.length() != b.length() {
        return Ok(Some(Mismatch::Size));
    }
    let search = Search {
        pair: Pair::new(a, b),
        rule,
        size: a.length().max(b.length()),
        next: Mutex::new(0),
        limit: AtomicU64::new(u64::MAX),
        found: Mutex::new(None),
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let searched: Result<()> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| search.work(progress))).collect();
        let panicked = |_| Err(Error::new(ErrorKind::Io, "a comparing thread panicked"));
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(panicked))
    });
    searched?;
    Ok(search.found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

struct Search<'a> {
    pair: Pair<'a>,
    rule: Rule,
    size: u64,
    /// Where the next piece begins.
    next: Mutex<u64>,
    /// Nothing from here on matters any more: the first mismatch is before it.
    limit: AtomicU64,
    found: Mutex<Option<Mismatch>>,
}

impl Search<'_> {
    /// Compares pieces until there are none left before the first mismatch.
    fn work(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        let mut buffers = [Buffer::default(), Buffer::default()];
        while let Some((from, to)) = self.piece()? {
            let compared = self.pair.runs(from, to, self.rule == Rule::Strict, &mut |run| {
                let mismatch = self.compare(run, &mut buffers)?;
                if let Some((offset, mismatch)) = mismatch {
                    self.found(offset, mismatch);
                }
                Ok(match mismatch {
                    Some(_) => ControlFlow::Break(()),
                    None => ControlFlow::Continue(()),
                })
            });
            // The other threads need not go on either.
            compared.inspect_err(|_| self.limit.store(0, Ordering::Relaxed))?;
            progress(to);
        }
        Ok(())
    }

    fn piece(&self) -> Result<Option<(u64, u64)>> {
        let mut next = guard(&self.next);
        let from = self.pair.next(*next)?.min(self.size);
        if from >= self.limit.load(Ordering::Relaxed).min(self.size) {
            return Ok(None);
        }
        *next = self.size.min((from / PIECE + 1) * PIECE);
        Ok(Some((from, *next)))
    }

    fn found(&self, offset: u64, mismatch: Mismatch) {
        let mut found = guard(&self.found);
        if offset < self.limit.fetch_min(offset, Ordering::Relaxed) {
            *found = Some(mismatch);
        }
    }

    fn compare(&self, run: Run, [a, b]: &mut [Buffer; 2]) -> Result<Option<(u64, Mismatch)>> {
        let owned = [run.a, run.b].map(|kind| kind != Kind::Absent);
        if self.rule == Rule::Strict && owned[0] != owned[1] {
            return Ok(Some((run.offset, Mismatch::Allocation(run.offset))));
        }
        if run.a != Kind::Data && run.b != Kind::Data {
            return Ok(None);
        }
        let (mut at, end) = (run.offset, run.offset + run.length);
        while at < end {
            let length = (end - at).min(BUFFER) as usize;
            a.set_length(length);
            b.set_length(length);
            fill(self.pair.a, run.a, at, a)?;
            fill(self.pair.b, run.b, at, b)?;
            if **a != **b {
                let place = a.iter().zip(b.iter()).position(|(a, b)| a != b).unwrap_or(0);
                let offset = at + place as u64;
                return Ok(Some((offset, Mismatch::Content(offset))));
            }
            at += length as u64;
        }
        Ok(None)
    }
}

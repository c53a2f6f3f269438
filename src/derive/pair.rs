//! Two disks side by side: where their maps leave open whether they read the same.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::chain::{Chain, Kind, MapExtent};
use crate::device::{Detail, Device};
use crate::error::Result;
use crate::storage::{Storage, failed, read_exact_at};
use crate::types::Identity;

/// Bytes of both disks that are looked at in one go; a whole number of blocks.
pub(super) const PIECE: u64 = 16 << 20;
/// Bytes that are read of each disk at a time: both fit a processor's own cache, or nearly.
pub(super) const BUFFER: u64 = 1 << 20;

/// A disk that keeps still while it is compared.
pub trait Content: Sync {
    /// Size in bytes.
    fn length(&self) -> u64;

    /// The layers' identities by depth, none for those that may change.
    fn owners(&self) -> Vec<Option<Identity>>;

    /// Where the first byte at or after `offset` may stand that is not [`Kind::Absent`]; the size
    /// where there is none. A whole number of blocks, or the size.
    fn next(&self, offset: u64) -> Result<u64>;

    /// Appends the extents of a range, in order.
    fn extents(&self, offset: u64, length: u64, out: &mut Vec<MapExtent>) -> Result<()>;

    /// Fills `buf` from `offset`.
    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
}

impl Content for Chain {
    fn length(&self) -> u64 {
        self.size()
    }

    fn owners(&self) -> Vec<Option<Identity>> {
        self.identities()
    }

    fn next(&self, offset: u64) -> Result<u64> {
        self.skip_absent(offset)
    }

    fn extents(&self, offset: u64, length: u64, out: &mut Vec<MapExtent>) -> Result<()> {
        self.map(offset, length, Detail::Files, &mut |extent| {
            out.push(extent);
            ControlFlow::Continue(())
        })
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read(offset, buf)
    }
}

/// A raw file: its bytes are the disk's. A hole in it is what no layer owns.
#[derive(Debug)]
pub struct Raw {
    file: Arc<dyn Storage>,
    length: u64,
}

impl Raw {
    /// The disk that a file holds.
    ///
    /// # Errors
    /// Host errors.
    pub fn new(file: Arc<dyn Storage>) -> Result<Self> {
        let length = file.length().map_err(failed(&*file, "reading the length", 0))?;
        Ok(Self { file, length })
    }
}

impl Content for Raw {
    fn length(&self) -> u64 {
        self.length
    }

    fn owners(&self) -> Vec<Option<Identity>> {
        Vec::new()
    }

    fn next(&self, offset: u64) -> Result<u64> {
        let data =
            self.file.next_data(offset).map_err(failed(&*self.file, "looking for data", offset))?;
        // Some file systems hold less than a block of ours.
        Ok(data.map_or(self.length, |data| (data / PIECE * PIECE).max(offset)).min(self.length))
    }

    fn extents(&self, offset: u64, length: u64, out: &mut Vec<MapExtent>) -> Result<()> {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let fail = || failed(&*self.file, "looking for holes", at);
            let data = self.file.next_data(at).map_err(fail())?;
            let (kind, next) = match data {
                Some(data) if data <= at => {
                    (Kind::Data, self.file.next_hole(at).map_err(fail())?.max(at + 1))
                }
                Some(data) => (Kind::Absent, data),
                None => (Kind::Absent, end),
            };
            let length = next.min(end) - at;
            out.push(MapExtent { offset: at, length, depth: None, kind });
            at += length;
        }
        Ok(())
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        read_exact_at(&*self.file, buf, offset).map_err(failed(&*self.file, "reading", offset))
    }
}

/// A range in which the disks may read differently.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub offset: u64,
    pub length: u64,
    /// What the first disk has there.
    pub a: Kind,
    /// The depth of the layer that it has it in.
    pub depth: Option<usize>,
    /// What the second one has.
    pub b: Kind,
}

impl Run {
    fn continues_with(&self, next: &Self) -> bool {
        self.offset + self.length == next.offset
            && (self.a, self.depth, self.b) == (next.a, next.depth, next.b)
    }
}

/// Two disks. The shorter one reads as zeros beyond its end.
pub(super) struct Pair<'a> {
    pub a: &'a dyn Content,
    pub b: &'a dyn Content,
    /// The depth in `b` of each layer of `a` that both have.
    shared: Vec<Option<usize>>,
}

impl<'a> Pair<'a> {
    pub fn new(a: &'a dyn Content, b: &'a dyn Content) -> Self {
        let others = b.owners();
        let place = |owner: Option<Identity>| {
            owner.and_then(|owner| others.iter().position(|other| *other == Some(owner)))
        };
        let shared = a.owners().into_iter().map(place).collect();
        Self { a, b, shared }
    }

    /// Where the first byte at or after `offset` may stand that is not absent in both.
    pub fn next(&self, offset: u64) -> Result<u64> {
        let next = |disk: &dyn Content| match disk.length() {
            length if offset >= length => Ok(u64::MAX),
            length => disk.next(offset).map(|at| if at == length { u64::MAX } else { at }),
        };
        Ok(next(self.a)?.min(next(self.b)?))
    }

    /// Hands the runs of a range to `visit` in order, until it breaks off: those that no
    /// layer answers for in both disks alike, and that may differ in content or, with `zeros`, only
    /// in whether a layer owns them.
    pub fn runs(
        &self,
        from: u64,
        to: u64,
        zeros: bool,
        visit: &mut dyn FnMut(Run) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let (a, b) = (extents(self.a, from, to)?, extents(self.b, from, to)?);
        let mut pending: Option<Run> = None;
        let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
        let mut at = from;
        while let (Some(one), Some(other)) = (a.peek(), b.peek()) {
            let ends = (one.offset + one.length, other.offset + other.length);
            let end = ends.0.min(ends.1);
            let (length, depth) = (end - at, one.depth);
            let run = Run { offset: at, length, a: one.kind, depth, b: other.kind };
            let same = one.depth.is_some_and(|depth| {
                other.depth.is_some() && self.shared.get(depth).copied().flatten() == other.depth
            });
            let open = zeros && run.a != run.b;
            if !same && (open || run.a == Kind::Data || run.b == Kind::Data) {
                match &mut pending {
                    Some(last) if last.continues_with(&run) => last.length += run.length,
                    pending => {
                        if let Some(run) = pending.replace(run)
                            && visit(run)?.is_break()
                        {
                            return Ok(());
                        }
                    }
                }
            }
            at = end;
            a.next_if(|_| ends.0 == end);
            b.next_if(|_| ends.1 == end);
        }
        pending.map_or(Ok(ControlFlow::Continue(())), visit).map(drop)
    }
}

/// The extents of a disk from `from` to `to`, with what is beyond its end as absent.
fn extents(disk: &dyn Content, from: u64, to: u64) -> Result<Vec<MapExtent>> {
    let mut found = Vec::new();
    let end = disk.length().clamp(from, to);
    if from < end {
        disk.extents(from, end - from, &mut found)?;
    }
    if end < to {
        found.push(MapExtent { offset: end, length: to - end, depth: None, kind: Kind::Absent });
    }
    Ok(found)
}

/// Fills `buf` from a disk; zeros where the map says so or beyond its end.
pub(super) fn fill(disk: &dyn Content, kind: Kind, offset: u64, buf: &mut [u8]) -> Result<()> {
    let inside = match kind {
        Kind::Data => disk.length().saturating_sub(offset).min(buf.len() as u64),
        Kind::Absent | Kind::Zero => 0,
    };
    let (data, rest) = buf.split_at_mut(inside as usize);
    rest.fill(0);
    if data.is_empty() { Ok(()) } else { disk.fill(offset, data) }
}

//! Who owns what: the extents of a chain with their layers and holes.

use std::ops::ControlFlow;

use super::Chain;
use super::layer::Layer;
use super::walk::{Owner, Piece};
use crate::device::{Detail, Device, check_range};
use crate::error::Result;
use crate::format::geometry::word_offset;
use crate::storage::{Storage, failed};
use crate::types::{BLOCK_SIZE, GROUP_BYTES, Group, WORD_BYTES, Word};
use crate::wait::{Attempt, NotDone, Wait, waited};

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No layer owns it; reads as zeros.
    Absent,
    /// A layer owns it and gave its space back; reads as zeros.
    Zero,
    /// A layer owns it, and its file holds bytes there.
    Data,
}

/// A range of the device with one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapExtent {
    /// Guest offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The owner's depth: 0 is the top. `None` where nobody owns the range.
    pub depth: Option<usize>,
    /// What it holds.
    pub kind: Kind,
}

impl Chain {
    /// Hands the extents of a range to `visit` in order, neighbours that say the same joined, until
    /// it breaks off. [`Kind::Zero`] is found only under [`Detail::Files`].
    pub fn map(
        &self,
        offset: u64,
        length: u64,
        detail: Detail,
        visit: &mut dyn FnMut(MapExtent) -> ControlFlow<()>,
    ) -> Result<()> {
        waited(self.try_map(offset, length, detail, Wait::Allowed, visit))
    }

    /// [`Chain::map`] that may not wait unless `wait` says so.
    pub(super) fn try_map(
        &self,
        offset: u64,
        length: u64,
        detail: Detail,
        wait: Wait,
        visit: &mut dyn FnMut(MapExtent) -> ControlFlow<()>,
    ) -> Attempt {
        // Where holes are, the file system may have to look up on the disk.
        if detail == Detail::Files && wait != Wait::Allowed {
            return Err(NotDone::WouldWait);
        }
        let levels = self.levels();
        check_range(levels.size, offset, length)?;
        let base = usize::from(levels.top.is_some());
        let mut mapping = Mapping { holes: Holes::default(), detail, pending: None, visit };
        for piece in levels.walk(offset, length, wait) {
            if mapping.piece(&piece?, base, wait)?.is_break() {
                return Ok(());
            }
        }
        mapping.finish();
        Ok(())
    }
}

impl Chain {
    /// Where the first block at or after `offset` may stand that any layer owns; the device's size
    /// where there is none. One look-up skips the emptiest disk, but only where nothing is written:
    /// what an open top owns may be known in memory alone, so there the answer is `offset`.
    pub fn skip_absent(&self, offset: u64) -> Result<u64> {
        let levels = self.levels();
        if levels.top.is_some() {
            return Ok(offset);
        }
        let from = Word(offset / WORD_BYTES).group();
        let mut next: Option<Group> = None;
        for layer in levels.stack.iter().flat_map(|stack| stack.layers()) {
            next = next.into_iter().chain(layer.next_group(from)?).min();
        }
        let start = next.map_or(levels.size, |group| group.first_word().guest_offset());
        Ok(start.max(offset).min(levels.size))
    }
}

impl Chain {
    /// Hands all extents of a still chain to `visit`, in order, neighbours that say the same joined,
    /// however much of it is empty. `visit` may read.
    ///
    /// # Errors
    /// Host errors, and those of `visit`.
    pub fn walk(&self, visit: &mut dyn FnMut(MapExtent) -> Result<()>) -> Result<()> {
        let mut joined = Joined { pending: None, visit };
        let (size, mut at) = (self.size(), 0);
        while at < size {
            let next = self.skip_absent(at)?;
            joined.push(MapExtent {
                offset: at,
                length: next - at,
                depth: None,
                kind: Kind::Absent,
            })?;
            let end = size.min((next / GROUP_BYTES + 1) * GROUP_BYTES);
            let mut pushed = Ok(());
            self.map(next, end - next, Detail::Files, &mut |extent| {
                pushed = joined.push(extent);
                match pushed {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            })?;
            pushed?;
            at = end;
        }
        joined.pending.take().map_or(Ok(()), joined.visit)
    }
}

struct Joined<'a> {
    pending: Option<MapExtent>,
    visit: &'a mut dyn FnMut(MapExtent) -> Result<()>,
}

impl Joined<'_> {
    fn push(&mut self, extent: MapExtent) -> Result<()> {
        match &mut self.pending {
            _ if extent.length == 0 => Ok(()),
            Some(last) if last.depth == extent.depth && last.kind == extent.kind => {
                last.length += extent.length;
                Ok(())
            }
            pending => pending.replace(extent).map_or(Ok(()), &mut self.visit),
        }
    }
}

/// Pieces on their way to become extents.
struct Mapping<'a> {
    holes: Holes,
    detail: Detail,
    /// The extent that the next one may still continue.
    pending: Option<MapExtent>,
    visit: &'a mut dyn FnMut(MapExtent) -> ControlFlow<()>,
}

impl Mapping<'_> {
    fn push(
        &mut self,
        offset: u64,
        length: u64,
        depth: Option<usize>,
        kind: Kind,
    ) -> ControlFlow<()> {
        match &mut self.pending {
            Some(last) if last.depth == depth && last.kind == kind => {
                last.length += length;
                ControlFlow::Continue(())
            }
            pending => match pending.replace(MapExtent { offset, length, depth, kind }) {
                Some(done) => (self.visit)(done),
                None => ControlFlow::Continue(()),
            },
        }
    }

    fn finish(mut self) {
        if let Some(extent) = self.pending.take() {
            let _ = (self.visit)(extent);
        }
    }

    /// Maps a piece. The stack's first layer is at depth `base`.
    fn piece(&mut self, piece: &Piece<'_>, base: usize, wait: Wait) -> Attempt<ControlFlow<()>> {
        let depth = match piece.owner {
            Owner::Nobody => {
                return Ok(self.push(piece.offset(), piece.length(), None, Kind::Absent));
            }
            Owner::Top(_) => 0,
            Owner::Layer(place, _) => base + place,
        };
        if self.detail == Detail::Bitmaps {
            return Ok(self.push(piece.offset(), piece.length(), Some(depth), Kind::Data));
        }
        match piece.owner {
            Owner::Top(top) => Ok(self.in_file(top.file(), depth, piece)?),
            Owner::Layer(_, Layer::Live(layer)) => Ok(self.in_file(layer.file(), depth, piece)?),
            Owner::Layer(_, Layer::Packed(layer)) => {
                Ok(self.in_packed(layer.data(piece.word, wait)?, depth, piece))
            }
            Owner::Nobody => Ok(ControlFlow::Continue(())),
        }
    }

    /// A piece of a packed layer that has data for these blocks of the word.
    fn in_packed(&mut self, data: u64, depth: usize, piece: &Piece<'_>) -> ControlFlow<()> {
        let mut at = piece.from;
        while at < piece.to {
            let bit = at / BLOCK_SIZE;
            let (kind, same) = match data >> bit & 1 {
                1 => (Kind::Data, data >> bit),
                _ => (Kind::Zero, !data >> bit),
            };
            let end = piece.to.min((bit + u64::from(same.trailing_ones())) * BLOCK_SIZE);
            self.push(piece.word.guest_offset() + at, end - at, Some(depth), kind)?;
            at = end;
        }
        ControlFlow::Continue(())
    }

    /// A piece that stands in a live layer's file.
    fn in_file(
        &mut self,
        file: &dyn Storage,
        depth: usize,
        piece: &Piece<'_>,
    ) -> Result<ControlFlow<()>> {
        let (guest, host) = (piece.word.guest_offset(), word_offset(piece.word).0);
        let mut at = piece.from;
        while at < piece.to {
            let (end, hole) = self.holes.at(file, depth, host + at)?;
            let end = (end - host).min(piece.to);
            let kind = if hole { Kind::Zero } else { Kind::Data };
            if self.push(guest + at, end - at, Some(depth), kind).is_break() {
                return Ok(ControlFlow::Break(()));
            }
            at = end;
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// The extent of a layer's file that was looked up last: one look-up serves a long run of words.
#[derive(Default)]
struct Holes {
    known: Option<(usize, std::ops::Range<u64>, bool)>,
}

impl Holes {
    /// How far from `offset` the file goes on as it begins there, and whether that is a hole.
    fn at(&mut self, file: &dyn Storage, depth: usize, offset: u64) -> Result<(u64, bool)> {
        if let Some((of, range, hole)) = &self.known
            && *of == depth
            && range.contains(&offset)
        {
            return Ok((range.end, *hole));
        }
        let fail = || failed(file, "looking for holes", offset);
        let data = file.next_data(offset).map_err(fail())?;
        let (end, hole) = match data {
            Some(data) if data == offset => (file.next_hole(offset).map_err(fail())?, false),
            Some(data) => (data, true),
            None => (u64::MAX, true),
        };
        self.known = Some((depth, offset..end, hole));
        Ok((end, hole))
    }
}

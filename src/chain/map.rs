//! Who owns what: the extents of a chain with their layers and holes.

use super::layer::Layer;
use super::{Chain, Levels};
use crate::device::{Detail, Device, check_range};
use crate::error::Result;
use crate::format::geometry::word_offset;
use crate::live::words;
use crate::storage::{Storage, failed};
use crate::types::{BLOCK_SIZE, GROUP_BYTES, Group, WORD_BYTES, Word, touched};

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
    /// Hands the extents of a range to `visit` in order, neighbours that say the same joined, for
    /// as long as it answers true. [`Kind::Zero`] is found only under [`Detail::Files`].
    pub fn map(
        &self,
        offset: u64,
        length: u64,
        detail: Detail,
        visit: &mut dyn FnMut(MapExtent) -> bool,
    ) -> Result<()> {
        let levels = self.levels();
        check_range(levels.size, offset, length)?;
        let mut walk = Walk { holes: Holes::default(), detail, pending: None, visit };
        for (word, from, to) in words(offset, length) {
            if !levels.map_word(word, from, to, &mut walk)? {
                return Ok(());
            }
        }
        walk.finish();
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
                pushed.is_ok()
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

impl Levels {
    fn map_word(&self, word: Word, from: u64, to: u64, walk: &mut Walk<'_>) -> Result<bool> {
        let base = usize::from(self.top.is_some());
        self.split(word, from, to, |from, to, top| {
            if let Some(top) = top {
                return walk.owned(top.file(), 0, word, from, to);
            }
            self.view().runs(word, from, to, |run| match run.owner {
                Some((owner, layer)) => {
                    walk.layer(layer, base + usize::from(owner), word, run.from, run.to)
                }
                None => Ok(walk.push(
                    word.guest_offset() + run.from,
                    run.to - run.from,
                    None,
                    Kind::Absent,
                )),
            })
        })
    }

    /// Cuts bytes `from..to` of a word into those that the top owns and those that it doesn't, in
    /// order, for as long as `visit` answers true; false if it did not.
    pub(super) fn split<'a>(
        &'a self,
        word: Word,
        from: u64,
        to: u64,
        mut visit: impl FnMut(u64, u64, Option<&'a crate::live::Writable>) -> Result<bool>,
    ) -> Result<bool> {
        let Some(top) = &self.top else { return visit(from, to, None) };
        let mask = touched(from, to);
        let owned = top.owned(word)? & mask;
        let mut at = from;
        while at < to {
            let bit = at / BLOCK_SIZE;
            let here = owned >> bit & 1 == 1;
            let same = if here { owned >> bit } else { !owned >> bit };
            let end = to.min((bit + u64::from(same.trailing_ones())) * BLOCK_SIZE);
            if !visit(at, end, here.then_some(top))? {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }
}

struct Walk<'a> {
    holes: Holes,
    detail: Detail,
    /// The extent that the next one may still continue.
    pending: Option<MapExtent>,
    visit: &'a mut dyn FnMut(MapExtent) -> bool,
}

impl Walk<'_> {
    fn push(&mut self, offset: u64, length: u64, depth: Option<usize>, kind: Kind) -> bool {
        match &mut self.pending {
            Some(last) if last.depth == depth && last.kind == kind => {
                last.length += length;
                true
            }
            pending => {
                let done = pending.replace(MapExtent { offset, length, depth, kind });
                done.is_none_or(|extent| (self.visit)(extent))
            }
        }
    }

    fn finish(mut self) {
        if let Some(extent) = self.pending.take() {
            (self.visit)(extent);
        }
    }

    /// A run that a sealed layer owns.
    fn layer(
        &mut self,
        layer: &Layer,
        depth: usize,
        word: Word,
        from: u64,
        to: u64,
    ) -> Result<bool> {
        let packed = match layer {
            Layer::Packed(packed) if self.detail == Detail::Files => packed,
            _ => return self.owned(layer.file(), depth, word, from, to),
        };
        let data = packed.data(word)?;
        let mut at = from;
        while at < to {
            let bit = at / BLOCK_SIZE;
            let (kind, same) = match data >> bit & 1 {
                1 => (Kind::Data, data >> bit),
                _ => (Kind::Zero, !data >> bit),
            };
            let end = to.min((bit + u64::from(same.trailing_ones())) * BLOCK_SIZE);
            if !self.push(word.guest_offset() + at, end - at, Some(depth), kind) {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    /// A run that stands in a live layer's file.
    fn owned(
        &mut self,
        file: &dyn Storage,
        depth: usize,
        word: Word,
        from: u64,
        to: u64,
    ) -> Result<bool> {
        let (guest, host) = (word.guest_offset(), word_offset(word).0);
        if self.detail == Detail::Bitmaps {
            return Ok(self.push(guest + from, to - from, Some(depth), Kind::Data));
        }
        let mut at = from;
        while at < to {
            let (end, hole) = self.holes.at(file, depth, host + at)?;
            let end = (end - host).min(to);
            let kind = if hole { Kind::Zero } else { Kind::Data };
            if !self.push(guest + at, end - at, Some(depth), kind) {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
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

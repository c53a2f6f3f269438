//! The chain as a block device.

use std::ops::ControlFlow;

use super::layer::{Layer, prefetch};
use super::map::Kind;
use super::walk::{Owner, Walk};
use super::{Chain, Levels};
use crate::device::{
    Detail, Device, Disk, Extent, Facts, HostRange, Prefetch, ZeroMode, check_range, push_extent,
};
use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::word_offset;
use crate::live::{Under, Writable, ZeroKind};
use crate::memory::{Gather, Scatter};
use crate::storage::{Storage, read_blocks};
use crate::types::{BLOCK_SIZE, Block};
use crate::wait::{Attempt, Wait, unless_waiting, waited};

/// Bytes that are allocated before others get their turn.
const ALLOCATED_AT_A_TIME: usize = 16 << 20;

impl Levels {
    /// Who answers for the bytes of a range that lies inside the device.
    pub(super) fn walk(&self, offset: u64, length: u64, wait: Wait) -> Walk<'_> {
        Walk::new(self.top.as_ref(), self.view(), offset, length, wait)
    }

    fn read(&self, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        check_range(self.size, offset, into.len() as u64)?;
        self.walk(offset, into.len() as u64, wait).read(into)
    }

    /// The bytes of a range as they stand side by side in one live layer's file, if both ends are in
    /// the page cache.
    fn host_range(&self, offset: u64, length: u64) -> Attempt<Option<HostRange>> {
        check_range(self.size, offset, length)?;
        let mut found: Option<(&dyn Storage, u64, u64)> = None;
        for piece in self.walk(offset, length, Wait::Never) {
            let piece = piece?;
            let file = match piece.owner {
                Owner::Top(top) => top.file(),
                Owner::Layer(_, Layer::Live(layer)) => layer.file(),
                _ => return Ok(None),
            };
            let at = word_offset(piece.word).0 + piece.from;
            let start = match found {
                None => at,
                Some((known, start, end)) if std::ptr::addr_eq(known, file) && at == end => start,
                Some(_) => return Ok(None),
            };
            found = Some((file, start, at + piece.length()));
        }
        let Some((file, start, end)) = found else { return Ok(None) };
        let Some(descriptor) = file.descriptor() else { return Ok(None) };
        for at in [start, end - 1] {
            read_blocks(file, at, (&mut [0]).into(), Wait::Never)?;
        }
        // Out of descriptors, the bytes are copied.
        let file = descriptor.try_clone_to_owned().ok();
        Ok(file.map(|file| HostRange { file, offset: start }))
    }

    fn write(&self, offset: u64, from: Gather<'_>, wait: Wait) -> Result<u64> {
        let top = self.top()?;
        check_range(self.size, offset, from.len() as u64)?;
        top.write(offset, from, &self.view(), wait)
    }

    /// The whole blocks of a range, with the device's last block counted as whole: `first..end` in
    /// bytes, empty where there is none.
    fn whole_blocks(&self, offset: u64, length: u64) -> (u64, u64) {
        let end = offset + length;
        let first = offset.next_multiple_of(BLOCK_SIZE);
        let end = if end == self.size {
            end.next_multiple_of(BLOCK_SIZE)
        } else {
            end / BLOCK_SIZE * BLOCK_SIZE
        };
        (first, end.max(first))
    }

    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        let top = self.top()?;
        check_range(self.size, offset, length)?;
        let (first, end) = self.whole_blocks(offset, length);
        let stop = offset + length;
        let exact = offset == first && stop <= end;
        if mode.fast_only && (mode.allocate || !exact) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "zeroing parts of blocks, or with space allocated, is no faster than writing",
            ));
        }
        let kind = if mode.allocate { ZeroKind::Allocate } else { ZeroKind::Punch };
        if first >= stop {
            return self.zero_part(top, offset, stop, kind);
        }
        self.zero_part(top, offset, first, kind)?;
        top.zero_blocks(first, end - first, kind, &self.view())?;
        self.zero_part(top, end.min(stop), stop, kind)
    }

    fn allocate(&self, offset: u64, length: u64) -> Result<()> {
        let top = self.top()?;
        check_range(self.size, offset, length)?;
        top.allocate_blocks(offset, length, &self.view())
    }

    /// Writes zeros over bytes that begin and end in the middle of blocks, unless they are zeros
    /// already because nobody owns the block.
    fn zero_part(&self, top: &Writable, from: u64, to: u64, kind: ZeroKind) -> Result<()> {
        let mut at = from;
        while at < to {
            let block = Block(at / BLOCK_SIZE);
            let end = to.min((block.0 + 1) * BLOCK_SIZE);
            let (view, word) = (self.view(), block.word());
            let owned =
                waited(top.owned(word, Wait::Allowed))? | waited(view.owned(word, Wait::Allowed))?;
            if kind == ZeroKind::Allocate || owned & block.mask() != 0 {
                let zeros = vec![0; (end - at) as usize];
                top.write(at, (&zeros).into(), &view, Wait::Allowed)?;
            }
            at = end;
        }
        Ok(())
    }
}

impl Device for Chain {
    fn size(&self) -> u64 {
        self.levels().size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn try_read(&self, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        self.levels().read(offset, into, wait)
    }

    fn host_range(&self, offset: u64, length: u64) -> Result<Option<HostRange>> {
        Ok(unless_waiting(self.levels().host_range(offset, length))?.flatten())
    }

    fn try_write(&self, offset: u64, from: Gather<'_>, wait: Wait) -> Result<u64> {
        self.levels().write(offset, from, wait)
    }

    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        self.levels().zero(offset, length, mode)
    }

    fn trim(&self, offset: u64, length: u64) -> Result<()> {
        let levels = self.levels();
        let top = levels.top()?;
        check_range(levels.size, offset, length)?;
        let (first, end) = levels.whole_blocks(offset, length);
        top.zero_blocks(first, end - first, ZeroKind::Punch, &levels.view())
    }

    fn allocate(&self, offset: u64, length: u64) -> Result<()> {
        self.levels().top()?;
        check_range(self.size(), offset, length)?;
        let end = offset + length;
        // Each with the levels for itself: who changes those need not wait for all of a long copy-up.
        for at in (offset..end).step_by(ALLOCATED_AT_A_TIME) {
            let part = (end - at).min(ALLOCATED_AT_A_TIME as u64);
            self.levels().allocate(at, part)?;
        }
        self.levels().top()?.settle_blocks()
    }

    fn flush(&self) -> Result<()> {
        // Nothing to make durable where nothing can be written.
        self.levels().top.as_ref().map_or(Ok(()), Writable::flush)
    }

    fn try_extents(
        &self,
        offset: u64,
        length: u64,
        detail: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
        wait: Wait,
    ) -> Attempt {
        self.try_map(offset, length, detail, wait, &mut |extent| {
            let hole = extent.kind != Kind::Data;
            match push_extent(out, limit, Extent { length: extent.length, hole }) {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        })
    }

    fn prefetch(&self, offset: u64, length: u64) -> Result<Prefetch> {
        let levels = self.levels();
        check_range(levels.size, offset, length)?;
        let mut begun = Prefetch::All;
        for piece in levels.walk(offset, length, Wait::Allowed) {
            let piece = waited(piece)?;
            match piece.owner {
                Owner::Top(top) => prefetch(top.file(), piece.word, piece.from, piece.length())?,
                Owner::Layer(_, Layer::Live(layer)) => {
                    prefetch(layer.file(), piece.word, piece.from, piece.length())?;
                }
                // Small enough to wait until it is asked for.
                Owner::Layer(_, Layer::Packed(_)) => begun = Prefetch::InPart,
                Owner::Nobody => {}
            }
        }
        Ok(begun)
    }
}

impl Disk for Chain {
    fn facts(&self) -> Result<Facts> {
        let levels = self.levels();
        let newest = levels.files().next().flatten().and_then(Storage::descriptor);
        Facts::of_layer(levels.size, newest)
    }

    fn close(&self) -> Result<()> {
        Self::close(self)
    }
}

//! The chain as a block device.

use super::layer::{Layer, prefetch};
use super::map::Kind;
use super::{Chain, Levels};
use crate::device::{
    Detail, Device, Effort, Extent, HostRange, ZeroMode, check_range, push_extent,
};
use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::word_offset;
use crate::live::{Under, Writable, ZeroKind, words};
use crate::storage::{Storage, Wait, read_blocks};
use crate::types::{BLOCK_SIZE, Block, Word};

impl Levels {
    fn read(&self, offset: u64, buf: &mut [u8], wait: Wait) -> Result<bool> {
        check_range(self.size, offset, buf.len() as u64)?;
        let mut rest = buf;
        for (word, from, to) in words(offset, rest.len() as u64) {
            let (part, after) = rest.split_at_mut((to - from) as usize);
            let done = self.split(word, from, to, |a, b, top| {
                let part = &mut part[(a - from) as usize..(b - from) as usize];
                match top {
                    Some(top) => top.read(word, a, part, wait),
                    None => self.view().read_word(word, a, part, wait),
                }
            })?;
            if !done {
                return Ok(false);
            }
            rest = after;
        }
        Ok(true)
    }

    fn host_range(&self, offset: u64, length: u64) -> Result<Option<HostRange>> {
        check_range(self.size, offset, length)?;
        let mut piece = Piece::default();
        for (word, from, to) in words(offset, length) {
            let whole = self.split(word, from, to, |from, to, top| match top {
                Some(top) => Ok(piece.append(top.file(), word, from, to)),
                None => self.view().runs(word, from, to, |run| match run.owner {
                    Some((_, Layer::Live(layer))) => {
                        Ok(piece.append(layer.file(), word, run.from, run.to))
                    }
                    _ => Ok(false),
                }),
            })?;
            if !whole {
                return Ok(None);
            }
        }
        piece.host_range()
    }

    fn write(&self, offset: u64, data: &[u8], wait: Wait) -> Result<bool> {
        let top = self.top()?;
        check_range(self.size, offset, data.len() as u64)?;
        top.write(offset, data, &self.view(), wait)
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

    /// Writes zeros over bytes that begin and end in the middle of blocks, unless they are zeros
    /// already because nobody owns the block.
    fn zero_part(&self, top: &Writable, from: u64, to: u64, kind: ZeroKind) -> Result<()> {
        let mut at = from;
        while at < to {
            let block = Block(at / BLOCK_SIZE);
            let end = to.min((block.0 + 1) * BLOCK_SIZE);
            let owned = top.owned(block.word())? | self.view().owned(block.word())?;
            if kind == ZeroKind::Allocate || owned & block.mask() != 0 {
                top.write(at, &vec![0; (end - at) as usize], &self.view(), Wait::Yes)?;
            }
            at = end;
        }
        Ok(())
    }
}

/// Bytes that stand side by side in one live layer's file.
#[derive(Default)]
struct Piece<'a> {
    file: Option<&'a dyn Storage>,
    start: u64,
    end: u64,
}

impl<'a> Piece<'a> {
    /// Takes in bytes of a word that `file` owns; false where they don't go on from the last ones.
    fn append(&mut self, file: &'a dyn Storage, word: Word, from: u64, to: u64) -> bool {
        let at = word_offset(word).0 + from;
        match self.file {
            None => (self.file, self.start) = (Some(file), at),
            Some(known) if std::ptr::addr_eq(known, file) && at == self.end => {}
            Some(_) => return false,
        }
        self.end = at + (to - from);
        true
    }

    fn host_range(&self) -> Result<Option<HostRange>> {
        let Some(file) = self.file else { return Ok(None) };
        let Some(descriptor) = file.descriptor() else { return Ok(None) };
        for end in [self.start, self.end - 1] {
            if !read_blocks(file, end, &mut [0], Wait::No)? {
                return Ok(None);
            }
        }
        // Out of descriptors, the bytes are copied.
        let file = descriptor.try_clone_to_owned().ok();
        Ok(file.map(|file| HostRange { file, offset: self.start }))
    }
}

impl Device for Chain {
    fn size(&self) -> u64 {
        self.levels().size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.levels().read(offset, buf, Wait::Yes).map(drop)
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], effort: Effort) -> Result<bool> {
        let wait = match effort {
            Effort::Copy => Wait::No,
            Effort::Decode => Wait::Decode,
        };
        self.levels().read(offset, buf, wait)
    }

    fn host_range(&self, offset: u64, length: u64) -> Result<Option<HostRange>> {
        self.levels().host_range(offset, length)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.levels().write(offset, data, Wait::Yes).map(drop)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<bool> {
        self.levels().write(offset, data, Wait::No)
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

    fn flush(&self) -> Result<()> {
        // Nothing to make durable where nothing can be written.
        self.levels().top.as_ref().map_or(Ok(()), Writable::flush)
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        detail: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        self.map(offset, length, detail, &mut |extent| {
            let hole = extent.kind != Kind::Data;
            push_extent(out, limit, Extent { length: extent.length, hole })
        })
    }

    fn prefetch(&self, offset: u64, length: u64) -> Result<bool> {
        let levels = self.levels();
        let mut all = true;
        check_range(levels.size, offset, length)?;
        for (word, from, to) in words(offset, length) {
            levels.split(word, from, to, |from, to, top| match top {
                Some(top) => prefetch(top.file(), word, from, to - from).map(|()| true),
                None => levels.view().runs(word, from, to, |run| match run.owner {
                    Some((_, layer)) => {
                        all &= layer.prefetch(word, run.from, run.to - run.from)?;
                        Ok(true)
                    }
                    None => Ok(true),
                }),
            })?;
        }
        Ok(all)
    }
}

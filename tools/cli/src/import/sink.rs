//! The layer that is being made from a source.

use indicatif::ProgressBar;
use thinply::chain::Chain;
use thinply::device::{Detail, Device, ZeroMode};
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Buffer;
use thinply::types::{BLOCK_SIZE, SECTOR_SIZE};

use crate::io::pump::{BUFFER, Piece, block_runs, is_zero};

/// Refuses a size that is too small for a source of `length` bytes.
pub fn check_fits(length: u64, size: u64) -> Result<()> {
    if length > size {
        let detail = format!("the source has {length} bytes, but --size says {size}");
        return Err(Error::new(ErrorKind::InvalidInput, detail));
    }
    Ok(())
}

/// What to do with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Keep,
    Write,
    Zero,
}

/// The layer that is being made.
pub struct Sink<'a> {
    chain: &'a Chain,
    /// The size that was asked for.
    fixed: Option<u64>,
    /// How many bytes of the parent show.
    visible: u64,
    /// Where the source's bytes end, so far.
    end: u64,
    /// What the parent has where a piece goes.
    below: Buffer,
}

impl<'a> Sink<'a> {
    /// Fills `chain`, where `fixed` is the size that was asked for and `visible` bytes of a parent
    /// show.
    pub fn new(chain: &'a Chain, fixed: Option<u64>, visible: u64) -> Self {
        Self { chain, fixed, visible, end: 0, below: Buffer::default() }
    }

    /// Takes the next piece.
    pub fn put(&mut self, piece: &Piece, bar: &ProgressBar) -> Result<()> {
        match piece {
            Piece::Data(offset, data) => {
                self.end = offset + data.len() as u64;
                self.grow()?;
                if self.end.is_multiple_of(SECTOR_SIZE) {
                    self.write(*offset, data)?;
                } else {
                    let mut padded = data.to_vec();
                    padded.resize(data.len().next_multiple_of(SECTOR_SIZE as usize), 0);
                    self.write(*offset, &padded)?;
                }
            }
            Piece::Zeros(offset, length) => {
                self.end = offset + length;
                self.clear(*offset, self.end)?;
            }
        }
        bar.set_position(self.end);
        Ok(())
    }

    /// Makes room for a source that doesn't tell its length.
    fn grow(&self) -> Result<()> {
        let size = self.chain.size();
        if self.end <= size {
            return Ok(());
        }
        match self.fixed {
            Some(fixed) => check_fits(self.end, fixed),
            None => {
                self.chain.resize((size * 2).max(self.end.next_multiple_of(SECTOR_SIZE)), false)
            }
        }
    }

    /// The rest of the disk is zeros, and the disk ends with the source unless told otherwise.
    /// `padded` is the source's length in whole sectors, if it was known.
    pub fn finish(&mut self, padded: Option<u64>) -> Result<()> {
        if self.fixed.is_none() && padded.is_none() {
            let size = self.end.max(1).next_multiple_of(SECTOR_SIZE);
            return self.chain.resize(size, true);
        }
        let end = padded.unwrap_or(self.end.next_multiple_of(SECTOR_SIZE));
        self.clear(end, self.chain.size())
    }

    /// Writes what differs from what is there.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        if offset >= self.visible {
            return self.apply(offset, data, |_, block| {
                if is_zero(block) { Change::Keep } else { Change::Write }
            });
        }
        let mut below = std::mem::take(&mut self.below);
        below.set_length(data.len());
        self.chain.read(offset, &mut below)?;
        self.apply(offset, data, |at, block| match &below[at..at + block.len()] {
            same if same == block => Change::Keep,
            _ if is_zero(block) => Change::Zero,
            _ => Change::Write,
        })?;
        self.below = below;
        Ok(())
    }

    fn apply(
        &self,
        offset: u64,
        data: &[u8],
        choose: impl Fn(usize, &[u8]) -> Change,
    ) -> Result<()> {
        for (change, from, to) in block_runs(data, choose) {
            let at = offset + from as u64;
            match change {
                Change::Keep => {}
                Change::Write => self.chain.write(at, &data[from..to])?,
                Change::Zero => self.chain.zero(at, (to - from) as u64, ZeroMode::default())?,
            }
        }
        Ok(())
    }

    /// Makes a range read as zeros, where the parent has anything else.
    fn clear(&mut self, from: u64, to: u64) -> Result<()> {
        let to = to.min(self.visible.next_multiple_of(BLOCK_SIZE)).min(self.chain.size());
        if from >= to {
            return Ok(());
        }
        let mut filled = Vec::new();
        let everything = usize::MAX;
        self.chain.extents(from, to - from, Detail::Files, everything, &mut filled)?;
        let zeros = vec![0; BUFFER];
        let mut at = from;
        for extent in filled {
            let end = at + extent.length;
            while at < end {
                let part = (end - at).min(BUFFER as u64);
                if !extent.hole {
                    self.write(at, &zeros[..part as usize])?;
                }
                at = if extent.hole { end } else { at + part };
            }
        }
        Ok(())
    }
}

//! `thinply import`

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::ProgressBar;
use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;
use thinply::chain::{Chain, create, seal};
use thinply::device::{Detail, Device, ZeroMode};
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Access;
use thinply::types::{BLOCK_SIZE, SECTOR_SIZE};

use crate::draft::Draft;
use crate::parent::ParentArg;
use crate::paths::{Place, closing};
use crate::pump::{BUFFER, Feeder, Piece, block_runs, is_zero, pump};
use crate::{Answer, Outcome, progress, size};

/// First size of a disk whose source doesn't tell its length.
const FIRST_SIZE: u64 = 1 << 30;

const AFTER_HELP: &str = "\
SRC is taken as it is, byte for byte: nothing in it is recognised. FILE appears when it is whole.

Examples:
  thinply import disk.raw base.tply
  thinply import --parent base.tply changed.raw layer.tply
  zstdcat disk.raw.zst | thinply import --writable - disk.tply";

/// Make a layer from a raw disk: a file, a block device, or standard input.
///
/// Zeros take no space, and with a parent only the blocks that differ from it do. The size is
/// rounded up to a whole sector of 512 bytes.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Import {
    #[command(flatten)]
    parent: ParentArg,
    /// Leave the layer writable instead of frozen
    #[arg(long)]
    writable: bool,
    /// Size of the disk, at least the source's; the rest is zeros
    #[arg(long, value_name = "S", value_parser = size::parse)]
    size: Option<u64>,
    /// A raw file or block device, or - for standard input
    src: PathBuf,
    /// The file to make; it must not exist
    file: PathBuf,
}

impl Import {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::vacant(&self.file)?;
        size::check(self.size)?;
        let source = Source::open(&self.src)?;
        source.check_fits(self.size)?;
        let (parent, layers) = self.parent.prepare(&place)?;
        let visible = parent.as_ref().map_or(0, |parent| parent.virtual_size);
        let size = source.first_size(self.size, visible);

        let draft = Draft::new(&place.directory);
        create(&place.folder, draft.name(), Some(size), parent.as_ref(), &layers)?;
        let made = Place { name: draft.name().to_owned(), ..place.clone() };
        closing(made.chain(Access::Write, layers)?, |chain| {
            source.copy_to(chain, self.size, visible)
        })?;
        if !self.writable {
            seal(&*made.folder, &made.name)?;
        }
        draft.publish_at(&place)?;
        Ok(Answer::Yes)
    }
}

fn check_fits(length: u64, size: u64) -> Result<()> {
    if length > size {
        let detail = format!("the source has {length} bytes, but the size shall be {size}");
        return Err(Error::new(ErrorKind::InvalidInput, detail));
    }
    Ok(())
}

/// Where the bytes come from.
pub struct Source {
    path: PathBuf,
    file: File,
    /// Unknown for what can only be read from beginning to end.
    length: Option<u64>,
}

impl Source {
    /// A raw file or block device, or `-` for standard input.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| Error::io(error, "opening the source").in_file(path);
        let file = if path.as_os_str() == "-" {
            File::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?)
        } else {
            File::open(path).map_err(failed)?
        };
        let kind = file.metadata().map_err(failed)?.file_type();
        if kind.is_dir() {
            return Err(Error::new(ErrorKind::InvalidInput, "is a folder").in_file(path));
        }
        // Standard input may be a file too, but then reading starts where it stands.
        let whole = path.as_os_str() != "-" && (kind.is_file() || kind.is_block_device());
        let length = whole.then(|| seek(&file, SeekFrom::End(0))).transpose();
        let length = length.map_err(|error| failed(error.into()))?;
        if length.is_some() {
            // Only a hint.
            let _ = fadvise(&file, 0, None, Advice::Sequential);
        }
        Ok(Self { path: path.to_owned(), file, length })
    }

    /// Refuses a size that is too small for it.
    pub fn check_fits(&self, size: Option<u64>) -> Result<()> {
        match (self.length, size) {
            (Some(length), Some(size)) => check_fits(length, size),
            _ => Ok(()),
        }
    }

    /// The length in whole sectors, if it is known.
    fn padded(&self) -> Option<u64> {
        self.length.map(|length| length.max(1).next_multiple_of(SECTOR_SIZE))
    }

    /// The size that a disk shall have before [`Source::copy_to`] fills it, where `fixed` is the
    /// size that was asked for and `visible` bytes of a parent show.
    pub fn first_size(&self, fixed: Option<u64>, visible: u64) -> u64 {
        fixed.or(self.padded()).unwrap_or(FIRST_SIZE.max(visible))
    }

    /// Makes the disk hold these bytes and nothing else.
    pub fn copy_to(&self, chain: &Chain, fixed: Option<u64>, visible: u64) -> Result<()> {
        let bar = progress::bar(self.length);
        let mut sink = Sink { chain, fixed, visible, end: 0, below: Vec::new() };
        pump(|feeder| self.read(feeder), |piece| sink.put(piece, &bar))?;
        sink.finish(self.padded())?;
        bar.finish_and_clear();
        Ok(())
    }

    fn failed(&self, error: io::Error, offset: u64) -> Error {
        Error::io(error, "reading the source").at(offset).in_file(&self.path)
    }

    fn read(&self, feeder: &Feeder) -> Result<()> {
        match self.length {
            Some(length) => self.read_ranges(length, feeder),
            None => self.read_stream(feeder),
        }
    }

    fn read_stream(&self, feeder: &Feeder) -> Result<()> {
        let mut at = 0;
        while let Some(mut buffer) = feeder.buffer() {
            let mut filled = 0;
            while filled < buffer.len() {
                match (&self.file).read(&mut buffer[filled..]) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(self.failed(error, at + filled as u64)),
                }
            }
            buffer.truncate(filled);
            if filled == 0 || !feeder.send(Piece::Data(at, buffer)) {
                break;
            }
            at += filled as u64;
        }
        Ok(())
    }

    /// Reads the data and skips the holes.
    fn read_ranges(&self, length: u64, feeder: &Feeder) -> Result<()> {
        let mut at = 0;
        while at < length {
            // Whole blocks, of which the file system may have said less.
            let data = match self.next(SeekFrom::Data(at), at)? {
                Some(data) if data < length => (data / BLOCK_SIZE * BLOCK_SIZE).max(at),
                _ => length,
            };
            if data > at && !feeder.send(Piece::Zeros(at, data - at)) {
                return Ok(());
            }
            let hole = self.next(SeekFrom::Hole(data), length)?.unwrap_or(length);
            // At least a block, should a hole appear meanwhile: this loop must end.
            let end = hole.max(data + 1).next_multiple_of(BLOCK_SIZE).min(length);
            at = data;
            while at < end {
                let Some(mut buffer) = feeder.buffer() else { return Ok(()) };
                buffer.truncate((end - at).min(BUFFER as u64) as usize);
                self.file.read_exact_at(&mut buffer, at).map_err(|e| self.failed(e, at))?;
                let count = buffer.len() as u64;
                if !feeder.send(Piece::Data(at, buffer)) {
                    return Ok(());
                }
                at += count;
            }
        }
        Ok(())
    }

    /// What `seek` finds; nothing beyond the last data, and `unknown` where that can't be told.
    fn next(&self, seek_from: SeekFrom, unknown: u64) -> Result<Option<u64>> {
        match seek(&self.file, seek_from) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(unknown)),
            Err(error) => Err(self.failed(error.into(), unknown)),
        }
    }
}

/// What to do with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Keep,
    Write,
    Zero,
}

/// The layer that is being made.
struct Sink<'a> {
    chain: &'a Chain,
    /// The size that was asked for.
    fixed: Option<u64>,
    /// How many bytes of the parent show.
    visible: u64,
    /// Where the source's bytes end, so far.
    end: u64,
    /// What the parent has where a piece goes.
    below: Vec<u8>,
}

impl Sink<'_> {
    fn put(&mut self, piece: &Piece, bar: &ProgressBar) -> Result<()> {
        match piece {
            Piece::Data(offset, data) => {
                self.end = offset + data.len() as u64;
                self.grow()?;
                if self.end.is_multiple_of(SECTOR_SIZE) {
                    self.write(*offset, data)?;
                } else {
                    let mut padded = data.clone();
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
    fn finish(&mut self, padded: Option<u64>) -> Result<()> {
        if self.fixed.is_none() && padded.is_none() {
            let size = self.end.max(1).next_multiple_of(SECTOR_SIZE);
            return self.chain.resize(size, true);
        }
        self.clear(self.end.next_multiple_of(SECTOR_SIZE), self.chain.size())
    }

    /// Writes what differs from what is there.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        if offset >= self.visible {
            return self.apply(offset, data, |_, block| {
                if is_zero(block) { Change::Keep } else { Change::Write }
            });
        }
        let mut below = std::mem::take(&mut self.below);
        below.resize(data.len(), 0);
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

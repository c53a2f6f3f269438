//! A raw disk: the bytes of a file, a block device or standard input.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;
use thinply::chain::Chain;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::{Rights, Share, Storage, opened};
use thinply::types::BLOCK_SIZE;

use super::format::{Format, TELLING, check_beginning, check_end};
use super::source::Disk;
use crate::io::pump::{BUFFER, Feeder, Piece};
use crate::io::stream;
use crate::options::share::ShareArg;

/// A raw disk.
pub struct RawDisk {
    path: PathBuf,
    file: File,
    /// Unknown for what can only be read from beginning to end.
    length: Option<u64>,
    rights: Rights,
    /// Whether somebody said that it is raw.
    said: bool,
}

impl RawDisk {
    /// A raw file or block device, or `-` for standard input. What nobody called raw must not look
    /// like something else.
    pub fn open(path: &Path, said: Option<Format>, share: ShareArg) -> Result<Self> {
        let failed = |error: io::Error| Error::io(error, "opening the source").in_file(path);
        let file = if path.as_os_str() == "-" {
            stream::input().map_err(failed)?
        } else {
            File::open(path).map_err(failed)?
        };
        let meta = file.metadata().map_err(failed)?;
        let kind = meta.file_type();
        if kind.is_dir() {
            return Err(Error::new(ErrorKind::InvalidInput, "is a folder").in_file(path));
        }
        if kind.is_file() || kind.is_block_device() {
            share.check_source(file.as_fd(), path)?;
        }
        // Standard input may be a file too, but then reading starts where it stands.
        let whole = path.as_os_str() != "-" && (kind.is_file() || kind.is_block_device());
        let length = whole.then(|| seek(&file, SeekFrom::End(0))).transpose();
        let length = length.map_err(|error| failed(error.into()))?;
        if length.is_some() {
            // Only a hint.
            let _ = fadvise(&file, 0, None, Advice::Sequential);
        }
        let rights = if whole { Rights::Copy(meta.mode()) } else { Rights::Usual };
        let disk = Self { path: path.to_owned(), file, length, rights, said: said.is_some() };
        if length == Some(0) {
            return Err(disk.empty());
        }
        if let Some(length) = length.filter(|_| !disk.said) {
            let mut bytes = vec![0; length.min(TELLING as u64) as usize];
            let looks = |look: fn(&[u8], bool) -> Result<()>, bytes: &[u8]| {
                look(bytes, false).map_err(|error| error.in_file(path))
            };
            disk.file.read_exact_at(&mut bytes, 0).map_err(|e| disk.failed(e, 0))?;
            looks(check_beginning, &bytes)?;
            let end = length - bytes.len() as u64;
            disk.file.read_exact_at(&mut bytes, end).map_err(|e| disk.failed(e, end))?;
            looks(check_end, &bytes)?;
        }
        Ok(disk)
    }

    fn failed(&self, error: io::Error, offset: u64) -> Error {
        Error::io(error, "reading the source").at(offset).in_file(&self.path)
    }

    /// No disk has no bytes; a program before this one in a pipe may have failed.
    fn empty(&self) -> Error {
        Error::new(ErrorKind::InvalidInput, "is empty, expected a disk").in_file(&self.path)
    }

    fn read_stream(&self, feeder: &Feeder) -> Result<()> {
        let mut at = 0;
        let mut last = Vec::new();
        while let Some(mut buffer) = feeder.buffer(BUFFER) {
            let filled = self.fill(&mut buffer, at)?;
            buffer.set_length(filled);
            if filled == 0 && at == 0 {
                return Err(self.empty());
            }
            self.look(&buffer, at, &mut last)?;
            if filled == 0 || !feeder.send(Piece::Data(at, buffer)) {
                break;
            }
            at += filled as u64;
        }
        Ok(())
    }

    /// Reads until the buffer is full, or to the end; answers how many bytes.
    fn fill(&self, buffer: &mut [u8], at: u64) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match (&self.file).read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error, at + filled as u64)),
            }
        }
        Ok(filled)
    }

    /// Looks at the next bytes of a stream, and at its last ones once there are no more.
    fn look(&self, bytes: &[u8], at: u64, last: &mut Vec<u8>) -> Result<()> {
        if self.said {
            return Ok(());
        }
        let looked = match (bytes, at) {
            (bytes, 0) => check_beginning(bytes, true),
            ([], _) => check_end(last, true),
            _ => Ok(()),
        };
        last.extend(&bytes[bytes.len().saturating_sub(TELLING)..]);
        last.drain(..last.len().saturating_sub(TELLING));
        looked.map_err(|error| error.in_file(&self.path))
    }

    /// The file as one that a layer may share space with.
    fn shared(&self) -> Result<Option<Arc<dyn Storage>>> {
        let kind = self.file.metadata().map_err(|e| self.failed(e, 0))?.file_type();
        let file = kind.is_file().then(|| self.file.try_clone()).transpose();
        let file = file.map_err(|e| self.failed(e, 0))?;
        file.map(|file| opened(self.path.clone(), file)).transpose().map_err(|e| self.failed(e, 0))
    }

    /// Reads the data and skips the holes.
    fn read_ranges(&self, length: u64, feeder: &Feeder, shares: Option<&Chain>) -> Result<()> {
        let mut at = 0;
        let mut shares = shares.zip(self.shared()?);
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
            if let Some((chain, file)) = &shares {
                let whole = (end - at) / BLOCK_SIZE * BLOCK_SIZE;
                match chain.share(at, whole, &**file, at)? {
                    Share::Done => at += whole,
                    Share::Refused => shares = None,
                }
            }
            while at < end {
                let length = (end - at).min(BUFFER as u64) as usize;
                let Some(mut buffer) = feeder.buffer(length) else { return Ok(()) };
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

impl Disk for RawDisk {
    fn length(&self) -> Option<u64> {
        self.length
    }

    fn rights(&self) -> Rights {
        self.rights.clone()
    }

    fn read(&self, feeder: &Feeder, shares: Option<&Chain>) -> Result<()> {
        match self.length {
            Some(length) => self.read_ranges(length, feeder, shares),
            None => self.read_stream(feeder),
        }
    }
}

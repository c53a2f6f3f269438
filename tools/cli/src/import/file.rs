//! A file that an image consists of, or one of them.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom as Look, seek};
use rustix::io::Errno;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Rights;

use crate::options::share::ShareArg;

/// A file of an image, open for reading. It opens no other.
#[derive(Debug)]
pub struct ImageFile {
    pub path: PathBuf,
    pub file: File,
    pub length: u64,
    pub rights: Rights,
}

impl ImageFile {
    /// A regular file or block device that no other program writes.
    pub fn open(path: &Path, share: ShareArg) -> Result<Self> {
        let failed = |error: io::Error| Error::io(error, "opening the source").in_file(path);
        // What is only a name of a pipe must not be opened: that waits for the other end.
        let meta = path.metadata().map_err(failed)?;
        let kind = meta.file_type();
        if kind.is_dir() {
            return Err(Error::new(ErrorKind::InvalidInput, "is a folder").in_file(path));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(not_a_pipe(path));
        }
        let mut file = File::open(path).map_err(failed)?;
        share.check_source(file.as_fd(), path)?;
        let rights = Rights::Copy(file.metadata().map_err(failed)?.mode());
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, length, rights })
    }

    /// The bytes at an offset, with zeros where the file is shorter.
    pub fn bytes<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        let there = self.length.saturating_sub(offset).min(N as u64) as usize;
        self.fill(offset, &mut bytes[..there])?;
        Ok(bytes)
    }

    /// Fills `buf` from `offset`.
    pub fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file
            .read_exact_at(buf, offset)
            .map_err(|error| Error::io(error, "reading the source").at(offset).in_file(&self.path))
    }

    /// Whether there is a hole at an offset inside the file, and how far from there it is so.
    pub fn hole(&self, offset: u64) -> Result<(bool, u64)> {
        let next = |look| match seek(&self.file, look) {
            Ok(at) => Ok(Some(at.min(self.length))),
            // Nothing of it behind.
            Err(Errno::NXIO) => Ok(Some(self.length)),
            // Not told.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(None),
            Err(error) => Err(Error::io(error.into(), "looking for holes").in_file(&self.path)),
        };
        match next(Look::Data(offset))? {
            Some(data) if data > offset => Ok((true, data - offset)),
            Some(_) => {
                let hole = next(Look::Hole(offset))?.unwrap_or(self.length);
                // At least something, should a hole appear meanwhile.
                Ok((false, hole.max(offset + 1) - offset))
            }
            None => Ok((false, self.length.saturating_sub(offset).max(1))),
        }
    }
}

/// Why an image in another format is no stream.
pub fn not_a_pipe(path: &Path) -> Error {
    let detail = "an image is read here and there, not from beginning to end as what comes through a \
                  pipe: save it as a file and import that";
    Error::new(ErrorKind::InvalidInput, detail).in_file(path)
}

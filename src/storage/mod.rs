//! The one seam for I/O: positional files and the folders that hold them.
//!
//! The traits have no default methods, so that no backend inherits a durability it doesn't have.
//! Single attempts may be short, as in the system calls; [`read_exact_at`] and [`write_all_at`]
//! are the loops over them.

mod buffer;
mod file;
mod memory;
mod names;
mod rights;
mod writeback;

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Gather, Scatter};
use crate::wait::{Attempt, NotDone, Wait};

pub use buffer::Buffer;
pub use file::{FileFolder, holders, is_used, is_written, opened};
pub use memory::MemoryFolder;
pub use names::rename_new;
pub use rights::Rights;
pub use writeback::Writeback;

/// A lock that one open file holds against all others, in this process and elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Many readers, no writer.
    Shared,
    /// One writer, nobody else.
    Exclusive,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing.
    Write,
}

/// Whether space was shared instead of copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// All of it was.
    Done,
    /// It can't be: the bytes have to be copied.
    Refused,
}

/// An open file with byte addresses.
pub trait Storage: Send + Sync + Debug {
    /// The file's name for messages.
    fn path(&self) -> &Path;

    /// Length in bytes.
    fn length(&self) -> io::Result<u64>;

    /// Bytes of disk that the file takes, metadata of the file system aside.
    fn allocated(&self) -> io::Result<u64>;

    /// Sets the length; new bytes read as zeros.
    fn set_length(&self, length: u64) -> io::Result<()>;

    /// Reads once; 0 only at the end of the file.
    fn read_at(&self, into: Scatter<'_>, offset: u64) -> io::Result<usize>;

    /// [`Storage::read_at`] without waiting for a disk: [`io::ErrorKind::WouldBlock`], or fewer
    /// bytes, where the page cache lacks them.
    fn read_cached_at(&self, into: Scatter<'_>, offset: u64) -> io::Result<usize>;

    /// Writes once.
    fn write_at(&self, from: Gather<'_>, offset: u64) -> io::Result<usize>;

    /// Makes the range hold what stands in `source` from `from` on, by sharing its space instead of
    /// copying it. Refused, with nothing changed, where that can't be done: not on this file system,
    /// not between these files, or not at these offsets. It counts as a write: durable after the
    /// next sync, the source's bytes with it.
    fn clone_range(
        &self,
        offset: u64,
        length: u64,
        source: &dyn Storage,
        from: u64,
    ) -> io::Result<Share>;

    /// The host's descriptor, where the file is one of the host's.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// Gives the range back; it reads as zeros.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes the range read as zeros and keeps space allocated for it.
    fn zero(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Allocates space for the range; content stays. [`io::ErrorKind::Unsupported`] where the file
    /// system can't.
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Returns once all that completed before survives a power loss.
    fn sync_data(&self) -> io::Result<()>;

    /// Forgets the range's cached pages unless they still have to be written, so that reads show
    /// what is on the disk.
    fn drop_cache(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Starts to write dirty pages out, without waiting and without promising anything.
    fn start_writeback(&self) -> io::Result<()>;

    /// Starts to read the range into the page cache.
    fn prefetch(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Start of the first data at or after `offset`; `None` where only a hole is left.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;

    /// Start of the first hole at or after `offset`; the end of the file counts as one.
    fn next_hole(&self, offset: u64) -> io::Result<u64>;

    /// Takes the lock or changes the one held; [`io::ErrorKind::WouldBlock`] where another open
    /// file stands against it. Dropping the file gives it back.
    fn lock(&self, lock: Lock) -> io::Result<()>;
}

/// A folder of files, addressed by plain names.
pub trait Folder: Send + Sync + Debug {
    /// The folder's name for messages.
    fn path(&self) -> &Path;

    /// Opens a file; a symbolic link is an error.
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>>;

    /// Creates a file that must not exist, open for writing.
    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>>;

    /// The same folder, where [`Folder::create`] gives a file these rights, before its name can be
    /// seen and durably before anything that is written to it.
    fn creating(&self, rights: Rights) -> Arc<dyn Folder>;

    /// The names in it, in no order, those of other things than files included.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Whether both names stand for the same file; false where one is missing.
    fn same_file(&self, a: &str, b: &str) -> io::Result<bool>;

    /// Gives the file a second name, which must not exist; [`io::ErrorKind::Unsupported`] where a
    /// file has one name only.
    fn link(&self, from: &str, to: &str) -> io::Result<()>;

    /// Renames, replacing what bears the new name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Renames to a name that must not exist.
    fn rename_new(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a name.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Removes an empty folder that stands in a file's place; [`io::ErrorKind::NotADirectory`] where
    /// there is none.
    fn remove_folder(&self, name: &str) -> io::Result<()>;

    /// Returns once all changes of names survive a power loss, as far as the host has a way to ask
    /// for that.
    fn sync(&self) -> io::Result<()>;
}

/// Turns a host error into one that names the file, the offset and the operation.
pub fn failed(
    storage: &dyn Storage,
    operation: &'static str,
    offset: u64,
) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::io(error, operation).at(offset).in_file(storage.path())
}

/// Opens a file in a folder; an error names it.
pub fn open_in(folder: &dyn Folder, name: &str, access: Access) -> Result<Arc<dyn Storage>> {
    folder
        .open(name, access)
        .map_err(|error| Error::io(error, "opening the file").in_file(folder.path().join(name)))
}

/// [`open_in`] of a file that may be missing.
pub fn find_in(
    folder: &dyn Folder,
    name: &str,
    access: Access,
) -> Result<Option<Arc<dyn Storage>>> {
    match open_in(folder, name, access) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Makes the changes of names in a folder durable.
pub fn sync_folder(folder: &dyn Folder) -> Result<()> {
    folder.sync().map_err(|error| Error::io(error, "syncing the folder").in_file(folder.path()))
}

/// Fills `into`. Without leave to wait only from the page cache.
pub fn read_blocks(file: &dyn Storage, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
    match wait {
        Wait::Allowed => read_exact_at(file, into, offset)
            .map_err(|error| failed(file, "reading blocks", offset)(error).into()),
        Wait::Decode | Wait::Never => read_cached(file, offset, into),
    }
}

fn read_cached(file: &dyn Storage, mut offset: u64, into: Scatter<'_>) -> Attempt {
    let mut left = into;
    while !left.is_empty() {
        match file.read_cached_at(left.again(), offset) {
            Ok(n) if n == left.len() => return Ok(()),
            Ok(0) => return Err(NotDone::WouldWait),
            Ok(n) => {
                (_, left) = left.split_at(n);
                offset += n as u64;
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {
                    return Err(NotDone::WouldWait);
                }
                _ => return Err(failed(file, "reading blocks", offset)(error).into()),
            },
        }
    }
    Ok(())
}

/// Fills `into`, or fails with [`io::ErrorKind::UnexpectedEof`].
pub fn read_exact_at<'a>(
    storage: &dyn Storage,
    into: impl Into<Scatter<'a>>,
    mut offset: u64,
) -> io::Result<()> {
    let mut left = into.into();
    while !left.is_empty() {
        match storage.read_at(left.again(), offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                (_, left) = left.split_at(n);
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `from`.
pub fn write_all_at<'a>(
    storage: &dyn Storage,
    from: impl Into<Gather<'a>>,
    mut offset: u64,
) -> io::Result<()> {
    let mut left = from.into();
    while !left.is_empty() {
        match storage.write_at(left, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                left = left.range(n, left.len());
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Copies bytes between files, through memory for all of them at once.
pub fn copy_range(
    to: &dyn Storage,
    offset: u64,
    length: u64,
    source: &dyn Storage,
    from: u64,
) -> io::Result<()> {
    let mut bytes = vec![0; length as usize];
    read_exact_at(source, &mut bytes, from)?;
    write_all_at(to, &bytes, offset)
}

/// Allocates space ahead of its need, where the file system can.
pub fn allocate_ahead(storage: &dyn Storage, offset: u64, length: u64) -> io::Result<()> {
    match storage.allocate(offset, length) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        other => other,
    }
}

/// Writes zeros over the range, for backends whose host can't punch.
fn write_zeros(storage: &dyn Storage, mut offset: u64, mut length: u64) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while length > 0 {
        let part = length.min(ZEROS.len() as u64);
        write_all_at(storage, &ZEROS[..part as usize], offset)?;
        offset += part;
        length -= part;
    }
    Ok(())
}

/// Takes a lock, or names who stands against it.
pub fn take_lock(file: &dyn Storage, lock: Lock) -> Result<()> {
    file.lock(lock).map_err(|error| {
        if error.kind() != io::ErrorKind::WouldBlock {
            return failed(file, "locking the file", 0)(error);
        }
        let who = match holders(file.path()) {
            names if names.is_empty() => "another open file".into(),
            names => names.join(", "),
        };
        let wanted = match lock {
            Lock::Shared => "to be read, but is being written",
            Lock::Exclusive => "to be written, but is in use",
        };
        Error::new(ErrorKind::InUse, format!("wanted {wanted} by {who}")).in_file(file.path())
    })
}

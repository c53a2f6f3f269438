//! Files and folders of the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{
    Advice, AtFlags, CWD, FallocateFlags, OFlags, SeekFrom, StatxFlags, fadvise, fallocate,
    fstatfs, seek, statx,
};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::process::geteuid;

use super::{Access, Folder, Lock, Rights, Share, Storage, names, write_zeros};
use crate::memory::{Gather, Scatter};

const TMPFS_MAGIC: i64 = 0x0102_1994;

/// A file of the host.
#[derive(Debug)]
struct HostFile {
    path: PathBuf,
    file: File,
    /// Whether all of it is memory, so that no read waits (and `RWF_NOWAIT` is refused).
    in_memory: bool,
    locked: AtomicBool,
}

impl HostFile {
    fn open(path: PathBuf, options: &mut OpenOptions) -> io::Result<Arc<dyn Storage>> {
        // A pipe under the name of a layer must not hold the open up until somebody writes to it.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = options.read(true).custom_flags(flags.bits() as i32).open(&path)?;
        opened(path, file)
    }

    fn unlock(&self) {
        // Where that fails closing the file has to do.
        let _ = fcntl(self.file.as_fd(), FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, 0, 0)));
    }

    /// Runs `fallocate`; none where the file system does not know that mode.
    fn fallocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<Option<()>> {
        let possible = length > 0 && offset.checked_add(length).is_some_and(|end| end < 1 << 63);
        match fallocate(&self.file, mode, offset, length) {
            Ok(()) => Ok(Some(())),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY) => Ok(None),
            // Said of a mode too (fuse2fs), where it can't be about the range.
            Err(Errno::INVAL) if possible => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads once, with these flags of `preadv2`.
    fn read_parts(&self, mut into: Scatter<'_>, offset: u64, flags: i32) -> io::Result<usize> {
        let at = as_offset(offset)?;
        // SAFETY: the descriptor lives as long as `self`, and the addresses stand for memory that is
        // writable as long as `into` and that no reference leads into. The kernel fills it.
        let read = into.with_iovecs(|parts| unsafe {
            libc::preadv2(self.file.as_raw_fd(), parts.as_ptr(), parts.len() as i32, at, flags)
        });
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }
}

fn as_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Drop for HostFile {
    /// Closing the file gives its lock back, but not where a file system passes locks on.
    fn drop(&mut self) {
        if *self.locked.get_mut() {
            self.unlock();
        }
    }
}

/// A regular file that is open already, called `path` in messages.
///
/// # Errors
/// Host errors; [`io::ErrorKind::InvalidInput`] for what is no regular file.
pub fn opened(path: PathBuf, file: File) -> io::Result<Arc<dyn Storage>> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let in_memory = fstatfs(&file)?.f_type == TMPFS_MAGIC;
    Ok(Arc::new(HostFile { path, file, in_memory, locked: AtomicBool::new(false) }))
}

impl Storage for HostFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn read_at(&self, mut into: Scatter<'_>, offset: u64) -> io::Result<usize> {
        match into.own() {
            Some(bytes) => self.file.read_at(bytes, offset),
            None => self.read_parts(into, offset, 0),
        }
    }

    fn read_cached_at(&self, mut into: Scatter<'_>, offset: u64) -> io::Result<usize> {
        if self.in_memory {
            return self.read_at(into, offset);
        }
        let read = match into.own() {
            Some(bytes) => {
                let mut parts = [io::IoSliceMut::new(bytes)];
                preadv2(&self.file, &mut parts, offset, ReadWriteFlags::NOWAIT)
                    .map_err(io::Error::from)
            }
            None => self.read_parts(into, offset, libc::RWF_NOWAIT),
        };
        match read {
            // A file system that can't tell is asked in the way that may wait.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            other => other,
        }
    }

    fn write_at(&self, from: Gather<'_>, offset: u64) -> io::Result<usize> {
        if let Some(bytes) = from.own() {
            return self.file.write_at(bytes, offset);
        }
        let at = as_offset(offset)?;
        // SAFETY: the descriptor lives as long as `self`, and the addresses stand for memory that is
        // readable as long as `from`. The kernel copies it; that it may change meanwhile is no
        // matter to it.
        let written = from.with_iovecs(|parts| unsafe {
            libc::pwritev(self.file.as_raw_fd(), parts.as_ptr(), parts.len() as i32, at)
        });
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    fn clone_range(
        &self,
        offset: u64,
        length: u64,
        source: &dyn Storage,
        from: u64,
    ) -> io::Result<Share> {
        let Some(descriptor) = source.descriptor() else { return Ok(Share::Refused) };
        if length == 0 {
            // To the kernel that means everything.
            return Ok(Share::Done);
        }
        let range = libc::file_clone_range {
            src_fd: descriptor.as_raw_fd().into(),
            src_offset: from,
            src_length: length,
            dest_offset: offset,
        };
        let file = self.file.as_raw_fd();
        // SAFETY: both descriptors live as long as this call, and the kernel only reads the one
        // structure that the pointer leads to, which is of the type that FICLONERANGE takes.
        let answer = unsafe { libc::ioctl(file, libc::FICLONERANGE, &raw const range) };
        if answer == 0 {
            return Ok(Share::Done);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // Another file system, one without shared extents, or offsets that don't suit it.
            Some(libc::EXDEV | libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS | libc::EINVAL) => {
                Ok(Share::Refused)
            }
            _ => Err(error),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match self.fallocate(mode, offset, length)? {
            Some(()) => Ok(()),
            None => write_zeros(self, offset, length),
        }
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match self.fallocate(mode, offset, length)? {
            Some(()) => Ok(()),
            None => write_zeros(self, offset, length),
        }
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let done = self.fallocate(FallocateFlags::KEEP_SIZE, offset, length)?;
        done.ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn drop_cache(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(fadvise(&self.file, offset, std::num::NonZeroU64::new(length), Advice::DontNeed)?)
    }

    fn start_writeback(&self) -> io::Result<()> {
        let flags = libc::SYNC_FILE_RANGE_WRITE;
        // SAFETY: takes a descriptor that lives as long as `self` and numbers; no memory is passed.
        let answer = unsafe { libc::sync_file_range(self.file.as_raw_fd(), 0, 0, flags) };
        if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn prefetch(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(fadvise(&self.file, offset, std::num::NonZeroU64::new(length), Advice::WillNeed)?)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            // Where holes can't be told, all of it is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                Ok(Some(offset).filter(|_| offset < self.length().unwrap_or(0)))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        match seek(&self.file, SeekFrom::Hole(offset)) {
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => self.length(),
            other => Ok(other?),
        }
    }

    fn lock(&self, lock: Lock) -> io::Result<()> {
        let kind = match lock {
            Lock::Shared => libc::F_RDLCK,
            Lock::Exclusive => libc::F_WRLCK,
        };
        let whole = range(kind, 0, 0);
        match fcntl(self.file.as_fd(), FcntlArg::F_OFD_SETLK(&whole)) {
            // A file system that passes locks on (bindfs) may give the same one to two files, but it
            // tells of the other. It may tell of one that was killed long ago, too.
            Ok(_) if is_held(self.file.as_fd(), whole) && !nobody_has(&self.path) => {
                self.unlock();
                Err(io::ErrorKind::WouldBlock.into())
            }
            Ok(_) => {
                self.locked.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A folder of the host.
#[derive(Clone, Debug)]
pub struct FileFolder {
    path: PathBuf,
    /// Those of the files that are made.
    rights: Rights,
}

impl FileFolder {
    /// The folder at `path`; files in it are opened only when asked for.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), rights: Rights::default() }
    }

    fn join(&self, name: &str) -> io::Result<PathBuf> {
        // A hint has been checked long before; this keeps every other caller inside the folder too.
        if name.is_empty() || name == "." || name == ".." || name.contains('/') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file name"));
        }
        Ok(self.path.join(name))
    }
}

impl Folder for FileFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        let write = access == Access::Write;
        HostFile::open(self.join(name)?, OpenOptions::new().write(write))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let path = self.join(name)?;
        let file = self.rights.create(&path)?;
        opened(path, file)
    }

    fn creating(&self, rights: Rights) -> Arc<dyn Folder> {
        Arc::new(Self { rights, ..self.clone() })
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(&self.path)?;
        // Nothing is ever stored under a name that is not UTF-8.
        let name = |entry: fs::DirEntry| entry.file_name().into_string().ok();
        entries.filter_map(|entry| entry.map(name).transpose()).collect()
    }

    fn same_file(&self, a: &str, b: &str) -> io::Result<bool> {
        let identity = |name: &str| match fs::symlink_metadata(self.join(name)?) {
            Ok(meta) => Ok(Some((meta.dev(), meta.ino()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        let (a, b) = (identity(a)?, identity(b)?);
        Ok(a.is_some() && a == b)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        names::link(&self.join(from)?, &self.join(to)?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.join(from)?, self.join(to)?)
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        names::rename_new(&self.join(from)?, &self.join(to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.join(name)?)
    }

    fn remove_folder(&self, name: &str) -> io::Result<()> {
        fs::remove_dir(self.join(name)?)
    }

    fn sync(&self) -> io::Result<()> {
        names::sync(&self.path)
    }
}

/// Whether another open file holds a lock against this one; no where that can't be told.
fn is_held(file: BorrowedFd<'_>, mut lock: libc::flock) -> bool {
    let told = fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock));
    told.is_ok() && lock.l_type != libc::F_UNLCK as libc::c_short
}

/// Whether it is certain that no other process has the file open: only root sees them all.
fn nobody_has(path: &Path) -> bool {
    let own = Path::new("/proc/self");
    // This process may be the other one, by the file that asks and one more.
    geteuid().is_root() && opens(own, path) == 1 && holders(path).is_empty()
}

/// A lock of `kind` on `length` bytes from `start` on; on all of them for a length of 0.
fn range(kind: libc::c_int, start: i64, length: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

/// Bytes that QEMU locks: 100 and more for what a program does with an image (0 reads it, 1 writes it,
/// 3 resizes it), 200 and more for what it lets nobody else do. All are locks for reading, which only
/// a question for a lock for writing meets.
const QEMU_READS: i64 = 100;
const QEMU_WRITES: [i64; 2] = [101, 103];
const QEMU_NO_READERS: i64 = 200;
const QEMU_NO_WRITERS: [i64; 2] = [201, 203];

/// Whether another program writes a file, as far as its locks tell. If none does, those that look
/// (QEMU's) are kept from beginning to, for as long as the file is open.
pub fn is_written(file: BorrowedFd<'_>) -> bool {
    // First the locks, as QEMU does: of two that begin at once, neither may miss the other.
    for byte in [QEMU_READS].into_iter().chain(QEMU_NO_WRITERS) {
        // Where there are no locks nobody can have any.
        let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte, 1)));
    }
    let writes = |byte| is_held(file, range(libc::F_WRLCK, byte, 1));
    is_held(file, range(libc::F_RDLCK, 0, 0))
        || QEMU_WRITES.into_iter().chain([QEMU_NO_READERS]).any(writes)
}

/// Whether another program uses a file, as far as its locks tell.
pub fn is_used(file: BorrowedFd<'_>) -> bool {
    is_held(file, range(libc::F_WRLCK, 0, 0))
}

/// The processes that have the file open, as `name (pid)`, as far as this one may look: an OFD lock
/// doesn't tell its owner.
pub fn holders(path: &Path) -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let other = pid != std::process::id() && opens(&entry.path(), path) > 0;
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            other.then(|| format!("{} ({pid})", name.trim_end()))
        })
        .collect()
}

/// How many descriptors of a process, given by its folder, are of this file.
fn opens(process: &Path, file: &Path) -> usize {
    // Not asking its file system: one that hangs, and that this is not about, would hang us too.
    let identity = |path: &Path| {
        let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::INO)?;
        Ok::<_, Errno>((found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
    };
    let Ok(wanted) = identity(file) else { return 0 };
    let same = |entry: &fs::DirEntry| identity(&entry.path()) == Ok(wanted);
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    descriptors.filter(same).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{read_blocks, read_exact_at, write_all_at};
    use crate::wait::Wait;

    fn folder() -> (tempfile::TempDir, FileFolder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = FileFolder::new(dir.path());
        (dir, folder)
    }

    #[test]
    fn punched_and_zeroed_ranges_read_as_zeros_and_holes_are_found() {
        let (_dir, folder) = folder();
        let file = folder.create("a").unwrap();
        file.set_length(1 << 20).unwrap();
        write_all_at(&*file, &[7; 3 * 4096], 4096).unwrap();
        file.punch(8192, 4096).unwrap();
        file.zero(12288, 4096).unwrap();
        let mut buf = [1; 5 * 4096];
        read_exact_at(&*file, &mut buf, 0).unwrap();
        assert!(buf[4096..8192].iter().all(|&b| b == 7));
        assert!(buf[8192..].iter().all(|&b| b == 0));
        assert_eq!(file.next_data(0).unwrap(), Some(4096));
        assert_eq!(file.next_hole(4096).unwrap(), 8192);
        assert_eq!(file.next_data(1 << 19).unwrap(), None);
        read_blocks(&*file, 0, (&mut buf).into(), Wait::Never).unwrap();
        assert!(read_exact_at(&*file, &mut buf, (1 << 20) - 1).is_err());
    }

    #[test]
    fn one_writer_or_many_readers() {
        let (_dir, folder) = folder();
        let writer = folder.create("a").unwrap();
        let reader = folder.open("a", Access::Read).unwrap();
        let other = folder.open("a", Access::Read).unwrap();
        writer.lock(Lock::Exclusive).unwrap();
        assert_eq!(reader.lock(Lock::Shared).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        writer.lock(Lock::Shared).unwrap();
        reader.lock(Lock::Shared).unwrap();
        other.lock(Lock::Shared).unwrap();
        assert_eq!(writer.lock(Lock::Exclusive).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop((reader, other));
        writer.lock(Lock::Exclusive).unwrap();
    }

    #[test]
    fn names_stay_inside_the_folder_and_links_are_not_followed() {
        let (dir, folder) = folder();
        for name in ["", ".", "..", "../a", "/etc/passwd", "a/b"] {
            assert!(folder.open(name, Access::Read).is_err(), "{name}");
        }
        folder.create("real").unwrap();
        std::os::unix::fs::symlink(dir.path().join("real"), dir.path().join("link")).unwrap();
        assert!(folder.open("real", Access::Read).is_ok());
        assert!(folder.open("link", Access::Read).is_err());
        folder.link("real", "twin").unwrap();
        assert!(folder.same_file("real", "twin").unwrap());
        assert!(!folder.same_file("real", "missing").unwrap());
        assert!(folder.link("real", "twin").is_err());
    }

    #[test]
    fn the_holder_of_a_file_is_found_by_name() {
        let (dir, folder) = folder();
        folder.create("held").unwrap();
        let path = dir.path().join("held");
        assert!(holders(&path).is_empty());
        let stdin = File::open(&path).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").stdin(stdin).spawn().unwrap();
        let found = holders(&path);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, [format!("sleep ({})", child.id())]);
    }
}

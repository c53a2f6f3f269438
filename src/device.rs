//! The block device seen by its users: what an NBD export, a benchmark or a test needs of a chain.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::fstat;
use rustix::process::{getegid, geteuid};

use crate::error::{Error, ErrorKind, Result};
use crate::wait::waited;

// What the calls below take and answer, and what a front end may know of the grain.
pub use crate::memory::{Gather, Scatter, Stretch};
pub use crate::types::BLOCK_SIZE;
pub use crate::wait::{Attempt, NotDone, Wait};

/// How a range reads, as far as the allocation bitmaps and the host file system tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never zero.
    pub length: u64,
    /// Whether the range is known to cost no space and to read as zeros.
    pub hole: bool,
}

/// Where a range of a device stands side by side in a file of the host.
#[derive(Debug)]
pub struct HostRange {
    /// The file, open for reading at least.
    pub file: OwnedFd,
    /// Where the range begins in it, in bytes.
    pub offset: u64,
}

/// How much an [`Device::extents`] call may spend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Only what the bitmaps say; as cheap as a read's own lookup.
    Bitmaps,
    /// Also ask the host file system for holes in owned blocks (`SEEK_HOLE`).
    Files,
}

/// How much of a range a [`Device::prefetch`] has begun to bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// All of it.
    All,
    /// Not what is only read once it is asked for.
    InPart,
}

/// What a [`Device::zero`] call asks for beyond zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// Keep space allocated for the range, so that writing it later cannot run out of space.
    pub allocate: bool,
    /// Fail with [`ErrorKind::Unsupported`] and change nothing where it would be no faster than
    /// writing zeros.
    pub fast_only: bool,
}

/// A block device with byte addresses. Any alignment is served.
///
/// Ranges must lie inside the device ([`check_range`] is the one test for that); a range beyond it
/// fails with [`ErrorKind::OutOfRange`] and changes nothing. Concurrent calls that overlap have no
/// order among themselves.
///
/// The `try_` forms take a [`Wait`]. Unless it allows to wait they never wait for a disk, a commit or
/// what is far away: what they can't know, read or write without, maps included, they leave undone
/// and say so. (A write goes to the page cache, and once in a group takes the space that its map will
/// need: when too much is dirty, or the host's file system is at work, the kernel slows every writer
/// down.)
pub trait Device: Send + Sync {
    /// Virtual size in bytes.
    fn size(&self) -> u64;

    /// Whether every write, zero, trim and allocation fails with [`ErrorKind::ReadOnly`].
    fn read_only(&self) -> bool;

    /// Fills `into` from `offset`.
    fn try_read(&self, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt;

    /// [`Device::try_read`] that may wait.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        waited(self.try_read(offset, buf.into(), Wait::Allowed))
    }

    /// Where the bytes of a range that is not empty stand, so that they can be sent without a copy.
    /// `None` where they don't stand in one piece, where its ends are not in the page cache, or where
    /// to know it would take a wait; then a read is as good.
    fn host_range(&self, _offset: u64, _length: u64) -> Result<Option<HostRange>> {
        Ok(None)
    }

    /// Writes `from` at `offset`; durable after the next [`Device::flush`]. Answers how many bytes,
    /// from the first one on, were written before it would have had to wait: all of them where it
    /// may. The rest is unchanged. After an error any part may be written.
    fn try_write(&self, offset: u64, from: Gather<'_>, wait: Wait) -> Result<u64>;

    /// [`Device::try_write`] that may wait.
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.try_write(offset, data.into(), Wait::Allowed).map(drop)
    }

    /// Makes a range read as zeros.
    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()>;

    /// Gives the whole blocks inside a range back to the host; they read as zeros afterwards. The
    /// bytes of a partial block at either end stay as they are.
    fn trim(&self, offset: u64, length: u64) -> Result<()>;

    /// Takes space for all blocks that a range touches, so that no later write to them fails for lack
    /// of it, nor a flush because of such writes; what they hold stays. As far as the host keeps that
    /// promise for a file of its own, and until the range is trimmed or a snapshot freezes the layer
    /// that has the space. After an error a part may have it. [`ErrorKind::Unsupported`] where space
    /// can't be promised.
    fn allocate(&self, _offset: u64, _length: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "this disk can't promise space"))
    }

    /// Returns once every call that completed before this one began survives a power loss.
    fn flush(&self) -> Result<()>;

    /// Appends to `out` how the range reads, in order, at most `limit` extents; neighbours differ.
    /// Covers the whole range unless the limit cuts it short. [`Detail::Files`] always needs leave
    /// to wait.
    fn try_extents(
        &self,
        offset: u64,
        length: u64,
        detail: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
        wait: Wait,
    ) -> Attempt;

    /// [`Device::try_extents`] that may wait.
    fn extents(
        &self,
        offset: u64,
        length: u64,
        detail: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        waited(self.try_extents(offset, length, detail, limit, out, Wait::Allowed))
    }

    /// Starts to bring a range into the page cache.
    fn prefetch(&self, offset: u64, length: u64) -> Result<Prefetch>;
}

/// What a disk shows of itself where it stands as a file among others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes of the host's disk that its own layer takes.
    pub space: u64,
    /// Who may read and write it: the permission bits of its layer.
    pub mode: u32,
    /// User and group of its layer.
    pub owner: (u32, u32),
    /// When its layer was written last, in seconds since 1970 and nanoseconds.
    pub modified: (i64, u32),
}

impl Facts {
    /// Of a disk of `size` bytes that no file holds: it is this process's user's, and takes all of its
    /// size.
    pub fn without_layer(size: u64) -> Self {
        let owner = (geteuid().as_raw(), getegid().as_raw());
        Self { size, space: size, mode: 0o600, owner, modified: (0, 0) }
    }

    /// Of a disk of `size` bytes whose layer is this file, if it is one of the host's.
    ///
    /// # Errors
    /// Host errors.
    pub fn of_layer(size: u64, file: Option<BorrowedFd<'_>>) -> Result<Self> {
        let Some(file) = file else { return Ok(Self::without_layer(size)) };
        let found = fstat(file).map_err(|error| Error::io(error.into(), "looking at the layer"))?;
        Ok(Self {
            size,
            space: found.st_blocks as u64 * 512,
            mode: found.st_mode & 0o666,
            owner: (found.st_uid, found.st_gid),
            modified: (found.st_mtime, found.st_mtime_nsec as u32),
        })
    }
}

/// A device that is opened and closed.
pub trait Disk: Device {
    /// What it shows of itself as a file.
    ///
    /// # Errors
    /// Host errors.
    fn facts(&self) -> Result<Facts> {
        Ok(Facts::without_layer(self.size()))
    }

    /// Makes everything durable and lets go of all that was open, so that the same disk can be
    /// opened again. Called once, when nobody uses the device any more.
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

impl<D: Device + ?Sized> Device for Arc<D> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_only(&self) -> bool {
        (**self).read_only()
    }

    fn try_read(&self, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        (**self).try_read(offset, into, wait)
    }

    fn host_range(&self, offset: u64, length: u64) -> Result<Option<HostRange>> {
        (**self).host_range(offset, length)
    }

    fn try_write(&self, offset: u64, from: Gather<'_>, wait: Wait) -> Result<u64> {
        (**self).try_write(offset, from, wait)
    }

    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        (**self).zero(offset, length, mode)
    }

    fn trim(&self, offset: u64, length: u64) -> Result<()> {
        (**self).trim(offset, length)
    }

    fn allocate(&self, offset: u64, length: u64) -> Result<()> {
        (**self).allocate(offset, length)
    }

    fn flush(&self) -> Result<()> {
        (**self).flush()
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
        (**self).try_extents(offset, length, detail, limit, out, wait)
    }

    fn prefetch(&self, offset: u64, length: u64) -> Result<Prefetch> {
        (**self).prefetch(offset, length)
    }
}

impl<D: Disk + ?Sized> Disk for Arc<D> {
    fn facts(&self) -> Result<Facts> {
        (**self).facts()
    }

    fn close(&self) -> Result<()> {
        (**self).close()
    }
}

/// Fails with [`ErrorKind::OutOfRange`] unless `offset..offset + length` lies within `size`.
pub fn check_range(size: u64, offset: u64, length: u64) -> Result<()> {
    if offset > size || length > size - offset {
        return Err(Error::new(
            ErrorKind::OutOfRange,
            format!("{length} bytes at {offset} reach beyond the device's {size} bytes"),
        ));
    }
    Ok(())
}

/// Appends an extent to `out`, joining it with its neighbour where they say the same. Answers
/// whether there is room for it under `limit`.
pub fn push_extent(out: &mut Vec<Extent>, limit: usize, extent: Extent) -> bool {
    if extent.length == 0 {
        return true;
    }
    if let Some(last) = out.last_mut()
        && last.hole == extent.hole
    {
        last.length += extent.length;
        return true;
    }
    let room = out.len() < limit;
    if room {
        out.push(extent);
    }
    room
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_without_overflow() {
        assert!(check_range(4096, 0, 4096).is_ok());
        assert!(check_range(4096, 4096, 0).is_ok());
        for (offset, length) in [(0, 4097), (4096, 1), (4097, 0), (u64::MAX, 2), (1, u64::MAX)] {
            let error = check_range(4096, offset, length).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
        }
    }

    #[test]
    fn extents_join_and_stop_at_the_limit() {
        let mut out = Vec::new();
        let data = Extent { length: 512, hole: false };
        let hole = Extent { length: 512, hole: true };
        assert!(push_extent(&mut out, 2, data));
        assert!(push_extent(&mut out, 2, data));
        assert!(push_extent(&mut out, 2, hole));
        assert!(push_extent(&mut out, 2, hole));
        assert!(!push_extent(&mut out, 2, data));
        assert_eq!(out, [Extent { length: 1024, ..data }, Extent { length: 1024, ..hole }]);
    }
}

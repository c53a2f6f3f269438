//! The files that clients have open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::fs::{MemfdFlags, memfd_create};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::proto::SENT_AGAIN;
use crate::serve::{Lease, guard};

/// An open file.
pub struct Open {
    /// The disk.
    pub disk: Lease,
    /// Whether it may be written through this.
    pub writes: bool,
    /// Whether what is changed through this is to be durable at once.
    pub durable: bool,
}

/// Bits of [`Kept::access`].
const WRITES: u64 = 1;
const DURABLE: u64 = 2;

/// What is kept of an open file beyond the end of its server.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Kept {
    /// The request that opened it, by which one that is sent again is known; 0 where nothing is open.
    pub unique: u64,
    /// What is open.
    pub node: u64,
    /// How it is open.
    access: u64,
}

impl Kept {
    /// [`Open::writes`].
    pub fn writes(&self) -> bool {
        self.access & WRITES != 0
    }

    /// [`Open::durable`].
    pub fn durable(&self) -> bool {
        self.access & DURABLE != 0
    }
}

const SIZE: u64 = size_of::<Kept>() as u64;

/// Open files by the number that the kernel is told. What another server needs to know of them is
/// in memory of its own before anybody hears of the number.
pub struct Handles {
    open: RwLock<HashMap<u64, Arc<Open>>>,
    memory: File,
    /// Numbers that are in use in that memory, by the request that each comes from.
    taken: Mutex<Vec<Option<u64>>>,
    /// No more files are opened. Set under the lock of `taken`.
    ended: AtomicBool,
}

impl Handles {
    /// None yet.
    ///
    /// # Errors
    /// Host errors.
    pub fn new() -> io::Result<Self> {
        Self::of(File::from(memfd_create("thinply-open", MemfdFlags::CLOEXEC)?))
    }

    /// Those that another server had; none leads to a disk yet.
    ///
    /// # Errors
    /// Host errors.
    pub fn of(memory: File) -> io::Result<Self> {
        let taken =
            kept(&memory)?.into_iter().map(|kept| (kept.unique != 0).then_some(kept.unique));
        let taken = Mutex::new(taken.collect());
        Ok(Self { open: RwLock::default(), memory, taken, ended: AtomicBool::new(false) })
    }

    /// What to keep.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// What is kept: the numbers that are open, and what they stand for.
    ///
    /// # Errors
    /// Host errors.
    pub fn kept(&self) -> io::Result<Vec<(u64, Kept)>> {
        let all = (1..).zip(kept(&self.memory)?);
        Ok(all.filter(|(_, kept)| kept.unique != 0).collect())
    }

    /// Has a kept number lead to a disk again.
    pub fn restore(&self, handle: u64, open: Open) {
        let mut map = self.open.write().unwrap_or_else(PoisonError::into_inner);
        map.insert(handle, Arc::new(open));
    }

    /// A number for an open file. A request that was sent again has the one that it had before.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotConnected`] after [`Handles::end_with_none`]; host errors.
    pub fn add(&self, unique: u64, node: u64, open: Open) -> io::Result<u64> {
        let unique = unique & !SENT_AGAIN;
        let bit = |has, bit| if has { bit } else { 0 };
        let access = bit(open.writes, WRITES) | bit(open.durable, DURABLE);
        let mut taken = guard(&self.taken);
        if self.ended.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let again = taken.iter().position(|&known| known == Some(unique));
        let place = again.or_else(|| taken.iter().position(Option::is_none));
        let place = place.unwrap_or(taken.len());
        let kept = Kept { unique, node, access };
        self.memory.write_all_at(kept.as_bytes(), place as u64 * SIZE)?;
        match taken.get_mut(place) {
            Some(free) => *free = Some(unique),
            None => taken.push(Some(unique)),
        }
        drop(taken);
        let handle = place as u64 + 1;
        self.restore(handle, open);
        Ok(handle)
    }

    /// The open file of a number.
    pub fn get(&self, handle: u64) -> Option<Arc<Open>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(&handle).cloned()
    }

    /// Whether the number stands for an open file, even for one that leads nowhere.
    pub fn knows(&self, handle: u64) -> bool {
        let place = handle.checked_sub(1).and_then(|place| usize::try_from(place).ok());
        let taken = guard(&self.taken);
        place.and_then(|place| taken.get(place)).is_some_and(Option::is_some)
    }

    /// Nobody has the file open any more. The disk is let go of with what this answers.
    ///
    /// # Errors
    /// Host errors.
    pub fn release(&self, handle: u64) -> io::Result<Option<Arc<Open>>> {
        // First: once the number is free, the next file that is opened may have it.
        let open = self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle);
        if self.knows(handle) {
            let place = handle - 1;
            self.memory.write_all_at(Kept::default().as_bytes(), place * SIZE)?;
            if let Some(taken) = guard(&self.taken).get_mut(place as usize) {
                *taken = None;
            }
        }
        Ok(open)
    }

    /// Has no more files opened if none is open. Answers whether that is so.
    pub fn end_with_none(&self) -> bool {
        let taken = guard(&self.taken);
        let none = taken.iter().all(Option::is_none);
        self.ended.fetch_or(none, Ordering::Relaxed);
        none
    }

    /// Lets go of all disks. The numbers stay known.
    pub fn clear(&self) {
        let open = std::mem::take(&mut *self.open.write().unwrap_or_else(PoisonError::into_inner));
        drop(open);
    }
}

fn kept(memory: &File) -> io::Result<Vec<Kept>> {
    let length = memory.metadata()?.len();
    let count = usize::try_from(length / SIZE).map_err(io::Error::other)?;
    let mut all = vec![Kept::default(); count];
    memory.read_exact_at(all.as_mut_bytes(), 0)?;
    Ok(all)
}

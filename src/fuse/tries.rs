//! Requests that were sent again, and how many servers have died at each: one that ends every server
//! must not be tried for ever.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};
use zerocopy::{FromZeros, IntoBytes};

use super::proto::SENT_AGAIN;

/// So many servers may die at a request.
const MOST: u64 = 3;
/// Number and count.
type Entry = [u64; 2];
const SIZE: u64 = size_of::<Entry>() as u64;

/// Counts in memory that outlives this server.
pub struct Tries {
    memory: File,
    /// How many servers had begun a request and died, by its number.
    before: HashMap<u64, u64>,
    /// Entries that this one has written.
    written: AtomicU64,
}

impl Tries {
    /// Of a mount that was made just now.
    ///
    /// # Errors
    /// Host errors.
    pub fn new() -> io::Result<Self> {
        Self::of(File::from(memfd_create("thinply-tries", MemfdFlags::CLOEXEC)?))
    }

    /// Of one that another server had.
    ///
    /// # Errors
    /// Host errors.
    pub fn of(memory: File) -> io::Result<Self> {
        let count = usize::try_from(memory.metadata()?.len() / SIZE).map_err(io::Error::other)?;
        let mut entries = vec![Entry::new_zeroed(); count];
        memory.read_exact_at(entries.as_mut_bytes(), 0)?;
        memory.set_len(0)?;
        let before = entries.into_iter().map(|[unique, count]| (unique, count)).collect();
        Ok(Self { memory, before, written: AtomicU64::new(0) })
    }

    /// What to keep.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Notes that a request is begun. Answers whether it may be: not where too many have died at it.
    ///
    /// # Errors
    /// Host errors.
    pub fn begin(&self, unique: u64) -> io::Result<bool> {
        if unique & SENT_AGAIN == 0 {
            return Ok(true);
        }
        let unique = unique & !SENT_AGAIN;
        // One died before anybody counted.
        let count = self.before.get(&unique).unwrap_or(&0) + 1;
        let place = self.written.fetch_add(1, Ordering::Relaxed);
        self.memory.write_all_at([unique, count].as_bytes(), place * SIZE)?;
        Ok(count < MOST)
    }

    /// Notes that none that dies from now on dies at a request.
    ///
    /// # Errors
    /// Host errors.
    pub fn forget(&self, unique: u64) -> io::Result<()> {
        if unique & SENT_AGAIN == 0 {
            return Ok(());
        }
        let place = self.written.fetch_add(1, Ordering::Relaxed);
        self.memory.write_all_at([unique & !SENT_AGAIN, 0].as_bytes(), place * SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_ends_every_server_is_given_up() {
        let mut tries = Tries::new().unwrap();
        assert!(tries.begin(8).unwrap());
        for may in [true, true, false] {
            let memory = File::from(tries.memory().try_clone_to_owned().unwrap());
            tries = Tries::of(memory).unwrap();
            assert_eq!(tries.begin(8 | SENT_AGAIN).unwrap(), may);
            assert!(tries.begin(10).unwrap());
        }
        // One that only waits is as if it had come just now.
        tries.begin(14 | SENT_AGAIN).unwrap();
        for _ in 0..5 {
            let memory = File::from(tries.memory().try_clone_to_owned().unwrap());
            tries = Tries::of(memory).unwrap();
            assert!(tries.begin(14 | SENT_AGAIN).unwrap());
            tries.forget(14 | SENT_AGAIN).unwrap();
        }
        // Others begin at their first.
        assert!(tries.begin(12 | SENT_AGAIN).unwrap());
    }
}

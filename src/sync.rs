//! The locks and threads of the library, and small helpers for state that threads share.
//!
//! With `--cfg simulation` they are those of a scheduler that decides which thread goes on at each
//! lock, from a seed (`tests/crash/simulation.rs`).

use std::io;
use std::sync::{OnceLock, PoisonError};

use crate::wait::Attempt;

#[cfg(simulation)]
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
#[cfg(simulation)]
use shuttle::thread;
#[cfg(not(simulation))]
pub use std::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
#[cfg(not(simulation))]
use std::thread;

/// Stack of the threads that serve, in bytes; only what is touched costs memory.
const STACK: usize = 512 << 10;

/// Starts a thread that nobody waits for.
pub fn spawn(name: &str, act: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name(name.into()).stack_size(STACK);
    thread.spawn(act).map(drop)
}

/// Locks a mutex. A panic elsewhere is that thread's affair: every critical section in this crate
/// leaves its data consistent at each step.
pub fn guard<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const LEAF: usize = 1024;

/// A table whose entries are made on first use and then read without a lock. Its memory follows
/// the entries in use; an unused one costs 1/64 of a byte.
#[derive(Debug)]
pub struct LazyTable<T> {
    leaves: Vec<OnceLock<Box<[OnceLock<T>]>>>,
}

impl<T> LazyTable<T> {
    /// A table of at least `length` entries.
    pub fn new(length: u64) -> Self {
        let mut table = Self { leaves: Vec::new() };
        table.resize(length);
        table
    }

    /// Changes the length. Entries below it keep their values, all others are forgotten.
    pub fn resize(&mut self, length: u64) {
        let length = length as usize;
        self.leaves.resize_with(length.div_ceil(LEAF), OnceLock::new);
        if let Some(last) = self.leaves.get_mut(length / LEAF).and_then(OnceLock::get_mut) {
            last[length % LEAF..].iter_mut().for_each(|entry| drop(entry.take()));
        }
    }

    /// The entry at `index`; made by `make` if this is its first use. Threads that race make it more
    /// than once, and all get the one that was first.
    ///
    /// # Panics
    /// Where `index` is beyond the length.
    pub fn get(&self, index: u64, make: impl FnOnce() -> Attempt<T>) -> Attempt<&T> {
        let (leaf, place) = (index as usize / LEAF, index as usize % LEAF);
        let known = self.leaves[leaf].get().and_then(|leaf| leaf[place].get());
        if let Some(value) = known {
            return Ok(value);
        }
        let made = make()?;
        let leaf = self.leaves[leaf]
            .get_or_init(|| std::iter::repeat_with(OnceLock::new).take(LEAF).collect());
        Ok(leaf[place].get_or_init(|| made))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait::NotDone;

    #[test]
    fn entries_are_made_once_and_live_until_they_are_cut_off() {
        let mut table = LazyTable::new(3);
        let made = |table: &LazyTable<u32>, index, value| *table.get(index, || Ok(value)).unwrap();
        assert!(matches!(table.get(2, || Err(NotDone::WouldWait)), Err(NotDone::WouldWait)));
        assert_eq!(made(&table, 2, 7), 7);
        assert_eq!(table.get(2, || Err(NotDone::WouldWait)).unwrap(), &7);
        table.resize(5000);
        assert_eq!(made(&table, 2, 8), 7);
        assert_eq!(made(&table, 4999, 9), 9);
        table.resize(2);
        table.resize(3);
        assert_eq!(made(&table, 2, 8), 8, "cut off, so forgotten");
    }
}

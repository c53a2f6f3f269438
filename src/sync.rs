//! The locks of the engine, and small helpers for state that threads share.
//!
//! With `--cfg simulation` the locks are those of a scheduler that decides which thread goes on at
//! each of them, from a seed (`tests/crash/simulation.rs`).

use std::sync::{OnceLock, PoisonError};

#[cfg(simulation)]
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
#[cfg(not(simulation))]
pub use std::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};

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

    /// The entry at `index`, made by `make` if this is its first use. Threads that race make it
    /// more than once, and all get the one that was first.
    ///
    /// # Panics
    /// Where `index` is beyond the length.
    pub fn get_or_try_make<E>(
        &self,
        index: u64,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<&T, E> {
        let (leaf, place) = (index as usize / LEAF, index as usize % LEAF);
        let leaf = self.leaves[leaf]
            .get_or_init(|| std::iter::repeat_with(OnceLock::new).take(LEAF).collect());
        if let Some(value) = leaf[place].get() {
            return Ok(value);
        }
        let made = make()?;
        Ok(leaf[place].get_or_init(|| made))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_made_once_and_live_until_they_are_cut_off() {
        let mut table = LazyTable::new(3);
        assert_eq!(table.get_or_try_make(2, || Err(())), Err(()));
        assert_eq!(table.get_or_try_make(2, || Ok::<_, ()>(7)), Ok(&7));
        table.resize(5000);
        assert_eq!(table.get_or_try_make(2, || Ok::<_, ()>(8)), Ok(&7));
        assert_eq!(table.get_or_try_make(4999, || Ok::<_, ()>(9)), Ok(&9));
        table.resize(2);
        table.resize(3);
        assert_eq!(table.get_or_try_make(2, || Ok::<_, ()>(8)), Ok(&8), "cut off, so forgotten");
    }
}

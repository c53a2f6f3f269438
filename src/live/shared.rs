//! A fresh map in memory that several processes share, one after the other.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom, fallocate, ftruncate, memfd_create, seek};
use rustix::io::Errno;

use super::keeper::FreshMap;
use crate::sync::{RwLock, RwLockReadGuard};
use crate::types::{GROUP_WORDS, Group, Word};

const WORD: u64 = size_of::<u64>() as u64;

/// Marks in a memory file: whoever has its descriptor has the marks, whatever becomes of the process
/// that set them. A group takes a page of it once it is reserved.
pub struct SharedMap {
    memory: File,
    map: RwLock<MmapRaw>,
    release: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for SharedMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMap").field("memory", &self.memory).finish_non_exhaustive()
    }
}

fn map(memory: &File) -> io::Result<MmapRaw> {
    let length = memory.metadata()?.len();
    let length = usize::try_from(length).map_err(io::Error::other)?;
    MmapOptions::new().len(length).map_raw(memory)
}

impl SharedMap {
    /// A new one without marks, for so many groups. `release` hears that nobody needs it any more.
    ///
    /// # Errors
    /// Host errors.
    pub fn new(groups: u64, release: impl Fn() + Send + Sync + 'static) -> io::Result<Self> {
        let memory = File::from(memfd_create("thinply-fresh", MemfdFlags::CLOEXEC)?);
        ftruncate(&memory, groups * GROUP_WORDS * WORD)?;
        Self::open(memory, release)
    }

    /// One that another process has made.
    ///
    /// # Errors
    /// Host errors; for a file that is empty too.
    pub fn open(memory: File, release: impl Fn() + Send + Sync + 'static) -> io::Result<Self> {
        let map = RwLock::new(map(&memory)?);
        Ok(Self { memory, map, release: Box::new(release) })
    }

    /// What to keep of it.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    fn map(&self) -> RwLockReadGuard<'_, MmapRaw> {
        self.map.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FreshMap for SharedMap {
    fn reserve(&self, group: Group) -> io::Result<()> {
        let length = GROUP_WORDS * WORD;
        // Otherwise the first mark would take the memory, and where there is none a signal end us.
        Ok(fallocate(&self.memory, FallocateFlags::KEEP_SIZE, group.0 * length, length)?)
    }

    fn mark(&self, word: Word, mask: u64) {
        let map = self.map();
        let at = (word.0 * WORD) as usize;
        assert!(at + size_of::<u64>() <= map.len(), "a mark beyond the map");
        // SAFETY: inside the mapping, as checked, which lives as long as the guard; aligned, as a
        // mapping begins at a page. Everybody who writes there does so atomically.
        let entry = unsafe { AtomicU64::from_ptr(map.as_mut_ptr().add(at).cast()) };
        entry.fetch_or(mask, Ordering::Release);
    }

    fn marks(&self) -> io::Result<Vec<(Word, u64)>> {
        let (mut found, mut at) = (Vec::new(), 0);
        let mut page = vec![0; 64 << 10];
        loop {
            match seek(&self.memory, SeekFrom::Data(at)) {
                // Pages are whole words.
                Ok(data) => at = data,
                Err(Errno::NXIO) => return Ok(found),
                Err(error) => return Err(error.into()),
            }
            let count = self.memory.read_at(&mut page, at)?;
            let words = page[..count].chunks_exact(size_of::<u64>()).map(|word| {
                let mut bytes = [0; size_of::<u64>()];
                bytes.copy_from_slice(word);
                u64::from_ne_bytes(bytes)
            });
            let marked = (at / WORD..).map(Word).zip(words).filter(|(_, mask)| *mask != 0);
            found.extend(marked);
            at += count as u64;
        }
    }

    fn grow(&self, groups: u64) -> io::Result<()> {
        let mut held = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let length = groups * GROUP_WORDS * WORD;
        if length > held.len() as u64 {
            ftruncate(&self.memory, length)?;
            *held = map(&self.memory)?;
        }
        Ok(())
    }

    fn release(&self) {
        (self.release)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_by_whoever_has_the_memory() {
        let map = SharedMap::new(3000, || {}).unwrap();
        assert_eq!(map.marks().unwrap(), []);
        for group in [0, 1, 2999] {
            map.reserve(Group(group)).unwrap();
        }
        let last = Word(3000 * GROUP_WORDS - 1);
        for (word, mask) in [(Word(1), 1), (Word(1), 1 << 63), (Word(GROUP_WORDS), 6), (last, 5)] {
            map.mark(word, mask);
        }
        map.grow(4000).unwrap();
        map.mark(Word(4000 * GROUP_WORDS - 1), 9);
        let expected = [
            (Word(1), 1 | 1 << 63),
            (Word(GROUP_WORDS), 6),
            (last, 5),
            (Word(4000 * GROUP_WORDS - 1), 9),
        ];
        assert_eq!(map.marks().unwrap(), expected);
        let memory = File::from(map.memory().try_clone_to_owned().unwrap());
        drop(map);
        assert_eq!(SharedMap::open(memory, || {}).unwrap().marks().unwrap(), expected);
    }
}

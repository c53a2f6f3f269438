//! Files in memory, for tests, fuzzing and simulations: sparse, with locks, gone with the folder.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use bitvec::vec::BitVec;
use memmap2::MmapMut;

use super::{Access, Folder, Lock, Rights, Share, Storage, copy_range};
use crate::memory::{Gather, Scatter};
use crate::sync::{Mutex, RwLock, RwLockReadGuard, guard};

const PAGE: u64 = 4096;

/// A sparse array of bytes: an anonymous map costs memory only where it was written.
#[derive(Debug)]
struct Content {
    map: MmapMut,
    length: u64,
    /// One bit a page that may hold data.
    data: BitVec,
}

impl Content {
    fn new() -> io::Result<Self> {
        Ok(Self { map: MmapMut::map_anon(PAGE as usize)?, length: 0, data: BitVec::new() })
    }

    fn set_length(&mut self, length: u64) -> io::Result<()> {
        if length < self.length {
            self.clear(length, self.length);
        }
        if length > self.map.len() as u64 {
            let mut map = MmapMut::map_anon(length.next_multiple_of(PAGE) as usize)?;
            for page in self.data.iter_ones() {
                let range = page * PAGE as usize..(page + 1) * PAGE as usize;
                map[range.clone()].copy_from_slice(&self.map[range]);
            }
            self.map = map;
        }
        self.length = length;
        self.data.resize(length.div_ceil(PAGE) as usize, false);
        Ok(())
    }

    /// Zeroes `from..to`; pages that lie wholly inside become holes.
    fn clear(&mut self, from: u64, to: u64) {
        let (first, end) = (from / PAGE, to.min(self.length).div_ceil(PAGE));
        for page in first..end {
            if self.data[page as usize] {
                let (start, stop) = (from.max(page * PAGE), to.min((page + 1) * PAGE));
                self.map[start as usize..stop as usize].fill(0);
                let whole = start == page * PAGE && stop == (page + 1) * PAGE;
                self.data.set(page as usize, !whole);
            }
        }
    }

    fn read(&self, mut into: Scatter<'_>, offset: u64) -> usize {
        let end = self.length.min(offset.saturating_add(into.len() as u64));
        let count = end.saturating_sub(offset) as usize;
        if count > 0 {
            into.copy_from(&self.map[offset as usize..][..count]);
        }
        count
    }

    fn write(&mut self, from: Gather<'_>, offset: u64) -> io::Result<()> {
        let end = offset + from.len() as u64;
        if end > self.length {
            self.set_length(end)?;
        }
        from.copy_to(&mut self.map[offset as usize..end as usize]);
        self.data[(offset / PAGE) as usize..end.div_ceil(PAGE) as usize].fill(true);
        Ok(())
    }
}

/// What all handles of one file share.
#[derive(Debug)]
struct Inode {
    content: RwLock<Content>,
    /// Shared holders, or -1 for an exclusive one.
    locks: Mutex<i32>,
}

/// One open of a file; holds at most one lock.
#[derive(Debug)]
struct Handle {
    path: PathBuf,
    inode: Arc<Inode>,
    access: Access,
    held: Mutex<Option<Lock>>,
}

impl Handle {
    fn content(&self) -> RwLockReadGuard<'_, Content> {
        self.inode.content.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Content) -> io::Result<T>) -> io::Result<T> {
        if self.access == Access::Read {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        change(&mut self.inode.content.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn release(&self, held: &mut Option<Lock>) {
        let mut locks = guard(&self.inode.locks);
        match held.take() {
            Some(Lock::Exclusive) => *locks = 0,
            Some(Lock::Shared) => *locks -= 1,
            None => {}
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.release(&mut guard(&self.held));
    }
}

impl Storage for Handle {
    fn path(&self) -> &Path {
        &self.path
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.content().length)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.content().data.count_ones() as u64 * PAGE)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.change(|content| content.set_length(length))
    }

    fn read_at(&self, into: Scatter<'_>, offset: u64) -> io::Result<usize> {
        Ok(self.content().read(into, offset))
    }

    fn read_cached_at(&self, into: Scatter<'_>, offset: u64) -> io::Result<usize> {
        self.read_at(into, offset)
    }

    fn write_at(&self, from: Gather<'_>, offset: u64) -> io::Result<usize> {
        self.change(|content| content.write(from, offset))?;
        Ok(from.len())
    }

    fn clone_range(
        &self,
        offset: u64,
        length: u64,
        source: &dyn Storage,
        from: u64,
    ) -> io::Result<Share> {
        copy_range(self, offset, length, source, from).map(|()| Share::Done)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(|content| {
            content.clear(offset, offset + length);
            Ok(())
        })
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.punch(offset, length)
    }

    fn allocate(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn drop_cache(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn start_writeback(&self) -> io::Result<()> {
        Ok(())
    }

    fn prefetch(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let content = self.content();
        let first = ((offset / PAGE) as usize).min(content.data.len());
        let page = content.data[first..].first_one();
        Ok(page.map(|n| offset.max((first + n) as u64 * PAGE)).filter(|&at| at < content.length))
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        let content = self.content();
        let first = ((offset / PAGE) as usize).min(content.data.len());
        let page = content.data[first..].first_zero();
        let at = page.map_or(content.length, |n| offset.max((first + n) as u64 * PAGE));
        Ok(at.min(content.length))
    }

    fn lock(&self, lock: Lock) -> io::Result<()> {
        let mut held = guard(&self.held);
        let mut locks = guard(&self.inode.locks);
        let others = match *held {
            Some(Lock::Exclusive) => 0,
            Some(Lock::Shared) => *locks - 1,
            None => *locks,
        };
        match lock {
            Lock::Shared if others >= 0 => *locks = others + 1,
            Lock::Exclusive if others == 0 => *locks = -1,
            _ => return Err(io::ErrorKind::WouldBlock.into()),
        }
        *held = Some(lock);
        Ok(())
    }
}

/// A folder of files in memory; clones share them.
#[derive(Clone, Debug)]
pub struct MemoryFolder {
    path: PathBuf,
    files: Arc<Mutex<BTreeMap<String, Arc<Inode>>>>,
}

impl MemoryFolder {
    /// An empty folder called `name` in messages.
    pub fn new(name: impl Into<PathBuf>) -> Self {
        Self { path: name.into(), files: Arc::default() }
    }

    fn find(&self, name: &str) -> Option<Arc<Inode>> {
        guard(&self.files).get(name).cloned()
    }

    fn handle(&self, name: &str, inode: Arc<Inode>, access: Access) -> Arc<dyn Storage> {
        Arc::new(Handle { path: self.path.join(name), inode, access, held: Mutex::default() })
    }

    fn insert_new(&self, name: &str, inode: Arc<Inode>) -> io::Result<()> {
        match guard(&self.files).entry(name.to_owned()) {
            std::collections::btree_map::Entry::Occupied(_) => {
                Err(io::ErrorKind::AlreadyExists.into())
            }
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(inode);
                Ok(())
            }
        }
    }
}

impl Folder for MemoryFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        let inode = self.find(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(self.handle(name, inode, access))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let inode = Arc::new(Inode { content: RwLock::new(Content::new()?), locks: Mutex::new(0) });
        self.insert_new(name, inode.clone())?;
        Ok(self.handle(name, inode, Access::Write))
    }

    fn creating(&self, _: Rights) -> Arc<dyn Folder> {
        Arc::new(self.clone())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(guard(&self.files).keys().cloned().collect())
    }

    fn same_file(&self, a: &str, b: &str) -> io::Result<bool> {
        Ok(self.find(a).zip(self.find(b)).is_some_and(|(a, b)| Arc::ptr_eq(&a, &b)))
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let inode = self.find(from).ok_or(io::ErrorKind::NotFound)?;
        self.insert_new(to, inode)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = guard(&self.files);
        let inode = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), inode);
        Ok(())
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = guard(&self.files);
        if files.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), inode);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        guard(&self.files).remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn remove_folder(&self, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::NotADirectory.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{read_exact_at, write_all_at};

    #[test]
    fn content_is_sparse_and_survives_growth_and_cuts() {
        let folder = MemoryFolder::new("m");
        let file = folder.create("a").unwrap();
        file.set_length(1 << 30).unwrap();
        write_all_at(&*file, &[7; 8192], 4096).unwrap();
        file.set_length(1 << 31).unwrap();
        file.punch(4096, 4096).unwrap();
        assert_eq!(file.next_data(0).unwrap(), Some(8192));
        assert_eq!(file.next_hole(8192).unwrap(), 12288);
        file.set_length(8292).unwrap();
        file.set_length(1 << 20).unwrap();
        let mut buf = [1; 12288];
        read_exact_at(&*file, &mut buf, 0).unwrap();
        assert!(buf[..8192].iter().all(|&b| b == 0) && buf[8292..].iter().all(|&b| b == 0));
        assert!(buf[8192..8292].iter().all(|&b| b == 7));
    }

    #[test]
    fn one_writer_or_many_readers() {
        let folder = MemoryFolder::new("m");
        let writer = folder.create("a").unwrap();
        let reader = folder.open("a", Access::Read).unwrap();
        writer.lock(Lock::Exclusive).unwrap();
        assert!(reader.lock(Lock::Shared).is_err());
        writer.lock(Lock::Shared).unwrap();
        reader.lock(Lock::Shared).unwrap();
        assert!(writer.lock(Lock::Exclusive).is_err());
        drop(reader);
        writer.lock(Lock::Exclusive).unwrap();
    }
}

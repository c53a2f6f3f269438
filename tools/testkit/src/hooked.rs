//! A folder whose files ask before each call, so that a test can fail it, cut it short, or do
//! something in its middle.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use thinply::memory::{Gather, Scatter};
use thinply::storage::{Access, Folder, Lock, Rights, Share, Storage, copy_range, write_all_at};

/// A call on the folder or a file.
#[derive(Clone, Copy, Debug)]
pub enum Call<'a> {
    Open {
        name: &'a str,
    },
    Remove {
        name: &'a str,
    },
    Read {
        name: &'a str,
        offset: u64,
    },
    /// A read from the page cache alone.
    ReadCached {
        name: &'a str,
        offset: u64,
    },
    Write {
        name: &'a str,
        offset: u64,
    },
    Allocate {
        offset: u64,
        length: u64,
    },
    Prefetch {
        name: &'a str,
        offset: u64,
        length: u64,
    },
    Sync,
}

/// Answers how many bytes a call may do at most.
type Judge = dyn Fn(Call<'_>) -> io::Result<usize> + Send + Sync;

#[derive(Default)]
struct Shared {
    judge: Mutex<Option<Arc<Judge>>>,
    after_sync: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    without_holes: AtomicBool,
    without_numbers: AtomicBool,
}

/// Passes everything on to the folder inside.
pub struct Hooked {
    inner: Arc<dyn Folder>,
    shared: Arc<Shared>,
}

struct File {
    inner: Arc<dyn Storage>,
    shared: Arc<Shared>,
}

impl Shared {
    fn ask(&self, call: Call<'_>) -> io::Result<usize> {
        let judge = self.judge.lock().unwrap().clone();
        judge.map_or(Ok(usize::MAX), |judge| judge(call))
    }
}

impl Hooked {
    pub fn new(inner: Arc<dyn Folder>) -> Self {
        Self { inner, shared: Arc::default() }
    }

    /// Runs `hook` once, after the data of the next sync is on the disk and before it returns.
    pub fn at_next_sync(&self, hook: impl FnOnce() + Send + 'static) {
        *self.shared.after_sync.lock().unwrap() = Some(Box::new(hook));
    }

    /// Asks `judge` before each call from now on.
    pub fn on_calls(&self, judge: impl Fn(Call<'_>) -> io::Result<usize> + Send + Sync + 'static) {
        *self.shared.judge.lock().unwrap() = Some(Arc::new(judge));
    }

    /// From now on punching writes zeros, and files claim to have no holes.
    pub fn without_holes(&self) {
        self.shared.without_holes.store(true, Ordering::Relaxed);
    }

    /// From now on two names never seem to be those of one file.
    pub fn without_numbers(&self) {
        self.shared.without_numbers.store(true, Ordering::Relaxed);
    }

    fn ask(&self, call: Call<'_>) -> io::Result<()> {
        self.shared.ask(call).map(drop)
    }

    fn wrap(&self, inner: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(File { inner, shared: self.shared.clone() })
    }
}

impl fmt::Debug for Hooked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Folder for Hooked {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        self.ask(Call::Open { name })?;
        Ok(self.wrap(self.inner.open(name, access)?))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        Ok(self.wrap(self.inner.create(name)?))
    }

    fn creating(&self, rights: Rights) -> Arc<dyn Folder> {
        Arc::new(Self { inner: self.inner.creating(rights), shared: self.shared.clone() })
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn same_file(&self, a: &str, b: &str) -> io::Result<bool> {
        let known = a == b || !self.shared.without_numbers.load(Ordering::Relaxed);
        Ok(known && self.inner.same_file(a, b)?)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.link(from, to)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename_new(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.ask(Call::Remove { name })?;
        self.inner.remove(name)
    }

    fn remove_folder(&self, name: &str) -> io::Result<()> {
        self.inner.remove_folder(name)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }
}

impl File {
    fn name(&self) -> &str {
        self.inner.path().file_name().and_then(|name| name.to_str()).unwrap_or("")
    }

    fn has_holes(&self) -> bool {
        !self.shared.without_holes.load(Ordering::Relaxed)
    }

    fn clear(
        &self,
        offset: u64,
        length: u64,
        host: impl FnOnce(&dyn Storage) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.has_holes() {
            return host(&*self.inner);
        }
        write_all_at(&*self.inner, &vec![0; length as usize], offset)
    }
}

impl Storage for File {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn length(&self) -> io::Result<u64> {
        self.inner.length()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.inner.set_length(length)
    }

    fn read_at(&self, mut into: Scatter<'_>, offset: u64) -> io::Result<usize> {
        let allowed = self.shared.ask(Call::Read { name: self.name(), offset })?.min(into.len());
        self.inner.read_at(into.range(0, allowed), offset)
    }

    fn read_cached_at(&self, mut into: Scatter<'_>, offset: u64) -> io::Result<usize> {
        let call = Call::ReadCached { name: self.name(), offset };
        let allowed = self.shared.ask(call)?.min(into.len());
        self.inner.read_cached_at(into.range(0, allowed), offset)
    }

    fn write_at(&self, from: Gather<'_>, offset: u64) -> io::Result<usize> {
        let allowed = self.shared.ask(Call::Write { name: self.name(), offset })?.min(from.len());
        self.inner.write_at(from.range(0, allowed), offset)
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
        self.clear(offset, length, |file| file.punch(offset, length))
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.clear(offset, length, |file| file.zero(offset, length))
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.shared.ask(Call::Allocate { offset, length })?;
        self.inner.allocate(offset, length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.shared.ask(Call::Sync)?;
        self.inner.sync_data()?;
        let hook = self.shared.after_sync.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
        Ok(())
    }

    fn drop_cache(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.drop_cache(offset, length)
    }

    fn start_writeback(&self) -> io::Result<()> {
        self.inner.start_writeback()
    }

    fn prefetch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.shared.ask(Call::Prefetch { name: self.name(), offset, length })?;
        self.inner.prefetch(offset, length)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match self.has_holes() {
            true => self.inner.next_data(offset),
            false => Ok((offset < self.length()?).then_some(offset)),
        }
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        if self.has_holes() { self.inner.next_hole(offset) } else { self.length() }
    }

    fn lock(&self, lock: Lock) -> io::Result<()> {
        self.inner.lock(lock)
    }
}

//! A folder that loses power: it keeps, beside what is durable, every value that a sector was given
//! since, and at a crash each sector gets one of them (`format-spec.md`, "Media assumptions").

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use thinply::storage::{Access, Folder, Lock, Storage};

const SECTOR: u64 = 512;
type Sector = [u8; SECTOR as usize];

/// A small generator with a seed to repeat a run by.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % bound
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

/// One file: durable sectors, and the values each got since the last sync, oldest first.
#[derive(Clone, Debug, Default)]
struct Content {
    durable: BTreeMap<u64, Sector>,
    pending: BTreeMap<u64, Vec<Sector>>,
    /// What a failed sync left in the page cache as if it were clean: no later sync writes it.
    ghosts: BTreeMap<u64, Sector>,
    lengths: Vec<u64>,
    exclusive: bool,
    shared: usize,
}

impl Content {
    fn length(&self) -> u64 {
        *self.lengths.last().unwrap()
    }

    fn sector(&self, number: u64) -> Sector {
        let pending = self.pending.get(&number).and_then(|values| values.last());
        let cached = pending.or(self.ghosts.get(&number));
        *cached.or(self.durable.get(&number)).unwrap_or(&[0; SECTOR as usize])
    }

    fn put(&mut self, number: u64, value: Sector) {
        if self.sector(number) != value || self.pending.contains_key(&number) {
            self.pending.entry(number).or_default().push(value);
        }
    }

    fn change(&mut self, offset: u64, length: u64, mut byte: impl FnMut(u64) -> u8) {
        let mut at = offset;
        while at < offset + length {
            let number = at / SECTOR;
            let end = ((number + 1) * SECTOR).min(offset + length);
            let mut value = self.sector(number);
            (at..end).for_each(|at| value[(at % SECTOR) as usize] = byte(at - offset));
            self.put(number, value);
            at = end;
        }
    }

    /// Only sectors that hold something; a punch can span a lot of nothing.
    fn clear(&mut self, offset: u64, end: u64) {
        let known: Vec<u64> = self
            .durable
            .range(offset / SECTOR..end.div_ceil(SECTOR))
            .map(|(&number, _)| number)
            .chain(self.ghosts.range(offset / SECTOR..end.div_ceil(SECTOR)).map(|(&n, _)| n))
            .chain(
                self.pending
                    .range(offset / SECTOR..end.div_ceil(SECTOR))
                    .map(|(&number, _)| number),
            )
            .collect();
        for number in known {
            let (from, to) = (offset.max(number * SECTOR), end.min((number + 1) * SECTOR));
            self.change(from, to - from, |_| 0);
        }
    }

    fn set_length(&mut self, length: u64) {
        if length < self.length() {
            self.clear(length, self.length());
        }
        self.lengths.push(length);
    }

    /// A sync that fails: some of it reached the media, the kernel forgets the rest.
    fn fail_sync(&mut self) {
        let arbitrary = self.pending.len() as u64;
        for (number, values) in std::mem::take(&mut self.pending) {
            let value = *values.last().unwrap();
            if number.wrapping_mul(0x9e37_79b9).wrapping_add(arbitrary) >> 7 & 1 == 0 {
                self.durable.insert(number, value);
                self.ghosts.remove(&number);
            } else {
                self.ghosts.insert(number, value);
            }
        }
    }

    fn sync(&mut self) {
        for (number, values) in std::mem::take(&mut self.pending) {
            self.ghosts.remove(&number);
            let value = *values.last().unwrap();
            if value == [0; SECTOR as usize] {
                self.durable.remove(&number);
            } else {
                self.durable.insert(number, value);
            }
        }
        self.lengths = vec![self.length()];
    }

    /// What the media hold after a power loss.
    fn crashed(&self, random: &mut Random) -> Self {
        let mut after = Self {
            durable: self.durable.clone(),
            lengths: vec![*random.pick(&self.lengths)],
            ..Self::default()
        };
        // Now and then all, or nothing, of what was not synced survives.
        let mode = random.below(8);
        for (&number, values) in &self.pending {
            let chosen = match mode {
                0 => Some(values.len() - 1),
                1 => None,
                _ => (random.below(values.len() as u64 + 1) as usize).checked_sub(1),
            };
            if let Some(chosen) = chosen {
                after.durable.insert(number, values[chosen]);
            }
        }
        let end = after.length();
        after.durable.retain(|number, _| number * SECTOR < end);
        after
    }
}

type Names = BTreeMap<String, Arc<Mutex<Content>>>;

#[derive(Debug)]
struct Disk {
    names: Names,
    /// The names after each change that is not durable yet; the durable ones first.
    history: Vec<Names>,
}

/// Calls left until something fails.
#[derive(Debug)]
struct Fuse {
    /// Until the power goes; negative: never.
    power: AtomicI64,
    /// Until one call fails; negative: never.
    fault: AtomicI64,
    /// The error number of that one.
    errno: AtomicI32,
}

impl Default for Fuse {
    fn default() -> Self {
        Self { power: AtomicI64::new(-1), fault: AtomicI64::new(-1), errno: AtomicI32::new(0) }
    }
}

/// A folder whose files may lose power.
#[derive(Clone, Debug)]
pub struct CrashFolder {
    disk: Arc<Mutex<Disk>>,
    fuse: Arc<Fuse>,
}

impl Default for CrashFolder {
    fn default() -> Self {
        let disk = Disk { names: Names::new(), history: vec![Names::new()] };
        Self { disk: Arc::new(Mutex::new(disk)), fuse: Arc::default() }
    }
}

fn tick(fuse: &Fuse) -> io::Result<()> {
    match fuse.power.load(Ordering::Relaxed) {
        0 => return Err(io::Error::other("the power is gone")),
        left if left > 0 => drop(fuse.power.fetch_sub(1, Ordering::Relaxed)),
        _ => {}
    }
    if fuse.fault.load(Ordering::Relaxed) >= 0 && fuse.fault.fetch_sub(1, Ordering::Relaxed) == 0 {
        return Err(io::Error::from_raw_os_error(fuse.errno.load(Ordering::Relaxed)));
    }
    Ok(())
}

impl CrashFolder {
    /// Lets the power go after `calls` more calls.
    pub fn light(&self, calls: u64) {
        self.fuse.power.store(calls as i64, Ordering::Relaxed);
    }

    /// The power is not going any more.
    pub fn quench(&self) {
        self.fuse.power.store(-1, Ordering::Relaxed);
    }

    /// Lets one call fail with `errno` after `calls` more calls.
    pub fn fail(&self, calls: u64, errno: i32) {
        self.fuse.errno.store(errno, Ordering::Relaxed);
        self.fuse.fault.store(calls as i64, Ordering::Relaxed);
    }

    /// Whether that call has failed.
    pub fn has_failed(&self) -> bool {
        self.fuse.fault.load(Ordering::Relaxed) < 0
    }

    /// Whether the power is gone.
    pub fn is_dark(&self) -> bool {
        self.fuse.power.load(Ordering::Relaxed) == 0
    }

    /// The folder after a power loss.
    pub fn crashed(&self, random: &mut Random) -> Self {
        let disk = self.disk.lock().unwrap();
        // Changes of names reach the media in order, as in a journaling file system.
        let names = random.pick(&disk.history).clone();
        let mut seen: Vec<(*const Mutex<Content>, Arc<Mutex<Content>>)> = Vec::new();
        let names: Names = names
            .into_iter()
            .map(|(name, content)| {
                let key = Arc::as_ptr(&content);
                let known = seen.iter().find(|(other, _)| *other == key).map(|(_, c)| c.clone());
                let after = known.unwrap_or_else(|| {
                    Arc::new(Mutex::new(content.lock().unwrap().crashed(random)))
                });
                seen.push((key, after.clone()));
                (name, after)
            })
            .collect();
        let disk = Disk { history: vec![names.clone()], names };
        Self { disk: Arc::new(Mutex::new(disk)), fuse: Arc::default() }
    }

    /// All durable bytes of a file, to see that nobody changes it.
    pub fn bytes(&self, name: &str) -> BTreeMap<u64, Sector> {
        self.disk.lock().unwrap().names[name].lock().unwrap().durable.clone()
    }

    fn change(&self, change: impl FnOnce(&mut Names) -> io::Result<()>) -> io::Result<()> {
        tick(&self.fuse)?;
        let mut disk = self.disk.lock().unwrap();
        change(&mut disk.names)?;
        let names = disk.names.clone();
        disk.history.push(names);
        Ok(())
    }

    fn find(&self, name: &str) -> Option<Arc<Mutex<Content>>> {
        self.disk.lock().unwrap().names.get(name).cloned()
    }

    fn handle(&self, name: &str, content: Arc<Mutex<Content>>) -> Arc<dyn Storage> {
        let (path, held) = (PathBuf::from(name), Mutex::new(None));
        Arc::new(CrashFile { path, content, held, fuse: self.fuse.clone() })
    }
}

impl Folder for CrashFolder {
    fn path(&self) -> &Path {
        Path::new("crash")
    }

    fn open(&self, name: &str, _access: Access) -> io::Result<Arc<dyn Storage>> {
        tick(&self.fuse)?;
        Ok(self.handle(name, self.find(name).ok_or(io::ErrorKind::NotFound)?))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let content = Content { lengths: vec![0], ..Content::default() };
        let content = Arc::new(Mutex::new(content));
        self.change(|names| match names.contains_key(name) {
            true => Err(io::ErrorKind::AlreadyExists.into()),
            false => {
                names.insert(name.to_owned(), content.clone());
                Ok(())
            }
        })?;
        Ok(self.handle(name, content))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        tick(&self.fuse)?;
        Ok(self.disk.lock().unwrap().names.keys().cloned().collect())
    }

    fn same_file(&self, a: &str, b: &str) -> io::Result<bool> {
        tick(&self.fuse)?;
        Ok(self.find(a).zip(self.find(b)).is_some_and(|(a, b)| Arc::ptr_eq(&a, &b)))
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.change(|names| {
            let content = names.get(from).cloned().ok_or(io::ErrorKind::NotFound)?;
            match names.insert(to.to_owned(), content) {
                None => Ok(()),
                Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            }
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.change(|names| {
            let content = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            names.insert(to.to_owned(), content);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.change(|names| names.remove(name).map(drop).ok_or(io::ErrorKind::NotFound.into()))
    }

    fn sync(&self) -> io::Result<()> {
        tick(&self.fuse)?;
        let mut disk = self.disk.lock().unwrap();
        disk.history = vec![disk.names.clone()];
        Ok(())
    }
}

#[derive(Debug)]
struct CrashFile {
    path: PathBuf,
    content: Arc<Mutex<Content>>,
    held: Mutex<Option<Lock>>,
    fuse: Arc<Fuse>,
}

impl CrashFile {
    fn with<T>(&self, act: impl FnOnce(&mut Content) -> T) -> io::Result<T> {
        tick(&self.fuse)?;
        Ok(act(&mut self.content.lock().unwrap()))
    }
}

impl Drop for CrashFile {
    fn drop(&mut self) {
        let mut content = self.content.lock().unwrap();
        match self.held.lock().unwrap().take() {
            Some(Lock::Exclusive) => content.exclusive = false,
            Some(Lock::Shared) => content.shared -= 1,
            None => {}
        }
    }
}

impl Storage for CrashFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn length(&self) -> io::Result<u64> {
        self.with(|content| content.length())
    }

    fn allocated(&self) -> io::Result<u64> {
        self.with(|content| {
            let pending = content.pending.keys().filter(|n| !content.durable.contains_key(n));
            (content.durable.len() + pending.count()) as u64 * SECTOR
        })
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.with(|content| content.set_length(length))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(|content| {
            let end = content.length().min(offset + buf.len() as u64);
            let count = end.saturating_sub(offset);
            let mut at = offset;
            while at < offset + count {
                let stop = ((at / SECTOR + 1) * SECTOR).min(offset + count);
                let sector = content.sector(at / SECTOR);
                buf[(at - offset) as usize..(stop - offset) as usize]
                    .copy_from_slice(&sector[(at % SECTOR) as usize..][..(stop - at) as usize]);
                at = stop;
            }
            count as usize
        })
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.with(|content| {
            content.change(offset, buf.len() as u64, |at| buf[at as usize]);
            buf.len()
        })
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.with(|content| content.clear(offset, offset + length))
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.punch(offset, length)
    }

    fn allocate(&self, _offset: u64, _length: u64) -> io::Result<()> {
        self.with(|_| ())
    }

    fn sync_data(&self) -> io::Result<()> {
        let power = self.fuse.power.load(Ordering::Relaxed);
        self.with(Content::sync).inspect_err(|_| {
            if power != 0 {
                self.content.lock().unwrap().fail_sync();
            }
        })
    }

    fn drop_cache(&self, offset: u64, length: u64) -> io::Result<()> {
        let dropped = offset / SECTOR..(offset + length).div_ceil(SECTOR);
        self.with(|content| content.ghosts.retain(|number, _| !dropped.contains(number)))
    }

    fn start_writeback(&self) -> io::Result<()> {
        self.with(|_| ())
    }

    fn prefetch(&self, _offset: u64, _length: u64) -> io::Result<()> {
        self.with(|_| ())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.with(|content| {
            let first = offset / SECTOR;
            let next = |number: Option<&u64>| number.copied().unwrap_or(u64::MAX);
            let durable = next(content.durable.range(first..).next().map(|(number, _)| number));
            let pending = next(content.pending.range(first..).next().map(|(number, _)| number));
            let number = durable.min(pending);
            (number != u64::MAX).then(|| offset.max(number * SECTOR))
        })
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.with(|content| {
            let known = |number| {
                content.durable.contains_key(&number) || content.pending.contains_key(&number)
            };
            let hole = (offset / SECTOR..).find(|&number| !known(number)).unwrap();
            offset.max(hole * SECTOR).min(content.length())
        })
    }

    fn lock(&self, lock: Lock) -> io::Result<()> {
        let mut held = self.held.lock().unwrap();
        self.with(|content| {
            let (exclusive, shared) = match *held {
                Some(Lock::Exclusive) => (false, content.shared),
                Some(Lock::Shared) => (content.exclusive, content.shared - 1),
                None => (content.exclusive, content.shared),
            };
            if exclusive || lock == Lock::Exclusive && shared > 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            content.exclusive = lock == Lock::Exclusive;
            content.shared = shared + usize::from(lock == Lock::Shared);
            *held = Some(lock);
            Ok(())
        })?
    }
}

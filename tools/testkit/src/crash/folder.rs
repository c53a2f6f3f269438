//! A folder on a [`Disk`]: it records what is done to it, loses power, and has calls fail.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thinply::memory::{Gather, Scatter};
use thinply::planted::{Bug, planted};
use thinply::storage::{Access, Folder, Lock, Rights, Share, Storage, copy_range};

use super::Random;
use super::disk::{Change, Data, Disk, Names};
use super::oracle::Note;

/// A step of a run: what was done to the disk, and what the client knows of it.
#[derive(Clone, Debug)]
pub enum Event {
    Disk(Change),
    Client(Note),
}

/// What a call that is told to fail does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Any call fails: the disk is broken.
    Io,
    /// A call that takes space, or a sync, fails: the disk is full.
    Full,
    /// A read or write handles a part.
    Short,
}

/// What a call does, as far as faults care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    /// Takes space, but can't be short.
    Allocate,
    Sync,
    Other,
}

impl Fault {
    fn concerns(self, kind: Kind) -> bool {
        match self {
            Self::Io => true,
            Self::Full => matches!(kind, Kind::Write | Kind::Allocate | Kind::Sync),
            Self::Short => matches!(kind, Kind::Read | Kind::Write),
        }
    }

    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(if self == Self::Full { 28 } else { 5 })
    }
}

/// Which call fails.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub fault: Fault,
    /// How many calls that the fault concerns come before it.
    pub after: u64,
    pub for_ever: bool,
}

#[derive(Debug, Default)]
struct State {
    disk: Disk,
    record: Option<Vec<Event>>,
    /// Exclusive holders, shared holders.
    locks: HashMap<usize, (bool, usize)>,
    /// Calls until the power goes.
    power: Option<u64>,
    fault: Option<Plan>,
    fired: bool,
    random: Random,
}

impl State {
    fn apply(&mut self, change: Change) {
        self.disk.apply(&change);
        if let Some(record) = &mut self.record {
            record.push(Event::Disk(change));
        }
    }

    /// Counts a call; whether it is the short one.
    fn enter(&mut self, kind: Kind) -> io::Result<bool> {
        match &mut self.power {
            Some(0) => return Err(io::Error::other("the power is gone")),
            Some(left) => *left -= 1,
            None => {}
        }
        let Some(plan) = self.fault.as_mut().filter(|plan| plan.fault.concerns(kind)) else {
            return Ok(false);
        };
        if plan.after > 0 {
            plan.after -= 1;
            return Ok(false);
        }
        let fault = plan.fault;
        if !plan.for_ever {
            self.fault = None;
        }
        self.fired = true;
        if fault == Fault::Short { Ok(true) } else { Err(fault.error()) }
    }

    /// How many bytes a short read or write handles: sectors stay whole.
    fn some_sectors_of(&mut self, length: usize) -> usize {
        let sectors = length as u64 / 512;
        if sectors > 1 { (1 + self.random.below(sectors - 1) as usize) * 512 } else { length }
    }
}

/// Also after a panic elsewhere, so that a failing test can clean up.
pub fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets other threads go on, where a scheduler decides which does.
fn pause() {
    #[cfg(simulation)]
    shuttle::thread::yield_now();
}

/// A folder whose files may lose power. Clones share it.
#[derive(Clone, Debug)]
pub struct CrashFolder(Arc<Mutex<State>>);

impl CrashFolder {
    /// A machine that has just started with this disk.
    pub fn new(disk: Disk) -> Self {
        Self(Arc::new(Mutex::new(State { disk, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        guard(&self.0)
    }

    /// The state for a call of the engine, before which other threads may go on.
    fn called(&self) -> MutexGuard<'_, State> {
        pause();
        self.state()
    }

    /// Records from now on. `seed` decides what a failing sync leaves, and how short a short call is.
    pub fn record(&self, seed: u64) {
        let mut state = self.state();
        state.record = Some(Vec::new());
        state.random = Random::new(seed);
    }

    /// What was recorded.
    pub fn take_record(&self) -> Vec<Event> {
        self.state().record.take().unwrap_or_default()
    }

    /// Records what the client asks for, or is answered.
    pub fn note(&self, note: Note) {
        if let Some(record) = &mut self.state().record {
            record.push(Event::Client(note));
        }
    }

    /// The disk as it is, page cache included: what a killed process leaves.
    pub fn disk(&self) -> Disk {
        self.state().disk.clone()
    }

    /// Lets the power go after `calls` more calls.
    pub fn lose_power_after(&self, calls: u64) {
        self.state().power = Some(calls);
    }

    pub fn fail(&self, plan: Plan) {
        self.state().fault = Some(plan);
    }

    /// Whether a planned fault has come.
    pub fn has_failed(&self) -> bool {
        self.state().fired
    }

    /// Makes the names durable that begin with `prefix`: those of one folder of several.
    pub fn sync_names(&self, prefix: &'static str) -> io::Result<()> {
        let mut state = self.called();
        state.enter(Kind::Sync)?;
        state.apply(Change::SyncNames(prefix));
        Ok(())
    }

    fn names(&self, change: impl FnOnce(&mut Names) -> io::Result<()>) -> io::Result<()> {
        let mut state = self.called();
        state.enter(Kind::Allocate)?;
        let mut names = state.disk.names().clone();
        change(&mut names)?;
        state.apply(Change::Names(names));
        Ok(())
    }

    fn handle(&self, name: &str, file: usize) -> Arc<dyn Storage> {
        let (path, held) = (Path::new("crash").join(name), Mutex::default());
        Arc::new(CrashFile { path, file, held, folder: self.clone() })
    }
}

impl Folder for CrashFolder {
    fn path(&self) -> &Path {
        Path::new("crash")
    }

    fn open(&self, name: &str, _access: Access) -> io::Result<Arc<dyn Storage>> {
        let mut state = self.called();
        state.enter(Kind::Other)?;
        let file = *state.disk.names().get(name).ok_or(io::ErrorKind::NotFound)?;
        drop(state);
        Ok(self.handle(name, file))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let mut state = self.called();
        state.enter(Kind::Allocate)?;
        let mut names = state.disk.names().clone();
        let file = state.disk.count();
        if names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        names.insert(name.to_owned(), file);
        state.apply(Change::NewFile);
        state.apply(Change::Names(names));
        drop(state);
        Ok(self.handle(name, file))
    }

    fn creating(&self, _: Rights) -> Arc<dyn Folder> {
        Arc::new(self.clone())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut state = self.called();
        state.enter(Kind::Other)?;
        Ok(state.disk.names().keys().cloned().collect())
    }

    fn same_file(&self, a: &str, b: &str) -> io::Result<bool> {
        let mut state = self.called();
        state.enter(Kind::Other)?;
        let names = state.disk.names();
        Ok(names.get(a).zip(names.get(b)).is_some_and(|(a, b)| a == b))
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        if self.state().disk.without_links {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.names(|names| {
            let file = *names.get(from).ok_or(io::ErrorKind::NotFound)?;
            match names.insert(to.to_owned(), file) {
                None => Ok(()),
                Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            }
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.names(|names| {
            let file = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            names.insert(to.to_owned(), file);
            Ok(())
        })
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        self.names(|names| {
            let file = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            match names.insert(to.to_owned(), file) {
                None => Ok(()),
                Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            }
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.names(|names| names.remove(name).map(drop).ok_or(io::ErrorKind::NotFound.into()))
    }

    fn sync(&self) -> io::Result<()> {
        if planted(Bug::NameNotSynced) { Ok(()) } else { self.sync_names("") }
    }
}

#[derive(Debug)]
struct CrashFile {
    path: PathBuf,
    file: usize,
    held: Mutex<Option<Lock>>,
    folder: CrashFolder,
}

impl CrashFile {
    fn enter(&self, kind: Kind) -> io::Result<(MutexGuard<'_, State>, bool)> {
        let mut state = self.folder.called();
        let short = state.enter(kind)?;
        Ok((state, short))
    }

    fn clear(&self, from: u64, to: u64, kind: Kind) -> io::Result<()> {
        let (mut state, _) = self.enter(kind)?;
        state.apply(Change::Clear { file: self.file, from, to });
        Ok(())
    }
}

impl Drop for CrashFile {
    fn drop(&mut self) {
        let Some(held) = guard(&self.held).take() else { return };
        let mut state = self.folder.state();
        let (exclusive, shared) = state.locks.entry(self.file).or_default();
        match held {
            Lock::Exclusive => *exclusive = false,
            Lock::Shared => *shared -= 1,
        }
    }
}

impl Storage for CrashFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn length(&self) -> io::Result<u64> {
        let (state, _) = self.enter(Kind::Other)?;
        Ok(state.disk.length(self.file))
    }

    fn allocated(&self) -> io::Result<u64> {
        let (state, _) = self.enter(Kind::Other)?;
        Ok(state.disk.length(self.file))
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let (mut state, _) = self.enter(Kind::Allocate)?;
        state.apply(Change::Length { file: self.file, length });
        Ok(())
    }

    fn read_at(&self, mut into: Scatter<'_>, offset: u64) -> io::Result<usize> {
        let (mut state, short) = self.enter(Kind::Read)?;
        let length = if short { state.some_sectors_of(into.len()) } else { into.len() };
        let mut bytes = vec![0; length];
        let count = state.disk.read(self.file, &mut bytes, offset);
        into.copy_from(&bytes[..count]);
        Ok(count)
    }

    fn read_cached_at(&self, into: Scatter<'_>, offset: u64) -> io::Result<usize> {
        self.read_at(into, offset)
    }

    fn write_at(&self, from: Gather<'_>, offset: u64) -> io::Result<usize> {
        let mut buf = vec![0; from.len()];
        from.copy_to(&mut buf);
        let mut state = self.folder.called();
        let is_on = state.power != Some(0);
        let entered = state.enter(Kind::Write);
        let length = match entered {
            Ok(false) => buf.len(),
            Ok(true) => state.some_sectors_of(buf.len()),
            // A write that fails may have changed something.
            Err(_) if is_on && state.random.one_in(2) => state.some_sectors_of(buf.len()),
            Err(_) => 0,
        };
        if length > 0 {
            let data = Data(buf[..length].into());
            state.apply(Change::Write { file: self.file, offset, data });
        }
        entered.map(|_| length)
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
        self.clear(offset, offset + length, Kind::Other)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.clear(offset, offset + length, Kind::Allocate)
    }

    fn allocate(&self, _offset: u64, _length: u64) -> io::Result<()> {
        self.enter(Kind::Allocate).map(drop)
    }

    /// Two steps: what others write while the sync is under way may be left out.
    fn sync_data(&self) -> io::Result<()> {
        let file = self.file;
        let upto = self.folder.called().disk.time();
        let mut state = self.folder.called();
        let is_on = state.power != Some(0);
        match state.enter(Kind::Sync) {
            Ok(_) => state.apply(Change::Sync { file, upto }),
            Err(error) => {
                if is_on {
                    let seed = state.random.below(1 << 32);
                    state.apply(Change::FailedSync { file, upto, seed });
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn drop_cache(&self, offset: u64, length: u64) -> io::Result<()> {
        let (mut state, _) = self.enter(Kind::Other)?;
        if !planted(Bug::CacheTrusted) {
            state.apply(Change::DropCache { file: self.file, from: offset, to: offset + length });
        }
        Ok(())
    }

    fn start_writeback(&self) -> io::Result<()> {
        self.enter(Kind::Other).map(drop)
    }

    fn prefetch(&self, _offset: u64, _length: u64) -> io::Result<()> {
        self.enter(Kind::Other).map(drop)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let (state, _) = self.enter(Kind::Other)?;
        Ok(state.disk.next_data(self.file, offset))
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        let (state, _) = self.enter(Kind::Other)?;
        Ok(state.disk.next_hole(self.file, offset))
    }

    fn lock(&self, lock: Lock) -> io::Result<()> {
        let (mut state, _) = self.enter(Kind::Other)?;
        let mut held = guard(&self.held);
        let (exclusive, shared) = state.locks.entry(self.file).or_default();
        let others = match *held {
            Some(Lock::Exclusive) => (false, *shared),
            Some(Lock::Shared) => (*exclusive, *shared - 1),
            None => (*exclusive, *shared),
        };
        if others.0 || lock == Lock::Exclusive && others.1 > 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        (*exclusive, *shared) = match lock {
            Lock::Exclusive => (true, others.1),
            Lock::Shared => (false, others.1 + 1),
        };
        *held = Some(lock);
        Ok(())
    }
}

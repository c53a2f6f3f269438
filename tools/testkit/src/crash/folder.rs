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
use super::keeper::{Estate, Told};
use super::oracle::Note;

/// A step of a run: what was done to the disk, and what the client knows of it.
#[derive(Clone, Debug)]
pub enum Event {
    Disk(Change),
    Client(Note),
    Keeper(Told),
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
    /// What a keeper has.
    estate: Estate,
    /// What is answered before it is done, and done with the next call (planted bugs).
    late: Option<Event>,
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
        self.happen(Event::Disk(change));
    }

    fn happen(&mut self, event: Event) {
        match &event {
            Event::Disk(change) => self.disk.apply(change),
            Event::Keeper(told) => self.estate.apply(told),
            Event::Client(_) => {}
        }
        if let Some(record) = &mut self.record {
            record.push(event);
        }
    }

    fn is_on(&self) -> bool {
        self.power != Some(0)
    }

    /// Counts a step of the process, unless it has ended.
    fn step(&mut self) -> io::Result<()> {
        if let Some(event) = self.late.take() {
            self.happen(event);
        }
        match &mut self.power {
            Some(0) => return Err(io::Error::other("the power is gone")),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(())
    }

    /// Counts a call; whether it is the short one.
    fn enter(&mut self, kind: Kind) -> io::Result<bool> {
        self.step()?;
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

    /// The same machine after the process that wrote to it has died: `estate` is what a keeper has
    /// of it, locks included.
    pub fn after_death(disk: Disk, estate: Estate) -> Self {
        let mut locks = HashMap::new();
        if !planted(Bug::LockFreeInTheGap) {
            locks.extend(estate.files().map(|file| (file, (true, 0))));
        }
        Self(Arc::new(Mutex::new(State { disk, estate, locks, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        guard(&self.0)
    }

    /// What a keeper has.
    pub fn estate(&self) -> Estate {
        self.state().estate.clone()
    }

    /// Tells the keeper, which nobody does any more once the process is gone.
    pub(super) fn tell(&self, told: impl FnOnce(&Disk) -> Told) {
        let mut state = self.called();
        if state.step().is_ok() {
            let told = told(&state.disk);
            state.happen(told.into());
        }
    }

    pub(super) fn tell_late(&self, told: Told) {
        let mut state = self.called();
        if state.step().is_ok() {
            state.late = Some(told.into());
        }
    }

    /// A call that takes memory of the keeper's.
    pub(super) fn take_memory(&self) -> io::Result<()> {
        self.called().enter(Kind::Allocate).map(drop)
    }

    /// Something that a dead process had begun comes to pass.
    pub(super) fn happen_late(&self, change: Change) {
        self.state().apply(change);
    }

    pub(super) fn number_of(&self, file: &dyn Storage) -> usize {
        let name = file.path().file_name().and_then(|name| name.to_str()).unwrap_or_default();
        self.state().disk.names()[name]
    }

    fn handle_of(&self, file: usize, held: Option<Lock>, seen: u64) -> Arc<dyn Storage> {
        let name = self
            .state()
            .disk
            .names()
            .iter()
            .find(|(_, number)| **number == file)
            .map(|(name, _)| name.clone());
        self.handle(&name.unwrap_or_else(|| format!("file {file}")), file, held, seen)
    }

    /// A kept file as its writer had it open.
    pub(super) fn kept_handle(&self, file: usize) -> Arc<dyn Storage> {
        let seen = self.state().disk.failures(file);
        self.handle_of(file, Some(Lock::Exclusive), seen)
    }

    /// A handle of a kept file that has heard of no failure but the first ones.
    pub(super) fn witness(&self, file: usize, failures: u64) -> Arc<dyn Storage> {
        self.handle_of(file, None, failures)
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

    /// Whether a sync of any file has failed.
    pub fn has_lost_a_sync(&self) -> bool {
        self.state().disk.has_lost_a_sync()
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

    /// A file that was opened just now.
    fn opened(&self, name: &str, file: usize) -> Arc<dyn Storage> {
        let seen = self.state().disk.failures(file);
        self.handle(name, file, None, seen)
    }

    fn handle(&self, name: &str, file: usize, held: Option<Lock>, seen: u64) -> Arc<dyn Storage> {
        let path = Path::new("crash").join(name);
        let (held, seen) = (Mutex::new(held), Mutex::new(seen));
        Arc::new(CrashFile { path, file, held, seen, folder: self.clone() })
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
        Ok(self.opened(name, file))
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
        Ok(self.opened(name, file))
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

    fn remove_folder(&self, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::NotADirectory.into())
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
    /// Failures of a sync that it was told of, or that came before it. The others it is told of by
    /// its next sync.
    seen: Mutex<u64>,
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
        if state.estate.has(self.file) {
            return;
        }
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
        let is_on = state.is_on();
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
            let change = Change::Write { file: self.file, offset, data };
            if planted(Bug::AnsweredBeforeThePageCache) && entered.is_ok() {
                state.late = Some(Event::Disk(change));
            } else {
                state.apply(change);
            }
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
        let is_on = state.is_on();
        let failures = state.disk.failures(file);
        if std::mem::replace(&mut *guard(&self.seen), failures) < failures && is_on {
            return Err(io::Error::from_raw_os_error(5));
        }
        match state.enter(Kind::Sync) {
            Ok(_) => state.apply(Change::Sync { file, upto }),
            Err(error) => {
                if is_on {
                    let seed = state.random.below(1 << 32);
                    state.apply(Change::FailedSync { file, upto, seed });
                    *guard(&self.seen) = failures + 1;
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

//! A disk in use under a name.

use std::sync::Arc;

use super::moment::Moments;
use super::queue::Queue;
use super::{Disk, MAX_NAME};
use crate::device::{
    Attempt, Detail, Device, Extent, Facts, Gather, HostRange, Prefetch, Scatter, Wait, ZeroMode,
};
use crate::error::{Error, ErrorKind, Result};
use crate::planted::{Bug, planted};
use crate::sync::{Mutex, MutexGuard, guard};

/// Threads that wait for one disk at a time, where nothing else is said.
const WORKERS: usize = 16;

/// A disk that was opened, and what its users are told of it.
#[derive(Debug)]
pub struct Opened<D> {
    /// The disk.
    pub disk: D,
    /// A line for people, possibly empty; at most [`MAX_NAME`] bytes.
    pub description: String,
    /// Whether it may have several users at a time: readers, or writers that know of each other.
    pub shared: bool,
    /// Whether changes are refused even if the disk would take them.
    pub read_only: bool,
    /// Most threads that wait for the disk on behalf of its users, at least one.
    pub workers: usize,
}

impl<D: Device> Opened<D> {
    /// A disk that any number may use, writable if it is.
    pub fn new(disk: D) -> Self {
        let read_only = disk.read_only();
        Self { disk, description: String::new(), shared: true, read_only, workers: WORKERS }
    }
}

/// Hears that a disk is closed.
pub(super) trait Register: Send + Sync {
    /// The disk called `name` may be opened again.
    fn closed(&self, name: &str);

    /// Hears what went wrong where nobody waits for an answer.
    fn log(&self, line: &str);
}

/// Has the register hear of the end, also of one by a panic.
pub(super) struct Entry {
    pub(super) register: Arc<dyn Register>,
    pub(super) name: String,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.register.closed(&self.name);
    }
}

/// A disk in use under a name: a [`Device`] whose users may come and go, and which others may look
/// at or change as a whole meanwhile. Closed when the last of them lets go of it.
pub struct Served<D: Disk + ?Sized = dyn Disk> {
    pub(super) name: String,
    description: String,
    read_only: bool,
    shared: bool,
    pub(super) moments: Moments,
    /// Held by whoever changes the disk as a whole.
    changing: Mutex<()>,
    pub(super) queue: Queue,
    entry: Option<Entry>,
    closed: bool,
    /// Last, so that any disk's `Arc<Served<_>>` is an `Arc<AnyServed>` too.
    pub(super) disk: D,
}

/// A disk in use, of whatever kind.
pub type AnyServed = Served<dyn Disk>;

/// Fails with [`ErrorKind::InvalidInput`] where a name or description is too long.
pub(super) fn check_text(text: &str) -> Result<()> {
    if text.len() > MAX_NAME {
        let detail = format!("{} bytes of name or description, at most {MAX_NAME}", text.len());
        return Err(Error::new(ErrorKind::InvalidInput, detail));
    }
    Ok(())
}

impl<D: Disk> Served<D> {
    /// A disk in use as `name`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a name or description of more than [`MAX_NAME`] bytes.
    pub fn new(name: impl Into<String>, opened: Opened<D>) -> Result<Self> {
        Self::with_entry(name.into(), opened, None)
    }

    pub(super) fn with_entry(
        name: String,
        opened: Opened<D>,
        entry: Option<Entry>,
    ) -> Result<Self> {
        check_text(&name)?;
        check_text(&opened.description)?;
        Ok(Self {
            queue: Queue::new(&name, opened.workers),
            name,
            description: opened.description,
            read_only: opened.read_only,
            shared: opened.shared,
            moments: Moments::default(),
            changing: Mutex::default(),
            entry,
            closed: false,
            disk: opened.disk,
        })
    }

    /// Lets go of the disk. If this was its last user, it is closed, and this tells how that went.
    pub fn leave(self: Arc<Self>) -> Result<()> {
        Arc::into_inner(self).map_or(Ok(()), |mut last| last.close())
    }
}

impl<D: Disk + ?Sized> Served<D> {
    /// The name it is used under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A line for people, possibly empty.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Whether it may have several users at a time.
    pub fn shared(&self) -> bool {
        self.shared
    }

    /// How many of its requests wait for space on the host.
    pub fn waiting(&self) -> usize {
        self.queue.waiters.count()
    }

    /// What it shows of itself as a file.
    ///
    /// # Errors
    /// Host errors.
    pub fn facts(&self) -> Result<Facts> {
        self.disk.facts()
    }

    /// Waits for the turn to change the disk as a whole: to take a snapshot of it, to resize it, to
    /// look at one moment of it. One at a time; its users go on.
    pub fn change(&self) -> Change<'_, D> {
        Change { _one: guard(&self.changing), disk: &self.disk }
    }

    fn close(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        self.queue.close();
        let entry = self.entry.take();
        if planted(Bug::CloseRacesAnOpen) {
            drop(entry);
            return self.disk.close();
        }
        let result = self.disk.close();
        drop(entry);
        result
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{} is read-only", self.name)));
        }
        Ok(())
    }

    /// Makes a change of a range once what it holds is kept, where somebody looks.
    fn changed<T>(&self, offset: u64, length: u64, act: impl FnOnce() -> Result<T>) -> Result<T> {
        self.check_writable()?;
        let permit = self.moments.before_change(&self.disk, offset, length);
        if planted(Bug::MomentMissesABlock) {
            drop(permit);
            return act();
        }
        act()
    }
}

impl<D: Disk + ?Sized> Drop for Served<D> {
    fn drop(&mut self) {
        let register = self.entry.as_ref().map(|entry| entry.register.clone());
        if let (Err(error), Some(register)) = (self.close(), register) {
            register.log(&format!("closing {}: {error}", self.name));
        }
    }
}

/// The turn to change a disk as a whole, until it is dropped. Leads to the disk itself.
pub struct Change<'a, D: Disk + ?Sized> {
    _one: MutexGuard<'a, ()>,
    disk: &'a D,
}

impl<D: Disk + ?Sized> std::ops::Deref for Change<'_, D> {
    type Target = D;

    fn deref(&self) -> &D {
        self.disk
    }
}

impl<D: Disk + ?Sized> Device for Served<D> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn try_read(&self, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        self.disk.try_read(offset, into, wait)
    }

    fn host_range(&self, offset: u64, length: u64) -> Result<Option<HostRange>> {
        self.disk.host_range(offset, length)
    }

    fn try_write(&self, offset: u64, from: Gather<'_>, wait: Wait) -> Result<u64> {
        if wait == Wait::Allowed {
            let length = from.len() as u64;
            return self.changed(offset, length, || self.disk.try_write(offset, from, wait));
        }
        self.check_writable()?;
        // Keeping what is there would take a wait.
        self.moments.idle().map_or(Ok(0), |_permit| self.disk.try_write(offset, from, wait))
    }

    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        self.changed(offset, length, || self.disk.zero(offset, length, mode))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<()> {
        self.changed(offset, length, || self.disk.trim(offset, length))
    }

    /// No moment is asked: what the range holds stays as it is.
    fn allocate(&self, offset: u64, length: u64) -> Result<()> {
        self.check_writable()?;
        self.disk.allocate(offset, length)
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn try_extents(
        &self,
        offset: u64,
        length: u64,
        detail: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
        wait: Wait,
    ) -> Attempt {
        self.disk.try_extents(offset, length, detail, limit, out, wait)
    }

    fn prefetch(&self, offset: u64, length: u64) -> Result<Prefetch> {
        self.disk.prefetch(offset, length)
    }
}

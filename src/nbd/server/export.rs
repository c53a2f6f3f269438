//! Exports, where the server finds them, and the flusher that connections of an export share.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use super::link::Ticket;
use super::work::{Pool, STACK, device_failure};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::proto::{Errno, MAX_NAME};
use crate::sync::guard;

/// A device under a name.
pub struct Export {
    name: String,
    description: String,
    device: Arc<dyn Device>,
    read_only: bool,
    multi_conn: bool,
    flusher: Arc<Flusher>,
    /// An export has its own workers, so that a device that hangs takes none from others.
    pool: OnceLock<Arc<Pool>>,
}

impl Drop for Export {
    fn drop(&mut self) {
        self.pool.get().into_iter().for_each(|pool| pool.close());
    }
}

impl Export {
    /// Exports `device` as `name`, writable if the device is. Fails with
    /// [`ErrorKind::InvalidInput`] if the name is longer than the protocol allows (4096 bytes).
    pub fn new(name: impl Into<String>, device: Arc<dyn Device>) -> Result<Self> {
        let name = checked(name.into())?;
        let read_only = device.read_only();
        Ok(Self {
            name,
            description: String::new(),
            device,
            read_only,
            multi_conn: true,
            flusher: Arc::default(),
            pool: OnceLock::new(),
        })
    }

    /// Adds a line for people, at most 4096 bytes.
    pub fn with_description(mut self, description: impl Into<String>) -> Result<Self> {
        self.description = checked(description.into())?;
        Ok(self)
    }

    /// Refuses changes even if the device would take them.
    #[must_use]
    pub fn with_read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Tells clients that only one connection may use it at a time. That is for [`Exports::find`]
    /// to see to.
    #[must_use]
    pub fn with_one_connection(mut self) -> Self {
        self.multi_conn = false;
        self
    }

    /// Whether several connections may use it at a time.
    pub fn multi_conn(&self) -> bool {
        self.multi_conn
    }

    /// The name clients ask for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A line for people, possibly empty.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The device behind it.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Whether clients may not change it.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The threads that wait for the device; `most` of them, as the first caller says.
    pub(super) fn pool(&self, most: usize) -> &Arc<Pool> {
        self.pool.get_or_init(|| Pool::new(most))
    }

    /// Answers `ticket` once everything that completed before now is durable. Never waits.
    pub(super) fn flush(&self, ticket: Ticket) {
        self.flusher.add(Arc::clone(&self.device), ticket);
    }
}

fn checked(text: String) -> Result<String> {
    if text.len() > MAX_NAME {
        let detail = format!("{} bytes of name or description, at most 4096", text.len());
        return Err(Error::new(ErrorKind::InvalidInput, detail));
    }
    Ok(text)
}

/// Where a server finds its exports. May change while it serves.
pub trait Exports: Send + Sync {
    /// The export called `name`; the empty name asks for a default. Fails with
    /// [`ErrorKind::NotFound`] if there is none.
    fn find(&self, name: &str) -> Result<Arc<Export>>;

    /// Name and description of all exports that clients may be told of.
    fn list(&self) -> Vec<(String, String)>;
}

/// A table of exports. Where there is only one, it is also the default.
#[derive(Default)]
pub struct ExportTable(RwLock<BTreeMap<String, Arc<Export>>>);

impl ExportTable {
    /// A table without exports.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an export; fails with [`ErrorKind::Exists`] if its name is taken.
    pub fn insert(&self, export: Export) -> Result<()> {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if table.contains_key(export.name()) {
            let detail = format!("there is an export called {:?}", export.name());
            return Err(Error::new(ErrorKind::Exists, detail));
        }
        table.insert(export.name.clone(), Arc::new(export));
        Ok(())
    }

    /// Takes an export out. Clients that have it keep it until they hang up.
    pub fn remove(&self, name: &str) -> Option<Arc<Export>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name)
    }
}

impl Exports for ExportTable {
    fn find(&self, name: &str) -> Result<Arc<Export>> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let default = || (name.is_empty() && table.len() == 1).then(|| table.values().next());
        let found = table.get(name).or_else(|| default().flatten());
        found.cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no export called {name:?}"))
        })
    }

    fn list(&self) -> Vec<(String, String)> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        table.values().map(|e| (e.name.clone(), e.description.clone())).collect()
    }
}

/// Runs one flush at a time; whoever asks meanwhile shares the next one. Its thread comes with the
/// first flush and goes when none was asked for in a while.
#[derive(Default)]
struct Flusher {
    state: Mutex<Waiting>,
    asked: Condvar,
}

#[derive(Default)]
struct Waiting {
    tickets: Vec<Ticket>,
    /// The device to flush; held only while somebody waits, so that no idle thread keeps it open.
    device: Option<Arc<dyn Device>>,
    has_thread: bool,
}

impl Flusher {
    const LINGER: Duration = Duration::from_secs(10);

    fn add(self: &Arc<Self>, device: Arc<dyn Device>, ticket: Ticket) {
        let mut state = guard(&self.state);
        state.tickets.push(ticket);
        state.device = Some(device);
        if state.has_thread {
            self.asked.notify_one();
            return;
        }
        let this = Arc::clone(self);
        let thread = thread::Builder::new().name("nbd-flush".into()).stack_size(STACK);
        match thread.spawn(move || this.run()) {
            Ok(_) => state.has_thread = true,
            Err(_) => {
                let tickets = std::mem::take(&mut state.tickets);
                drop(state);
                tickets.into_iter().for_each(|ticket| ticket.fail(Errno::NoMem, "no thread"));
            }
        }
    }

    fn run(&self) {
        while let Some((device, tickets)) = self.next() {
            // A flush covers what completed before it: only those who asked before it began.
            let result = catch_unwind(AssertUnwindSafe(|| device.flush()));
            drop(device);
            match result {
                Ok(Ok(())) => tickets.into_iter().for_each(Ticket::succeed),
                Ok(Err(error)) => {
                    for ticket in tickets {
                        let (errno, message) = device_failure(&error, Errno::Io);
                        ticket.log(&format!("flush failed: {error}"));
                        ticket.fail(errno, message);
                    }
                }
                Err(_) => drop(tickets),
            }
        }
    }

    fn next(&self) -> Option<(Arc<dyn Device>, Vec<Ticket>)> {
        let mut state = guard(&self.state);
        loop {
            if let Some(device) = state.device.take() {
                return Some((device, std::mem::take(&mut state.tickets)));
            }
            let wait = self.asked.wait_timeout(state, Self::LINGER);
            let (held, timeout) = wait.unwrap_or_else(PoisonError::into_inner);
            state = held;
            if timeout.timed_out() && state.device.is_none() {
                state.has_thread = false;
                return None;
            }
        }
    }
}

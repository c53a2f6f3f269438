//! Names to disks in use: opened with the first who wants one, closed after the last.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use super::served::{Entry, Register, check_text};
use super::{AnyServed, Disk, Facts, Opened, Served};
use crate::error::{Error, ErrorKind, Result};
use crate::planted::{Bug, planted};
use crate::storage::Storage;
use crate::sync::{Condvar, Mutex, MutexGuard, guard};

/// How long a user waits for the one before to be gone, where nothing else is said.
const PATIENCE: Duration = Duration::from_secs(2);

/// A disk that may be told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The name to ask for it by.
    pub name: String,
    /// A line for people, possibly empty.
    pub description: String,
    /// Whether it is another name of a disk that is listed too, for another way to use it.
    pub alias: bool,
}

/// Who does for a desk, by name, what whoever faces strangers may not do itself. In this process for
/// now.
pub trait Broker: Send + Sync + 'static {
    /// What its names stand for.
    type Disk: Disk + 'static;

    /// Opens a disk. Not called again for the same name before what it gave is closed.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for an unknown name; [`ErrorKind::InUse`] for a disk that somebody
    /// else has.
    fn open(&self, name: &str) -> Result<Opened<Self::Disk>>;

    /// Hears that a disk that is open is about to get another user, who doesn't get it after an error.
    ///
    /// # Errors
    /// Those of the implementation.
    fn lend(&self, _name: &str) -> Result<()> {
        Ok(())
    }

    /// What a disk shows of itself as a file, opened or not.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for an unknown name, and for another name of a disk.
    fn facts(&self, name: &str) -> Result<Facts>;

    /// All disks that may be told of.
    fn list(&self) -> Result<Vec<Listed>>;

    /// An empty file for what need not stay: it is gone once it is dropped.
    fn scratch(&self) -> Result<Arc<dyn Storage>>;

    /// Hears what went wrong where nobody waits for an answer.
    fn log(&self, line: &str);
}

/// Where a front end gets its disks.
pub trait Leases: Send + Sync {
    /// The disk called `name`, to be used until the lease is dropped; the empty name asks for a
    /// default. May wait for the user before.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] where the one before stays.
    fn lease(&self, name: &str) -> Result<Lease>;

    /// The disk called `name` to be read beside its users, none of whom it keeps out.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] where another process has it.
    fn look(&self, name: &str) -> Result<Lease>;

    /// What a disk shows of itself as a file, opened or not.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for an unknown name, and for another name of a disk.
    fn facts(&self, name: &str) -> Result<Facts>;

    /// All disks that may be told of.
    fn list(&self) -> Vec<Listed>;
}

/// The right to use a disk, until the last clone of it is dropped. Leads to the disk.
#[derive(Clone)]
pub struct Lease {
    /// First, so that the next user may come in while the disk is still open.
    _turn: Option<Arc<Turn>>,
    pub(super) served: Arc<AnyServed>,
}

impl Deref for Lease {
    type Target = AnyServed;

    fn deref(&self) -> &AnyServed {
        &self.served
    }
}

impl Lease {
    /// What tells two disks in use apart, and whether one is still in use.
    pub fn watch(&self) -> Weak<AnyServed> {
        Arc::downgrade(&self.served)
    }
}

/// One user's place at a disk.
struct Turn {
    leaving: Box<dyn Fn() + Send + Sync>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        (self.leaving)();
    }
}

/// Disks in use by name. Clones are the same desk.
pub struct Desk<B: Broker>(Arc<Book<B>>);

impl<B: Broker> Clone for Desk<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

struct Book<B: Broker> {
    broker: B,
    patience: Duration,
    slots: Mutex<BTreeMap<String, Slot<B::Disk>>>,
    /// A disk was opened or closed, or a user left.
    changed: Condvar,
}

/// A disk that is open, or just being opened or closed.
struct Slot<D: Disk> {
    /// Leads nowhere before the disk is open, and once it is being closed.
    served: Weak<Served<D>>,
    shared: bool,
    leases: usize,
}

/// How a disk is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// As its only user, or as one of those who share it.
    Lease,
    /// Beside its users.
    Visit,
}

/// What is done with a disk just now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InUse {
    /// Its name.
    pub name: String,
    /// Whether its users share it.
    pub shared: bool,
    /// How many users it has: none where only a change of it is under way, or it is being closed.
    pub users: usize,
    /// How many of their requests wait for space on the host.
    pub waiting: usize,
}

impl<D: Disk> Slot<D> {
    /// The disk, if it is open and free for this purpose. Nothing that this looks at may be dropped
    /// here: closing a disk takes the lock that is held now.
    fn admit(&mut self, purpose: Purpose) -> Option<Arc<Served<D>>> {
        let free = purpose == Purpose::Visit || self.shared || self.leases == 0;
        let served = if free { self.served.upgrade() } else { None };
        if served.is_some() && purpose == Purpose::Lease && !planted(Bug::LeaseGivenTwice) {
            self.leases += 1;
        }
        served
    }
}

impl<B: Broker> Desk<B> {
    /// A desk for the disks of `broker`. Who wants a disk that has a user waits two seconds for that
    /// one to be gone.
    pub fn new(broker: B) -> Self {
        Self::with_patience(broker, PATIENCE)
    }

    /// As [`Desk::new`], with another time to wait.
    pub fn with_patience(broker: B, patience: Duration) -> Self {
        let (slots, changed) = (Mutex::default(), Condvar::new());
        Self(Arc::new(Book { broker, patience, slots, changed }))
    }

    /// Who opens the disks.
    pub fn broker(&self) -> &B {
        &self.0.broker
    }

    /// A disk to be looked at or changed as a whole, beside its users. Opened where nobody has it;
    /// always waits while it is being opened or closed.
    ///
    /// # Errors
    /// Those of [`Broker::open`].
    pub fn visit(&self, name: &str) -> Result<Arc<Served<B::Disk>>> {
        self.0.enter(name, Purpose::Visit)
    }

    /// Waits until no disk is in use any more, for `limit` at most. Whoever ends a process does so
    /// once its front ends are gone: a change of a disk may be under way still.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] with the names of those that still are.
    pub fn settle(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut slots = self.0.slots();
        while !slots.is_empty() {
            if Instant::now() >= deadline {
                let names: Vec<_> = slots.keys().map(String::as_str).collect();
                let detail = format!("still in use: {}", names.join(", "));
                return Err(Error::new(ErrorKind::InUse, detail));
            }
            slots = self.0.wait(slots, Some(deadline));
        }
        Ok(())
    }

    /// The disks in use, by name.
    pub fn in_use(&self) -> Vec<InUse> {
        let entry = |(name, slot): (&String, &Slot<_>)| {
            let (name, shared, users) = (name.clone(), slot.shared, slot.leases);
            (InUse { name, shared, users, waiting: 0 }, slot.served.clone())
        };
        let entries: Vec<_> = self.0.slots().iter().map(entry).collect();
        // Without the book: this may find itself the last to have the disk, and closes it then.
        let counted = |(disk, served): (InUse, Weak<Served<_>>)| InUse {
            waiting: served.upgrade().map_or(0, |served| served.waiting()),
            ..disk
        };
        entries.into_iter().map(counted).collect()
    }
}

impl<B: Broker> Leases for Desk<B> {
    fn lease(&self, name: &str) -> Result<Lease> {
        let served = self.0.enter(name, Purpose::Lease)?;
        let (book, named) = (self.0.clone(), name.to_owned());
        let turn = Turn { leaving: Box::new(move || book.left(&named)) };
        let lease = Lease { _turn: Some(Arc::new(turn)), served };
        self.0.broker.lend(name)?;
        Ok(lease)
    }

    fn look(&self, name: &str) -> Result<Lease> {
        Ok(Lease { _turn: None, served: self.visit(name)? })
    }

    fn facts(&self, name: &str) -> Result<Facts> {
        self.0.broker.facts(name)
    }

    fn list(&self) -> Vec<Listed> {
        self.0.broker.list().unwrap_or_else(|error| {
            self.0.broker.log(&format!("listing the disks: {error}"));
            Vec::new()
        })
    }
}

type Slots<'a, D> = MutexGuard<'a, BTreeMap<String, Slot<D>>>;

impl<B: Broker> Book<B> {
    fn slots(&self) -> Slots<'_, B::Disk> {
        guard(&self.slots)
    }

    /// Waits for a change, until `deadline`.
    fn wait<'a>(&self, slots: Slots<'a, B::Disk>, deadline: Option<Instant>) -> Slots<'a, B::Disk> {
        let Some(deadline) = deadline else {
            return self.changed.wait(slots).unwrap_or_else(PoisonError::into_inner);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout(slots, left);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn enter(self: &Arc<Self>, name: &str, purpose: Purpose) -> Result<Arc<Served<B::Disk>>> {
        check_text(name)?;
        let deadline = Instant::now() + self.patience;
        let mut slots = self.slots();
        while let Some(slot) = slots.get_mut(name) {
            if let Some(served) = slot.admit(purpose) {
                return Ok(served);
            }
            if purpose == Purpose::Visit && planted(Bug::ChangeOnAClosingDisk) {
                break;
            }
            let limit = (purpose == Purpose::Lease).then_some(deadline);
            if limit.is_some_and(|limit| Instant::now() >= limit) {
                return Err(Error::new(ErrorKind::InUse, format!("{name} has a user already")));
            }
            slots = self.wait(slots, limit);
        }
        let leases = usize::from(purpose == Purpose::Lease);
        slots.insert(name.to_owned(), Slot { served: Weak::new(), shared: false, leases });
        drop(slots);
        // From here on whoever wants it waits until it is open, or this entry is dropped; nobody else
        // is held up.
        let entry = Entry { register: self.clone(), name: name.to_owned() };
        let opened = self.broker.open(name)?;
        let served = Arc::new(Served::with_entry(name.to_owned(), opened, Some(entry))?);
        if let Some(slot) = self.slots().get_mut(name) {
            (slot.served, slot.shared) = (Arc::downgrade(&served), served.shared());
        }
        self.changed.notify_all();
        Ok(served)
    }

    /// A user has left.
    fn left(&self, name: &str) {
        if let Some(slot) = self.slots().get_mut(name) {
            slot.leases = slot.leases.saturating_sub(1);
        }
        self.changed.notify_all();
    }
}

impl<B: Broker> Register for Book<B> {
    fn closed(&self, name: &str) {
        self.slots().remove(name);
        self.changed.notify_all();
    }

    fn log(&self, line: &str) {
        self.broker.log(line);
    }
}

/// Disks that are open for as long as they are in it. Any number may use each. Where there is only
/// one, it is also the default.
#[derive(Default)]
pub struct Table(RwLock<BTreeMap<String, Arc<AnyServed>>>);

impl Table {
    /// A table without disks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a disk.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if its name is taken.
    pub fn insert(&self, served: Arc<AnyServed>) -> Result<()> {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if table.contains_key(served.name()) {
            let detail = format!("there is a disk called {:?} already", served.name());
            return Err(Error::new(ErrorKind::Exists, detail));
        }
        table.insert(served.name().to_owned(), served);
        Ok(())
    }

    /// Takes a disk out. Who has it keeps it.
    pub fn remove(&self, name: &str) -> Option<Arc<AnyServed>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name)
    }
}

impl Leases for Table {
    fn lease(&self, name: &str) -> Result<Lease> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let default = || (name.is_empty() && table.len() == 1).then(|| table.values().next());
        let found = table.get(name).or_else(|| default().flatten());
        let served = found.cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no disk called {name:?}"))
        })?;
        Ok(Lease { _turn: None, served })
    }

    fn look(&self, name: &str) -> Result<Lease> {
        self.lease(name)
    }

    fn facts(&self, name: &str) -> Result<Facts> {
        self.lease(name)?.facts()
    }

    fn list(&self) -> Vec<Listed> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let listed = |served: &Arc<AnyServed>| Listed {
            name: served.name().to_owned(),
            description: served.description().to_owned(),
            alias: false,
        };
        table.values().map(listed).collect()
    }
}

//! Images, containers and volumes in a folder, safe across crashes and between processes
//! (`docs/store.md`).
//!
//! Invariants:
//! - a file under its final name is whole and durable before anything refers to it, and goes only
//!   after nothing does;
//! - every change of names happens under the one lock; readers take no lock, and see the state
//!   before a change or the one after it;
//! - the parent link in a layer decides what it stands on, records and names only describe it.

mod blob;
mod broker;
mod collect;
mod container;
mod digest;
mod disk;
mod features;
mod files;
mod host_key;
mod image;
mod index;
mod json;
mod made;
mod name;
mod publish;
mod strays;
mod survey;
mod transfer;
mod verify;
mod volume;

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::chain::Gate;
use crate::error::{Error, ErrorKind, Result};
use crate::live::Keepers;
use crate::storage::{
    Access, FileFolder, Folder, Lock, Storage, allocate_ahead, failed, open_in, take_lock,
};

pub use blob::Draft;
pub use broker::StoreBroker;
pub use collect::{Collected, Usage};
pub use container::{Container, Snapshot};
pub use digest::is_hex_digest;
pub use disk::{DiskKind, DiskName, OpenDisk};
pub use features::Need;
pub use image::{Costs, HistoryEntry, Image, RemovedImage};
pub use name::{MAX_NAME, Reference, check_name};
pub use publish::NewImage;
pub use survey::{Finding, Survey};
pub use volume::Volume;

const LAYOUT_FILE: &str = "oci-layout";
const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
const LOCK_FILE: &str = "lock";
const FOLDERS: [&str; 3] = ["blobs/sha256", "containers", "volumes"];
/// Locked by the process that serves the store.
const DESK_FILE: &str = "desk";
/// Space that is given back where a removal finds the disk full: it has to write the index.
const RESERVE_FILE: &str = "reserve";
const RESERVE: u64 = 1 << 20;
/// How long a change waits for others.
const PATIENCE: Duration = Duration::from_secs(60);

/// The folders of a store.
#[derive(Clone, Debug)]
pub struct Folders {
    /// The OCI layout's root, with the index and the lock.
    pub root: Arc<dyn Folder>,
    /// `blobs/sha256` in it.
    pub blobs: Arc<dyn Folder>,
    /// `containers` in it.
    pub containers: Arc<dyn Folder>,
    /// `volumes` in it.
    pub volumes: Arc<dyn Folder>,
}

/// An open store. Cheap to clone; clones share the layers that are open.
#[derive(Clone, Debug)]
pub struct Store {
    folders: Folders,
    layers: Arc<Gate>,
    /// Keep the disks that are written beyond the end of this process.
    keepers: Option<Arc<dyn Keepers>>,
    /// Has what is mounted of a disk hold still.
    freezer: Option<Arc<dyn Freezer>>,
}

/// Knows where disks are mounted.
pub trait Freezer: Send + Sync + Debug {
    /// Has the file systems on a disk hold still, with all that was written to them on the disk.
    ///
    /// # Errors
    /// Host errors.
    fn freeze(&self, disk: &DiskName) -> Result<Box<dyn Still>>;
}

/// File systems that hold still until this is dropped.
pub trait Still {
    /// Has them go on.
    ///
    /// # Errors
    /// Where one has gone on before.
    fn end(self: Box<Self>) -> Result<()>;
}

/// Keeps all others from changing names in the store, until it is dropped.
struct Hold(#[allow(dead_code, reason = "held for its lock")] Arc<dyn Storage>);

/// The right to change names in the store, until it is dropped.
struct Guard(#[allow(dead_code, reason = "held for its lock")] Hold);

impl Store {
    /// Opens the store in a folder of the host.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none; those of [`Store::over`].
    pub fn open(path: &Path) -> Result<Self> {
        if is_store(path)? {
            return Self::at(path);
        }
        let detail = "there is no store in this folder; the first image or volume makes one";
        Err(Error::new(ErrorKind::NotFound, detail).in_file(path))
    }

    /// Opens the store in a folder of the host, and makes it where the folder is missing or empty.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a folder with other things; those of [`Store::over`].
    pub fn open_or_make(path: &Path) -> Result<Self> {
        if !is_store(path)? && !may_become_store(path)? {
            let detail = "no store is made in this folder: it is not empty, and no store";
            return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(path));
        }
        Self::at(path)
    }

    /// Makes what is missing of the store in a folder.
    fn at(path: &Path) -> Result<Self> {
        let fail = |error| Error::io(error, "making the store's folders").in_file(path);
        // In a store that is there a folder may be missing that nobody here may make: it is empty.
        let is_there = path.join(LAYOUT_FILE).exists();
        let folder = |name: &str| {
            let path = path.join(name);
            match std::fs::create_dir_all(&path) {
                Err(error) if !is_there => return Err(fail(error)),
                _ => {}
            }
            Ok::<_, Error>(Arc::new(FileFolder::new(path)) as Arc<dyn Folder>)
        };
        // The root comes last, so that its path carries no trailing slash.
        let [blobs, containers, volumes] = FOLDERS.map(folder);
        let (blobs, containers, volumes) = (blobs?, containers?, volumes?);
        let root = Arc::new(FileFolder::new(path));
        Self::over(Folders { root, blobs, containers, volumes })
    }

    /// Opens the store in these folders, which is made where it is missing.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for an OCI layout of another version, and for a store of a later
    /// version that this one can't read; [`ErrorKind::Corrupt`]; host errors.
    pub fn over(folders: Folders) -> Result<Self> {
        let layers = Arc::new(Gate::new(vec![folders.blobs.clone()]));
        let store = Self { folders, layers, keepers: None, freezer: None };
        features::check(store.root(), Need::Read)?;
        match files::read_small(store.root(), LAYOUT_FILE)? {
            Some(found) => store.check_layout(&found)?,
            None => store.initialise()?,
        }
        Ok(store)
    }

    /// The same, with keepers of the disks that it opens for writing: where they have something of a
    /// process that died, this one goes on with it. A disk's name is what front ends call it by.
    #[must_use]
    pub fn with_keepers(self, keepers: Arc<dyn Keepers>) -> Self {
        Self { keepers: Some(keepers), ..self }
    }

    /// The same, where disks may be mounted: `freezer` has them hold still while a snapshot is taken.
    #[must_use]
    pub fn with_freezer(self, freezer: Arc<dyn Freezer>) -> Self {
        Self { freezer: Some(freezer), ..self }
    }

    fn check_layout(&self, found: &[u8]) -> Result<()> {
        let path = self.root().path().join(LAYOUT_FILE);
        let layout: serde_json::Value = json::parse(found).map_err(|error| error.in_file(&path))?;
        match layout.get("imageLayoutVersion").and_then(|version| version.as_str()) {
            Some(version) if version.starts_with("1.") => Ok(()),
            other => {
                let detail = format!("image layout version {other:?}, expected 1.0.0");
                Err(Error::new(ErrorKind::Unsupported, detail).in_file(path))
            }
        }
    }

    /// The layout file comes last: with it everything is there.
    fn initialise(&self) -> Result<()> {
        match self.root().create(LOCK_FILE) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io(error, "creating the lock").in_file(self.root().path()));
            }
            _ => {}
        }
        let _guard = self.lock()?;
        if files::read_small(self.root(), index::FILE)?.is_none() {
            index::Index::default().write(self)?;
        }
        self.keep_reserve();
        files::replace(self.root(), LAYOUT_FILE, LAYOUT)
    }

    /// Sets space aside for a removal on a full disk. Where there is none now, later changes try
    /// again.
    fn keep_reserve(&self) {
        if let Ok(file) = self.root().create(RESERVE_FILE)
            && allocate_ahead(&*file, 0, RESERVE).is_err()
        {
            let _ = self.root().remove(RESERVE_FILE);
        }
    }

    fn root(&self) -> &dyn Folder {
        &*self.folders.root
    }

    fn blobs(&self) -> &dyn Folder {
        &*self.folders.blobs
    }

    /// The store's folder.
    pub fn path(&self) -> &Path {
        self.root().path()
    }

    /// The right to serve the store, for as long as the file is open.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] with who has it; host errors.
    pub fn take_desk(&self) -> Result<Arc<dyn Storage>> {
        let file = match self.root().create(DESK_FILE) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                open_in(self.root(), DESK_FILE, Access::Write)?
            }
            other => other.map_err(|error| {
                let path = self.root().path().join(DESK_FILE);
                Error::io(error, "creating the desk's lock").in_file(path)
            })?,
        };
        take_lock(&*file, Lock::Exclusive).map_err(|error| match error.kind() {
            ErrorKind::InUse => {
                let detail = format!("another process serves this store: {error}");
                Error::new(ErrorKind::InUse, detail)
            }
            _ => error,
        })?;
        Ok(file)
    }

    /// Waits for the right to change names.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a store that only a later version may change.
    fn lock(&self) -> Result<Guard> {
        self.guard(Lock::Exclusive)
    }

    /// [`Store::lock`]; shared for telling what would be done, which others may do at the same time.
    fn guard(&self, lock: Lock) -> Result<Guard> {
        let hold = self.hold(lock)?;
        features::check(self.root(), Need::Write)?;
        Ok(Guard(hold))
    }

    /// Waits for those who change names, and keeps them out; with a shared lock others who look are
    /// let in, and the store need not be one that this process may write.
    fn hold(&self, lock: Lock) -> Result<Hold> {
        let access = match lock {
            Lock::Shared => Access::Read,
            Lock::Exclusive => Access::Write,
        };
        let file = open_in(self.root(), LOCK_FILE, access)?;
        let start = Instant::now();
        let mut pause = Duration::from_micros(100);
        loop {
            match file.lock(lock) {
                Ok(()) => return Ok(Hold(file)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(failed(&*file, "locking the store", 0)(error)),
            }
            if start.elapsed() > PATIENCE {
                // Fails with the holder's name, or succeeds after all.
                return take_lock(&*file, lock).map(|()| Hold(file));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }
}

/// Whether there is a store in a folder, or one whose making was cut off.
fn is_store(path: &Path) -> Result<bool> {
    let is_there = |name: &&str| match std::fs::symlink_metadata(path.join(name)) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(error, "looking for the store").in_file(path)),
    };
    if is_there(&LAYOUT_FILE)? {
        return Ok(true);
    }
    // They come before it.
    for name in FOLDERS.iter().chain([&LOCK_FILE]) {
        if !is_there(name)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a folder is missing, or holds nothing but what making a store begins with and what a new
/// file system has.
fn may_become_store(path: &Path) -> Result<bool> {
    let known = |name: &String| {
        let begun = FOLDERS.iter().any(|folder| folder.split('/').next() == Some(name));
        begun || name == "lost+found"
    };
    Ok(files::listing(&FileFolder::new(path))?.iter().all(known))
}

/// The present time: noted where something is made, and never decided by.
fn clock() -> SystemTime {
    SystemTime::now()
}

/// The present time as the OCI specification writes it.
pub(crate) fn now() -> String {
    humantime::format_rfc3339_seconds(clock()).to_string()
}

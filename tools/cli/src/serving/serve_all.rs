//! `thinply serve --all`: every image, container and volume of a store as an export by name.
//!
//! An export opens its disk when the first client asks for it and closes it after the last one has
//! gone, so that idle disks can be changed and removed by others meanwhile.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use thinply::chain::Chain;
use thinply::device::{Detail, Device, Extent, HostRange, Prefetch, ZeroMode};
use thinply::error::{Error, ErrorKind, Result};
use thinply::memory::{Gather, Scatter};
use thinply::nbd::server::{Export, Exports, Log};
use thinply::storage::Access;
use thinply::store::{Disk, DiskKind, Reference, Store};
use thinply::wait::{Attempt, Wait};

use crate::io::paths::closing;
use crate::serving::changes::Changes;
use crate::serving::control::{self, Request};
use crate::serving::moment::{Moment, Moments};

/// How long a client waits for the one before it to be gone.
const PATIENCE: Duration = Duration::from_secs(2);

/// The exports of a store.
pub struct StoreExports {
    store: Store,
    log: Log,
    open: Mutex<HashMap<String, Slot>>,
    closed: Condvar,
}

/// An export that is open, or just being closed.
struct Slot {
    export: Weak<Export>,
    disk: Weak<OpenDisk>,
}

/// What an export's name stands for.
enum Target {
    Writable(Disk),
    ReadOnlyVolume(Disk),
    Snapshot(String, String),
    Image(String),
}

fn unknown(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no export called {name:?}"))
}

impl Target {
    fn parse(name: &str) -> Result<Self> {
        let (noun, rest) = name.split_once('/').ok_or_else(|| unknown(name))?;
        match (noun, rest.split_once('@'), rest.strip_suffix(":ro")) {
            ("image", ..) => Ok(Self::Image(rest.to_owned())),
            ("container", Some((container, snapshot)), _) => {
                Ok(Self::Snapshot(container.to_owned(), snapshot.to_owned()))
            }
            ("container", None, _) => Ok(Self::Writable(Disk::new(DiskKind::Container, rest)?)),
            ("volume", _, Some(rest)) => {
                Ok(Self::ReadOnlyVolume(Disk::new(DiskKind::Volume, rest)?))
            }
            ("volume", _, None) => Ok(Self::Writable(Disk::new(DiskKind::Volume, rest)?)),
            _ => Err(unknown(name)),
        }
    }

    fn open(&self, store: &Store) -> Result<Chain> {
        match self {
            Self::Writable(disk) => store.open_disk(disk, Access::Write),
            Self::ReadOnlyVolume(disk) => store.open_disk(disk, Access::Read),
            Self::Snapshot(container, snapshot) => store.open_snapshot(container, snapshot),
            Self::Image(name) => store.open_image(&store.image(name)?),
        }
    }
}

impl StoreExports {
    /// The exports of `store`; `log` hears of disks that can't be closed.
    pub fn new(store: Store, log: Log) -> Arc<Self> {
        Arc::new(Self { store, log, open: Mutex::default(), closed: Condvar::new() })
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries a control request out.
    fn answer(&self, request: &Request) -> Result<Value> {
        match request {
            Request::Commit { container, image, comment } => {
                let image = image.parse::<Reference>()?;
                self.change(container, |chain| {
                    Ok(self.store.commit(container, chain, &image, comment)?.id.into())
                })
            }
            Request::Snapshot { container, name } => self.change(container, |chain| {
                self.store.snapshot_container(container, chain, name)?;
                Ok(Value::Null)
            }),
            Request::Diff { container } => serde_json::to_value(self.diff(container)?)
                .map_err(|error| Error::io(error.into(), "writing the changes")),
        }
    }

    fn open_container(&self, name: &str) -> Option<Arc<OpenDisk>> {
        self.slots().get(&format!("container/{name}")).and_then(|slot| slot.disk.upgrade())
    }

    /// Changes a container, on the open disk if there is one.
    fn change<T>(&self, name: &str, act: impl FnOnce(&Chain) -> Result<T>) -> Result<T> {
        match self.open_container(name) {
            Some(disk) => {
                let _one = disk.changing();
                act(&disk.chain)
            }
            None => {
                let disk = Disk::new(DiskKind::Container, name)?;
                closing(self.store.open_disk(&disk, Access::Write)?, act)
            }
        }
    }

    /// What a container changed, with its files as of one moment if it is open.
    fn diff(&self, name: &str) -> Result<Changes> {
        let Some(disk) = self.open_container(name) else {
            return Changes::of(&self.store, name);
        };
        let _one = disk.changing();
        let moment = Moment::begin(disk.clone(), disk.moments.clone(), self.store.path())?;
        Changes::between(&self.store, name, &disk.chain, Arc::new(moment))
    }

    fn open(self: &Arc<Self>, name: &str) -> Result<Arc<Export>> {
        let target = Target::parse(name)?;
        let start = Instant::now();
        let mut slots = self.slots();
        // The one before may be closing still, or its client just hanging up.
        while let Some(slot) = slots.get(name) {
            if let Some(export) = slot.export.upgrade()
                && export.multi_conn()
            {
                return Ok(export);
            }
            if start.elapsed() > PATIENCE {
                let detail = format!("{name} has a client already");
                return Err(Error::new(ErrorKind::InUse, detail));
            }
            let waited = self.closed.wait_timeout(slots, PATIENCE / 20);
            slots = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let place = Slot { export: Weak::new(), disk: Weak::new() };
        slots.insert(name.to_owned(), place);
        drop(slots);
        // Others that want it wait until the slot is filled or gone; nobody else is held up.
        let mut opened = target.open(&self.store);
        // The other export of a volume may be closing still.
        while opened.as_ref().is_err_and(|error| error.kind() == ErrorKind::InUse)
            && start.elapsed() < PATIENCE
        {
            thread::sleep(PATIENCE / 100);
            opened = target.open(&self.store);
        }
        let opened = opened.map(|chain| {
            Arc::new(OpenDisk {
                chain,
                moments: Arc::default(),
                changing: Mutex::default(),
                name: name.to_owned(),
                exports: Arc::downgrade(self),
            })
        });
        let disk = match opened {
            Ok(disk) => disk,
            Err(error) => {
                self.slots().remove(name);
                self.closed.notify_all();
                return Err(error);
            }
        };
        let export = Export::new(name, disk.clone())?;
        let single = matches!(target, Target::Writable(_));
        let export = Arc::new(if single { export.with_one_connection() } else { export });
        let slot = Slot { export: Arc::downgrade(&export), disk: Arc::downgrade(&disk) };
        self.slots().insert(name.to_owned(), slot);
        self.closed.notify_all();
        Ok(export)
    }
}

/// What the server asks: [`StoreExports`] behind a pointer that exports can keep.
pub struct Shared(pub Arc<StoreExports>);

impl Exports for Shared {
    fn find(&self, name: &str) -> Result<Arc<Export>> {
        self.0.open(name)
    }

    fn list(&self) -> Vec<(String, String)> {
        let store = &self.0.store;
        let mut list = Vec::new();
        for image in store.images().unwrap_or_default() {
            if let Some(name) = &image.reference {
                list.push((format!("image/{name}"), format!("image {:.12}", image.id)));
            }
        }
        for container in store.containers().unwrap_or_default() {
            let over = format!("container over {}", container.image);
            list.push((format!("container/{}", container.name), over));
            for saved in &container.snapshots {
                let text = format!("snapshot of container {}", container.name);
                list.push((format!("container/{}@{}", container.name, saved.name), text));
            }
        }
        for name in store.disk_names(DiskKind::Volume).unwrap_or_default() {
            list.push((format!("volume/{name}"), "volume, for one writer".into()));
            list.push((format!("volume/{name}:ro"), "volume, for many readers".into()));
        }
        list
    }
}

/// A disk that clients have; closed when the last of them is gone.
struct OpenDisk {
    chain: Chain,
    moments: Arc<Moments>,
    /// Held by whoever commits it, takes a snapshot or looks at its changes: one at a time.
    changing: Mutex<()>,
    name: String,
    exports: Weak<StoreExports>,
}

impl OpenDisk {
    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for OpenDisk {
    fn drop(&mut self) {
        let closed = self.chain.close();
        let Some(exports) = self.exports.upgrade() else { return };
        if let Err(error) = closed {
            (exports.log)(&format!("closing {}: {error}", self.name));
        }
        exports.slots().remove(&self.name);
        exports.closed.notify_all();
    }
}

impl Device for OpenDisk {
    fn size(&self) -> u64 {
        self.chain.size()
    }

    fn read_only(&self) -> bool {
        self.chain.read_only()
    }

    fn try_read(&self, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        self.chain.try_read(offset, into, wait)
    }

    fn host_range(&self, offset: u64, length: u64) -> Result<Option<HostRange>> {
        self.chain.host_range(offset, length)
    }

    fn try_write(&self, offset: u64, from: Gather<'_>, wait: Wait) -> Result<u64> {
        let permit = match wait {
            Wait::Allowed => {
                Some(self.moments.before_change(&self.chain, offset, from.len() as u64))
            }
            _ => self.moments.idle(),
        };
        permit.map_or(Ok(0), |_permit| self.chain.try_write(offset, from, wait))
    }

    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        let _permit = self.moments.before_change(&self.chain, offset, length);
        self.chain.zero(offset, length, mode)
    }

    fn trim(&self, offset: u64, length: u64) -> Result<()> {
        let _permit = self.moments.before_change(&self.chain, offset, length);
        self.chain.trim(offset, length)
    }

    fn flush(&self) -> Result<()> {
        self.chain.flush()
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
        self.chain.try_extents(offset, length, detail, limit, out, wait)
    }

    fn prefetch(&self, offset: u64, length: u64) -> Result<Prefetch> {
        self.chain.prefetch(offset, length)
    }
}

/// The control socket of a store; its file goes when this is dropped.
pub struct Control {
    path: PathBuf,
}

impl Control {
    /// Listens, for the owner of the store alone, and answers in threads of its own.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where another process serves the store.
    pub fn start(exports: Arc<StoreExports>) -> Result<Self> {
        let path = control::socket(&exports.store);
        let fail = |error| Error::io(error, "listening for control requests").in_file(&path);
        if UnixStream::connect(&path).is_ok() {
            let detail = "another process serves this store";
            return Err(Error::new(ErrorKind::InUse, detail).in_file(path));
        }
        // Made under a name that nobody connects to, until only the owner may.
        let draft = path.with_file_name(format!(".draft-control-{}", std::process::id()));
        let _ = fs::remove_file(&draft);
        let listener = UnixListener::bind(&draft).map_err(fail)?;
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o600)).map_err(fail)?;
        fs::rename(&draft, &path).map_err(fail)?;
        let answer = move || {
            for stream in listener.incoming().flatten() {
                let exports = exports.clone();
                thread::spawn(move || {
                    control::answer(&stream, |request| exports.answer(request));
                });
            }
        };
        thread::Builder::new().name("control".into()).spawn(answer).map_err(fail)?;
        Ok(Self { path })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

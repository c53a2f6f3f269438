//! The store's disks by the names that front ends and people call them.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{DiskKind, DiskName, Finding, OpenDisk, Reference, Store, Survey, files};
use crate::device::Disk;
use crate::error::{Error, ErrorKind, Result, shown};
use crate::serve::{Broker, Facts, Listed, Log, Opened};
use crate::storage::{Access, Storage};
use crate::sync::{Mutex, guard};

/// How long a disk that is in use is tried again: the other name of a volume may just be closed, or a
/// verb of another process be done soon.
const PATIENCE: Duration = Duration::from_secs(2);
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// Opens the disks of a store:
///
/// | name | what | users |
/// | --- | --- | --- |
/// | `container/NAME`, `volume/NAME` | the disk | one, which may write |
/// | `container/NAME@SNAP` | a snapshot | many readers |
/// | `volume/NAME:ro` | a volume | many readers, while nobody writes it |
/// | `image/NAME:TAG` | an image | many readers |
pub struct StoreBroker {
    store: Store,
    log: Log,
    /// Whether nothing but mounts of this host gets its disks.
    for_mounts: bool,
    /// What was damaged when the disks were listed last.
    told: Mutex<Vec<Finding>>,
}

/// What a name stands for.
pub(super) enum Named {
    Writable(DiskName),
    ReadOnlyVolume(DiskName),
    Snapshot(String, String),
    Image(String),
}

fn unknown(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no disk called {name:?}"))
}

/// Whether a name of an image says all that it is listed under.
fn is_whole(name: &str) -> bool {
    name.parse::<Reference>().is_ok_and(|reference| reference.to_string() == name)
}

impl Named {
    pub fn parse(name: &str) -> Result<Self> {
        let (noun, rest) = name.split_once('/').ok_or_else(|| unknown(name))?;
        match (noun, rest.split_once('@'), rest.strip_suffix(":ro")) {
            ("image", ..) => Ok(Self::Image(rest.to_owned())),
            ("container", Some((container, snapshot)), _) => {
                Ok(Self::Snapshot(container.to_owned(), snapshot.to_owned()))
            }
            ("container", None, _) => Ok(Self::Writable(DiskName::new(DiskKind::Container, rest)?)),
            ("volume", _, Some(rest)) => {
                Ok(Self::ReadOnlyVolume(DiskName::new(DiskKind::Volume, rest)?))
            }
            ("volume", _, None) => Ok(Self::Writable(DiskName::new(DiskKind::Volume, rest)?)),
            _ => Err(unknown(name)),
        }
    }

    /// The disk that it is, or that it was.
    pub fn disk(&self) -> Result<DiskName> {
        match self {
            Self::Writable(disk) | Self::ReadOnlyVolume(disk) => Ok(disk.clone()),
            Self::Snapshot(container, _) => DiskName::new(DiskKind::Container, container),
            Self::Image(image) => Err(unknown(image)),
        }
    }

    fn open(&self, store: &Store) -> Result<OpenDisk> {
        match self {
            Self::Writable(disk) => store.open_disk(disk, Access::Write),
            Self::ReadOnlyVolume(disk) => store.open_disk(disk, Access::Read),
            Self::Snapshot(container, snapshot) => store.open_snapshot(container, snapshot),
            Self::Image(name) => store.open_image(&store.image(name)?),
        }
    }
}

impl StoreBroker {
    /// For the disks of `store`; `log` hears of what goes wrong where nobody waits for an answer.
    pub fn new(store: Store, log: Log) -> Self {
        Self { store, log, for_mounts: false, told: Mutex::default() }
    }

    /// The same, for nothing but mounts of this host: what its kernel made stays its own
    /// ([`Store::is_made_here`]).
    #[must_use]
    pub fn for_mounts(self) -> Self {
        Self { for_mounts: true, ..self }
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What could be listed; what could not be goes to `bad`.
    fn listed<T: Default>(what: &str, list: Result<Survey<T>>, bad: &mut Vec<Finding>) -> T {
        match list {
            Ok(survey) => {
                bad.extend(survey.bad);
                survey.good
            }
            Err(error) => {
                bad.push(Finding::new(what, error));
                T::default()
            }
        }
    }

    /// Logs what is damaged, unless it was so already when somebody listed the disks before.
    fn tell(&self, bad: Vec<Finding>) {
        let mut told = guard(&self.told);
        bad.iter().filter(|found| !told.contains(found)).for_each(|found| {
            (self.log)(&found.to_string());
        });
        *told = bad;
    }
}

impl Broker for StoreBroker {
    type Disk = OpenDisk;

    fn open(&self, name: &str) -> Result<Opened<OpenDisk>> {
        let (named, start) = (Named::parse(name)?, Instant::now());
        let shared = !matches!(named, Named::Writable(_));
        loop {
            match named.open(&self.store) {
                Err(error) if error.kind() == ErrorKind::InUse && start.elapsed() < PATIENCE => {
                    thread::sleep(TRY_AGAIN);
                }
                opened => return Ok(Opened { shared, ..Opened::new(opened?) }),
            }
        }
    }

    fn lend(&self, name: &str) -> Result<()> {
        match Named::parse(name)? {
            Named::Writable(disk) if !self.for_mounts => self.store.note_foreign(&disk),
            _ => Ok(()),
        }
    }

    fn facts(&self, name: &str) -> Result<Facts> {
        match Named::parse(name)? {
            Named::Writable(disk) => self.store.disk_facts(&disk),
            // Whoever opens a disk for reading sees what its writer does.
            Named::ReadOnlyVolume(_) => Err(unknown(name)),
            Named::Image(image) if !is_whole(&image) => Err(unknown(name)),
            named => named.open(&self.store)?.facts(),
        }
    }

    fn list(&self) -> Result<Vec<Listed>> {
        let (mut list, mut bad) = (Vec::new(), Vec::new());
        let mut add = |name, description, alias| list.push(Listed { name, description, alias });
        for image in Self::listed("images", self.store.images(), &mut bad) {
            if let Some(name) = &image.reference {
                add(format!("image/{name}"), format!("image {:.12}", image.id), false);
            }
        }
        let containers = Self::listed("containers", self.store.containers(), &mut bad);
        // One whose layer can't be read is no disk.
        for container in containers.iter().filter(|container| container.base.is_some()) {
            let over = format!("container over {}", shown(&container.image));
            add(format!("container/{}", container.name), over, false);
            for saved in &container.snapshots {
                let text = format!("snapshot of container {}", container.name);
                add(format!("container/{}@{}", container.name, saved.name), text, false);
            }
        }
        for volume in Self::listed("volumes", self.store.volumes(), &mut bad) {
            let name = volume.name;
            add(format!("volume/{name}"), "volume, for one writer".into(), false);
            add(format!("volume/{name}:ro"), "volume, for many readers".into(), true);
        }
        self.tell(bad);
        Ok(list)
    }

    /// In the store's folder, under no name: a name is there for a moment only, and `gc` takes what a
    /// crash leaves of it.
    fn scratch(&self) -> Result<Arc<dyn Storage>> {
        let (root, name) = (self.store.root(), files::draft_name()?);
        let fail = |error| Error::io(error, "making a temporary file").in_file(root.path());
        let file = root.create(&name).map_err(fail)?;
        files::remove(root, &name)?;
        Ok(file)
    }

    fn log(&self, line: &str) {
        (self.log)(line);
    }
}

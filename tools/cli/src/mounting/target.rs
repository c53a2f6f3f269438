//! What is to be mounted, as people name it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thinply::device::Facts;
use thinply::error::Result;
use thinply::serve::Broker;
use thinply::store::{Store, StoreBroker};

use crate::io::paths::Place;
use crate::options::StoreArg;

/// The folders of disks of a store.
const KINDS: [&str; 3] = ["container", "volume", "image"];

/// A disk.
#[derive(Clone, Debug)]
pub enum Target {
    /// A layer that is no part of a store.
    Layer(Place),
    /// A disk of a store, by its name.
    Disk {
        /// The store.
        store: Store,
        /// As in `container/web`.
        name: String,
    },
}

impl Target {
    /// A layer's file, or else the disk of the store.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::InvalidInput`]; host errors.
    pub fn find(named: &Path, store: &StoreArg) -> Result<Self> {
        let name = named.to_str().unwrap_or_default();
        let kind = name.split_once('/').map(|(kind, _)| kind);
        if named.exists() || !kind.is_some_and(|kind| KINDS.contains(&kind)) {
            return Place::existing(named).map(Self::Layer);
        }
        let (store, name) = (store.open()?, named_in_full(name));
        let target = Self::Disk { store, name };
        target.facts().map(|_| target)
    }

    /// What the disk's file will show of itself.
    fn facts(&self) -> Result<Option<Facts>> {
        match self {
            Self::Layer(_) => Ok(None),
            Self::Disk { store, name } => {
                let broker = StoreBroker::new(store.clone(), Arc::new(|_| {}));
                broker.facts(name).map(Some)
            }
        }
    }

    /// What a server serves for it: the layer's path, or the store's.
    ///
    /// # Errors
    /// Host errors.
    pub fn served(&self) -> Result<PathBuf> {
        match self {
            Self::Layer(place) => Ok(place.path()),
            Self::Disk { store, .. } => crate::io::paths::real(store.path()),
        }
    }

    /// Its file's path in the folder that a server shows.
    pub fn file(&self) -> &Path {
        match self {
            Self::Layer(place) => Path::new(&place.name),
            Self::Disk { name, .. } => Path::new(name),
        }
    }

    /// As people name it.
    pub fn shown(&self) -> PathBuf {
        match self {
            Self::Layer(place) => place.path(),
            Self::Disk { name, .. } => name.into(),
        }
    }

    /// Whether nobody may change it.
    pub fn read_only(&self) -> bool {
        match self {
            Self::Layer(_) => false,
            Self::Disk { name, .. } => name.starts_with("image/") || name.contains('@'),
        }
    }
}

/// An image's name with its tag, which may be left out.
fn named_in_full(name: &str) -> String {
    match name.split_once('/') {
        Some(("image", image)) => {
            let last = Path::new(image).file_name().and_then(OsStr::to_str).unwrap_or_default();
            if last.contains(':') { name.to_owned() } else { format!("{name}:latest") }
        }
        _ => name.to_owned(),
    }
}

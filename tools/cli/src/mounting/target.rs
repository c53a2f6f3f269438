//! What is to be mounted, as people name it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use thinply::error::{Error, ErrorKind, Result};
use thinply::serve::Broker;
use thinply::store::{DiskName, Reference, Store, StoreBroker};

use crate::io::paths::{self, Place};
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
            let found = Place::existing(named).map(Self::Layer);
            return found.map_err(|error| match error.kind() {
                ErrorKind::NotFound => {
                    let detail = format!(
                        "{error}; disks of the store are called as in container/{}",
                        named.display()
                    );
                    Error::new(ErrorKind::NotFound, detail)
                }
                _ => error,
            });
        }
        let (store, name) = (store.open()?, named_in_full(name)?);
        // Says so if there is none.
        StoreBroker::new(store.clone(), Arc::new(|_| {})).facts(&name)?;
        Ok(Self::Disk { store, name })
    }

    /// What a server serves for it: the layer's path, or the store's.
    ///
    /// # Errors
    /// Host errors.
    pub fn served(&self) -> Result<PathBuf> {
        match self {
            Self::Layer(place) => Ok(place.path()),
            Self::Disk { store, .. } => paths::real(store.path()),
        }
    }

    /// Its file's path in the folder that a server shows.
    pub fn file(&self) -> &Path {
        match self {
            Self::Layer(place) => Path::new(&place.name),
            Self::Disk { name, .. } => Path::new(name),
        }
    }

    /// The layer that whoever writes it writes; none of what nobody may change.
    ///
    /// # Errors
    /// Host errors.
    pub fn layer(&self) -> Result<Option<Place>> {
        match self {
            Self::Layer(place) => Ok(Some(place.clone())),
            Self::Disk { store, name } => {
                let disk = DiskName::of_export(name);
                disk.map(|disk| Place::existing(&store.layer_path(&disk))).transpose()
            }
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

/// A disk's name with what may be left out of an image's.
fn named_in_full(name: &str) -> Result<String> {
    match name.split_once('/') {
        Some(("image", image)) => Ok(format!("image/{}", image.parse::<Reference>()?)),
        _ => Ok(name.to_owned()),
    }
}

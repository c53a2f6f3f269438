//! `made`: file systems that this host made itself, which its kernel may therefore be let read
//! (`docs/mounting.md`). Where the file says nothing of one, a stranger may have made it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{DiskKind, DiskName, Guard, Store, files, json};
use crate::error::{Error, ErrorKind, Result};
use crate::live::newest_header;
use crate::storage::{Access, open_in};

const FILE: &str = "made";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Made {
    /// Layers by the SHA-256 of their bytes: whoever has the same bytes has what this host made.
    layers: BTreeSet<String>,
    /// Volumes by their names, with the UUIDs of their layers: another one may come to have the name.
    volumes: BTreeMap<String, String>,
}

impl Store {
    /// Whether the file system on a disk, called as front ends call it, was made by this host, or stands
    /// on such a one. (What was written to it since is not asked.)
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Corrupt`] for a damaged list; host errors.
    pub fn is_made_here(&self, name: &str) -> Result<bool> {
        let made = self.made()?;
        match name.split_once('/') {
            Some(("image", image)) => Ok(made.layers.contains(&self.image(image)?.top()?)),
            Some(("container", name)) => {
                let name = name.split_once('@').map_or(name, |(name, _)| name);
                let (container, _) = self.container(name)?;
                Ok(container.base.is_some_and(|base| made.layers.contains(&base)))
            }
            Some(("volume", name)) => {
                let known = made.volumes.get(name);
                Ok(known.is_some_and(|known| {
                    self.uuid_of_volume(name).is_ok_and(|uuid| uuid == *known)
                }))
            }
            _ => Err(Error::new(ErrorKind::NotFound, format!("there is no disk called {name:?}"))),
        }
    }

    /// Notes that this host made the file system on a volume.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; host errors.
    pub fn note_made_volume(&self, name: &str) -> Result<()> {
        let guard = self.lock()?;
        let uuid = self.uuid_of_volume(name)?;
        self.change_made(&guard, |made| {
            made.volumes.insert(name.to_owned(), uuid);
        })
    }

    /// Notes that this host made the file system in a layer.
    pub(super) fn note_made_layer(&self, digest: &str, guard: &Guard) -> Result<()> {
        self.change_made(guard, |made| {
            made.layers.insert(digest.to_owned());
        })
    }

    /// Forgets what is gone.
    pub(super) fn forget_made(&self, guard: &Guard) -> Result<()> {
        if self.made().is_ok_and(|made| made == Made::default()) {
            return Ok(());
        }
        let blobs: BTreeSet<_> = files::listing(self.blobs())?.into_iter().collect();
        let volumes = self.disk_names(DiskKind::Volume)?;
        self.change_made(guard, |made| {
            made.layers.retain(|layer| blobs.contains(layer));
            made.volumes.retain(|name, _| volumes.contains(name));
        })
    }

    fn made(&self) -> Result<Made> {
        Ok(json::read(self.root(), FILE)?.unwrap_or_default())
    }

    /// A list that can't be read is begun anew: then more is refused, not less.
    fn change_made(&self, _: &Guard, change: impl FnOnce(&mut Made)) -> Result<()> {
        let old = self.made().unwrap_or_default();
        let mut made = old.clone();
        change(&mut made);
        if made == old {
            return Ok(());
        }
        if made == Made::default() {
            return files::remove(self.root(), FILE);
        }
        files::replace(self.root(), FILE, &json::canonical(&made)?)
    }

    fn uuid_of_volume(&self, name: &str) -> Result<String> {
        let disk = DiskName::new(DiskKind::Volume, name)?;
        let layer = open_in(&**self.folder(DiskKind::Volume), &disk.file(), Access::Read)?;
        Ok(newest_header(&*layer)?.uuid.to_string())
    }
}

//! `made`: file systems that this host made itself, which its kernel may therefore be let read
//! (`docs/mounting.md`). Where the file says nothing of one, a stranger may have made it. It is sealed
//! with a key of the host: what came from elsewhere says nothing, even to the store that it is in.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::broker::Named;
use super::host_key::HostKey;
use super::{DiskKind, DiskName, Guard, Store, files, json};
use crate::chain::{Layer, MAX_DEPTH};
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
    /// Containers over such layers, which nothing but the host's kernel has written to.
    containers: BTreeSet<String>,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    #[serde(flatten)]
    made: Made,
    /// Hexadecimal [`HostKey::seal`] of this store's folder and the rest.
    seal: String,
}

impl Store {
    /// Whether the file system on a disk, called as front ends call it, was made by this host, or stands
    /// on such a one, and nothing but this host's kernel wrote to it since.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; host errors.
    pub fn is_made_here(&self, name: &str) -> Result<bool> {
        match Named::parse(name)? {
            Named::Image(image) => Ok(self.made().layers.contains(&self.image(&image)?.top()?)),
            named => self.is_made_disk(&named.disk()?),
        }
    }

    pub(super) fn is_made_disk(&self, disk: &DiskName) -> Result<bool> {
        let made = self.made();
        match disk.kind {
            DiskKind::Container => {
                let (container, _) = self.container(&disk.name)?;
                let over_own = container.base.is_some_and(|base| made.layers.contains(&base));
                Ok(over_own && made.containers.contains(&disk.name))
            }
            DiskKind::Volume => {
                let known = made.volumes.get(&disk.name);
                let is_it = |known: &String| {
                    self.uuid_of_volume(&disk.name).is_ok_and(|uuid| uuid == *known)
                };
                Ok(known.is_some_and(is_it))
            }
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

    /// Notes, before it happens, that something else than this host's file system writes to a disk.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; host errors.
    pub fn note_foreign(&self, disk: &DiskName) -> Result<()> {
        let names_it = |made: Made| match disk.kind {
            DiskKind::Container => made.containers.contains(&disk.name),
            DiskKind::Volume => made.volumes.contains_key(&disk.name),
        };
        let nothing_to_do = match self.sealed() {
            Some(made) => !names_it(made),
            None => !files::exists(self.root(), FILE)?,
        };
        if nothing_to_do {
            return Ok(());
        }
        let guard = self.lock()?;
        if self.sealed().is_none() {
            // Whoever has the key would believe it still.
            return files::remove(self.root(), FILE);
        }
        self.change_made(&guard, |made| match disk.kind {
            DiskKind::Container => drop(made.containers.remove(&disk.name)),
            DiskKind::Volume => drop(made.volumes.remove(&disk.name)),
        })
    }

    /// Notes that a container holds what a layer does, and nothing else.
    pub(super) fn note_new_container(
        &self,
        disk: &DiskName,
        base: &str,
        guard: &Guard,
    ) -> Result<()> {
        self.change_made(guard, |made| {
            if made.layers.contains(base) {
                made.containers.insert(disk.name.clone());
            } else {
                made.containers.remove(&disk.name);
            }
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
        if self.made() == Made::default() {
            return Ok(());
        }
        let blobs: BTreeSet<_> = files::listing(self.blobs())?.into_iter().collect();
        let volumes = self.disk_names(DiskKind::Volume)?;
        let containers = self.disk_names(DiskKind::Container)?;
        self.change_made(guard, |made| {
            made.layers.retain(|layer| blobs.contains(layer));
            made.volumes.retain(|name, _| volumes.contains(name));
            made.containers.retain(|name| containers.contains(name));
        })
    }

    /// The files that decide what is on a disk, called as front ends call it, and whose that is: its layers,
    /// its record and the list of what was made here.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Corrupt`]; host errors.
    pub fn decisive_files(&self, name: &str) -> Result<Vec<PathBuf>> {
        let disk = match Named::parse(name)? {
            Named::Image(image) => return self.blobs_from(&self.image(&image)?.top()?),
            named => named.disk()?,
        };
        let folder = self.folder(disk.kind).path();
        let list = self.root().path().join(FILE);
        let mut found = vec![list, folder.join(disk.record_file()), folder.join(disk.file())];
        if disk.kind == DiskKind::Container {
            let (own, base) = self.own_layers(&disk.file())?;
            let record = self.record(&disk)?.unwrap_or_default();
            let frozen = record.frozen.into_iter().map(|frozen| frozen.file);
            found.extend(own.into_iter().chain(frozen).map(|file| folder.join(file)));
            if let Some(base) = base {
                found.extend(self.blobs_from(&base)?);
            }
        }
        Ok(found)
    }

    /// A layer among the blobs and those below it.
    fn blobs_from(&self, top: &str) -> Result<Vec<PathBuf>> {
        let (mut found, mut next) = (Vec::new(), Some(top.to_owned()));
        while let Some(digest) = next {
            let layer = Layer::open(open_in(self.blobs(), &digest, Access::Read)?)?;
            found.push(self.blobs().path().join(&digest));
            if found.len() > MAX_DEPTH {
                return Err(Error::new(ErrorKind::Corrupt, "the layer is its own ancestor"));
            }
            next = layer.parent().map(|link| link.hint.clone());
        }
        Ok(found)
    }

    fn made(&self) -> Made {
        self.sealed().unwrap_or_default()
    }

    /// What can't be read, or isn't sealed by this host, says nothing.
    fn sealed(&self) -> Option<Made> {
        let sealed = json::read::<Sealed>(self.root(), FILE).ok().flatten();
        let own = |sealed: &Sealed| {
            HostKey::find().is_some_and(|key| self.seal(&key, &sealed.made) == sealed.seal)
        };
        sealed.filter(own).map(|sealed| sealed.made)
    }

    /// A host without a key can't tell what it made: then more is refused, not less.
    fn change_made(&self, _: &Guard, change: impl FnOnce(&mut Made)) -> Result<()> {
        let old = self.made();
        let mut made = old.clone();
        change(&mut made);
        if made == old {
            return Ok(());
        }
        if made.layers.is_empty() && made.volumes.is_empty() {
            return files::remove(self.root(), FILE);
        }
        let Some(key) = HostKey::find_or_make() else { return Ok(()) };
        let seal = self.seal(&key, &made);
        files::clear_folder(self.root(), FILE)?;
        files::replace(self.root(), FILE, &json::canonical(&Sealed { made, seal })?)
    }

    /// What was noted for this folder, on this host.
    fn seal(&self, key: &HostKey, made: &Made) -> String {
        // A folder of another kind has no other to be told from.
        let path = self.root().path();
        let inode = std::fs::metadata(path).map_or(0, |found| found.ino());
        let file_system = rustix::fs::statvfs(path).map_or(0, |found| found.f_fsid);
        key.seal([file_system, inode], &json::canonical(made).unwrap_or_default())
    }

    fn uuid_of_volume(&self, name: &str) -> Result<String> {
        let disk = DiskName::new(DiskKind::Volume, name)?;
        let layer = open_in(&**self.folder(DiskKind::Volume), &disk.file(), Access::Read)?;
        Ok(newest_header(&*layer)?.uuid.to_string())
    }
}

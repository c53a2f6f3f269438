//! What is needed, what is not, and taking away the latter.

use std::collections::BTreeSet;
use std::io;

use serde_json::Value;

use super::digest::{hex_digest, is_hex_digest};
use super::disk::{DiskKind, DiskName, GONE, LAYER, RECORD, Record, is_layer_of};
use super::files::listing;
use super::index::Index;
use super::{Guard, Image, Store, files, json};
use crate::chain::finish_snapshot;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::State;
use crate::live::newest_header;
use crate::packed::Packed;
use crate::storage::{Access, Folder, Lock, failed, find_in, sync_folder};

/// What a collection took away, or would.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Ids of images without a name and without containers.
    pub images: Vec<String>,
    /// Files with their folder in the store, and the bytes of disk that they take.
    pub files: Vec<(String, u64)>,
}

impl Collected {
    /// Bytes of disk in all.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// What a kind of thing takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// How many there are.
    pub total: u64,
    /// How many are in use.
    pub active: u64,
    /// Bytes of disk.
    pub size: u64,
    /// Bytes of disk that only those take that are not in use.
    pub reclaimable: u64,
}

/// A folder of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Root,
    Blobs,
    Disks(DiskKind),
}

impl Place {
    fn label(self) -> &'static str {
        match self {
            Self::Root => ".",
            Self::Blobs => "blobs/sha256",
            Self::Disks(DiskKind::Container) => "containers",
            Self::Disks(DiskKind::Volume) => "volumes",
        }
    }
}

/// A file that nothing needs.
#[derive(Debug)]
struct Garbage {
    place: Place,
    name: String,
}

impl Store {
    /// Everything that something refers to in the folder of blobs: from the index, from records,
    /// and from the parent links of layers, those of no record included, but for what is `doomed`.
    fn marked(&self, index: &Index, doomed: &[Garbage]) -> Result<BTreeSet<String>> {
        let is_doomed = |place: Place, name: &str| {
            doomed.iter().any(|garbage| garbage.place == place && garbage.name == name)
        };
        let mut marked = BTreeSet::new();
        self.mark_json(index.value(), &mut marked)?;
        for kind in [DiskKind::Container, DiskKind::Volume] {
            let folder = &**self.folder(kind);
            for name in listing(folder)? {
                if name.ends_with(RECORD) || name.ends_with(GONE) {
                    let record = json::read::<Record>(folder, &name)?.unwrap_or_default();
                    if is_hex_digest(&record.manifest) {
                        self.mark_manifest(&record.manifest, &mut marked)?;
                    }
                } else if (name.ends_with(LAYER) || name.ends_with(".top"))
                    && !is_doomed(Place::Disks(kind), &name)
                {
                    self.mark_parents(folder, &name, &mut marked)?;
                }
            }
        }
        // What is being made stands on something too.
        for name in listing(self.blobs())?.iter().filter(|name| name.starts_with(files::DRAFT)) {
            if !is_doomed(Place::Blobs, name) {
                self.mark_parents(self.blobs(), name, &mut marked)?;
            }
        }
        Ok(marked)
    }

    /// Marks the digests in JSON and what those blobs refer to in turn, whatever wrote it.
    fn mark_json(&self, value: &Value, marked: &mut BTreeSet<String>) -> Result<()> {
        match value {
            Value::Object(map) => {
                let text = |key| map.get(key).and_then(Value::as_str);
                if let Some(digest) = text("digest").and_then(hex_digest) {
                    let kind = text("mediaType").unwrap_or_default();
                    if kind.contains("manifest") || kind.contains("index") {
                        self.mark_manifest(digest, marked)?;
                    }
                    marked.insert(digest.to_owned());
                }
                map.values().try_for_each(|value| self.mark_json(value, marked))
            }
            Value::Array(items) => items.iter().try_for_each(|item| self.mark_json(item, marked)),
            _ => Ok(()),
        }
    }

    fn mark_manifest(&self, digest: &str, marked: &mut BTreeSet<String>) -> Result<()> {
        if !marked.insert(digest.to_owned()) {
            return Ok(());
        }
        // A missing one is for `check` to tell. One that was altered ends the collection.
        let Some(bytes) = self.json_blob(digest)? else { return Ok(()) };
        self.mark_json(&json::parse(&bytes)?, marked)
    }

    /// Marks the blobs below a layer. A layer that can't be read ends the collection, but a file
    /// that never became one doesn't.
    fn mark_parents(
        &self,
        folder: &dyn Folder,
        name: &str,
        marked: &mut BTreeSet<String>,
    ) -> Result<()> {
        let Some(hint) = parent_hint(folder, name)? else { return Ok(()) };
        let mut next = Some(hint);
        while let Some(digest) = next.take().filter(|hint| is_hex_digest(hint)) {
            if marked.insert(digest.clone()) {
                next = parent_hint(self.blobs(), &digest)?;
            }
        }
        Ok(())
    }

    /// The blobs that only `image` needs, by an index that doesn't have it any more.
    pub(super) fn garbage_of(&self, index: &Index, image: &Image) -> Result<Vec<String>> {
        let mut own = BTreeSet::new();
        self.mark_manifest(&image.id, &mut own)?;
        let kept = self.marked(index, &[])?;
        Ok(own.difference(&kept).cloned().collect())
    }

    /// Those of the blobs that nothing refers to and nobody has open; none where something can't be
    /// read that may.
    pub(super) fn unmarked(&self, index: &Index, blobs: &[String]) -> Result<Vec<String>> {
        let marks = self.marked(index, &[])?;
        let mut unmarked = Vec::new();
        for blob in blobs.iter().filter(|blob| !marks.blobs.contains(*blob)) {
            if marks.bad.is_empty() && self.is_idle(self.blobs(), blob)? {
                unmarked.push(blob.clone());
            }
        }
        Ok(unmarked)
    }

    /// Takes away what nothing refers to: blobs, images without a name and without containers, and
    /// what crashes left. With `dry_run` it only tells.
    ///
    /// # Errors
    /// Where anything can't be read that may refer to something, nothing is taken.
    pub fn collect(&self, dry_run: bool) -> Result<Collected> {
        let guard = self.lock()?;
        if !dry_run {
            self.finish_changes()?;
        }
        let mut index = Index::read(self)?;
        let unnamed = self.unnamed_images(&index)?;
        index.remove(|entry| entry.reference.is_none() && unnamed.contains(&entry.digest));
        let mut found = Collected { images: unnamed, files: Vec::new() };
        let mut doomed = self.leftovers(&guard)?;
        let marked = self.marked(&index, &doomed)?;
        for name in listing(self.blobs())? {
            if is_hex_digest(&name)
                && !marked.contains(&name)
                && self.is_idle(self.blobs(), &name)?
            {
                doomed.push(Garbage { place: Place::Blobs, name });
            }
        }
        for garbage in &doomed {
            let file = self.place(garbage.place).open(&garbage.name, Access::Read);
            let bytes = file.and_then(|file| file.allocated()).unwrap_or(0);
            found.files.push((format!("{}/{}", garbage.place.label(), garbage.name), bytes));
        }
        if dry_run {
            return Ok(found);
        }
        // The index first: a blob that it still names may not go.
        if !found.images.is_empty() {
            index.write_smaller(self)?;
        }
        for garbage in &doomed {
            files::remove(self.place(garbage.place), &garbage.name)?;
        }
        for folder in [
            &self.folders.root,
            &self.folders.blobs,
            &self.folders.containers,
            &self.folders.volumes,
        ] {
            sync_folder(&**folder)?;
        }
        self.keep_reserve();
        drop::<Guard>(guard);
        Ok(found)
    }

    /// What commands left that were killed, and that nobody is making any more.
    fn leftovers(&self, guard: &Guard) -> Result<Vec<Garbage>> {
        let mut found = Vec::new();
        let mut add = |place, names: Vec<String>| {
            found.extend(names.into_iter().map(|name| Garbage { place, name }));
        };
        let is_draft = |name: &String| name.starts_with(files::DRAFT);
        for place in [Place::Root, Place::Blobs] {
            let mut drafts = listing(self.place(place))?;
            drafts.retain(is_draft);
            let mut idle = Vec::new();
            for name in drafts {
                if place == Place::Root || self.is_idle(self.blobs(), &name)? {
                    idle.push(name);
                }
            }
            add(place, idle);
        }
        for kind in [DiskKind::Container, DiskKind::Volume] {
            add(Place::Disks(kind), self.strays(kind)?);
        }
        for name in self.disk_names(DiskKind::Container)? {
            let disk = DiskName { kind: DiskKind::Container, name };
            add(Place::Disks(DiskKind::Container), self.abandoned(&disk, guard)?);
        }
        Ok(found)
    }

    /// What a snapshot or commit of a container left that was cut off. One that is open is for
    /// whoever has it.
    fn abandoned(&self, disk: &DiskName, guard: &Guard) -> Result<Vec<String>> {
        let folder = &**self.folder(disk.kind);
        let exists = |name: &str| {
            let fail = |error| Error::io(error, "looking at layers").in_file(folder.path());
            folder.same_file(name, name).map_err(fail)
        };
        let record = self.record(disk)?.unwrap_or_default();
        let (new_top, copy) = (disk.new_top_file(), disk.copy_file());
        let (has_top, has_copy) = (exists(&new_top)?, exists(&copy)?);
        if record.frozen.is_empty() && !has_top && !has_copy {
            return Ok(Vec::new());
        }
        let file = match self.claim(disk, guard) {
            Ok(Some(file)) => file,
            Err(error) if error.kind() != ErrorKind::InUse => return Err(error),
            _ => return Ok(Vec::new()),
        };
        let frozen = matches!(newest_header(&*file)?.state, State::Frozen(_));
        let mut names = self.unneeded(disk, &record)?;
        // The frozen layer's new top is still to take its name.
        names.retain(|_| !frozen);
        names.extend((has_top && !frozen).then_some(new_top));
        names.extend(has_copy.then_some(copy));
        let mut found = Vec::new();
        for name in names {
            if exists(&name)? {
                found.push(name);
            }
        }
        Ok(found)
    }

    fn place(&self, place: Place) -> &dyn Folder {
        match place {
            Place::Root => self.root(),
            Place::Blobs => self.blobs(),
            Place::Disks(kind) => &**self.folder(kind),
        }
    }

    /// Brings removals and snapshots to their end that were cut off.
    fn finish_changes(&self) -> Result<()> {
        for kind in [DiskKind::Container, DiskKind::Volume] {
            let folder = &**self.folder(kind);
            for name in listing(folder)? {
                let top = name.strip_prefix('.').and_then(|name| name.strip_suffix(".top"));
                if let Some(name) = name.strip_suffix(GONE) {
                    self.finish_removal(&DiskName { kind, name: name.to_owned() })?;
                } else if let Some(layer) = top {
                    match finish_snapshot(folder, layer) {
                        Err(error)
                            if !matches!(error.kind(), ErrorKind::InUse | ErrorKind::NotFound) =>
                        {
                            return Err(error);
                        }
                        // Somebody is making it just now, or it was of a disk that is gone.
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// Images whose name went to another one and on which no container stands.
    fn unnamed_images(&self, index: &Index) -> Result<Vec<String>> {
        let containers = self.containers()?;
        let mut unnamed = Vec::new();
        for entry in index.entries().filter(|e| e.is_manifest && e.reference.is_none()) {
            let Some(image) = self.load_image(&entry.digest, None)? else { continue };
            let top = image.top().ok();
            let used = containers.iter().any(|container| {
                container.image_id == image.id || (top.is_some() && container.base == top)
            });
            if !used {
                unnamed.push(entry.digest);
            }
        }
        Ok(unnamed)
    }

    /// Whether nobody has a file open with a lock on it.
    fn is_idle(&self, folder: &dyn Folder, name: &str) -> Result<bool> {
        let Some(file) = find_in(folder, name, Access::Write)? else { return Ok(false) };
        match file.lock(Lock::Exclusive) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(failed(&*file, "locking the file", 0)(error)),
        }
    }

    /// Files of no record: drafts, and layers that a cut-off creation or commit left.
    fn strays(&self, kind: DiskKind) -> Result<Vec<String>> {
        let folder = &**self.folder(kind);
        let names = listing(folder)?;
        let mut strays = Vec::new();
        for name in &names {
            let stem = name.strip_prefix('.').unwrap_or(name);
            let stem =
                [".top", ".copy"].iter().find_map(|end| stem.strip_suffix(end)).unwrap_or(stem);
            let stray = if name.starts_with(files::DRAFT) {
                true
            } else if let Some(stem) = stem.strip_suffix(LAYER) {
                !self.is_recorded(kind, stem, name, &names)?
            } else {
                false
            };
            if stray && self.is_idle(folder, name)? {
                strays.push(name.clone());
            }
        }
        Ok(strays)
    }

    /// Whether a layer file belongs to a disk that has a record.
    fn is_recorded(
        &self,
        kind: DiskKind,
        stem: &str,
        file: &str,
        names: &[String],
    ) -> Result<bool> {
        let (owner, frozen) = match stem.split_once('@') {
            Some((owner, _)) => (owner, true),
            None => (stem, false),
        };
        let disk = DiskName { kind, name: owner.to_owned() };
        if names.binary_search(&disk.record_file()).is_err() {
            return Ok(false);
        }
        if !frozen {
            return Ok(true);
        }
        let record = self.record(&disk)?.unwrap_or_default();
        Ok(!is_layer_of(&disk, file) || record.frozen.iter().any(|frozen| frozen.file == file))
    }

    /// What images, containers and volumes take, in that order.
    pub fn usage(&self) -> Result<[Usage; 3]> {
        let containers = self.containers()?;
        let mut images = Usage::default();
        let (mut all, mut held) = (BTreeSet::new(), BTreeSet::new());
        let mut counted = BTreeSet::new();
        for image in self.images()? {
            let layers = image.layers()?;
            let used = containers.iter().any(|container| {
                container.image_id == image.id || container.base.as_ref() == layers.last()
            });
            if counted.insert(image.id.clone()) {
                images.total += 1;
                images.active += u64::from(used);
            }
            if used {
                held.extend(layers.iter().cloned());
            }
            all.extend(layers);
        }
        for layer in &all {
            let cost = self.blob_cost(layer)?;
            images.size += cost;
            images.reclaimable += if held.contains(layer) { 0 } else { cost };
        }
        let disks = |kind| -> Result<Usage> {
            let mut usage = Usage::default();
            for name in self.disk_names(kind)? {
                let disk = DiskName { kind, name };
                let Some(record) = self.record(&disk)? else { continue };
                let cost = self.disk_cost(&disk, &record)?;
                let idle = self.is_idle(&**self.folder(kind), &disk.file())?;
                usage.total += 1;
                usage.active += u64::from(!idle);
                usage.size += cost;
                usage.reclaimable += if idle { cost } else { 0 };
            }
            Ok(usage)
        };
        Ok([images, disks(DiskKind::Container)?, disks(DiskKind::Volume)?])
    }
}

/// The file name that a layer's parent link gives; none where the file is gone, is no layer, or
/// stands on nothing.
fn parent_hint(folder: &dyn Folder, name: &str) -> Result<Option<String>> {
    let Some(file) = find_in(folder, name, Access::Read)? else { return Ok(None) };
    if Packed::is_packed(&*file)? {
        return match Packed::open(file) {
            Ok(layer) => Ok(layer.parent().map(|link| link.hint.clone())),
            // One that is being written; the layer that it is made from keeps the parents.
            Err(_) if name.starts_with(files::DRAFT) => Ok(None),
            Err(error) => Err(error),
        };
    }
    match newest_header(&*file) {
        Ok(header) => Ok(header.parent.map(|link| link.hint)),
        Err(error) if error.kind() == ErrorKind::NotAnImage => Ok(None),
        // A header whose checksums don't hold, of a creation that was cut off.
        Err(error) if name.starts_with(files::DRAFT) && error.kind() == ErrorKind::Corrupt => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

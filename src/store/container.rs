//! Containers: live layers over images, and what becomes of them.

use std::collections::BTreeSet;

use super::blob::NewBlob;
use super::digest::is_hex_digest;
use super::disk::{DiskKind, DiskName, FrozenLayer, LAYER, Record, rights_over};
use super::index::Index;
use super::{
    Costs, Finding, Image, NewImage, OpenDisk, Reference, Store, Survey, check_name, clock, files,
    now,
};
use crate::chain::{Chain, Parent, create, seal};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::ParentLink;
use crate::live::{durable_header, newest_header};
use crate::storage::{Access, open_in, sync_folder};

/// A container as its record and its layer tell.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// RFC 3339.
    pub created: String,
    /// The name that its image had.
    pub image: String,
    /// Hexadecimal SHA-256 of that image's manifest.
    pub image_id: String,
    /// The newest blob that it stands on; none where its layers can't be read.
    pub base: Option<String>,
    /// The names of its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
}

/// A snapshot of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// RFC 3339.
    pub created: String,
}

/// What a container stands on.
pub(super) struct Standing {
    pub container: String,
    /// By its record; empty where that can't be read.
    pub image_id: String,
    /// The newest blob below its layers; none where they can't be read.
    pub base: Option<String>,
}

fn container(name: &str) -> Result<DiskName> {
    DiskName::new(DiskKind::Container, name)
}

impl Store {
    /// All containers, by name. One whose layer can't be read is there, and told of.
    pub fn containers(&self) -> Result<Survey<Vec<Container>>> {
        self.settled(|| {
            let mut survey = Survey::<Vec<Container>>::default();
            for name in self.disk_names(DiskKind::Container)? {
                let disk = container(&name)?;
                match self.find_container(&name, &mut survey.bad) {
                    Ok(Some(found)) => {
                        if found.base.is_none()
                            && let Err(error) = self.base_of(&disk.file())
                        {
                            survey.bad.push(Finding::new(&disk, error));
                        }
                        survey.good.push(found);
                    }
                    // It went meanwhile.
                    Ok(None) => {}
                    Err(error) => survey.bad.push(Finding::new(&disk, error)),
                }
            }
            Ok(survey)
        })
    }

    /// What each container stands on, as far as its record and its layer can be read: both may be
    /// behind the other, and either damaged.
    pub(super) fn standing(&self) -> Result<Vec<Standing>> {
        let names = self.disk_names(DiskKind::Container)?.into_iter();
        let named = names.map(|name| DiskName { kind: DiskKind::Container, name });
        let lost = self.strays(DiskKind::Container)?.lost.into_iter().map(|lost| lost.disk);
        let disks: BTreeSet<_> = named.chain(lost).collect();
        let standing = disks.into_iter().map(|disk| {
            let record = self.record(&disk).ok().flatten().unwrap_or_default();
            let base = self.base_of(&disk.file()).ok();
            Standing { container: disk.name, image_id: record.manifest, base }
        });
        Ok(standing.collect())
    }

    /// One container, and what of its snapshots can't be read.
    pub fn container(&self, name: &str) -> Result<(Container, Vec<Finding>)> {
        let mut bad = Vec::new();
        match self.find_container(name, &mut bad)? {
            Some(found) => Ok((found, bad)),
            None => Err(container(name)?.missing()),
        }
    }

    /// A frozen layer that can't be looked at goes to `bad`, and hides no more than its snapshot.
    fn find_container(&self, name: &str, bad: &mut Vec<Finding>) -> Result<Option<Container>> {
        let disk = container(name)?;
        let Some(record) = self.record(&disk)? else { return Ok(None) };
        let mut snapshots = Vec::new();
        for frozen in &record.frozen {
            let made = self.is_made(&disk, frozen).unwrap_or_else(|error| {
                bad.push(Finding::new(&disk, error));
                false
            });
            if let Some(name) = frozen.snapshot.clone().filter(|_| made) {
                snapshots.push(Snapshot { name, created: frozen.created.clone() });
            }
        }
        Ok(Some(Container {
            name: name.to_owned(),
            snapshots,
            base: self.base_of(&disk.file()).ok(),
            created: record.created,
            image: record.image,
            image_id: record.manifest,
        }))
    }

    /// The first blob below a layer in the folder of containers.
    fn base_of(&self, file: &str) -> Result<String> {
        let (_, base) = self.own_layers(file)?;
        base.ok_or_else(|| Error::new(ErrorKind::Corrupt, "a container without an image"))
    }

    /// The files below `file` in the folder of containers, newest first, and the blob they stand
    /// on.
    pub(super) fn own_layers(&self, file: &str) -> Result<(Vec<String>, Option<String>)> {
        let folder = self.folder(DiskKind::Container);
        let (mut own, mut next) = (Vec::new(), file.to_owned());
        loop {
            let opened = open_in(&**folder, &next, Access::Read)?;
            let hint = newest_header(&*opened)?.parent.map(|link| link.hint);
            match hint {
                None => return Ok((own, None)),
                Some(hint) if is_hex_digest(&hint) => return Ok((own, Some(hint))),
                Some(hint) if own.contains(&hint) || hint == file => {
                    let error = Error::new(ErrorKind::Corrupt, "the layer is its own ancestor");
                    return Err(error.in_file(opened.path()));
                }
                Some(hint) => {
                    own.push(hint.clone());
                    next = hint;
                }
            }
        }
    }

    /// Makes a container over an image.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; [`ErrorKind::InvalidInput`] for a name or size that can't be, such as one
    /// smaller than the image's; [`ErrorKind::NotFound`] if the image was removed meanwhile.
    pub fn create_container(&self, name: &str, image: &Image, size: Option<u64>) -> Result<()> {
        let disk = container(name)?;
        let guard = self.lock()?;
        let base = image.top()?;
        let parent = self.parent(&base)?;
        if let Some(size) = size.filter(|size| *size < parent.virtual_size) {
            // It would hold half a file system.
            let whole = parent.virtual_size;
            let detail = format!("{disk} of {size} bytes, expected at least the image's {whole}");
            return Err(Error::new(ErrorKind::InvalidInput, detail));
        }
        let record = Record {
            created: now(),
            image: image.name(),
            manifest: image.id.clone(),
            ..Record::default()
        };
        self.create_disk(&disk, size, Some(&parent), &record, &guard)?;
        self.note_new_container(&disk, &base, &guard)
    }

    /// Bytes of disk that a container's own layers take, as far as they can be looked at:
    /// [`Store::container`] tells of the others.
    pub fn container_cost(&self, name: &str) -> Result<u64> {
        let disk = container(name)?;
        let record = self.record(&disk)?.ok_or_else(|| disk.missing())?;
        Ok(self.disk_cost(&disk, &record)?.good)
    }

    /// Size of a container's device in bytes.
    pub fn container_size(&self, name: &str) -> Result<u64> {
        self.disk_size(&container(name)?)
    }

    /// Opens a snapshot of a container for reading.
    pub fn open_snapshot(&self, name: &str, snapshot: &str) -> Result<OpenDisk> {
        let disk = container(name)?;
        let record = self.record(&disk)?.ok_or_else(|| disk.missing())?;
        let frozen = self.find_snapshot(&disk, &record, snapshot)?;
        let chain = self.open_chain(self.folder(disk.kind), &frozen.file, Access::Read)?;
        Ok(OpenDisk::new(self, None, chain))
    }

    fn find_snapshot<'a>(
        &self,
        disk: &DiskName,
        record: &'a Record,
        name: &str,
    ) -> Result<&'a FrozenLayer> {
        let found = record.frozen.iter().find(|frozen| frozen.snapshot.as_deref() == Some(name));
        if let Some(frozen) = found
            && self.is_made(disk, frozen)?
        {
            return Ok(frozen);
        }
        let detail = format!("container {:?} has no snapshot {name:?}", disk.name);
        Err(Error::new(ErrorKind::NotFound, detail))
    }

    /// Freezes what a container holds under a new file name, which the record has from before; the
    /// container goes on over it.
    fn freeze(&self, open: &OpenDisk, snapshot: Option<&str>) -> Result<Parent> {
        let disk = open.writable_container()?;
        let guard = self.lock()?;
        let mut record = self.record(disk)?.ok_or_else(|| disk.missing())?;
        self.drop_unneeded(disk, &mut record)?;
        if let Some(name) = snapshot
            && record.frozen.iter().any(|frozen| frozen.snapshot.as_deref() == Some(name))
        {
            let detail = format!("container {:?} has a snapshot {name:?} already", disk.name);
            return Err(Error::new(ErrorKind::Exists, detail));
        }
        let file = self.unused_file(disk, &record)?;
        record.frozen.push(FrozenLayer::new(file.clone(), snapshot));
        self.write_record(disk, &record)?;
        drop(guard);
        let Some(freezer) = &self.freezer else { return Chain::snapshot(open, &file) };
        // So that little is left to be synced while they hold still.
        open.flush()?;
        let still = freezer.freeze(disk)?;
        let taken = Chain::snapshot(open, &file)?;
        still.end().map(|()| taken).inspect_err(|_| {
            // The container stays over one more frozen layer, which nobody asked for.
            let _ = self.take_name(disk, &file);
        })
    }

    /// Takes its name from a snapshot.
    fn take_name(&self, disk: &DiskName, file: &str) -> Result<()> {
        let _guard = self.lock()?;
        let mut record = self.record(disk)?.ok_or_else(|| disk.missing())?;
        let named = record.frozen.iter_mut().filter(|frozen| frozen.file == file);
        named.for_each(|frozen| frozen.snapshot = None);
        self.write_record(disk, &record)
    }

    /// A name for a frozen layer that neither the record has nor a file: that may be a layer whose
    /// entry is lost.
    fn unused_file(&self, disk: &DiskName, record: &Record) -> Result<String> {
        let folder = &**self.folder(disk.kind);
        let mut number = 1u64;
        loop {
            let file = format!("{}@{number}{LAYER}", disk.name);
            let named = record.frozen.iter().any(|frozen| frozen.file == file);
            if !named && !files::exists(folder, &file)? {
                return Ok(file);
            }
            number += 1;
        }
    }

    /// Whether a layer of a record was made: a crash may have kept its file from being there, or
    /// left it as a second name of the layer that is written.
    pub(super) fn is_made(&self, disk: &DiskName, frozen: &FrozenLayer) -> Result<bool> {
        let folder = self.folder(disk.kind);
        let same = |other: &str| {
            let fail = |error| Error::io(error, "looking at layers").in_file(folder.path());
            folder.same_file(&frozen.file, other).map_err(fail)
        };
        if !same(&frozen.file)? || same(&disk.file())? {
            return Ok(false);
        }
        // Not all file systems show that two names are those of one file.
        let file = open_in(&**folder, &frozen.file, Access::Read)?;
        // What can't be read is no name of a layer that is being written; `check` tells of it.
        Ok(newest_header(&*file).map_or(true, |header| header.is_frozen()))
    }

    /// The image that a container stands on: its record may be behind its layer.
    fn image_over(&self, record: &Record, base: &str) -> Result<Image> {
        if let Ok(Some(image)) = self.load_image(&record.manifest, None)
            && image.top()? == base
        {
            return Ok(image);
        }
        let images = self.look_at_images(&Index::read(self)?, &mut Costs::new(self)).good;
        let found = images.into_iter().find(|image| image.top().is_ok_and(|top| top == base));
        found.ok_or_else(|| {
            let detail = format!("no image has the layer {base} that the container stands on");
            Error::new(ErrorKind::NotFound, detail)
        })
    }

    /// Brings the record of a container in line with the image it stands on now, and removes its
    /// frozen layers that nothing stands on any more.
    fn settle(&self, disk: &DiskName, image: &Image) -> Result<()> {
        let _guard = self.lock()?;
        let mut record = self.record(disk)?.ok_or_else(|| disk.missing())?;
        record.image = image.name();
        record.manifest = image.id.clone();
        self.drop_unneeded(disk, &mut record)?;
        self.write_record(disk, &record)
    }

    /// The frozen layers of a container that were never made, or that neither its top nor a
    /// snapshot stands on, children first. The container must not be open elsewhere.
    pub(super) fn unneeded(&self, disk: &DiskName, record: &Record) -> Result<Vec<String>> {
        let unneeded = self.unneeded_now(disk, record)?;
        if unneeded.is_empty() {
            return Ok(unneeded);
        }
        // A killed process may have relinked the top in the page cache alone: what it stands on
        // after a power loss is needed too.
        let folder = &**self.folder(disk.kind);
        durable_header(&*open_in(folder, &disk.file(), Access::Read)?)?;
        self.unneeded_now(disk, record)
    }

    fn unneeded_now(&self, disk: &DiskName, record: &Record) -> Result<Vec<String>> {
        let mut needed: BTreeSet<_> = self.own_layers(&disk.file())?.0.into_iter().collect();
        for frozen in record.frozen.iter().filter(|frozen| frozen.snapshot.is_some()) {
            if self.is_made(disk, frozen)? {
                needed.extend(self.own_layers(&frozen.file)?.0);
                needed.insert(frozen.file.clone());
            }
        }
        let files = record.frozen.iter().rev().map(|frozen| frozen.file.clone());
        Ok(files.filter(|file| !needed.contains(file)).collect())
    }

    /// Removes the frozen layers that nothing needs, and takes them out of the record, which is to
    /// be written: a record may name a layer that isn't there.
    fn drop_unneeded(&self, disk: &DiskName, record: &mut Record) -> Result<()> {
        let unneeded = self.unneeded(disk, record)?;
        if unneeded.is_empty() {
            return Ok(());
        }
        let folder = &**self.folder(disk.kind);
        for file in &unneeded {
            files::remove(folder, file)?;
        }
        // Durably: a layer that no record names has lost its entry.
        sync_folder(folder)?;
        record.frozen.retain(|frozen| !unneeded.contains(&frozen.file));
        Ok(())
    }

    /// Throws away what a container wrote: it holds what its image holds again, or what a snapshot
    /// of it does. Snapshots stay.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] with who has it open.
    pub fn reset_container(&self, name: &str, snapshot: Option<&str>) -> Result<()> {
        let disk = container(name)?;
        let guard = self.lock()?;
        let mut record = self.record(&disk)?.ok_or_else(|| disk.missing())?;
        let claim = self.claim(&disk, &guard)?;
        let size = match &claim {
            Some(file) => Some(newest_header(&**file)?.virtual_size),
            None => None,
        };
        let folder = self.folder(disk.kind);
        let (parent, home) = match snapshot {
            Some(snapshot) => {
                let file = &self.find_snapshot(&disk, &record, snapshot)?.file;
                (seal(&**folder, file)?, &**folder)
            }
            None => (self.parent(&self.image_of_reset(&disk, &record)?)?, self.blobs()),
        };
        let draft = files::draft_name()?;
        let rights = match &claim {
            Some(file) => files::rights_of(&**file)?,
            None => rights_over(home, &parent)?,
        };
        let drafts = folder.creating(rights);
        let size = size.or(Some(parent.virtual_size));
        create(&drafts, &draft, size, Some(&parent), &self.layers)?;
        folder.rename(&draft, &disk.file()).map_err(|error| {
            let _ = folder.remove(&draft);
            Error::io(error, "replacing the layer").in_file(folder.path().join(disk.file()))
        })?;
        disk.clear_snapshot(&**folder)?;
        sync_folder(&**folder)?;
        self.drop_unneeded(&disk, &mut record)?;
        self.write_record(&disk, &record)?;
        if record.frozen.is_empty() {
            let base = self.base_of(&disk.file())?;
            self.note_new_container(&disk, &base, &guard)?;
        }
        Ok(())
    }

    /// The blob that a container is reset to: that of its layer, or of its record where the layer
    /// can't be read.
    fn image_of_reset(&self, disk: &DiskName, record: &Record) -> Result<String> {
        if let Ok(base) = self.base_of(&disk.file()) {
            return Ok(base);
        }
        let image = self.load_image(&record.manifest, None)?;
        let missing = || {
            let detail = format!("the image {} of the container is missing", record.image);
            Error::new(ErrorKind::NotFound, detail)
        };
        image.ok_or_else(missing)?.top()
    }
}

impl OpenDisk {
    /// Its name, where it is a container that is open for writing.
    fn writable_container(&self) -> Result<&DiskName> {
        let name = self.container()?;
        if self.read_only() {
            let detail = format!("container {:?} is not open for writing", name.name);
            return Err(Error::new(ErrorKind::ReadOnly, detail));
        }
        Ok(name)
    }

    /// Keeps the present state of a container under a name. In place of [`Chain::snapshot`], of which
    /// no record would know.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; [`ErrorKind::InvalidInput`] for what is no name or no container; those
    /// of [`Chain::snapshot`].
    pub fn snapshot(&self, name: &str) -> Result<()> {
        check_name("a snapshot", name)?;
        self.store().freeze(self, Some(name)).map(drop)
    }

    /// Makes an image of a container. The container goes on over the new image: what it wrote is the
    /// image's newest layer then, and is kept once.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is no container; those of [`Store::publish`] and
    /// [`Chain::snapshot`]. After an error the container holds what it held.
    pub fn commit(&self, reference: &Reference, comment: &str) -> Result<Image> {
        let (store, disk) = (self.store(), self.writable_container()?);
        let Parent { link: ParentLink { identity: from, hint: file }, .. } =
            store.freeze(self, None)?;
        let (below, base) = store.own_layers(&file)?;
        let base = base.ok_or_else(|| Error::new(ErrorKind::Corrupt, "stands on no image"))?;
        let record = store.record(disk)?.ok_or_else(|| disk.missing())?;
        let image = store.image_over(&record, &base)?;

        let frozen = store.open_chain(store.folder(disk.kind), &file, Access::Read)?;
        let blob = if below.is_empty() {
            NewBlob::pack(store, &frozen)?
        } else {
            let rights = frozen.successor_rights()?;
            let draft = store.draft(Some(frozen.size()), Some(&image), rights)?;
            let below = store.open_chain(&store.folders.blobs, &base, Access::Read)?;
            frozen.copy_above(&below, draft.chain())?;
            draft.finish()?
        };
        drop(frozen);
        let new = NewImage {
            reference: reference.clone(),
            created_by: format!("commit {}", disk.name),
            comment: comment.to_owned(),
            made_here: store.is_made_disk(disk)?,
            created: clock(),
        };
        let made = store.publish_blob(blob, Some(&image), &new)?;
        self.relink(from, &store.parent(&made.top()?)?.link)?;
        store.settle(disk, &made)?;
        Ok(made)
    }

    fn container(&self) -> Result<&DiskName> {
        let name = self.name().filter(|name| name.kind == DiskKind::Container);
        name.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "not a container"))
    }

    /// How many of the layers of a container's chain are its own, for reading what it changed.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is no container.
    pub fn own_depth(&self) -> Result<usize> {
        Ok(self.store().own_layers(&self.container()?.file())?.0.len() + 1)
    }

    /// Opens what a container stands on, for reading.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is no container; those of [`Chain::open`].
    pub fn open_base(&self) -> Result<OpenDisk> {
        let store = self.store();
        let base = store.base_of(&self.container()?.file())?;
        let chain = store.open_chain(&store.folders.blobs, &base, Access::Read)?;
        Ok(OpenDisk::new(store, None, chain))
    }
}

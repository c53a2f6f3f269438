//! Writable disks of the store: a live layer and a record beside it. Containers and volumes are
//! both that.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::broker::Named;
use super::features::{self, Need};
use super::files::listing;
use super::{Finding, Guard, Store, Survey, check_name, files, json, now};
use crate::chain::{Chain, Parent, create};
use crate::device::{Detail, Device, Disk, Extent, Facts, HostRange, Prefetch, ZeroMode};
use crate::error::{Error, ErrorKind, Result};
use crate::live::newest_header;
use crate::memory::{Gather, Scatter};
use crate::storage::{
    Access, Folder, Lock, Rights, Storage, failed, find_in, holders, open_in, sync_folder,
    take_lock,
};
use crate::wait::{Attempt, Wait};

/// What a disk is to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DiskKind {
    /// A live layer over an image.
    Container,
    /// A live layer without a parent.
    Volume,
}

impl DiskKind {
    /// The word for it.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Volume => "volume",
        }
    }
}

/// A container or volume by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskName {
    /// Which of the two.
    pub kind: DiskKind,
    /// Its name.
    pub name: String,
}

/// What is kept beside a layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// RFC 3339.
    pub created: String,
    /// The image's name when the container was made.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// Hexadecimal SHA-256 of the image's manifest.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub manifest: String,
    /// Frozen layers of its own, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub frozen: Vec<FrozenLayer>,
    #[serde(flatten, skip_serializing)]
    pub unknown: UnknownFields,
}

/// Fields that this version doesn't know.
pub(super) type UnknownFields = BTreeMap<String, IgnoredAny>;

impl Record {
    fn unknown_field(&self) -> Option<&str> {
        let frozen = self.frozen.iter().flat_map(|frozen| frozen.unknown.keys());
        self.unknown.keys().chain(frozen).map(String::as_str).next()
    }
}

/// A frozen layer of a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FrozenLayer {
    /// File name.
    pub file: String,
    /// RFC 3339.
    pub created: String,
    /// The snapshot's name; none for what an interrupted commit left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    #[serde(flatten, skip_serializing)]
    pub unknown: UnknownFields,
}

impl FrozenLayer {
    /// One that is about to be made.
    pub fn new(file: String, snapshot: Option<&str>) -> Self {
        Self {
            file,
            created: now(),
            snapshot: snapshot.map(str::to_owned),
            unknown: UnknownFields::new(),
        }
    }
}

pub(super) const RECORD: &str = ".json";
/// The record's name while the disk is being removed.
pub(super) const GONE: &str = ".gone";
pub(super) const LAYER: &str = ".tply";

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.noun(), self.name)
    }
}

impl DiskName {
    /// A disk's name, checked.
    pub fn new(kind: DiskKind, name: &str) -> Result<Self> {
        let what = match kind {
            DiskKind::Container => "a container",
            DiskKind::Volume => "a volume",
        };
        check_name(what, name)?;
        Ok(Self { kind, name: name.to_owned() })
    }

    /// The name by which front ends offer it to be written.
    pub fn export(&self) -> String {
        format!("{}/{}", self.kind.noun(), self.name)
    }

    /// The disk that a name means by which front ends offer it to be written.
    pub fn of_export(name: &str) -> Option<Self> {
        match Named::parse(name) {
            Ok(Named::Writable(disk)) => Some(disk),
            _ => None,
        }
    }

    pub(super) fn record_file(&self) -> String {
        format!("{}{RECORD}", self.name)
    }

    pub(super) fn gone_file(&self) -> String {
        format!("{}{GONE}", self.name)
    }

    /// The layer's file name.
    pub(super) fn file(&self) -> String {
        format!("{}{LAYER}", self.name)
    }

    /// The file that a snapshot of the layer goes through.
    pub(super) fn new_top_file(&self) -> String {
        format!(".{}.top", self.file())
    }

    /// The file that it goes through besides, where a file has one name only.
    pub(super) fn copy_file(&self) -> String {
        format!(".{}.copy", self.file())
    }

    /// Makes sure that nothing is left of a snapshot that was cut off. Not durable until the folder is
    /// synced.
    pub(super) fn clear_snapshot(&self, folder: &dyn Folder) -> Result<()> {
        files::remove(folder, &self.new_top_file())?;
        files::remove(folder, &self.copy_file())
    }

    pub(super) fn missing(&self) -> Error {
        let detail = format!("there is no {} {:?}", self.kind.noun(), self.name);
        Error::new(ErrorKind::NotFound, detail)
    }
}

/// A container, volume, snapshot or image that is open. It reads and writes as the [`Chain`] that it
/// owns; what its record has to know of is done through it alone ([`OpenDisk::commit`],
/// [`OpenDisk::snapshot`]).
#[derive(Debug)]
pub struct OpenDisk {
    store: Store,
    name: Option<DiskName>,
    chain: Chain,
}

impl OpenDisk {
    pub(super) fn new(store: &Store, name: Option<DiskName>, chain: Chain) -> Self {
        Self { store: store.clone(), name, chain }
    }

    /// Its name; none for a snapshot or image, which never changes.
    pub fn name(&self) -> Option<&DiskName> {
        self.name.as_ref()
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }
}

impl Deref for OpenDisk {
    type Target = Chain;

    fn deref(&self) -> &Chain {
        &self.chain
    }
}

impl Disk for OpenDisk {
    fn facts(&self) -> Result<Facts> {
        self.chain.facts()
    }

    fn close(&self) -> Result<()> {
        self.chain.close()
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
        self.chain.try_write(offset, from, wait)
    }

    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        self.chain.zero(offset, length, mode)
    }

    fn trim(&self, offset: u64, length: u64) -> Result<()> {
        self.chain.trim(offset, length)
    }

    fn allocate(&self, offset: u64, length: u64) -> Result<()> {
        self.chain.allocate(offset, length)
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

/// How far a removal that was cut off has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CutOffRemoval {
    /// It is done now.
    Finished,
    /// There was none.
    Nothing,
}

impl Store {
    pub(super) fn folder(&self, kind: DiskKind) -> &Arc<dyn Folder> {
        match kind {
            DiskKind::Container => &self.folders.containers,
            DiskKind::Volume => &self.folders.volumes,
        }
    }

    /// The names of all disks of a kind, sorted.
    pub fn disk_names(&self, kind: DiskKind) -> Result<Vec<String>> {
        let names = listing(&**self.folder(kind))?;
        let mut names: Vec<_> =
            names.iter().filter_map(|name| name.strip_suffix(RECORD)).map(str::to_owned).collect();
        names.retain(|name| check_name("a disk", name).is_ok());
        names.sort();
        Ok(names)
    }

    /// Where a disk's own layer is.
    pub fn layer_path(&self, disk: &DiskName) -> PathBuf {
        self.folder(disk.kind).path().join(disk.file())
    }

    /// The record of a disk; none where there is no such disk.
    pub(super) fn record(&self, disk: &DiskName) -> Result<Option<Record>> {
        self.record_in(&**self.folder(disk.kind), &disk.record_file())
    }

    /// The record in a file. A field that no record has was another one once, unless a later version
    /// has been here: no program adds any without a feature.
    pub(super) fn record_in(&self, folder: &dyn Folder, file: &str) -> Result<Option<Record>> {
        let record = json::read::<Record>(folder, file)?;
        if let Some(field) = record.as_ref().and_then(Record::unknown_field)
            && features::check(self.root(), Need::Write).is_ok()
        {
            let detail = format!("a record with the field {field:?}, which none has");
            return Err(Error::new(ErrorKind::Corrupt, detail).in_file(folder.path().join(file)));
        }
        Ok(record)
    }

    pub(super) fn write_record(&self, disk: &DiskName, record: &Record) -> Result<()> {
        let folder = &**self.folder(disk.kind);
        files::replace(folder, &disk.record_file(), &json::canonical(record)?)
    }

    /// Makes a disk: first the layer, then the record that says that it is there.
    pub(super) fn create_disk(
        &self,
        disk: &DiskName,
        size: Option<u64>,
        parent: Option<&Parent>,
        record: &Record,
        _: &Guard,
    ) -> Result<()> {
        let folder = self.folder(disk.kind);
        if self.record(disk)?.is_some() {
            let detail = format!("there is a {} {:?} already", disk.kind.noun(), disk.name);
            return Err(Error::new(ErrorKind::Exists, detail));
        }
        self.finish_removal(disk)?;
        if files::exists(&**folder, &disk.file())? && !self.is_cut_off_creation(disk) {
            let detail =
                format!("the record of {disk} is lost, but not its layer: remove it first");
            let path = folder.path().join(disk.file());
            return Err(Error::new(ErrorKind::Exists, detail).in_file(path));
        }
        files::remove(&**folder, &disk.file())?;
        disk.clear_snapshot(&**folder)?;
        let rights = match parent {
            Some(parent) => rights_over(self.blobs(), parent)?,
            None => Rights::Usual,
        };
        let made = create(&folder.creating(rights), &disk.file(), size, parent, &self.layers)
            .and_then(|()| self.write_record(disk, record));
        made.inspect_err(|_| {
            // A layer without a record means nothing.
            let _ = folder.remove(&disk.file());
        })
    }

    /// Opens a disk. Under the lock, so that nobody replaces the layer at the same time.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] with who has it; [`ErrorKind::Unsupported`] for
    /// writing in a store that only a later version may change; those of [`Chain::open`].
    pub fn open_disk(&self, disk: &DiskName, access: Access) -> Result<OpenDisk> {
        let (lock, need) = match access {
            Access::Read => (Lock::Shared, Need::Read),
            Access::Write => (Lock::Exclusive, Need::Write),
        };
        let _hold = self.hold(lock)?;
        features::check(self.root(), need)?;
        if self.record(disk)?.is_none() {
            return Err(disk.missing());
        }
        let (folder, name) = (self.folder(disk.kind), disk.file());
        let chain = match (&self.keepers, access) {
            (Some(keepers), Access::Write) => {
                let keeper = keepers.of(&disk.export());
                Chain::open_kept(folder.clone(), &name, self.layers.clone(), keeper)?
            }
            _ => self.open_chain(folder, &name, access)?,
        };
        Ok(OpenDisk::new(self, Some(disk.clone()), chain))
    }

    pub(super) fn open_chain(
        &self,
        folder: &Arc<dyn Folder>,
        name: &str,
        access: Access,
    ) -> Result<Chain> {
        Chain::open(folder.clone(), name, access, self.layers.clone())
    }

    /// Bytes of disk that a disk's own files take, without the frozen layers that can't be looked at.
    pub(super) fn disk_cost(&self, disk: &DiskName, record: &Record) -> Result<Survey<u64>> {
        let folder = self.folder(disk.kind);
        let cost = |name: &str| match find_in(&**folder, name, Access::Read)? {
            Some(file) => file.allocated().map_err(failed(&*file, "looking at its size", 0)),
            // A frozen layer that was never made, or has gone meanwhile.
            None => Ok(0),
        };
        let good = cost(&disk.file())? + cost(&disk.record_file())?;
        let mut survey = Survey { good, bad: Vec::new() };
        for frozen in &record.frozen {
            match cost(&frozen.file) {
                Ok(cost) => survey.good += cost,
                Err(error) => survey.bad.push(Finding::new(disk, error)),
            }
        }
        Ok(survey)
    }

    /// The disk's virtual size.
    pub(super) fn disk_size(&self, disk: &DiskName) -> Result<u64> {
        let file = open_in(&**self.folder(disk.kind), &disk.file(), Access::Read)?;
        Ok(newest_header(&*file)?.virtual_size)
    }

    /// What a disk shows of itself as a file, whoever has it open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; those of its header.
    pub fn disk_facts(&self, disk: &DiskName) -> Result<Facts> {
        if self.record(disk)?.is_none() {
            return Err(disk.missing());
        }
        let file = open_in(&**self.folder(disk.kind), &disk.file(), Access::Read)?;
        Facts::of_layer(newest_header(&*file)?.virtual_size, file.descriptor())
    }

    /// Locks a disk's layer against everybody, under the store's lock.
    pub(super) fn claim(&self, disk: &DiskName, _: &Guard) -> Result<Option<Arc<dyn Storage>>> {
        let folder = &**self.folder(disk.kind);
        let Some(file) = find_in(folder, &disk.file(), Access::Write)? else { return Ok(None) };
        take_lock(&*file, Lock::Exclusive).map_err(|error| {
            let detail = format!("{} {:?} is in use: {error}", disk.kind.noun(), disk.name);
            Error::new(error.kind(), detail)
        })?;
        Ok(Some(file))
    }

    /// Removes a disk with all its layers, those of a record that is lost or can't be read included.
    /// Needs no free space.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] with who has it open; the host's for a folder in a
    /// file's place that has something in it. Then nothing has been removed but empty folders.
    pub fn remove_disk(&self, disk: &DiskName) -> Result<()> {
        let guard = self.lock()?;
        let folder = &**self.folder(disk.kind);
        let (record, gone) = (disk.record_file(), disk.gone_file());
        let mut names = self.files_of(disk)?;
        for name in [record, gone] {
            names.extend(files::exists(folder, &name)?.then_some(name));
        }
        if names.is_empty() {
            return Err(disk.missing());
        }
        let _claim = self.claim_to_remove(disk, &guard)?;
        // What can't be removed is found before anything is.
        for name in &names {
            files::clear_folder(folder, name)?;
        }
        self.mark_as_gone(disk)?;
        sync_folder(folder)?;
        self.finish_removal(disk)?;
        Ok(())
    }

    /// [`Store::claim`] for a removal: that the layer can't be opened, or is no file, is no reason to
    /// keep it, unless somebody is known to have it.
    fn claim_to_remove(&self, disk: &DiskName, guard: &Guard) -> Result<Option<Arc<dyn Storage>>> {
        let error = match self.claim(disk, guard) {
            Err(error) if error.kind() != ErrorKind::InUse => error,
            claimed => return claimed,
        };
        if !error.kind().forbids_writing() {
            return Ok(None);
        }
        let folder = &**self.folder(disk.kind);
        let who = holders(&folder.path().join(disk.file())).join(", ");
        // Where its lock can't be asked either, what is seen of other processes has to do.
        let is_idle = self.is_idle(folder, &disk.file()).unwrap_or(who.is_empty());
        if is_idle {
            return Ok(None);
        }
        let who = if who.is_empty() { "another open file" } else { &who };
        Err(Error::new(ErrorKind::InUse, format!("{disk} is in use by {who}")))
    }

    /// Marks a disk as removed: from here on it is not there.
    fn mark_as_gone(&self, disk: &DiskName) -> Result<()> {
        let folder = &**self.folder(disk.kind);
        let (record, gone) = (disk.record_file(), disk.gone_file());
        let marked = if files::exists(folder, &record)? {
            folder.rename(&record, &gone)
        } else if files::exists(folder, &gone)? {
            Ok(())
        } else {
            folder.create(&gone).map(drop)
        };
        marked.map_err(|error| {
            Error::io(error, "marking as removed").in_file(folder.path().join(&gone))
        })
    }

    /// Removes the layers of a disk whose record is marked as gone, and then the mark.
    pub(super) fn finish_removal(&self, disk: &DiskName) -> Result<CutOffRemoval> {
        let folder = &**self.folder(disk.kind);
        if !files::exists(folder, &disk.gone_file())? {
            return Ok(CutOffRemoval::Nothing);
        }
        // All that bear its name: the record may be damaged, or have been lost.
        for file in self.files_of(disk)? {
            files::clear_folder(folder, &file)?;
            files::remove(folder, &file)?;
        }
        sync_folder(folder)?;
        files::clear_folder(folder, &disk.gone_file())?;
        files::remove(folder, &disk.gone_file())?;
        sync_folder(folder)?;
        Ok(CutOffRemoval::Finished)
    }
}

/// The rights of a disk that shows what a parent in `folder` holds.
pub(super) fn rights_over(folder: &dyn Folder, parent: &Parent) -> Result<Rights> {
    let file = open_in(folder, &parent.link.hint, Access::Read)?;
    Rights::of_copy([&*file]).map_err(failed(&*file, "looking at the parent's mode", 0))
}

/// Whether a file name is one that this disk gives its frozen layers.
pub(super) fn is_layer_of(disk: &DiskName, file: &str) -> bool {
    let rest = file.strip_prefix(&disk.name).and_then(|rest| rest.strip_prefix('@'));
    rest.is_some_and(|rest| rest.ends_with(LAYER) && !rest.contains('/'))
}

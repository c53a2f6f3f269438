//! Files in the folders of containers and volumes that no record names: what crashes left there, and
//! what is more than that, since its record is lost.

use std::collections::BTreeMap;

use super::disk::{DiskKind, DiskName, GONE, LAYER, is_layer_of};
use super::files::{self, listing};
use super::{Finding, Store};
use crate::error::{ErrorKind, Result};
use crate::live::is_untouched;
use crate::storage::{Access, open_in};

/// What no record names.
#[derive(Debug, Default)]
pub(super) struct Strays {
    /// Drafts, and what a creation or a removal left that was cut off.
    pub leftovers: Vec<String>,
    /// What no crash leaves.
    pub lost: Vec<Lost>,
}

/// Files of a disk whose record is lost, or no longer names them.
#[derive(Debug)]
pub(super) struct Lost {
    pub disk: DiskName,
    detail: String,
}

impl Strays {
    /// What was lost, for people.
    pub fn findings(&self) -> Vec<Finding> {
        self.lost.iter().map(|lost| Finding::new(&lost.disk, &lost.detail)).collect()
    }
}

/// The name of the disk that a file belongs to: as its layer, as a frozen one, or as what a snapshot
/// goes through.
fn owner(file: &str) -> Option<&str> {
    let layer = match file.strip_prefix('.') {
        Some(hidden) => hidden.strip_suffix(".top").or_else(|| hidden.strip_suffix(".copy"))?,
        None => file,
    };
    let stem = layer.strip_suffix(LAYER)?;
    Some(stem.split_once('@').map_or(stem, |(owner, _)| owner))
}

impl Store {
    /// All files in the disk's folder that are its own, but for its record.
    pub(super) fn files_of(&self, disk: &DiskName) -> Result<Vec<String>> {
        let mut files = listing(&**self.folder(disk.kind))?;
        files.retain(|file| owner(file) == Some(&disk.name));
        Ok(files)
    }

    /// The files of a folder that no record names. Those whose record can't be read are none of them.
    pub(super) fn strays(&self, kind: DiskKind) -> Result<Strays> {
        let names = listing(&**self.folder(kind))?;
        let mut strays = Strays::default();
        let mut disks = BTreeMap::<&str, Vec<&String>>::new();
        for name in &names {
            if name.starts_with(files::DRAFT) {
                strays.leftovers.push(name.clone());
            } else if let Some(owner) = owner(name) {
                disks.entry(owner).or_default().push(name);
            }
        }
        for name in names.iter().filter_map(|name| name.strip_suffix(GONE)) {
            strays.lost.extend(self.stuck_removal(DiskName { kind, name: name.to_owned() }));
        }
        let is_there = |file: String| names.binary_search(&file).is_ok();
        for (name, files) in disks {
            let disk = DiskName { kind, name: name.to_owned() };
            if is_there(disk.record_file()) {
                strays.lost.extend(self.unrecorded(disk, &files));
            } else if is_there(disk.gone_file()) || self.is_leftover(&disk, &files) {
                strays.leftovers.extend(files.into_iter().cloned());
            } else {
                let detail = format!("its record is lost, these files are kept: {}", list(&files));
                strays.lost.push(Lost { disk, detail });
            }
        }
        Ok(strays)
    }

    /// What keeps a removal that was cut off from its end: a folder in the place of one of its files.
    fn stuck_removal(&self, disk: DiskName) -> Option<Lost> {
        let folder = &**self.folder(disk.kind);
        let names = self.files_of(&disk).unwrap_or_default();
        let failed = names.iter().chain([&disk.gone_file()]).find_map(|name| {
            let error = open_in(folder, name, Access::Read).err()?;
            (error.kind() != ErrorKind::NotFound).then_some(error)
        })?;
        Some(Lost { detail: format!("its removal can't be finished: {failed}"), disk })
    }

    /// Frozen layers that the disk's record doesn't name: a snapshot or commit writes the record
    /// before it makes one, and removes one before it writes the record.
    fn unrecorded(&self, disk: DiskName, files: &[&String]) -> Option<Lost> {
        let mut frozen: Vec<_> =
            files.iter().copied().filter(|file| is_layer_of(&disk, file)).collect();
        if frozen.is_empty() {
            return None;
        }
        // One that can't be read may name them, and is told of by whoever reads it.
        let record = self.record(&disk).ok().flatten()?;
        frozen.retain(|file| !record.frozen.iter().any(|named| named.file == **file));
        let detail = || format!("its record doesn't name these layers: {}", list(&frozen));
        (!frozen.is_empty()).then(|| Lost { detail: detail(), disk })
    }

    /// Whether these files, for which there is no record, are what a cut-off creation left.
    fn is_leftover(&self, disk: &DiskName, files: &[&String]) -> bool {
        !files.iter().any(|file| is_layer_of(disk, file)) && self.is_cut_off_creation(disk)
    }

    /// Whether the layer of a disk without a record holds nothing: a creation that was cut off leaves
    /// it so, or none. What can't be read may hold something.
    pub(super) fn is_cut_off_creation(&self, disk: &DiskName) -> bool {
        let folder = &**self.folder(disk.kind);
        match files::exists(folder, &disk.file()) {
            Ok(false) => true,
            _ => open_in(folder, &disk.file(), Access::Read)
                .and_then(|file| is_untouched(&*file))
                .unwrap_or(false),
        }
    }
}

fn list(files: &[&String]) -> String {
    files.iter().map(|file| file.as_str()).collect::<Vec<_>>().join(", ")
}

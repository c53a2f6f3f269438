//! `store check`: whether everything is there and is what its name says.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;

use super::digest::is_hex_digest;
use super::disk::{DiskKind, DiskName};
use super::files::listing;
use super::index::{Index, IndexEntry};
use super::{Costs, Finding, Store, Survey, digest};
use crate::error::{ErrorKind, Result};
use crate::inspect;
use crate::storage::{Access, failed, find_in, open_in};

/// Hears of what was found, and what about.
type Note<'a> = &'a mut dyn FnMut(&dyn Display, &dyn Display);

impl Store {
    /// Reads everything: blobs against their digests, images against their layers, disks against
    /// their records, every layer against the format.
    pub fn verify(&self) -> Result<Vec<Finding>> {
        Ok(self.settled(|| Ok(self.examine()))?.bad)
    }

    fn examine(&self) -> Survey<()> {
        let mut survey = Survey::default();
        let mut note = |subject: &dyn Display, detail: &dyn Display| {
            survey.bad.push(Finding::new(subject, detail));
        };
        if let Err(error) = self.verify_blobs(&mut note) {
            note(&"blobs", &error);
        }
        if let Err(error) = self.verify_images(&mut note) {
            note(&"images", &error);
        }
        for kind in [DiskKind::Container, DiskKind::Volume] {
            if let Err(error) = self.verify_disks(kind, &mut note) {
                note(&format_args!("{}s", kind.noun()), &error);
            }
        }
        survey
    }

    fn verify_disks(&self, kind: DiskKind, note: Note<'_>) -> Result<()> {
        for found in self.strays(kind)?.findings() {
            note(&found.subject, &found.detail);
        }
        for name in self.disk_names(kind)? {
            let disk = DiskName { kind, name };
            if let Err(error) = self.verify_disk(&disk, note) {
                note(&disk, &error);
            }
        }
        Ok(())
    }

    fn verify_blobs(&self, note: Note<'_>) -> Result<()> {
        for name in listing(self.blobs())?.iter().filter(|name| is_hex_digest(name)) {
            let file = open_in(self.blobs(), name, Access::Read);
            match file.and_then(|file| digest::sha256_file(&*file)) {
                Ok((digest, _)) if digest == *name => {}
                Ok((digest, _)) => {
                    note(&format_args!("blob {name}"), &format_args!("its SHA-256 is {digest}"));
                }
                Err(error) => note(&format_args!("blob {name}"), &error),
            }
        }
        Ok(())
    }

    fn verify_images(&self, note: Note<'_>) -> Result<()> {
        let mut costs = Costs::new(self);
        let index = Index::read(self)?;
        let images = self.look_at_images(&index, &mut costs);
        images.bad.iter().for_each(|bad| note(&bad.subject, &bad.detail));
        let mut opened = HashSet::new();
        for image in images.good.iter().filter(|image| opened.insert(image.id.clone())) {
            if let Err(error) = self.open_image(image) {
                note(&format_args!("image {}", image.name()), &error);
            }
        }
        let ours = |entry: &IndexEntry| opened.contains(&entry.digest);
        self.verify_entries(index.manifests().filter(ours), note)
    }

    /// Compares entries of the index with each other, and with their manifests.
    fn verify_entries(
        &self,
        entries: impl Iterator<Item = IndexEntry>,
        note: Note<'_>,
    ) -> Result<()> {
        let mut names = HashMap::new();
        for entry in entries {
            let file = self.blob(&entry.digest)?;
            let length = file.length().map_err(failed(&*file, "reading the length", 0))?;
            if entry.size != Some(length) {
                let said = entry.size.map_or("none".into(), |size| size.to_string());
                let detail = format!("the index has the size {said}, its manifest {length} bytes");
                note(&entry.label(), &detail);
            }
            let Some(reference) = &entry.reference else { continue };
            match names.insert(reference.clone(), entry.digest.clone()) {
                Some(other) if other != entry.digest => {
                    let detail = format!("the index gives the name to {} too", other);
                    note(&entry.label(), &detail);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn verify_disk(&self, disk: &DiskName, note: Note<'_>) -> Result<()> {
        let Some(record) = self.record(disk)? else { return Ok(()) };
        for name in [disk.new_top_file(), disk.copy_file()] {
            if let Err(error) = find_in(&**self.folder(disk.kind), &name, Access::Read) {
                note(disk, &error);
            }
        }
        let mut files = vec![disk.file()];
        for frozen in record.frozen {
            match self.is_made(disk, &frozen) {
                Ok(true) => files.push(frozen.file),
                Ok(false) => {}
                Err(error) => note(disk, &error),
            }
        }
        for file in files {
            if let Err(error) = self.verify_layer(disk, &file, note) {
                note(disk, &error);
            }
        }
        Ok(())
    }

    fn verify_layer(&self, disk: &DiskName, name: &str, note: Note<'_>) -> Result<()> {
        let folder = self.folder(disk.kind);
        let file = open_in(&**folder, name, Access::Read)?;
        for finding in inspect::check(&*file)?.findings {
            note(disk, &format_args!("{name}: {finding:?}"));
        }
        drop(file);
        match self.open_chain(folder, name, Access::Read) {
            // Somebody writes it, and has opened its chain.
            Err(error) if error.kind() == ErrorKind::InUse => Ok(()),
            other => other.map(drop),
        }
    }
}

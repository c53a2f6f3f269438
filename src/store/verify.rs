//! `store check`: whether everything is there and is what its name says.

use super::digest::is_hex_digest;
use super::disk::{DiskKind, DiskName};
use super::files::listing;
use super::index::Index;
use super::{Store, digest};
use crate::error::{ErrorKind, Result};
use crate::inspect;
use crate::storage::{Access, open_in};

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is about.
    pub subject: String,
    /// What was found.
    pub detail: String,
}

impl Store {
    /// Reads everything: blobs against their digests, images against their layers, disks against
    /// their records, every layer against the format.
    ///
    /// A change under way may look like damage. So what is found is looked for again, with all
    /// changes kept out.
    pub fn verify(&self) -> Result<Vec<Finding>> {
        match self.examine() {
            Ok(findings) if findings.is_empty() => Ok(findings),
            _ => {
                let _hold = self.hold()?;
                self.examine()
            }
        }
    }

    fn examine(&self) -> Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let mut note = |subject: String, detail: String| findings.push(Finding { subject, detail });
        self.verify_blobs(&mut note)?;
        self.verify_images(&mut note)?;
        for kind in [DiskKind::Container, DiskKind::Volume] {
            for name in self.disk_names(kind)? {
                let disk = DiskName { kind, name };
                if let Err(error) = self.verify_disk(&disk, &mut note) {
                    note(format!("{} {}", kind.noun(), disk.name), error.to_string());
                }
            }
        }
        Ok(findings)
    }

    fn verify_blobs(&self, note: &mut impl FnMut(String, String)) -> Result<()> {
        for name in listing(self.blobs())?.iter().filter(|name| is_hex_digest(name)) {
            let file = open_in(self.blobs(), name, Access::Read);
            match file.and_then(|file| digest::sha256_file(&*file)) {
                Ok((digest, _)) if digest == *name => {}
                Ok((digest, _)) => note(format!("blob {name}"), format!("its SHA-256 is {digest}")),
                Err(error) => note(format!("blob {name}"), error.to_string()),
            }
        }
        Ok(())
    }

    fn verify_images(&self, note: &mut impl FnMut(String, String)) -> Result<()> {
        for entry in Index::read(self)?.entries().filter(|entry| entry.is_manifest) {
            let name = entry.reference.as_ref().map_or_else(
                || format!("image {}", entry.digest),
                |reference| format!("image {reference}"),
            );
            match self.load_image(&entry.digest, entry.reference) {
                Ok(Some(image)) => {
                    for layer in image.manifest.layers() {
                        let digest = layer.digest().digest();
                        let length =
                            self.blobs().open(digest, Access::Read).and_then(|file| file.length());
                        match length {
                            Ok(length) if length == layer.size() => {}
                            Ok(length) => note(
                                name.clone(),
                                format!(
                                    "layer {digest} of {length} bytes, expected {}",
                                    layer.size()
                                ),
                            ),
                            Err(error) => note(name.clone(), format!("layer {digest}: {error}")),
                        }
                    }
                    if let Err(error) = self.open_image(&image) {
                        note(name, error.to_string());
                    }
                }
                Ok(None) => note(name, format!("manifest {} is missing", entry.digest)),
                Err(error) => note(name, error.to_string()),
            }
        }
        Ok(())
    }

    fn verify_disk(&self, disk: &DiskName, note: &mut impl FnMut(String, String)) -> Result<()> {
        let Some(record) = self.record(disk)? else { return Ok(()) };
        let mut files = vec![disk.file()];
        for frozen in record.frozen {
            if self.is_made(disk, &frozen)? {
                files.push(frozen.file);
            }
        }
        files.iter().try_for_each(|file| self.verify_layer(disk, file, note))
    }

    fn verify_layer(
        &self,
        disk: &DiskName,
        name: &str,
        note: &mut impl FnMut(String, String),
    ) -> Result<()> {
        let folder = self.folder(disk.kind);
        let file = open_in(&**folder, name, Access::Read)?;
        for finding in inspect::check(&*file)?.findings {
            note(format!("{} {}", disk.kind.noun(), disk.name), format!("{name}: {finding:?}"));
        }
        drop(file);
        match self.open_chain(folder, name, Access::Read) {
            // Somebody writes it, and has opened its chain.
            Err(error) if error.kind() == ErrorKind::InUse => Ok(()),
            other => other.map(drop),
        }
    }
}

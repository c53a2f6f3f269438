//! Volumes: live layers without a parent.

use super::disk::{DiskKind, DiskName, Record};
use super::{Finding, Store, Survey, now};
use crate::error::Result;

/// A volume as its record and its layer tell.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// RFC 3339.
    pub created: String,
    /// Size of the device in bytes.
    pub virtual_size: u64,
    /// Bytes of disk that it takes.
    pub size: u64,
}

impl Store {
    /// Makes an empty volume of `size` bytes.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Exists`]; [`crate::error::ErrorKind::InvalidInput`] for a name or
    /// size that can't be.
    pub fn create_volume(&self, name: &str, size: u64) -> Result<()> {
        let disk = DiskName::new(DiskKind::Volume, name)?;
        let guard = self.lock()?;
        let record = Record { created: now(), ..Record::default() };
        self.create_disk(&disk, Some(size), None, &record, &guard)
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> Result<Survey<Vec<Volume>>> {
        self.settled(|| {
            let mut survey = Survey::<Vec<Volume>>::default();
            for name in self.disk_names(DiskKind::Volume)? {
                match self.find_volume(&name) {
                    // One that goes meanwhile is left out.
                    Ok(found) => survey.good.extend(found),
                    Err(error) => {
                        survey
                            .bad
                            .push(Finding::new(DiskName::new(DiskKind::Volume, &name)?, error));
                    }
                }
            }
            Ok(survey)
        })
    }

    /// One volume.
    pub fn volume(&self, name: &str) -> Result<Volume> {
        let missing = || Ok(DiskName::new(DiskKind::Volume, name)?.missing());
        self.find_volume(name)?.map_or_else(|| Err(missing()?), Ok)
    }

    fn find_volume(&self, name: &str) -> Result<Option<Volume>> {
        let disk = DiskName::new(DiskKind::Volume, name)?;
        let Some(record) = self.record(&disk)? else { return Ok(None) };
        Ok(Some(Volume {
            name: name.to_owned(),
            virtual_size: self.disk_size(&disk)?,
            size: self.disk_cost(&disk, &record)?.good,
            created: record.created,
        }))
    }
}

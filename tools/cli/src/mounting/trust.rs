//! Which file systems the kernel is let read: those that this host made (`docs/mounting.md`).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use thinply::error::{Error, ErrorKind, Result};
use thinply::store::{DiskName, Store};

use super::target::Target;

/// Whether this host made the file system on a disk, and nothing else has written to it.
///
/// # Errors
/// [`ErrorKind::PermissionDenied`] where it did, and others may write to what says so; host errors.
pub fn is_own(target: &Target) -> Result<bool> {
    let Target::Disk { store, name } = target else { return Ok(false) };
    if !store.is_made_here(name)? {
        return Ok(false);
    }
    match open_to_others(store, name)? {
        None => Ok(true),
        Some(path) => {
            let detail = "others may write to it, so nobody knows what the kernel would read: \
                          --trust mounts all the same";
            Err(Error::new(ErrorKind::PermissionDenied, detail).in_file(path))
        }
    }
}

/// Why what this host did not make is refused.
pub fn refused(target: &Target) -> Error {
    let detail = "this host did not make its file system, and the kernel trusts what it mounts: \
                  --trust has it mounted all the same, --user mounts it by fuse2fs";
    Error::new(ErrorKind::PermissionDenied, detail).in_file(target.shown())
}

/// Notes that whoever is about to write to a disk of this host's own is its kernel, through the file
/// system that is on it.
///
/// # Errors
/// Host errors.
pub fn is_mounted(target: &Target) -> Result<()> {
    writable(target).map_or(Ok(()), |(store, disk)| store.note_made(&disk))
}

/// Notes that anything may be about to write to a disk.
///
/// # Errors
/// Host errors.
pub fn is_attached(target: &Target) -> Result<()> {
    writable(target).map_or(Ok(()), |(store, disk)| store.note_foreign(&disk))
}

fn writable(target: &Target) -> Option<(&Store, DiskName)> {
    match target {
        Target::Layer(_) => None,
        Target::Disk { store, name } => Some((store, DiskName::of_export(name)?)),
    }
}

/// A file or folder that decides what is on a disk, and that others than this user may write to.
fn open_to_others(store: &Store, name: &str) -> Result<Option<PathBuf>> {
    let files = store.decisive_files(name)?;
    let folders: BTreeSet<_> = files
        .iter()
        .flat_map(|file| file.ancestors().skip(1).take_while(|at| at.starts_with(store.path())))
        .map(Path::to_owned)
        .collect();
    for path in folders.into_iter().chain(files) {
        let found = match fs::metadata(&path) {
            // Named in a record, and never made.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            found => found.map_err(|error| Error::io(error, "looking at it").in_file(&path))?,
        };
        if found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

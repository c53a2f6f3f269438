//! Which file systems the kernel is let read: those that this host made (`docs/mounting.md`).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use thinply::error::{Error, ErrorKind, Result};
use thinply::store::{DiskName, Store};

use super::served::DiskFile;
use super::target::Target;

/// Refuses what this host did not make, and what something else may have written to. Whoever asks has the
/// disk's file open, and so nobody else gets it meanwhile.
///
/// # Errors
/// [`ErrorKind::PermissionDenied`]; host errors.
pub fn check(target: &Target, disk: &DiskFile) -> Result<()> {
    let refuse = |detail: &str| {
        let detail = format!(
            "{detail}, and the kernel trusts what it mounts: --trust has it mounted all the same, \
             --user mounts it by fuse2fs"
        );
        Error::new(ErrorKind::PermissionDenied, detail)
    };
    let Target::Disk { store, name } = target else {
        return Err(refuse("this host did not make its file system").in_file(target.shown()));
    };
    if !disk.is_for_mounts() {
        let detail = "its server gives it to others than mounts too";
        return Err(refuse(detail).in_file(target.shown()));
    }
    if !store.is_made_here(name)? {
        return Err(refuse("this host did not make its file system").in_file(target.shown()));
    }
    match open_to_others(store, name)? {
        None => Ok(()),
        Some(path) => Err(refuse("others may write to it").in_file(path)),
    }
}

/// Notes that anything may be about to write to a disk.
///
/// # Errors
/// Host errors.
pub fn is_attached(target: &Target) -> Result<()> {
    let Target::Disk { store, name } = target else { return Ok(()) };
    DiskName::of_export(name).map_or(Ok(()), |disk| store.note_foreign(&disk))
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

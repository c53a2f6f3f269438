//! Plain files in the store's folders: read, replaced and removed as a whole.

use std::io;

use super::digest::hex;
use super::index;
use crate::error::{Error, ErrorKind, Result};
use crate::live::random;
use crate::storage::{
    Access, Folder, Rights, Storage, failed, find_in, read_exact_at, write_all_at,
};

/// Largest JSON file that is written. A manifest of 1,024 layers takes about half a MiB.
const MAX_JSON: u64 = 4 << 20;
/// Largest index that is written: about 150,000 names.
const MAX_INDEX: u64 = 32 << 20;

/// How long a file of that name may become.
fn most(name: &str) -> u64 {
    if name == index::FILE { MAX_INDEX } else { MAX_JSON }
}

/// Refuses bytes that are too many for a file of that name.
pub(super) fn check_length(name: &str, bytes: &[u8]) -> Result<()> {
    let (length, most) = (bytes.len() as u64, most(name));
    if length > most {
        let detail = format!("would become {length} bytes of JSON, expected at most {most}");
        return Err(Error::new(ErrorKind::Limit, detail));
    }
    Ok(())
}

/// Reads a whole small file; `None` where it is not there. Somewhat longer ones than may be written
/// are read too, so that what came there otherwise can be made shorter.
pub(super) fn read_small(folder: &dyn Folder, name: &str) -> Result<Option<Vec<u8>>> {
    let Some(file) = find_in(folder, name, Access::Read)? else { return Ok(None) };
    let length = file.length().map_err(failed(&*file, "reading the length", 0))?;
    let most = most(name) / 4 * 5;
    if length > most {
        let detail = format!("{length} bytes of JSON, expected at most {most}");
        return Err(Error::new(ErrorKind::Limit, detail).in_file(file.path()));
    }
    let mut bytes = vec![0; length as usize];
    read_exact_at(&*file, &mut bytes, 0).map_err(failed(&*file, "reading", 0))?;
    Ok(Some(bytes))
}

/// The beginning of the names of files that mean nothing until they are renamed.
pub(super) const DRAFT: &str = ".draft-";

/// A name that no other draft has.
pub(super) fn draft_name() -> Result<String> {
    Ok(format!("{DRAFT}{}", hex(&random()?)))
}

/// Those of a file that takes the place of this one.
pub(super) fn rights_of(file: &dyn Storage) -> Result<Rights> {
    Rights::of_successor(file).map_err(failed(file, "looking at the owner", 0))
}

/// Replaces a file as a whole, durably: whoever reads it sees all of the old or all of the new. Its
/// rights stay.
///
/// # Errors
/// [`ErrorKind::Limit`] for more bytes than a file of that name may have; host errors.
pub(super) fn replace(folder: &dyn Folder, name: &str, bytes: &[u8]) -> Result<()> {
    check_length(name, bytes).map_err(|error| error.in_file(folder.path().join(name)))?;
    replace_by_shorter(folder, name, bytes)
}

/// [`replace`] by something shorter, which may be too long still.
pub(super) fn replace_by_shorter(folder: &dyn Folder, name: &str, bytes: &[u8]) -> Result<()> {
    let draft = draft_name()?;
    let fail = |operation| {
        let path = folder.path().join(name);
        move |error| Error::io(error, operation).in_file(path)
    };
    // What can't be opened has no rights that could be kept.
    let old = folder.open(name, Access::Read).ok();
    let rights = old.map_or(Ok(Rights::Usual), |old| rights_of(&*old))?;
    let drafts = folder.creating(rights);
    let write = || {
        let file = drafts.create(&draft).map_err(fail("creating the file"))?;
        write_all_at(&*file, bytes, 0).map_err(fail("writing the file"))?;
        file.sync_data().map_err(fail("syncing the file"))?;
        folder.rename(&draft, name).map_err(fail("renaming the file"))
    };
    write().inspect_err(|_| {
        // The error that matters is the first; a draft that stays is cleared by `gc`.
        let _ = folder.remove(&draft);
    })?;
    folder.sync().map_err(fail("syncing the folder"))
}

/// Whether something bears that name, of whatever kind.
pub(super) fn exists(folder: &dyn Folder, name: &str) -> Result<bool> {
    let fail = |error| Error::io(error, "looking for the file").in_file(folder.path().join(name));
    folder.same_file(name, name).map_err(fail)
}

/// Makes sure that there is no such file. Not durable until the folder is synced.
pub(super) fn remove(folder: &dyn Folder, name: &str) -> Result<()> {
    match folder.remove(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(error, "removing the file").in_file(folder.path().join(name)))
        }
        _ => Ok(()),
    }
}

/// Makes sure that no folder stands in a file's place, if it is an empty one.
pub(super) fn clear_folder(folder: &dyn Folder, name: &str) -> Result<()> {
    match folder.remove_folder(name) {
        Err(error)
            if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            let operation = "removing the folder that stands in the file's place";
            Err(Error::io(error, operation).in_file(folder.path().join(name)))
        }
        _ => Ok(()),
    }
}

/// The names in a folder, sorted. A folder that is missing is empty.
pub(super) fn listing(folder: &dyn Folder) -> Result<Vec<String>> {
    let mut names = match folder.list() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        listed => {
            listed.map_err(|error| Error::io(error, "listing the folder").in_file(folder.path()))?
        }
    };
    names.sort();
    Ok(names)
}

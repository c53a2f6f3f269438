//! JSON as the store keeps it, digests, and files that change as a whole.

use std::fmt::Write as _;
use std::io;

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::live::random;
use crate::storage::{Access, Folder, Rights, Storage, failed, read_exact_at, write_all_at};

/// Largest JSON file that is read. A manifest of 1,024 layers takes about half a MiB.
const MAX_JSON: u64 = 4 << 20;
const CHUNK: u64 = 1 << 20;

/// The bytes of a value, the same for equal values: keys in order, no white space.
pub(super) fn canonical(value: &impl Serialize) -> Result<Vec<u8>> {
    let value = serde_json::to_value(value).map_err(|error| invalid(&error))?;
    serde_json::to_vec(&sorted(value)).map_err(|error| invalid(&error))
}

/// Whether maps keep their order depends on features of serde_json that others choose.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => items.into_iter().map(sorted).collect(),
        other => other,
    }
}

fn invalid(error: &serde_json::Error) -> Error {
    Error::new(ErrorKind::Corrupt, format!("not the JSON that was expected: {error}"))
}

/// Reads bytes as JSON.
pub(super) fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| invalid(&error))
}

/// The SHA-256 of bytes in hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String never fails.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The SHA-256 of a file in hexadecimal, and its length. Holes are not read.
pub(super) fn sha256_file(file: &dyn Storage) -> Result<(String, u64)> {
    static ZEROS: [u8; CHUNK as usize] = [0; CHUNK as usize];
    let length = file.length().map_err(failed(file, "reading the length", 0))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK as usize];
    let mut at = 0;
    while at < length {
        let data = file.next_data(at).map_err(failed(file, "looking for data", at))?;
        let data = data.unwrap_or(length).min(length);
        while at < data {
            let part = (data - at).min(CHUNK);
            hasher.update(&ZEROS[..part as usize]);
            at += part;
        }
        let part = (length - at).min(CHUNK) as usize;
        read_exact_at(file, &mut buffer[..part], at).map_err(failed(file, "reading", at))?;
        hasher.update(&buffer[..part]);
        at += part as u64;
    }
    Ok((hex(&hasher.finalize()), length))
}

/// Reads a whole small file; `None` where it is not there.
pub(super) fn read_small(folder: &dyn Folder, name: &str) -> Result<Option<Vec<u8>>> {
    let path = folder.path().join(name);
    let file = match folder.open(name, Access::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| Error::io(error, "opening the file").in_file(&path))?,
    };
    let length = file.length().map_err(failed(&*file, "reading the length", 0))?;
    if length > MAX_JSON {
        let detail = format!("{length} bytes of JSON, expected at most {MAX_JSON}");
        return Err(Error::new(ErrorKind::Limit, detail).in_file(path));
    }
    let mut bytes = vec![0; length as usize];
    read_exact_at(&*file, &mut bytes, 0).map_err(failed(&*file, "reading", 0))?;
    Ok(Some(bytes))
}

/// Reads a JSON file; `None` where it is not there.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(
    folder: &dyn Folder,
    name: &str,
) -> Result<Option<T>> {
    let Some(bytes) = read_small(folder, name)? else { return Ok(None) };
    parse(&bytes).map(Some).map_err(|error| error.in_file(folder.path().join(name)))
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
pub(super) fn replace(folder: &dyn Folder, name: &str, bytes: &[u8]) -> Result<()> {
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

/// Removes a file; true if it was there. Not durable until the folder is synced.
pub(super) fn remove(folder: &dyn Folder, name: &str) -> Result<bool> {
    match folder.remove(name) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(error, "removing the file").in_file(folder.path().join(name))),
    }
}

/// The present time as the OCI specification writes it.
pub(super) fn now() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryFolder;

    #[test]
    fn equal_values_have_equal_bytes() {
        let a: Value = serde_json::from_str(r#"{"b":[{"z":1,"a":2}],"a":null}"#).unwrap();
        let b: Value = serde_json::from_str(r#"{"a":null,"b":[{"a":2,"z":1}]}"#).unwrap();
        assert_eq!(canonical(&a).unwrap(), br#"{"a":null,"b":[{"a":2,"z":1}]}"#);
        assert_eq!(canonical(&a).unwrap(), canonical(&b).unwrap());
    }

    #[test]
    fn the_digest_of_a_file_counts_its_holes() {
        let folder = MemoryFolder::new("m");
        let file = folder.create("a").unwrap();
        file.set_length(5 << 20).unwrap();
        write_all_at(&*file, b"text", 3 << 20).unwrap();
        let mut bytes = vec![0; 5 << 20];
        bytes[3 << 20..][..4].copy_from_slice(b"text");
        assert_eq!(sha256_file(&*file).unwrap(), (sha256(&bytes), 5 << 20));
        assert_eq!(sha256(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}

//! SHA-256 in hexadecimal, as blobs are named.

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};

use crate::error::Result;
use crate::storage::{Storage, failed, read_exact_at};

const CHUNK: u64 = 1 << 20;

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

/// The hexadecimal part of a digest that a file of `blobs/sha256` can have.
pub(super) fn hex_digest(digest: &str) -> Option<&str> {
    let hex = digest.strip_prefix("sha256:")?;
    is_hex_digest(hex).then_some(hex)
}

/// Whether a name is that of a blob: a SHA-256 in hexadecimal.
pub fn is_hex_digest(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Folder, MemoryFolder, write_all_at};

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

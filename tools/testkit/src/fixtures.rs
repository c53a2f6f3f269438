//! Files that earlier versions made: `tests/fixtures`, and what they must read as.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use thinply::device::Device;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// A copy of a set's files.
pub fn unpack(set: &str) -> TempDir {
    let archive = File::open(folder().join(set).with_extension("tar.zst")).unwrap();
    let copy = tempfile::tempdir().unwrap();
    tar::Archive::new(zstd::Decoder::new(archive).unwrap()).unpack(copy.path()).unwrap();
    copy
}

/// What the old binary and the script that used it say of all sets: `tests/fixtures/make`.
pub fn manifest() -> Value {
    serde_json::from_reader(File::open(folder().join("manifest.json")).unwrap()).unwrap()
}

/// The SHA-256 of all that a device holds, in hexadecimal.
pub fn sha256(device: &dyn Device) -> String {
    let (mut digest, mut bytes) = (Sha256::new(), vec![0; 1 << 20]);
    for offset in (0..device.size()).step_by(bytes.len()) {
        let length = bytes.len().min((device.size() - offset) as usize);
        device.read(offset, &mut bytes[..length]).unwrap();
        digest.update(&bytes[..length]);
    }
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

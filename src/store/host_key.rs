//! A secret of the host, which tells what it noted itself from what came from elsewhere.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::process::geteuid;

use super::files::draft_name;

const FILE: &str = "/var/lib/thinply.key";
/// Names another file.
const VARIABLE: &str = "THINPLY_HOST_KEY";
const LENGTH: usize = 32;

/// A key that only this host has.
pub(super) struct HostKey([u8; LENGTH]);

impl HostKey {
    /// The host's key. Nothing where there is none, or one that others than this user may know.
    pub fn find() -> Option<Self> {
        Self::read(&path()).ok()
    }

    /// The host's key, which is made where there is none. Nothing for whoever may not make one.
    pub fn find_or_make() -> Option<Self> {
        let path = path();
        Self::read(&path).or_else(|_| make(&path).and_then(|()| Self::read(&path))).ok()
    }

    /// Hexadecimal text that nobody can tell without the key: for these bytes in the folder that has
    /// these numbers, of its file system and of its inode.
    pub fn seal(&self, folder: [u64; 2], bytes: &[u8]) -> String {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for number in folder {
            hasher.update(&number.to_le_bytes());
        }
        hasher.update(bytes);
        hasher.finalize().to_hex().to_string()
    }

    fn read(path: &Path) -> io::Result<Self> {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let found = file.metadata()?;
        let own = found.is_file() && found.uid() == geteuid().as_raw() && found.mode() & 0o077 == 0;
        let mut bytes = Vec::new();
        file.take(LENGTH as u64 + 1).read_to_end(&mut bytes)?;
        let key = bytes.try_into().ok().filter(|_| own);
        key.map(Self).ok_or_else(|| io::Error::other("no key, or one that others may know"))
    }
}

fn path() -> PathBuf {
    let named = std::env::var_os(VARIABLE).filter(|named| !named.is_empty());
    named.map_or_else(|| FILE.into(), PathBuf::from)
}

/// Whole and durable under its name, or not there. One that somebody else made meanwhile stays.
fn make(path: &Path) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let draft = folder.join(draft_name().map_err(io::Error::other)?);
    let mut key = [0; LENGTH];
    getrandom::fill(&mut key).map_err(io::Error::other)?;
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
        file.write_all(&key)?;
        file.sync_all()?;
        fs::hard_link(&draft, path)
    };
    let written = write();
    let _ = fs::remove_file(&draft);
    match written {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => File::open(folder)?.sync_all(),
    }
}

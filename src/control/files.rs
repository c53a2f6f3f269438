//! Which files of an ext4 file system differ between two disks.
//!
//! Both disks may hold anything: the reader is a library without unsafe code that checks what it
//! reads, and what a tree can make it do is bounded here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ext4_view::{Ext4, Ext4Error, Ext4Read, Metadata};
use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::serve::Moment;

/// How long it may take to compare two trees.
const PATIENCE: Duration = Duration::from_secs(60);
/// Deepest folder that is looked into: a damaged tree may be its own child.
const MAX_DEPTH: usize = 256;
/// Where an ext4 file system has its magic number.
const MAGIC_OFFSET: u64 = 1024 + 56;
const MAGIC: [u8; 2] = [0x53, 0xef];

/// What became of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "each name says it")]
pub enum Change {
    Added,
    Changed,
    Deleted,
}

/// A file that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// What became of it.
    pub change: Change,
    /// Its path, with what is no UTF-8 replaced.
    pub path: String,
}

/// A disk that keeps still while it is read.
pub(super) trait Still: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
}

/// One that nobody has open for writing.
impl<D: Device> Still for D {
    fn size(&self) -> u64 {
        Device::size(self)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        Device::read(self, offset, buf)
    }
}

impl Still for Moment {
    fn size(&self) -> u64 {
        self.size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read(offset, buf)
    }
}

/// The files whose type, size, mode, owner or time of modification differ, sorted by path; none where
/// one of the disks holds no ext4 file system.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for a file system that can't be read; [`ErrorKind::Limit`] for one that takes
/// too long.
pub(super) fn changed(old: Arc<dyn Still>, new: Arc<dyn Still>) -> Result<Option<Vec<FileChange>>> {
    if !has_ext4(&*old)? || !has_ext4(&*new)? {
        return Ok(None);
    }
    let deadline = Instant::now() + PATIENCE;
    let open = |disk| {
        let disk = Disk { disk, deadline };
        Ext4::load(Box::new(disk)).map_err(unreadable)
    };
    let (old, new) = (open(old)?, open(new)?);
    let mut walk = Walk { old, new, deadline, found: Vec::new() };
    walk.compare(b"/", 0)?;
    walk.found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(Some(walk.found))
}

fn has_ext4(disk: &dyn Still) -> Result<bool> {
    let mut magic = [0; 2];
    if disk.size() < MAGIC_OFFSET + 2 {
        return Ok(false);
    }
    disk.read(MAGIC_OFFSET, &mut magic)?;
    Ok(magic == MAGIC)
}

fn unreadable(error: Ext4Error) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the ext4 file system can't be read: {error}"))
}

fn too_slow() -> Error {
    let detail = format!("comparing the files takes more than {} seconds", PATIENCE.as_secs());
    Error::new(ErrorKind::Limit, detail)
}

/// A disk as the file system's reader sees it.
struct Disk {
    disk: Arc<dyn Still>,
    deadline: Instant,
}

impl Ext4Read for Disk {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        if Instant::now() > self.deadline {
            return Err(too_slow().into());
        }
        Ok(self.disk.read(start_byte, dst)?)
    }
}

type Entries = BTreeMap<Vec<u8>, Metadata>;

struct Walk {
    old: Ext4,
    new: Ext4,
    deadline: Instant,
    found: Vec<FileChange>,
}

impl Walk {
    fn note(&mut self, change: Change, path: &[u8]) {
        let path = String::from_utf8_lossy(path).into_owned();
        self.found.push(FileChange { change, path });
    }

    fn entries(&self, fs: &Ext4, path: &[u8], depth: usize) -> Result<Entries> {
        if depth > MAX_DEPTH {
            let detail = format!("folders more than {MAX_DEPTH} deep");
            return Err(Error::new(ErrorKind::Limit, detail));
        }
        let mut entries = Entries::new();
        for entry in fs.read_dir(path).map_err(unreadable)? {
            if Instant::now() > self.deadline {
                return Err(too_slow());
            }
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name().as_ref().to_vec();
            if name != b"." && name != b".." {
                entries.insert(name, entry.metadata().map_err(unreadable)?);
            }
        }
        Ok(entries)
    }

    fn compare(&mut self, path: &[u8], depth: usize) -> Result<()> {
        let old = self.entries(&self.old, path, depth)?;
        let new = self.entries(&self.new, path, depth)?;
        for name in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
            let path = join(path, name);
            match (old.get(name), new.get(name)) {
                (Some(_), None) => self.note(Change::Deleted, &path),
                (None, Some(meta)) => self.added(&path, meta, depth + 1)?,
                (Some(old), Some(new)) => {
                    if is_changed(old, new) {
                        self.note(Change::Changed, &path);
                    }
                    if old.is_dir() && new.is_dir() {
                        self.compare(&path, depth + 1)?;
                    }
                }
                (None, None) => {}
            }
        }
        Ok(())
    }

    fn added(&mut self, path: &[u8], meta: &Metadata, depth: usize) -> Result<()> {
        self.note(Change::Added, path);
        if meta.is_dir() {
            for (name, meta) in self.entries(&self.new, path, depth)? {
                self.added(&join(path, &name), &meta, depth + 1)?;
            }
        }
        Ok(())
    }
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    let mut joined = path.to_vec();
    if !joined.ends_with(b"/") {
        joined.push(b'/');
    }
    joined.extend(name);
    joined
}

/// Reading a file changes its inode too: the time of access doesn't count.
fn is_changed(old: &Metadata, new: &Metadata) -> bool {
    let facts = |meta: &Metadata| {
        (meta.file_type(), meta.len(), meta.mode(), meta.uid(), meta.gid(), meta.modified())
    };
    facts(old) != facts(new)
}

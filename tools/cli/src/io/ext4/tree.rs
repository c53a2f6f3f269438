//! What is in a file tree: what an image of it needs, and a digest of all that it will hold.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, SeekFrom, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use thinply::error::{Error, ErrorKind, Result};

use super::{BLOCK, shown};
use crate::io::pump::is_zero;

/// What a block of an extent tree is sure to hold.
const EXTENTS: u64 = 170;
/// Extents that an inode holds by itself.
const OWN_EXTENTS: u64 = 4;
/// A symlink's target of this length or more has a block.
const SHORT_TARGET: u64 = 60;
/// Names that one ext4 inode can have, and what a folder's count of links ends at.
pub const MOST_LINKS: u64 = 65000;
/// Where the times of an ext4 inode begin and end, in seconds since 1970.
const TIMES: std::ops::RangeInclusive<i64> = -(1 << 31)..=(1 << 34) - (1 << 31) - 1;
/// Attributes that ext4 has a place for where Linux finds them again.
const KEPT: [&[u8]; 5] =
    [b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default"];
const CHUNK: usize = 1 << 20;

/// What `lstat` tells of a file, as far as an image or a change shows in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub device: u64,
    pub size: u64,
    /// Seconds since 1970, and nanoseconds.
    pub modified: (i64, i64),
    changed: (i64, i64),
}

impl Stat {
    fn of(meta: &Metadata) -> Self {
        Self {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            device: meta.rdev(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    pub fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    pub fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }
}

/// A file, or a folder with what is in it.
#[derive(Debug)]
pub struct Node {
    pub name: OsString,
    pub stat: Stat,
    /// In the order of their names' bytes.
    pub children: Vec<Node>,
}

/// A file tree as it was read.
#[derive(Debug)]
pub struct Tree {
    path: PathBuf,
    pub root: Node,
    /// Names in it.
    pub entries: u64,
    /// Blocks that an image of it needs, beside the inodes; rather too many.
    pub blocks: u64,
    /// No time of the image is later, in seconds since 1970.
    latest: Option<i64>,
    newest: i64,
    digest: blake3::Hash,
    lost: Vec<String>,
}

impl Tree {
    /// Reads all of a tree.
    pub fn read(path: &Path, latest: Option<i64>) -> Result<Self> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut survey = Survey {
            latest,
            newest: 0,
            now: since.map_or(0, |since| since.as_secs()).try_into().unwrap_or(i64::MAX),
            entries: 0,
            blocks: 0,
            links: HashMap::new(),
            hasher: blake3::Hasher::new(),
            lost: BTreeMap::new(),
            buffer: vec![0; CHUNK],
        };
        // The root may be a symlink, or where a file system is mounted; nothing below it.
        let meta = fs::metadata(path).map_err(|error| failed(error, "looking at", path))?;
        let root = survey.node(path, OsString::new(), &meta)?;
        let lost = survey.lost.into_iter().map(|(what, (first, count))| match count {
            1 => format!("{}: {what}", shown(first.as_os_str().as_bytes(), "")),
            _ => format!(
                "{} (and {} more): {what}",
                shown(first.as_os_str().as_bytes(), ""),
                count - 1
            ),
        });
        Ok(Self {
            path: path.to_owned(),
            root,
            entries: survey.entries,
            blocks: survey.blocks,
            latest,
            newest: survey.newest,
            digest: survey.hasher.finalize(),
            lost: lost.collect(),
        })
    }

    /// The time of the image itself: the latest that there may be, else the newest in the tree that is
    /// not to come yet. File system checks complain of one in the future.
    pub fn time(&self) -> i64 {
        self.latest.unwrap_or(self.newest)
    }

    /// The time that a file has in the image.
    pub fn modified(&self, stat: &Stat) -> (i64, i64) {
        nearest(wanted(stat.modified, self.latest))
    }

    /// What the image can't keep, for people.
    pub fn lost(self) -> Vec<String> {
        self.lost
    }

    /// Two UUIDs that are the same for the same tree, of the version that is for one's own use.
    pub fn uuids(&self) -> [String; 2] {
        let (first, second) = self.digest.as_bytes().split_at(16);
        [first, second].map(|half| {
            let mut number = u128::from_be_bytes(half.try_into().unwrap_or_default());
            number = number & !(0xf << 76) | 8 << 76;
            number = number & !(0b11 << 62) | 0b10 << 62;
            let hex = format!("{number:032x}");
            [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
        })
    }

    /// Fails if anything in the tree is not as it was read.
    pub fn check_unchanged(&self) -> Result<()> {
        let meta = fs::metadata(&self.path);
        compare(&self.path, &self.root, meta)
    }
}

fn compare(path: &Path, node: &Node, meta: io::Result<Metadata>) -> Result<()> {
    if !meta.is_ok_and(|meta| Stat::of(&meta) == node.stat) {
        return Err(changed(path));
    }
    if node.stat.is_dir() {
        let names = names(path)?;
        if !names.iter().eq(node.children.iter().map(|child| &child.name)) {
            return Err(changed(path));
        }
        for child in &node.children {
            let path = path.join(&child.name);
            compare(&path, child, fs::symlink_metadata(&path))?;
        }
    }
    Ok(())
}

fn changed(path: &Path) -> Error {
    Error::new(ErrorKind::InUse, "changed while the tree was read; it must keep still")
        .in_file(path)
}

/// An error of looking at what a folder has just named: where it is gone, that is what is said.
fn failed(error: io::Error, doing: &str, path: &Path) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => changed(path),
        _ => Error::io(error, doing).in_file(path),
    }
}

fn names(path: &Path) -> Result<Vec<OsString>> {
    let entries =
        fs::read_dir(path).and_then(|dir| dir.map(|entry| Ok(entry?.file_name())).collect());
    let mut names: Vec<_> = entries.map_err(|error| failed(error, "listing the folder", path))?;
    names.sort_unstable();
    Ok(names)
}

fn wanted(time: (i64, i64), latest: Option<i64>) -> (i64, i64) {
    latest.map_or(time, |latest| time.min((latest, 0)))
}

/// The time of ext4 that is nearest.
fn nearest(time: (i64, i64)) -> (i64, i64) {
    match time.0 {
        seconds if TIMES.contains(&seconds) => time,
        seconds => (seconds.clamp(*TIMES.start(), *TIMES.end()), 0),
    }
}

/// A walk through a tree.
struct Survey {
    latest: Option<i64>,
    newest: i64,
    now: i64,
    entries: u64,
    blocks: u64,
    /// Files with several names: which of them it was, and how many names were met.
    links: HashMap<(u64, u64), (u64, u64)>,
    hasher: blake3::Hasher,
    /// What can't be kept: of which file first, and of how many.
    lost: BTreeMap<String, (PathBuf, u64)>,
    buffer: Vec<u8>,
}

impl Survey {
    fn put(&mut self, bytes: &[u8]) {
        self.hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    }

    fn put_number(&mut self, number: u64) {
        self.hasher.update(&number.to_le_bytes());
    }

    fn lose(&mut self, path: &Path, what: impl Into<String>) {
        self.lost.entry(what.into()).or_insert_with(|| (path.to_owned(), 0)).1 += 1;
    }

    fn node(&mut self, path: &Path, name: OsString, meta: &Metadata) -> Result<Node> {
        let stat = Stat::of(meta);
        self.entries += 1;
        self.put(name.as_bytes());
        let mut node = Node { name, stat, children: Vec::new() };
        if self.is_further_name(path, meta)? {
            return Ok(node);
        }
        let time = wanted(stat.modified, self.latest);
        if time != nearest(time) {
            self.lose(path, "ext4 has no such date; the image has the nearest");
        }
        let time = nearest(time);
        if time.0 <= self.now {
            self.newest = self.newest.max(time.0);
        }
        for number in
            [stat.mode.into(), stat.uid.into(), stat.gid.into(), time.0 as u64, time.1 as u64]
        {
            self.put_number(number);
        }
        self.attributes(path)?;
        let kind = meta.file_type();
        if kind.is_dir() {
            node.children = self.children(path)?;
        } else if kind.is_file() {
            self.content(path, &stat)?;
        } else if kind.is_symlink() {
            let target =
                fs::read_link(path).map_err(|error| failed(error, "reading the link", path))?;
            self.blocks += u64::from(stat.size >= SHORT_TARGET);
            self.put(target.as_os_str().as_bytes());
        } else if kind.is_block_device() || kind.is_char_device() {
            self.put_number(stat.device);
        }
        Ok(node)
    }

    /// Whether a file was met under another name before.
    fn is_further_name(&mut self, path: &Path, meta: &Metadata) -> Result<bool> {
        if meta.is_dir() || meta.nlink() == 1 {
            return Ok(false);
        }
        let number = self.links.len() as u64;
        let (number, names) = self.links.entry((meta.dev(), meta.ino())).or_insert((number, 0));
        *names += 1;
        let (number, names) = (*number, *names);
        if meta.is_symlink() {
            // mke2fs makes a symlink of each name.
            if names > 1 {
                self.lose(
                    path,
                    "a further name of a symlink; in the image it is a symlink of its own",
                );
            }
            return Ok(false);
        }
        if names > MOST_LINKS {
            let detail = format!("has more than {MOST_LINKS} names; no file of ext4 has");
            return Err(Error::new(ErrorKind::Unsupported, detail).in_file(path));
        }
        self.put_number(number);
        Ok(names > 1)
    }

    fn children(&mut self, path: &Path) -> Result<Vec<Node>> {
        let names = names(path)?;
        self.put_number(names.len() as u64);
        // An entry is 8 bytes and the name in fours; what doesn't fit into a block goes to the next.
        let bytes: u64 = names.iter().map(|name| 12 + name.len() as u64).sum();
        self.blocks += 1 + bytes * 5 / 4 / BLOCK;
        let node = |name: OsString| {
            let path = path.join(&name);
            let meta = fs::symlink_metadata(&path)
                .map_err(|error| failed(error, "looking at it", &path))?;
            check_mount(&path)?;
            self.node(&path, name, &meta)
        };
        names.into_iter().map(node).collect()
    }

    fn attributes(&mut self, path: &Path) -> Result<()> {
        let mut names = list_attributes(path)?;
        names.sort_unstable();
        self.put_number(names.len() as u64);
        self.blocks += u64::from(!names.is_empty());
        for name in names {
            let value = attribute(path, &name)?;
            self.put(&name);
            self.put(&value);
            if !KEPT.iter().any(|kept| name.starts_with(kept)) {
                let what = format!("Linux finds no attribute {} in ext4", shown(&name, ""));
                self.lose(path, what);
            }
        }
        Ok(())
    }

    /// Digests what a file holds and counts the blocks of it; where those lie that are zeros, and
    /// whether they are holes, makes no difference to mke2fs.
    fn content(&mut self, path: &Path, stat: &Stat) -> Result<()> {
        let reading = |error| failed(error, "reading", path);
        // Should it be another kind of file by now, nobody waits for it.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(reading)?;
        if Stat::of(&file.metadata().map_err(reading)?) != *stat {
            return Err(changed(path));
        }
        self.put_number(stat.size);
        let (mut at, mut extents, mut next) = (0, 0, None);
        while let Some(data) = next_data(&file, at, stat.size).map_err(reading)? {
            at = data;
            let want = usize::try_from(stat.size - at).map_or(CHUNK, |left| left.min(CHUNK));
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = file.read_exact_at(&mut buffer[..want], at);
            // Shorter than it was.
            read.map_err(|_| changed(path))?;
            for block in buffer[..want].chunks(BLOCK as usize) {
                if !is_zero(block) {
                    extents += u64::from(next != Some(at));
                    next = Some(at + BLOCK);
                    self.blocks += 1;
                    self.put_number(at);
                    self.put(block);
                }
                at += BLOCK;
            }
            self.buffer = buffer;
        }
        if extents > OWN_EXTENTS {
            self.blocks += 1 + extents / EXTENTS + 1;
        }
        Ok(())
    }
}

/// The block from `at` on where a file may hold data; none from its end on.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<u64>> {
    if at >= size {
        return Ok(None);
    }
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some((data / BLOCK * BLOCK).max(at)).filter(|&data| data < size)),
        Err(Errno::NXIO) => Ok(None),
        // No holes here.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}

/// Refuses where another file system or folder is mounted: mke2fs would copy what is in it, which
/// is no part of the tree and may, like /proc, have no end.
fn check_mount(path: &Path) -> Result<()> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    // Kernels that can't tell don't say that there is one.
    let found = rustix::fs::statx(CWD, path, flags, StatxFlags::empty());
    if !found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)) {
        return Ok(());
    }
    let detail = "something is mounted here; unmount it, or build from a copy or a bind mount of the \
                  tree, which leave it out";
    Err(Error::new(ErrorKind::Unsupported, detail).in_file(path))
}

/// The names of a file's attributes.
fn list_attributes(path: &Path) -> Result<Vec<Vec<u8>>> {
    let list = grown(|buffer| rustix::fs::llistxattr(path, buffer));
    match list {
        Ok(list) => {
            let names = list.split(|&byte| byte == 0).filter(|name| !name.is_empty());
            Ok(names.map(<[u8]>::to_vec).collect())
        }
        Err(Errno::OPNOTSUPP) => Ok(Vec::new()),
        Err(error) => Err(failed(error.into(), "listing its attributes", path)),
    }
}

fn attribute(path: &Path, name: &[u8]) -> Result<Vec<u8>> {
    let value = grown(|buffer| rustix::fs::lgetxattr(path, name, buffer));
    value.map_err(|error| match error {
        Errno::NODATA => changed(path),
        error => failed(error.into(), &format!("reading the attribute {}", shown(name, "")), path),
    })
}

/// What a call puts into a buffer that is large enough.
fn grown(
    mut call: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 1024];
    loop {
        match call(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < (1 << 20) => buffer.resize(buffer.len() * 8, 0),
            Err(error) => return Err(error),
        }
    }
}

//! The disks' names as folders and files.
//!
//! A node is computed from its path, so that a server that goes on where another one ended means the
//! same by it, and so that nothing has to be counted: what is no longer known is found again among the
//! disks that are listed.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::errno;
use super::proto::{Attributes, ROOT};
use crate::error::{self, ErrorKind};
use crate::serve::{Facts, Lease, Leases, guard};

/// Most nodes whose paths are remembered.
const MOST: usize = 1 << 16;
/// Longest name of a file, as the kernel has it.
const MAX_NAME: usize = 255;
/// Nodes below are the kernel's, and the folders' own entries.
const FIRST: u64 = 16;

/// What is listed of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub folder: bool,
    pub name: String,
}

/// Paths have no slash at either end; the root's is empty.
pub struct Tree {
    disks: Arc<dyn Leases>,
    /// Folders that are there even if nothing is in them.
    folders: Vec<String>,
    /// The path of the disk whose name is empty.
    default: String,
    paths: Mutex<HashMap<u64, String>>,
}

pub fn node_of(path: &str) -> u64 {
    if path.is_empty() {
        return ROOT;
    }
    let hash = blake3::hash(path.as_bytes());
    let (first, _) = hash.as_bytes().split_first_chunk().unwrap_or((&[0; 8], &[]));
    // Offsets in a folder are nodes, and have no sign.
    FIRST + (u64::from_le_bytes(*first) >> 2)
}

fn below(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

/// Whether each part of a path can be a file's name.
fn is_path(path: &str) -> bool {
    let is_name = |part: &str| {
        !matches!(part, "" | "." | "..") && part.len() <= MAX_NAME && !part.contains('\0')
    };
    path.split('/').all(is_name)
}

impl Tree {
    pub fn new(disks: Arc<dyn Leases>, folders: Vec<String>, default: String) -> Self {
        Self { disks, folders, default, paths: Mutex::default() }
    }

    /// All paths of disks.
    fn disks(&self) -> impl Iterator<Item = String> {
        let listed = self.disks.list().into_iter().filter(|disk| !disk.alias);
        let path = |name: String| if name.is_empty() { self.default.clone() } else { name };
        listed.map(move |disk| path(disk.name)).filter(|path| is_path(path))
    }

    fn disk<'a>(&self, path: &'a str) -> &'a str {
        if path == self.default { "" } else { path }
    }

    fn remember(&self, node: u64, path: String) {
        let mut paths = guard(&self.paths);
        if paths.len() >= MOST {
            paths.clear();
        }
        paths.insert(node, path);
    }

    /// The path of a node that the kernel was told of.
    ///
    /// # Errors
    /// `ESTALE` where it is no more.
    pub fn path(&self, node: u64) -> Result<String, Errno> {
        if node == ROOT {
            return Ok(String::new());
        }
        if let Some(path) = guard(&self.paths).get(&node) {
            return Ok(path.clone());
        }
        let listed = self.disks().chain(self.folders.iter().cloned());
        let found = listed.flat_map(|path| prefixes(&path)).find(|path| node_of(path) == node);
        let path = found.ok_or(Errno::STALE)?;
        self.remember(node, path.clone());
        Ok(path)
    }

    /// The name of the disk that a node stands for.
    pub fn disk_of(&self, node: u64) -> Result<String, Errno> {
        self.path(node).map(|path| self.disk(&path).to_owned())
    }

    /// What `name` is in a folder.
    pub fn find(&self, folder: u64, name: &[u8]) -> Result<Attributes, Errno> {
        let name = str::from_utf8(name).map_err(|_| Errno::NOENT)?;
        let path = below(&self.path(folder)?, name);
        let found = self.attributes_of(&path)?;
        self.remember(found.node, path);
        Ok(found)
    }

    /// What a node is.
    pub fn attributes(&self, node: u64) -> Result<Attributes, Errno> {
        self.attributes_of(&self.path(node)?)
    }

    fn attributes_of(&self, path: &str) -> Result<Attributes, Errno> {
        let node = node_of(path);
        let facts = Facts { space: 0, mode: 0o555, ..Facts::without_layer(0) };
        let folder = Attributes { node, folder: true, facts };
        if path.is_empty() || self.folders.iter().any(|known| known == path) {
            return Ok(folder);
        }
        match self.disks.facts(self.disk(path)) {
            Ok(facts) => return Ok(Attributes { node, folder: false, facts }),
            Err(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::InvalidInput => {}
                _ => return Err(errno(&error)),
            },
        }
        let inside = format!("{path}/");
        let is_folder = self.disks().any(|disk| disk.starts_with(&inside));
        if is_folder { Ok(folder) } else { Err(Errno::NOENT) }
    }

    /// What is in a folder, in the order of nodes, which never changes.
    pub fn entries(&self, folder: u64) -> Result<Vec<Entry>, Errno> {
        let folder = self.path(folder)?;
        let inside = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let mut found = BTreeMap::new();
        let mut add = |path: &str, leads_on: bool| {
            let Some(rest) = path.strip_prefix(&inside) else { return };
            let (name, deeper) = match rest.split_once('/') {
                Some((name, _)) => (name, true),
                None => (rest, leads_on),
            };
            let node = node_of(&below(&folder, name));
            found.insert(node, Entry { node, folder: deeper, name: name.to_owned() });
        };
        self.folders.iter().for_each(|path| add(path, true));
        self.disks().for_each(|path| add(&path, false));
        Ok(found.into_values().collect())
    }

    /// The disk of a node, to be written or only read.
    ///
    /// # Errors
    /// As [`Leases::lease`] and [`Leases::look`].
    pub fn open(&self, disk: &str, writes: bool) -> error::Result<Lease> {
        if writes { self.disks.lease(disk) } else { self.disks.look(disk) }
    }
}

/// A path and all folders that it leads through.
fn prefixes(path: &str) -> Vec<String> {
    let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
    ends.filter_map(|end| path.get(..end)).map(str::to_owned).collect()
}

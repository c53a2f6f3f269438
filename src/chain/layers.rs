//! The parent gate: where a layer's parent may be looked for, and what is accepted there
//! (`format-spec.md`, "Parent link").

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, Weak};

use super::stack::Stack;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Header, ParentLink};
use crate::live::{Sealed, newest_header};
use crate::storage::{Access, Folder};
use crate::sync::guard;
use crate::types::Identity;

/// Most layers in a chain.
pub const MAX_DEPTH: usize = 1024;

/// A sealed layer and the folder it was found in, where its own parent is looked for first.
pub(super) struct Found {
    pub sealed: Sealed,
    pub folder: Arc<dyn Folder>,
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sealed.fmt(f)
    }
}

/// The folders where parents are looked for beside the child's own, and the layers that are open:
/// each is opened once, however many chains stand on it.
#[derive(Debug, Default)]
pub struct Layers {
    folders: Vec<Arc<dyn Folder>>,
    layers: Mutex<HashMap<Identity, Weak<Found>>>,
    stacks: Mutex<HashMap<Identity, Weak<Stack>>>,
}

impl Layers {
    /// Looks in `folders`, in that order, after the child's own.
    pub fn new(folders: Vec<Arc<dyn Folder>>) -> Self {
        Self { folders, ..Self::default() }
    }

    /// The stack that a layer in `folder` with this parent link stands on.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::ParentMismatch`], [`ErrorKind::Limit`] for a chain of
    /// more than [`MAX_DEPTH`] layers, [`ErrorKind::Corrupt`] for a layer that is its own ancestor
    /// or shows more of its parent than there is; what opening a layer refuses.
    pub fn stack(&self, link: &ParentLink, folder: &Arc<dyn Folder>) -> Result<Arc<Stack>> {
        if let Some(stack) = guard(&self.stacks).get(&link.identity).and_then(Weak::upgrade) {
            return Ok(stack);
        }
        let mut found: Vec<Arc<Found>> = Vec::new();
        let mut next = Some((link.clone(), folder.clone()));
        while let Some((link, folder)) = next {
            if found.len() == MAX_DEPTH {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("a chain of more than {MAX_DEPTH} layers"),
                ));
            }
            let layer = self.layer(&link, &folder)?;
            if found.iter().any(|other| Arc::ptr_eq(other, &layer)) {
                let path = layer.sealed.file().path();
                let error = Error::new(ErrorKind::Corrupt, "the layer is its own ancestor");
                return Err(error.in_file(path));
            }
            if let Some(child) = found.last() {
                check_visible_size(&child.sealed, &layer.sealed)?;
            }
            next = layer.sealed.header().parent.clone().map(|link| (link, layer.folder.clone()));
            found.push(layer);
        }
        let stack = Arc::new(Stack::new(found));
        remember(&self.stacks, link.identity, &stack);
        Ok(stack)
    }

    fn layer(&self, link: &ParentLink, folder: &Arc<dyn Folder>) -> Result<Arc<Found>> {
        if let Some(layer) = guard(&self.layers).get(&link.identity).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let mut refused = None;
        for folder in std::iter::once(folder).chain(&self.folders) {
            match open_parent(link, &**folder) {
                Ok(sealed) => {
                    let layer = Arc::new(Found { sealed, folder: folder.clone() });
                    remember(&self.layers, link.identity, &layer);
                    return Ok(layer);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    refused.get_or_insert(error);
                }
            }
        }
        Err(refused.unwrap_or_else(|| {
            let places = std::iter::once(folder).chain(&self.folders);
            let places: Vec<_> = places.map(|folder| folder.path().display().to_string()).collect();
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "parent {:?} ({}) is not in {}",
                    link.hint,
                    link.identity,
                    places.join(", ")
                ),
            )
        }))
    }

    /// A layer that this process has just frozen, for the chains that will stand on it.
    pub(super) fn adopt(&self, identity: Identity, layer: &Arc<Found>, stack: &Arc<Stack>) {
        remember(&self.layers, identity, layer);
        remember(&self.stacks, identity, stack);
    }
}

fn remember<T>(map: &Mutex<HashMap<Identity, Weak<T>>>, identity: Identity, value: &Arc<T>) {
    let mut map = guard(map);
    map.retain(|_, value| value.strong_count() > 0);
    map.insert(identity, Arc::downgrade(value));
}

/// Opens the file that the hint names, if it is who the link says.
fn open_parent(link: &ParentLink, folder: &dyn Folder) -> Result<Sealed> {
    let path = folder.path().join(&link.hint);
    let file = folder.open(&link.hint, Access::Read).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::io(error, "opening the parent").in_file(&path),
        _ => Error::io(error, "opening the parent (a regular file, not a link)").in_file(&path),
    })?;
    check_identity(link, &newest_header(&*file)?).map_err(|error| error.in_file(&path))?;
    let sealed = Sealed::open(file)?;
    // The file could have been replaced between the two looks; the lock holds from here on.
    check_identity(link, sealed.header()).map_err(|error| error.in_file(&path))?;
    Ok(sealed)
}

fn check_identity(link: &ParentLink, header: &Header) -> Result<()> {
    match header.identity() {
        Some(identity) if identity == link.identity => Ok(()),
        Some(identity) => Err(Error::new(
            ErrorKind::ParentMismatch,
            format!("is {identity}, but the child stands on {}", link.identity),
        )),
        None => Err(Error::new(
            ErrorKind::ParentMismatch,
            format!("is not frozen, but the child stands on {}", link.identity),
        )),
    }
}

/// A child can't show more of its parent than there is.
pub(super) fn check_visible_size(child: &Sealed, parent: &Sealed) -> Result<()> {
    check_visible(child.header(), parent.header().virtual_size)
        .map_err(|error| error.in_file(child.file().path()))
}

pub(super) fn check_visible(child: &Header, parent_size: u64) -> Result<()> {
    if child.visible_parent_size > parent_size {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "shows {} bytes of its parent, which has only {parent_size}",
                child.visible_parent_size
            ),
        ));
    }
    Ok(())
}

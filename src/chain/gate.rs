//! The parent gate: where a layer's parent may be looked for, and what is accepted there
//! (`format-spec.md`, "Parent link").

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};

use super::layer::Layer;
use super::stack::Stack;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::ParentLink;
use crate::live::{Sealed, newest_header};
use crate::packed::Packed;
use crate::storage::{Access, Folder};
use crate::sync::{Mutex, guard};
use crate::types::{Identity, Root};

/// Most layers in a chain.
pub const MAX_DEPTH: usize = 1024;

/// A sealed layer and the folder it was found in, where its own parent is looked for first.
pub(super) struct Found {
    pub layer: Layer,
    pub folder: Arc<dyn Folder>,
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.layer.fmt(f)
    }
}

/// Layers that are in no folder here: the last place of the parent gate. It is asked for an identity
/// alone; nothing else that stands in a header gets to it.
pub trait Afar: Send + Sync + fmt::Debug {
    /// What it is called in messages.
    fn name(&self) -> String;

    /// The packed layer with this root; none where it has no such layer.
    ///
    /// # Errors
    /// Those of [`Packed::open_far`], and whatever keeps it from knowing.
    fn find(&self, root: Root) -> Result<Option<Packed>>;
}

/// The places where parents are looked for beside the child's own folder, and the layers that are
/// open: each is opened once, however many chains stand on it.
#[derive(Debug, Default)]
pub struct Gate {
    folders: Vec<Arc<dyn Folder>>,
    afar: Option<Arc<dyn Afar>>,
    layers: Mutex<HashMap<Identity, Weak<Found>>>,
    stacks: Mutex<HashMap<Identity, Weak<Stack>>>,
}

impl Gate {
    /// Looks in `folders`, in that order, after the child's own.
    pub fn new(folders: Vec<Arc<dyn Folder>>) -> Self {
        Self { folders, ..Self::default() }
    }

    /// Asks `afar` where no folder has the parent.
    #[must_use]
    pub fn with_afar(self, afar: Arc<dyn Afar>) -> Self {
        Self { afar: Some(afar), ..self }
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
                let path = layer.layer.path();
                let error = Error::new(ErrorKind::Corrupt, "the layer is its own ancestor");
                return Err(error.in_file(path));
            }
            if let Some(child) = found.last() {
                check_visible(child.layer.visible_parent_size(), layer.layer.virtual_size())
                    .map_err(|error| error.in_file(child.layer.path()))?;
            }
            next = layer.layer.parent().cloned().map(|link| (link, layer.folder.clone()));
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
        let folders = || std::iter::once(folder).chain(&self.folders);
        let found = folders().map(|folder| (open_parent(link, &**folder), folder));
        let afar = self.afar.iter().map(|afar| (find_afar(link, &**afar), folder));
        let mut refused = None;
        for (opened, folder) in found.chain(afar) {
            match opened {
                Ok(layer) => {
                    let layer = Arc::new(Found { layer, folder: folder.clone() });
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
            let places = folders().map(|folder| folder.path().display().to_string());
            let places = places.chain(self.afar.iter().map(|afar| afar.name()));
            let places = places.collect::<Vec<_>>().join(", ");
            let detail = format!("parent {:?} ({}) is not in {places}", link.hint, link.identity);
            Error::new(ErrorKind::NotFound, detail)
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
fn open_parent(link: &ParentLink, folder: &dyn Folder) -> Result<Layer> {
    let path = folder.path().join(&link.hint);
    let file = folder.open(&link.hint, Access::Read).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::io(error, "opening the parent").in_file(&path),
        _ => Error::io(error, "opening the parent (a regular file, not a link)").in_file(&path),
    })?;
    let layer = if Packed::is_packed(&*file)? {
        Layer::Packed(Packed::open(file)?)
    } else {
        // Looked at without a lock first: somebody else's layer may be in use, which is no news.
        let identity = newest_header(&*file)?.identity();
        check_identity(link, identity).map_err(|error| error.in_file(&path))?;
        Layer::Live(Sealed::open(file)?)
    };
    // The file could have been replaced between the two looks; the lock holds from here on.
    check_identity(link, layer.identity()).map_err(|error| error.in_file(&path))?;
    Ok(layer)
}

/// The layer that the link's identity names, from afar.
fn find_afar(link: &ParentLink, afar: &dyn Afar) -> Result<Layer> {
    let missing = || Error::new(ErrorKind::NotFound, format!("not in {}", afar.name()));
    let Identity::Packed(root) = link.identity else { return Err(missing()) };
    let layer = Layer::Packed(afar.find(root)?.ok_or_else(missing)?);
    check_identity(link, layer.identity()).map_err(|error| error.in_file(layer.path()))?;
    Ok(layer)
}

fn check_identity(link: &ParentLink, identity: Option<Identity>) -> Result<()> {
    match identity {
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
pub(super) fn check_visible(visible_parent_size: u64, parent_size: u64) -> Result<()> {
    if visible_parent_size > parent_size {
        let detail = format!(
            "shows {visible_parent_size} bytes of its parent, which has only {parent_size}"
        );
        return Err(Error::new(ErrorKind::Corrupt, detail));
    }
    Ok(())
}

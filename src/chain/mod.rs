//! The stack of layers as one block device: newest-first reads, copy-up and snapshots.
//!
//! A [`Chain`] is a top layer, writable or not, over a [`Stack`] of sealed ones. Invariants:
//! - only the top is ever written, and only by this object, under its exclusive lock;
//! - what a layer shows of those below it ends at its visible parent size, to the byte.

mod device;
mod gate;
mod layer;
mod map;
mod owners;
mod setup;
mod share;
mod snapshot;
mod stack;
mod still;
mod walk;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Header, ParentLink};
use crate::live::{Keeper, Kept, Writable, newest_header, survivors};
use crate::packed::Packed;
use crate::storage::{Access, Folder, Rights, Storage, open_in, sync_folder};
use crate::sync::{RwLock, RwLockReadGuard};
use crate::types::Identity;
use gate::{Found, check_visible};
use snapshot::CutOff;
use stack::View;

pub use gate::{Afar, Gate, MAX_DEPTH};
pub use layer::Layer;
pub use map::{Kind, MapExtent};
pub(crate) use owners::shown;
pub use setup::{Parent, create, finish_snapshot, seal};
pub use share::Stored;
pub use stack::Stack;

/// An open chain: a [`crate::device::Device`].
#[derive(Debug)]
pub struct Chain {
    folder: Arc<dyn Folder>,
    name: String,
    layers: Arc<Gate>,
    read_only: bool,
    /// Keeps the top beyond the end of this process.
    keeper: Option<Arc<dyn Keeper>>,
    /// Taken for writing only where the layers themselves change: snapshot, resize, relink, close.
    state: RwLock<Levels>,
}

/// The layers, and how much of the stack shows.
#[derive(Debug)]
struct Levels {
    /// The layer that takes writes; without one the chain is read-only.
    top: Option<Writable>,
    stack: Option<Arc<Stack>>,
    clip: u64,
    size: u64,
}

impl Levels {
    fn view(&self) -> View<'_> {
        View { stack: self.stack.as_deref(), clip: self.clip }
    }

    /// The layers of a chain that nobody writes.
    fn sealed(&self) -> Option<&Arc<Stack>> {
        self.stack.as_ref().filter(|_| self.top.is_none())
    }

    /// The files of all layers, newest first; none for one that is far away.
    fn files(&self) -> impl Iterator<Item = Option<&dyn Storage>> {
        let top = self.top.iter().map(|top| Some(top.file()));
        top.chain(self.stack.iter().flat_map(|stack| stack.layers()).map(Layer::file))
    }

    fn top(&self) -> Result<&Writable> {
        self.top.as_ref().ok_or_else(|| not_writable(self.stack.as_deref()))
    }

    fn top_mut(&mut self) -> Result<&mut Writable> {
        self.top.as_mut().ok_or_else(|| not_writable(self.stack.as_deref()))
    }

    fn read_only(stack: Arc<Stack>) -> Self {
        let size = stack.virtual_size();
        Self { top: None, stack: Some(stack), clip: size, size }
    }

    fn writable(top: Writable, stack: Option<Arc<Stack>>) -> Self {
        let header = top.header();
        Self { top: Some(top), stack, clip: header.visible_parent_size, size: header.virtual_size }
    }
}

fn not_writable(stack: Option<&Stack>) -> Error {
    let error = Error::new(ErrorKind::ReadOnly, "not open for writing");
    match stack.and_then(|stack| stack.layers().next()) {
        Some(layer) => error.in_file(layer.path()),
        None => error,
    }
}

impl Chain {
    /// Opens the layer `name` in `folder` with all its ancestors. For [`Access::Write`] the layer
    /// is locked and recovered; for [`Access::Read`] nothing is changed.
    ///
    /// A frozen layer with the new top of an interrupted snapshot beside it is opened for writing
    /// by finishing that snapshot.
    ///
    /// # Errors
    /// Those of [`Gate::stack`], [`Writable::open`] and [`Layer::open`];
    /// [`ErrorKind::ReadOnly`] for writing to a packed layer.
    pub fn open(
        folder: Arc<dyn Folder>,
        name: &str,
        access: Access,
        layers: Arc<Gate>,
    ) -> Result<Self> {
        let levels = match access {
            Access::Read => sealed_levels(&folder, name, Some(&layers))?,
            Access::Write => open_writable(&folder, name, &layers, None)?,
        };
        Ok(Self::new(folder, name, layers, levels, None))
    }

    /// Opens the layer for writing, with a keeper of all that its writer leaves when it dies. Where
    /// the keeper has something of an earlier writer, this one goes on with it: nobody who was
    /// answered sees that there was a gap.
    ///
    /// # Errors
    /// As [`Chain::open`] and [`survivors`]; [`ErrorKind::InvalidInput`] where what is kept is
    /// another disk's.
    pub fn open_kept(
        folder: Arc<dyn Folder>,
        name: &str,
        layers: Arc<Gate>,
        keeper: Arc<dyn Keeper>,
    ) -> Result<Self> {
        let levels = open_writable(&folder, name, &layers, Some(&*keeper))?;
        Ok(Self::new(folder, name, layers, levels, Some(keeper)))
    }

    fn new(
        folder: Arc<dyn Folder>,
        name: &str,
        layers: Arc<Gate>,
        levels: Levels,
        keeper: Option<Arc<dyn Keeper>>,
    ) -> Self {
        let (name, read_only) = (name.to_owned(), levels.top.is_none());
        Self { folder, name, layers, read_only, keeper, state: RwLock::new(levels) }
    }

    fn levels(&self) -> RwLockReadGuard<'_, Levels> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The files of all layers, newest first.
    pub fn paths(&self) -> Vec<PathBuf> {
        let levels = self.levels();
        let top = levels.top.iter().map(|top| top.file().path());
        let sealed = levels.stack.iter().flat_map(|stack| stack.layers()).map(Layer::path);
        top.chain(sealed).map(Path::to_owned).collect()
    }

    /// The rights of a file that holds bytes of the newest `depth` layers: whoever one of them keeps
    /// out is kept out.
    ///
    /// # Errors
    /// Host errors.
    pub fn copy_rights(&self, depth: usize) -> Result<Rights> {
        Rights::of_copy(self.levels().files().take(depth).flatten())
            .map_err(|error| Error::io(error, "looking at the layers' modes"))
    }

    /// The rights of a file that takes the newest layer's place.
    #[cfg(feature = "store")]
    pub(crate) fn successor_rights(&self) -> Result<Rights> {
        let levels = self.levels();
        levels
            .files()
            .next()
            .flatten()
            .map_or(Ok(Rights::Usual), Rights::of_successor)
            .map_err(|error| Error::io(error, "looking at the layer's owner"))
    }

    /// Changes the virtual size of the top.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a smaller size without `shrink`; those of
    /// [`Writable::resize`].
    pub fn resize(&self, size: u64, shrink: bool) -> Result<()> {
        let mut levels = self.state.write().unwrap_or_else(PoisonError::into_inner);
        levels.top()?;
        if size < levels.size && !shrink {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{size} bytes would cut off data of {}; shrinking must be asked for",
                    levels.size
                ),
            ));
        }
        let top = levels.top_mut()?;
        top.resize(size)?;
        let header = top.header();
        levels.clip = header.visible_parent_size;
        levels.size = header.virtual_size;
        Ok(())
    }

    /// Stands the top, which stands on `from`, on another parent that reads the same, as far as
    /// `from` shows. Both must stay until this has returned, also after an error.
    ///
    /// # Errors
    /// [`ErrorKind::ParentMismatch`] where it stands on something else by now; those of
    /// [`Gate::stack`] and [`Writable::relink`].
    pub fn relink(&self, from: Identity, parent: &ParentLink) -> Result<()> {
        let mut levels = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let stack = self.layers.stack(parent, &self.folder)?;
        let top = levels.top_mut()?;
        let header = top.header();
        if header.parent.as_ref().map(|link| link.identity) != Some(from) {
            let detail = format!("doesn't stand on {from} any more");
            return Err(Error::new(ErrorKind::ParentMismatch, detail).in_file(top.file().path()));
        }
        check_visible(header.visible_parent_size, stack.virtual_size())?;
        top.relink(parent)?;
        levels.stack = Some(stack);
        Ok(())
    }

    /// Makes everything durable and the layer cleanly closed. Afterwards the device is empty.
    pub fn close(&self) -> Result<()> {
        let mut levels = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let closed = Levels { top: None, stack: None, clip: 0, size: 0 };
        std::mem::replace(&mut *levels, closed).top.map_or(Ok(()), Writable::close)
    }
}

/// The stack below a layer with this parent; checks what it shows of it.
fn stack_below(
    parent: Option<&ParentLink>,
    visible_parent_size: u64,
    folder: &Arc<dyn Folder>,
    layers: &Gate,
) -> Result<Option<Arc<Stack>>> {
    let Some(link) = parent else { return Ok(None) };
    let stack = layers.stack(link, folder)?;
    check_visible(visible_parent_size, stack.virtual_size())?;
    if stack.layers().len() == MAX_DEPTH {
        return Err(Error::new(
            ErrorKind::Limit,
            format!("a chain of more than {MAX_DEPTH} layers"),
        ));
    }
    Ok(Some(stack))
}

/// The levels of a layer that is only read, on what `layers` finds below it, or alone.
fn sealed_levels(folder: &Arc<dyn Folder>, name: &str, layers: Option<&Gate>) -> Result<Levels> {
    let path = folder.path().join(name);
    let layer = Layer::open(open_in(&**folder, name, Access::Read)?)?;
    let below = match layers {
        Some(layers) => stack_below(layer.parent(), layer.visible_parent_size(), folder, layers)
            .map_err(|error| error.in_file(path))?,
        None => None,
    };
    let mut found = vec![Arc::new(Found { layer, folder: folder.clone() })];
    found.extend(below.iter().flat_map(|stack| stack.found().iter().cloned()));
    Ok(Levels::read_only(Arc::new(Stack::new(found))))
}

fn is(kept: &Kept, header: &Header) -> Result<bool> {
    Ok(newest_header(&*kept.file)?.uuid == header.uuid)
}

/// The layer with this header out of those that are kept, of which the others are let go: a new top
/// that never came to mean anything, or what a snapshot has frozen.
fn take(held: Vec<Kept>, header: &Header, path: &Path) -> Result<Option<Kept>> {
    let mut taken = None;
    let mut others = Vec::new();
    for kept in held {
        match is(&kept, header)? {
            true => taken = Some(kept),
            false => others.push(kept),
        }
    }
    if taken.is_none() && !others.is_empty() {
        let detail = "is not the layer that an earlier writer left open";
        return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(path));
    }
    others.iter().for_each(|kept| kept.fresh.release());
    Ok(taken)
}

fn open_writable(
    folder: &Arc<dyn Folder>,
    name: &str,
    layers: &Gate,
    keeper: Option<&dyn Keeper>,
) -> Result<Levels> {
    let held = keeper.map_or(Ok(Vec::new()), survivors)?;
    let path = folder.path().join(name);
    let mut file = open_in(&**folder, name, Access::Write)?;
    if Packed::is_packed(&*file)? {
        let error = Error::new(ErrorKind::ReadOnly, "a packed layer never changes");
        return Err(error.in_file(path));
    }
    let mut header = newest_header(&*file)?;
    if header.is_frozen()
        && snapshot::finish(&**folder, name, header.identity(), &held)? == CutOff::Finished
    {
        file = open_in(&**folder, name, Access::Write)?;
        header = newest_header(&*file)?;
    }
    let kept = take(held, &header, &path)?;
    // The parents come first: a layer that can't be read shall not be marked as in use.
    let below = header.parent.clone();
    let mut stack = stack_below(below.as_ref(), header.visible_parent_size, folder, layers)
        .map_err(|error| error.in_file(&path))?;
    // A killed process may have given the file this name in memory alone.
    sync_folder(&**folder)?;
    let top = match kept {
        Some(kept) => Writable::go_on(kept)?,
        None => match Writable::open_for(file.clone(), keeper) {
            // By somebody's snapshot since it was looked at: the name leads to the new top now.
            Err(_) if !header.is_frozen() && newest_header(&*file).is_ok_and(|h| h.is_frozen()) => {
                // With its lock, which the new top's parent must not meet.
                drop(file);
                return open_writable(folder, name, layers, keeper);
            }
            opened => opened?,
        },
    };
    // Under the lock the header counts that is on the disk: another process may have relinked the
    // layer before, or a sync that failed have left in the cache what never came there.
    let header = top.header();
    if header.parent != below {
        let parent = header.parent.as_ref();
        stack = stack_below(parent, header.visible_parent_size, folder, layers)
            .map_err(|error| error.in_file(&path))?;
    }
    Ok(Levels::writable(top, stack))
}

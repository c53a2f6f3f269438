//! Snapshots: the writable path stays, what it held gets a name of its own
//! (`format-spec.md`, "Snapshot").

use std::io;
use std::sync::{Arc, PoisonError};

use super::gate::Found;
use super::layer::Layer;
use super::{Chain, Levels, MAX_DEPTH, Parent, Stack, is};
use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::JOURNAL_OFFSET;
use crate::format::header::ParentLink;
use crate::live::{self, Kept, NewLayer, Writable, durable_header, newest_header};
use crate::storage::{
    self, Access, Folder, Lock, Rights, Storage, copy_range, find_in, open_in, sync_folder,
    take_lock,
};
use crate::types::{FreezeId, Identity};

/// The new top's name until it takes the old one's.
fn new_top_name(name: &str) -> String {
    format!(".{name}.top")
}

/// The name of a copy of the layer `name` until it takes the snapshot's.
fn copy_name(name: &str) -> String {
    format!(".{name}.copy")
}

fn failed(folder: &dyn Folder, operation: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |error| Error::io(error, operation).in_file(folder.path())
}

/// What became of a snapshot that was cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CutOff {
    /// The name leads to the new top now.
    Finished,
    /// There was none.
    Nothing,
}

/// Finishes a snapshot that was cut off after `name` had been frozen under `identity`: its new top
/// takes the name.
///
/// The new top's lock keeps out others who would do the same; whoever gets it second finds that the
/// name has moved on.
///
/// `held` are the layers that this process has locked already.
pub(super) fn finish(
    folder: &dyn Folder,
    name: &str,
    identity: Option<Identity>,
    held: &[Kept],
) -> Result<CutOff> {
    let new_top = new_top_name(name);
    // A killed process may have left the freeze in the page cache alone. It has to be durable
    // before a name says that there is a child.
    let by_others = || {
        let now = durable_header(&*open_in(folder, name, Access::Read)?)?.identity();
        Ok(if now == identity { CutOff::Nothing } else { CutOff::Finished })
    };
    let Some(file) = find_in(folder, &new_top, Access::Write)? else { return by_others() };
    let header = newest_header(&*file)?;
    if !held.iter().any(|kept| is(kept, &header).unwrap_or(false)) {
        take_lock(&*file, Lock::Exclusive)?;
    }
    if by_others()? == CutOff::Finished {
        return Ok(CutOff::Finished);
    }
    if newest_header(&*file)?.parent.map(|link| link.identity) != identity {
        return Ok(CutOff::Nothing);
    }
    folder.rename(&new_top, name).map_err(failed(folder, "renaming the new top"))?;
    sync_folder(folder)?;
    Ok(CutOff::Finished)
}

/// Whether `name` leads to the layer that `top` writes, where links to one file don't show the same
/// number (mergerfs, unionfs-fuse): what is written by one name must show by the other. A copy of the
/// layer has its UUID too, but not what was written since.
fn is_link(top: &Writable, folder: &dyn Folder, name: &str) -> Result<bool> {
    let header = |file: &dyn Storage| newest_header(file).map(|h| (h.uuid, h.epoch, h.generation));
    let Ok(other) = open_in(folder, name, Access::Read) else { return Ok(false) };
    // Whatever can't be read is not this layer.
    if !header(&*other).is_ok_and(|(uuid, ..)| uuid == top.header().uuid) {
        return Ok(false);
    }
    top.mark()?;
    let marked = top.header();
    let Ok(other) = open_in(folder, name, Access::Read) else { return Ok(false) };
    other
        .drop_cache(0, JOURNAL_OFFSET.0)
        .map_err(|error| Error::io(error, "reading anew").in_file(other.path()))?;
    Ok(header(&*other).is_ok_and(|found| found == (marked.uuid, marked.epoch, marked.generation)))
}

/// Whether the layer has the snapshot's name, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Linked {
    Yes,
    /// It can't: here a file has one name only.
    Never,
}

/// Removes what a snapshot left that was cut off before it meant anything.
fn clear(folder: &dyn Folder, name: &str) -> Result<()> {
    match folder.remove(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed(folder, "removing what a snapshot left that was cut off")(error))
        }
        _ => Ok(()),
    }
}

/// Copies what a file holds into an empty one, holes aside.
fn copy_file(to: &dyn Storage, from: &dyn Storage) -> Result<()> {
    const PART: u64 = 1 << 20;
    let reading = |at| storage::failed(from, "reading what is to be copied", at);
    let length = from.length().map_err(reading(0))?;
    to.set_length(length).map_err(storage::failed(to, "setting the length", length))?;
    let mut at = 0;
    while let Some(data) = from.next_data(at).map_err(reading(at))? {
        let end = from.next_hole(data).map_err(reading(data))?;
        for part in (data..end).step_by(PART as usize) {
            copy_range(to, part, PART.min(end - part), from, part).map_err(storage::failed(
                to,
                "copying the layer",
                part,
            ))?;
        }
        at = end;
    }
    Ok(())
}

impl Chain {
    /// Gives the present content the name `snapshot` in the chain's folder, frozen; this chain and
    /// its name go on over it. Answers what the chain stands on now. Waits for operations under way,
    /// and holds up those that come: for as long as it takes to copy the top, where a file has one
    /// name only.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`]; [`ErrorKind::Exists`] for a name that is taken;
    /// [`ErrorKind::Limit`]; host errors. A snapshot that fails half-way is finished by the next
    /// [`Chain::open`] for writing; until then this chain may refuse writes. It never writes to what
    /// is frozen.
    pub fn snapshot(&self, snapshot: &str) -> Result<Parent> {
        let mut levels = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let below = levels.stack.as_ref().map_or(0, |stack| stack.layers().len());
        if below + 2 > MAX_DEPTH {
            let detail = format!("a chain of more than {MAX_DEPTH} layers");
            return Err(Error::new(ErrorKind::Limit, detail));
        }
        let top = levels.top()?;
        let (id, identity) = top.plan_freeze()?;
        let link = ParentLink { identity, hint: snapshot.to_owned() };
        let rights = Rights::of_successor(top.file())
            .map_err(failed(&*self.folder, "looking at the layer's owner"))?;
        let virtual_size = levels.size;
        let new_top = self.build_top(link.clone(), virtual_size, rights.clone())?;
        let linked = self.link_snapshot(top, snapshot).and_then(|linked| {
            if linked == Linked::Never {
                self.copy_snapshot(top, snapshot, id, rights)?;
            }
            Ok(linked)
        });
        let linked = linked.inspect_err(|_| {
            // They mean nothing yet; the next snapshot would replace them.
            new_top.release();
            let _ = self.folder.remove(&new_top_name(&self.name));
            let _ = self.folder.remove(&copy_name(&self.name));
        })?;

        let layer = match linked {
            Linked::Yes => Layer::Live(levels.top_mut()?.freeze(id)?),
            Linked::Never => Layer::open(open_in(&*self.folder, snapshot, Access::Read)?)?,
        };
        let found = Arc::new(Found { layer, folder: self.folder.clone() });
        let older = levels.stack.iter().flat_map(|stack| stack.found().iter().cloned());
        let stack = Arc::new(Stack::new(std::iter::once(found.clone()).chain(older).collect()));
        self.layers.adopt(identity, &found, &stack);
        let old = std::mem::replace(&mut *levels, Levels::read_only(stack.clone()));

        let name = new_top_name(&self.name);
        self.folder
            .rename(&name, &self.name)
            .map_err(failed(&*self.folder, "renaming the new top"))?;
        sync_folder(&*self.folder)?;
        if let Some(old) = &old.top {
            // Where it was copied it is not frozen, but nobody goes on with it.
            old.release();
        }
        *levels = Levels::writable(new_top, Some(stack));
        Ok(Parent { link, virtual_size, newly_frozen: true })
    }

    /// Builds the new top under its temporary name, replacing one that a crash left before it meant
    /// anything. Who may use the disk by its name goes on being able to, and nobody else.
    fn build_top(&self, link: ParentLink, virtual_size: u64, rights: Rights) -> Result<Writable> {
        let (folder, name) = (&*self.folder, new_top_name(&self.name));
        clear(folder, &name)?;
        let new = NewLayer { virtual_size, parent: Some((link, virtual_size)) };
        let file = live::create(&*folder.creating(rights), &name, &new)?;
        Writable::open_for(file, self.keeper.as_deref())
    }

    /// Links the snapshot's name to the layer, durably. A link that a crash left is as good as a new
    /// one, but it may not be durable yet either, and nor may the new top's name.
    fn link_snapshot(&self, top: &Writable, snapshot: &str) -> Result<Linked> {
        let folder = &*self.folder;
        let linked = self.name != snapshot
            && folder
                .same_file(&self.name, snapshot)
                .map_err(failed(folder, "looking at names"))?;
        if !linked {
            let link = folder.link(&self.name, snapshot);
            match link {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    return Ok(Linked::Never);
                }
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists
                        && self.name != snapshot
                        && is_link(top, folder, snapshot)? => {}
                other => other.map_err(|error| {
                    Error::io(error, "linking the snapshot").in_file(folder.path().join(snapshot))
                })?,
            }
        }
        sync_folder(folder).map(|()| Linked::Yes)
    }

    /// Gives the snapshot's name to a frozen copy of the layer, durably, in place of a link. The layer
    /// itself is never frozen: it goes with the name that the new top takes, and until then nothing
    /// stands on the copy.
    fn copy_snapshot(
        &self,
        top: &Writable,
        snapshot: &str,
        id: FreezeId,
        rights: Rights,
    ) -> Result<()> {
        let (folder, name) = (&*self.folder, copy_name(&self.name));
        clear(folder, &name)?;
        // All that a kill could leave here, a copy opens with.
        top.mark()?;
        let file = folder
            .creating(rights)
            .create(&name)
            .map_err(|error| Error::io(error, "creating the snapshot's copy"))
            .map_err(|error| error.in_file(folder.path().join(&name)))?;
        copy_file(&*file, top.file())?;
        Writable::open(file)?.freeze(id)?;
        folder.rename_new(&name, snapshot).map_err(|error| {
            Error::io(error, "naming the snapshot").in_file(folder.path().join(snapshot))
        })?;
        sync_folder(folder)
    }
}

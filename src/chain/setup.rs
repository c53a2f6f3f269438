//! Making new layers, with or without a parent.

use std::sync::Arc;

use super::Gate;
use super::snapshot::{self, CutOff};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::ParentLink;
use crate::live::{self, NewLayer, Sealed, Writable, durable_header};
use crate::packed::Packed;
use crate::storage::{Access, Folder, failed, open_in, sync_folder};

/// A layer that children may stand on.
#[derive(Clone, Debug)]
pub struct Parent {
    /// How children name it.
    pub link: ParentLink,
    /// Its virtual size in bytes.
    pub virtual_size: u64,
    /// It was frozen just now.
    pub newly_frozen: bool,
}

/// Makes sure that the layer `name` is sealed and durable, name included: a writable one is frozen
/// for ever, a packed one is sealed as it is. A snapshot that was cut off is finished first, so that
/// `name` goes on leading to what the answer says.
///
/// # Errors
/// [`ErrorKind::InUse`] where somebody writes it; those of [`Writable::open`] and
/// [`Writable::freeze`].
pub fn seal(folder: &dyn Folder, name: &str) -> Result<Parent> {
    // Whoever made or froze it may have been killed with all of that in memory alone.
    sync_folder(folder)?;
    let mut file = open_in(folder, name, Access::Read)?;
    if Packed::is_packed(&*file)? {
        file.sync_data().map_err(failed(&*file, "syncing the parent", 0))?;
        let layer = Packed::open(file)?;
        return Ok(Parent {
            link: ParentLink { identity: layer.identity(), hint: name.to_owned() },
            virtual_size: layer.header().virtual_size,
            newly_frozen: false,
        });
    }
    let mut header = durable_header(&*file)?;
    if header.is_frozen()
        && snapshot::finish(folder, name, header.identity(), &[])? == CutOff::Finished
    {
        file = open_in(folder, name, Access::Read)?;
        header = durable_header(&*file)?;
    }
    let newly_frozen = !header.is_frozen();
    let sealed = if newly_frozen {
        let mut layer = Writable::open(open_in(folder, name, Access::Write)?)?;
        let (id, _) = layer.plan_freeze()?;
        layer.freeze(id)?
    } else {
        Sealed::open(file)?
    };
    let header = sealed.header();
    let identity = header.identity().ok_or_else(|| {
        let error =
            Error::new(ErrorKind::InUse, "the layer was replaced while it was being frozen");
        error.in_file(sealed.file().path())
    })?;
    Ok(Parent {
        link: ParentLink { identity, hint: name.to_owned() },
        virtual_size: header.virtual_size,
        newly_frozen,
    })
}

/// Finishes a snapshot of the live layer `name` that was cut off after the layer had been frozen, as
/// opening it for writing does.
///
/// # Errors
/// [`ErrorKind::InUse`] where somebody is making it just now; host errors.
pub fn finish_snapshot(folder: &dyn Folder, name: &str) -> Result<()> {
    let header = durable_header(&*open_in(folder, name, Access::Read)?)?;
    if header.is_frozen() {
        snapshot::finish(folder, name, header.identity(), &[])?;
    }
    Ok(())
}

/// Creates the layer `name` in `folder`, cleanly closed and durable, name included. The size may be
/// left out where there is a parent.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a size that cannot be or none at all; [`ErrorKind::Exists`];
/// where the parent can't be found from `folder`, what [`Gate::stack`] says: then nothing is
/// created.
pub fn create(
    folder: &Arc<dyn Folder>,
    name: &str,
    virtual_size: Option<u64>,
    parent: Option<&Parent>,
    layers: &Gate,
) -> Result<()> {
    let Some(virtual_size) = virtual_size.or(parent.map(|parent| parent.virtual_size)) else {
        return Err(Error::new(ErrorKind::InvalidInput, "a layer without a parent needs a size"));
    };
    if let Some(parent) = parent {
        layers.stack(&parent.link, folder)?;
    }
    let parent = parent.map(|parent| (parent.link.clone(), parent.virtual_size));
    live::create(&**folder, name, &NewLayer { virtual_size, parent })?;
    sync_folder(&**folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::State;
    use crate::storage::MemoryFolder;

    /// A layer `a` with all of a snapshot but its last step, and what its name led to.
    fn cut_off() -> (Arc<dyn Folder>, Parent) {
        let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("m"));
        create(&folder, "a", Some(8192), None, &Gate::default()).unwrap();
        folder.link("a", "snap").unwrap();
        let frozen = seal(&*folder, "snap").unwrap();
        let parent = Some((frozen.link.clone(), 8192));
        live::create(&*folder, ".a.top", &NewLayer { virtual_size: 8192, parent }).unwrap();
        (folder, frozen)
    }

    #[test]
    fn a_parent_whose_snapshot_was_cut_off_gets_it_finished_first() {
        let (folder, frozen) = cut_off();
        let parent = seal(&*folder, "a").unwrap();
        assert_ne!(parent.link.identity, frozen.link.identity, "the name leads to the new top");
        create(&folder, "child", None, Some(&parent), &Gate::default()).unwrap();
    }

    #[test]
    fn a_snapshot_that_was_cut_off_is_finished_without_opening_what_is_new() {
        let (folder, _) = cut_off();
        finish_snapshot(&*folder, "a").unwrap();
        let header = durable_header(&*open_in(&*folder, "a", Access::Read).unwrap()).unwrap();
        assert_eq!(header.state, State::Writable);
        finish_snapshot(&*folder, "a").unwrap();
        assert!(folder.open(".a.top", Access::Read).is_err());
    }
}

//! Making a layer file.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::{SLOT_OFFSETS, file_length, is_virtual_size};
use crate::format::header::{Header, ParentLink, State, check_hint};
use crate::storage::{Folder, Storage, failed, write_all_at};
use crate::types::Uuid;

/// What a new layer shall be.
#[derive(Clone, Debug)]
pub struct NewLayer {
    /// Size of the device: a positive multiple of 512 bytes.
    pub virtual_size: u64,
    /// The layer below and its virtual size.
    pub parent: Option<(ParentLink, u64)>,
}

/// 16 bytes from the system's random source, for an identity.
pub fn random() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::io(error.into(), "drawing random bytes for an identity"))?;
    Ok(bytes)
}

/// Creates the file `name`, cleanly closed and durable but for its name: the caller syncs the
/// folder. The file costs two blocks; a file that can't be completed is removed.
///
/// # Errors
/// [`ErrorKind::Exists`]; [`ErrorKind::InvalidInput`] for a size or hint that cannot be; host
/// errors.
pub fn create(folder: &dyn Folder, name: &str, new: &NewLayer) -> Result<Arc<dyn Storage>> {
    let path = folder.path().join(name);
    let invalid = |detail| Err(Error::new(ErrorKind::InvalidInput, detail).in_file(&path));
    if !is_virtual_size(new.virtual_size) {
        return invalid(format!(
            "virtual size {}, expected a positive multiple of 512 up to 2^56",
            new.virtual_size
        ));
    }
    let parent = new.parent.as_ref();
    if let Some((link, _)) = parent
        && check_hint(&link.hint).is_err()
    {
        return invalid(format!("the parent's file name {:?} can't be a hint", link.hint));
    }
    let header = Header {
        uuid: Uuid(random()?),
        generation: 1,
        state: State::Writable,
        epoch: 0,
        journal_tail: 0,
        virtual_size: new.virtual_size,
        visible_parent_size: parent.map_or(0, |(_, size)| *size.min(&new.virtual_size)),
        parent: parent.map(|(link, _)| link.clone()),
        compatible: 0,
        read_only_compatible: 0,
        extensions: Vec::new(),
    };
    let file = folder
        .create(name)
        .map_err(|error| Error::io(error, "creating the file").in_file(&path))?;
    write_slots(&*file, header).inspect_err(|_| {
        // The error that matters is the first one; a half-made file without a header is refused
        // by every open, should the removal fail as well.
        let _ = folder.remove(name);
    })?;
    Ok(file)
}

fn write_slots(file: &dyn Storage, mut header: Header) -> Result<()> {
    file.set_length(file_length(header.virtual_size)).map_err(failed(
        file,
        "setting the length",
        file_length(header.virtual_size),
    ))?;
    for (slot, offset) in SLOT_OFFSETS.into_iter().enumerate() {
        write_all_at(file, &*header.encode(slot), offset.0).map_err(failed(
            file,
            "writing a header slot",
            offset.0,
        ))?;
        header.generation += 1;
    }
    file.sync_data().map_err(failed(file, "syncing the new file", 0))
}

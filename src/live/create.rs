//! Making a layer file.

use std::io;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::{JOURNAL_OFFSET, SLOT_OFFSETS, file_length, is_virtual_size};
use crate::format::header::{Header, ParentLink, SlotBytes, State, check_hint, has_magic};
use crate::storage::{Folder, Storage, failed, read_exact_at, write_all_at};
use crate::types::{BLOCK_SIZE, Uuid};

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

/// Whether a file is what [`create`] makes, or a part of it: no writer has had it, and it owns no
/// block.
pub fn is_untouched(file: &dyn Storage) -> Result<bool> {
    let length = file.length().map_err(failed(file, "reading the length", 0))?;
    for (slot, offset) in SLOT_OFFSETS.into_iter().enumerate() {
        let mut bytes: Box<SlotBytes> = Box::new([0; BLOCK_SIZE as usize]);
        if length <= offset.0 {
            break;
        }
        match read_exact_at(file, &mut *bytes, offset.0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            read => read.map_err(failed(file, "reading a header slot", offset.0))?,
        }
        let begun = has_magic(&bytes) || bytes.iter().take(8).all(|byte| *byte == 0);
        let fresh = |header: &Header| header.epoch == 0 && header.state == State::Writable;
        if !begun || !Header::decode(slot, &bytes).is_ok_and(|found| found.iter().all(fresh)) {
            return Ok(false);
        }
    }
    is_zero_from(file, JOURNAL_OFFSET.0, length)
}

/// Whether all bytes from `at` to the end are zeros.
fn is_zero_from(file: &dyn Storage, mut at: u64, length: u64) -> Result<bool> {
    let mut buffer = vec![0; 64 << 10];
    while let Some(data) = file.next_data(at).map_err(failed(file, "looking for data", at))? {
        let part = length.saturating_sub(data).min(buffer.len() as u64);
        let bytes = buffer.get_mut(..part as usize).unwrap_or_default();
        if bytes.is_empty() {
            break;
        }
        read_exact_at(file, &mut *bytes, data).map_err(failed(file, "reading", data))?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at = data + part;
    }
    Ok(true)
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

//! The two header slots of a file: which one counts, and replacing the older one.

use std::io;

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::{JOURNAL_OFFSET, SLOT_OFFSETS, file_length};
use crate::format::header::{Header, SlotBytes, has_magic};
use crate::planted::{Bug, planted};
use crate::storage::{Storage, failed, read_exact_at, write_all_at};
use crate::types::BLOCK_SIZE;

/// The header that counts, and where it stands.
#[derive(Debug)]
pub(super) struct Slots {
    pub header: Header,
    newest: usize,
}

/// Both slots as they stand; `None` for one whose checksum does not hold.
///
/// # Errors
/// [`ErrorKind::NotAnImage`] where neither slot begins with the magic; what [`Header::decode`]
/// refuses; host errors.
pub fn read_slots(file: &dyn Storage) -> Result<[Option<Header>; 2]> {
    let mut headers = [None, None];
    let mut magic = false;
    for (slot, offset) in SLOT_OFFSETS.into_iter().enumerate() {
        let mut bytes: Box<SlotBytes> = Box::new([0; BLOCK_SIZE as usize]);
        match read_exact_at(file, &mut *bytes, offset.0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
            read => read.map_err(failed(file, "reading a header slot", offset.0))?,
        }
        magic |= has_magic(&bytes);
        headers[slot] = Header::decode(slot, &bytes)
            .map_err(|error| error.at(offset.0).in_file(file.path()))?;
    }
    if !magic {
        let error =
            Error::new(ErrorKind::NotAnImage, "not a thinply layer: no magic in either slot");
        return Err(error.in_file(file.path()));
    }
    Ok(headers)
}

/// The header that counts on the disk: what a killed process left in the page cache alone is synced
/// first, and what a failed sync left there as if it were clean is forgotten.
///
/// # Errors
/// As [`newest_header`].
pub fn durable_header(file: &dyn Storage) -> Result<Header> {
    Ok(Slots::read_durable(file)?.header)
}

/// The header that counts.
///
/// # Errors
/// As [`read_slots`]; [`ErrorKind::Corrupt`] where no slot holds, the two contradict each other, or
/// the file is shorter than the header says.
pub fn newest_header(file: &dyn Storage) -> Result<Header> {
    Ok(Slots::read(file)?.header)
}

impl Slots {
    /// As [`Slots::read`], for what [`durable_header`] says.
    pub fn read_durable(file: &dyn Storage) -> Result<Self> {
        file.sync_data().map_err(failed(file, "syncing the header", 0))?;
        file.drop_cache(0, JOURNAL_OFFSET.0).map_err(failed(file, "dropping cached pages", 0))?;
        Self::read(file)
    }

    pub fn read(file: &dyn Storage) -> Result<Self> {
        let corrupt = |detail: String| Error::new(ErrorKind::Corrupt, detail).in_file(file.path());
        let slots = match read_slots(file)? {
            [Some(a), Some(b)] => {
                if a.uuid != b.uuid || a.generation == b.generation {
                    return Err(corrupt(format!(
                        "header slots contradict each other: {} generation {} and {} generation {}",
                        a.uuid, a.generation, b.uuid, b.generation
                    )));
                }
                let newest = usize::from(b.generation > a.generation);
                Self { header: if newest == 0 { a } else { b }, newest }
            }
            [Some(header), None] => Self { header, newest: 0 },
            [None, Some(header)] => Self { header, newest: 1 },
            [None, None] => {
                return Err(corrupt("neither header slot has the checksum it should have".into()));
            }
        };
        let length = file.length().map_err(failed(file, "reading the length", 0))?;
        let expected = file_length(slots.header.virtual_size);
        if length < expected {
            return Err(corrupt(format!("file of {length} bytes, expected {expected}")).at(length));
        }
        Ok(slots)
    }

    fn older(&self) -> usize {
        if planted(Bug::NewestSlotOverwritten) { self.newest } else { 1 - self.newest }
    }

    /// Writes `header` with the next generation over the older slot; not synced. The old header
    /// counts until that sync returns, so `self` changes only in [`Slots::adopt`].
    pub fn write_older(&self, file: &dyn Storage, header: &Header) -> Result<()> {
        let slot = self.older();
        let next = Header { generation: self.header.generation + 1, ..header.clone() };
        let offset = SLOT_OFFSETS[slot].0;
        write_all_at(file, &*next.encode(slot), offset).map_err(failed(
            file,
            "writing a header slot",
            offset,
        ))
    }

    /// The header that [`Slots::write_older`] wrote is durable.
    pub fn adopt(&mut self, header: Header) {
        self.newest = self.older();
        self.header = Header { generation: self.header.generation + 1, ..header };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::{NewLayer, create};
    use crate::storage::MemoryFolder;
    use crate::types::Uuid;

    #[test]
    fn a_slot_is_read_where_the_file_has_all_of_it() {
        let folder = MemoryFolder::new("m");
        let file = create(&folder, "a", &NewLayer { virtual_size: 4096, parent: None }).unwrap();
        let end = SLOT_OFFSETS.map(|offset| offset.0 + BLOCK_SIZE);
        for (length, expected) in
            [(end[1], [true; 2]), (end[1] - 1, [true, false]), (end[0], [true, false])]
        {
            file.set_length(length).unwrap();
            let slots = read_slots(&*file).unwrap();
            assert_eq!(slots.map(|slot| slot.is_some()), expected, "{length} bytes");
        }
        file.set_length(end[0] - 1).unwrap();
        assert_eq!(read_slots(&*file).unwrap_err().kind(), ErrorKind::NotAnImage);
    }

    #[test]
    fn slots_of_two_layers_or_of_one_generation_are_corrupt() {
        let folder = MemoryFolder::new("m");
        let file = create(&folder, "a", &NewLayer { virtual_size: 4096, parent: None }).unwrap();
        let header = newest_header(&*file).unwrap();
        for wrong in [
            Header { uuid: Uuid([1; 16]), ..header.clone() },
            Header { generation: header.generation - 1, ..header.clone() },
        ] {
            write_all_at(&*file, &*wrong.encode(1), SLOT_OFFSETS[1].0).unwrap();
            assert_eq!(newest_header(&*file).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        write_all_at(&*file, &*header.encode(1), SLOT_OFFSETS[1].0).unwrap();
        assert_eq!(newest_header(&*file).unwrap(), header);
    }
}

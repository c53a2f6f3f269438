//! The journal ring of a file: reading all of it, and appending to it.

use crate::error::Result;
use crate::format::geometry::{JOURNAL_OFFSET, JOURNAL_RECORDS, record_offset};
use crate::format::header::Header;
use crate::format::journal::{Record, RecordBytes, Slot, decode, encode};
use crate::planted::{Bug, planted};
use crate::storage::{Storage, allocate_ahead, failed, read_exact_at, write_all_at};
use crate::types::{BLOCK_SIZE, Uuid};

/// Records for which space is allocated at a time.
const AHEAD: u64 = 4;

/// One place of the ring: its number and what it holds.
pub type RingSlot = (u64, Slot);

/// The places of the ring that hold anything, in order.
///
/// # Errors
/// Host errors; [`crate::error::ErrorKind::Corrupt`] for a record that cannot be.
pub fn read_ring(file: &dyn Storage, header: &Header) -> Result<Vec<RingSlot>> {
    let (start, size) = (JOURNAL_OFFSET.0, JOURNAL_RECORDS * BLOCK_SIZE);
    let mut found = Vec::new();
    let mut at = start;
    loop {
        let data = file.next_data(at).map_err(failed(file, "looking for the journal", at))?;
        let Some(data) = data.filter(|&data| data < start + size) else { return Ok(found) };
        let number = (data - start) / BLOCK_SIZE;
        at = start + number * BLOCK_SIZE;
        let mut bytes: Box<RecordBytes> = Box::new([0; BLOCK_SIZE as usize]);
        read_exact_at(file, &mut *bytes, at).map_err(failed(file, "reading the journal", at))?;
        let slot =
            decode(header.uuid, &bytes).map_err(|error| error.at(at).in_file(file.path()))?;
        if slot != Slot::Empty {
            found.push((number, slot));
        }
        at += BLOCK_SIZE;
    }
}

/// The writing end of the ring. Only the committer has it, so records are appended one at a time.
#[derive(Debug)]
pub(super) struct Journal {
    pub epoch: u64,
    /// Sequence number of the next record.
    pub next: u64,
    /// First record that recovery would need, as the durable header says.
    pub tail: u64,
    /// Space is allocated up to this sequence number.
    allocated: u64,
}

impl Journal {
    pub fn new(epoch: u64, next: u64) -> Self {
        Self { epoch, next, tail: next, allocated: next }
    }

    /// Whether the ring has a place that no longer counts.
    pub fn has_room(&self) -> bool {
        self.next - self.tail < JOURNAL_RECORDS
    }

    /// Writes `record` at its place; not synced. `self` changes only in [`Journal::advance`], so a
    /// record that failed is written again at the same place.
    pub fn write(&mut self, file: &dyn Storage, uuid: Uuid, record: &Record) -> Result<()> {
        let offset = record_offset(record.sequence).0;
        if self.next >= self.allocated {
            let end = JOURNAL_OFFSET.0 + JOURNAL_RECORDS * BLOCK_SIZE;
            let length = (AHEAD * BLOCK_SIZE).min(end - offset);
            allocate_ahead(file, offset, length).map_err(failed(
                file,
                "allocating the journal",
                offset,
            ))?;
            self.allocated = self.next + length / BLOCK_SIZE;
        }
        write_all_at(file, &*encode(uuid, record), offset).map_err(failed(
            file,
            "writing a journal record",
            offset,
        ))
    }

    /// The record written last is durable.
    pub fn advance(&mut self) {
        self.next += 1;
    }

    /// Where the tail goes once all records are in the bitmap pages: one beyond the next record, so
    /// that an attempt at that one which failed but reached the disk can't count later.
    pub fn new_tail(&self) -> u64 {
        self.next + u64::from(!planted(Bug::FailedAttemptKeepsItsNumber))
    }

    /// A header with the tail at `tail`, from [`Journal::new_tail`], is durable.
    pub fn move_tail(&mut self, tail: u64) {
        (self.next, self.tail) = (tail, tail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::{NewLayer, create, newest_header};
    use crate::storage::MemoryFolder;

    #[test]
    fn only_the_places_of_the_ring_are_read() {
        let folder = MemoryFolder::new("m");
        let file = create(&folder, "a", &NewLayer { virtual_size: 4096, parent: None }).unwrap();
        let header = newest_header(&*file).unwrap();
        let record = |sequence| Record { epoch: 1, sequence, entries: Vec::new() };
        let put = |place: u64, sequence| {
            let offset = JOURNAL_OFFSET.0 + place * BLOCK_SIZE;
            write_all_at(&*file, &*encode(header.uuid, &record(sequence)), offset).unwrap();
        };
        put(3, 3);
        put(255, 255);
        // What a guest may have written to a block, or stands where the first bitmap page does.
        put(256, 256);
        put(1024, 1024);
        let found = read_ring(&*file, &header).unwrap();
        assert_eq!(found, [3, 255].map(|number| (number, Slot::Valid(record(number)))));
    }
}

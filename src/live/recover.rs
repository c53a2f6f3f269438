//! Recovery: what the journal adds to the bitmap pages (`format-spec.md`, "Recovery"). Changes
//! nothing in the file.

use std::collections::BTreeMap;

use super::journal::{RingSlot, read_ring};
use super::pages::read_page;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::Bits;
use crate::format::geometry::{JOURNAL_RECORDS, block_count, block_offset};
use crate::format::header::{Header, State};
use crate::format::journal::{Record, Slot};
use crate::planted::{Bug, planted};
use crate::storage::{Storage, failed, read_exact_at};
use crate::types::{BLOCK_SIZE, Block, GROUP_WORDS, Group, Word, runs};
use crate::wait::{Wait, waited};

/// What recovery found.
#[derive(Debug)]
pub(super) struct Recovered {
    /// The whole bitmaps of the groups that the journal speaks of, page and journal together.
    pub bits: BTreeMap<Group, Box<Bits>>,
    /// Sequence number of the next record.
    pub next: u64,
}

/// Replays the journal of a layer in memory.
///
/// # Errors
/// [`ErrorKind::Loss`] where durable records are missing; [`ErrorKind::Corrupt`]; host errors.
pub(super) fn recover(file: &dyn Storage, header: &Header) -> Result<Recovered> {
    let records = live_records(read_ring(file, header)?, header)
        .map_err(|error| error.in_file(file.path()))?;
    let next = header.journal_tail + records.len() as u64;
    let mut recovered = Recovered { bits: BTreeMap::new(), next };
    let Some((last, earlier)) = records.split_last() else { return Ok(recovered) };
    for entry in earlier.iter().flat_map(|record| &record.entries) {
        recovered.set(file, header, entry.block)?;
    }
    for entry in &last.entries {
        let mut content = [0; BLOCK_SIZE as usize];
        let offset = block_offset(entry.block).0;
        read_exact_at(file, &mut content, offset).map_err(failed(
            file,
            "reading a block that the journal names",
            offset,
        ))?;
        if crc32fast::hash(&content) == entry.crc || planted(Bug::LastRecordTrusted) {
            recovered.set(file, header, entry.block)?;
        }
    }
    Ok(recovered)
}

impl Recovered {
    /// Adds blocks that became owned in a process that died. Marks beyond the device's end are older
    /// than a shrink.
    pub fn add(
        &mut self,
        file: &dyn Storage,
        header: &Header,
        marks: Vec<(Word, u64)>,
    ) -> Result<()> {
        let blocks = block_count(header.virtual_size);
        let marked = marks.into_iter().flat_map(|(word, mask)| {
            runs(mask).flat_map(move |(first, end)| (first..end).map(move |bit| word.block(bit)))
        });
        marked.filter(|block| block.0 < blocks).try_for_each(|block| self.set(file, header, block))
    }

    fn set(&mut self, file: &dyn Storage, header: &Header, block: Block) -> Result<()> {
        let word = block.word();
        let bits = match self.bits.entry(word.group()) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let page = waited(read_page(file, header.uuid, word.group(), Wait::Allowed))?;
                entry.insert(page.unwrap_or_else(|| Box::new([0; GROUP_WORDS as usize])))
            }
        };
        bits[word.index()] |= block.mask();
        Ok(())
    }
}

/// The records that count, in order: from the tail for as long as sequence, epoch and checksum
/// hold. A valid one beyond those can't be left by a crash, since a record is appended only after
/// its predecessor's sync returned.
fn live_records(ring: Vec<RingSlot>, header: &Header) -> Result<Vec<Record>> {
    let mut valid: BTreeMap<u64, Record> = ring
        .into_iter()
        .filter_map(|(number, slot)| match slot {
            Slot::Valid(record) if record.sequence % JOURNAL_RECORDS == number => Some(record),
            _ => None,
        })
        .filter(|record| record.epoch >= header.epoch)
        .map(|record| (record.sequence, record))
        .collect();
    let loss = |detail: String| Err(Error::new(ErrorKind::Loss, format!("journal: {detail}")));
    if let Some(record) = valid.values().find(|record| record.epoch > header.epoch) {
        return loss(format!(
            "a record of epoch {}, but the newest header is of epoch {}",
            record.epoch, header.epoch
        ));
    }
    let mut records = Vec::new();
    while let Some(record) = valid.remove(&(header.journal_tail + records.len() as u64)) {
        let blocks = block_count(header.virtual_size);
        if let Some(entry) = record.entries.last().filter(|entry| entry.block.0 >= blocks) {
            let (sequence, block) = (record.sequence, entry.block.0);
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("journal record {sequence}: block {block}, expected below {blocks}"),
            ));
        }
        records.push(record);
    }
    let next = header.journal_tail + records.len() as u64;
    if let Some((sequence, _)) = valid.range(next..).next() {
        return loss(format!("record {next} is missing, but record {sequence} is there"));
    }
    if header.state != State::InUse && !records.is_empty() {
        return loss("records in a layer that was closed".into());
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::journal::Entry;
    use crate::types::Uuid;

    fn header(state: State) -> Header {
        Header {
            uuid: Uuid([1; 16]),
            generation: 2,
            state,
            epoch: 5,
            journal_tail: 300,
            virtual_size: 1 << 30,
            visible_parent_size: 0,
            parent: None,
            compatible: 0,
            read_only_compatible: 0,
            extensions: Vec::new(),
        }
    }

    fn ring(records: &[(u64, u64)]) -> Vec<RingSlot> {
        records
            .iter()
            .map(|&(epoch, sequence)| {
                let record = Record { epoch, sequence, entries: Vec::new() };
                (sequence % JOURNAL_RECORDS, Slot::Valid(record))
            })
            .collect()
    }

    fn sequences(records: &[(u64, u64)]) -> Result<Vec<u64>> {
        let live = live_records(ring(records), &header(State::InUse))?;
        Ok(live.iter().map(|record| record.sequence).collect())
    }

    #[test]
    fn records_count_from_the_tail_while_they_follow_each_other() {
        assert_eq!(sequences(&[]).unwrap(), [0u64; 0]);
        assert_eq!(sequences(&[(5, 301), (5, 300), (5, 302)]).unwrap(), [300, 301, 302]);
        assert_eq!(sequences(&[(5, 299), (5, 298), (4, 301), (4, 900)]).unwrap(), [0u64; 0]);
        assert_eq!(sequences(&[(4, 299), (5, 300), (4, 301)]).unwrap(), [300]);
    }

    #[test]
    fn a_record_in_another_place_of_the_ring_counts_as_torn() {
        let record = Record { epoch: 5, sequence: 300, entries: Vec::new() };
        let ring = vec![(301 % JOURNAL_RECORDS, Slot::Valid(record))];
        assert_eq!(live_records(ring, &header(State::InUse)).unwrap(), []);
    }

    #[test]
    fn a_block_beyond_the_device_is_corrupt_in_a_record_that_counts() {
        let entry = Entry { block: Block(block_count(1 << 30)), crc: 0 };
        let at = |sequence| {
            let record = Record { epoch: 5, sequence, entries: vec![entry] };
            let ring = vec![(sequence % JOURNAL_RECORDS, Slot::Valid(record))];
            live_records(ring, &header(State::InUse)).map(|records| records.len())
        };
        assert_eq!(at(300).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(at(299).unwrap(), 0);
    }

    #[test]
    fn gaps_and_later_epochs_are_losses() {
        for records in [&[(5, 301)][..], &[(5, 300), (5, 302)], &[(6, 10)], &[(5, 300), (6, 301)]] {
            assert_eq!(sequences(records).unwrap_err().kind(), ErrorKind::Loss, "{records:?}");
        }
        let closed = live_records(ring(&[(5, 300)]), &header(State::Writable));
        assert_eq!(closed.unwrap_err().kind(), ErrorKind::Loss);
    }
}

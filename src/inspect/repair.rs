//! Saving what can be read of a layer into a new file.
//!
//! Nothing is invented. A block that the layer is known to own is copied; one that can't be read is
//! left to what lies below, and reported. Where nothing tells any more whether the layer owns a block
//! (its bitmap sector is damaged, or a journal record is lost), data that stand at the block's place
//! are taken, since only a write to that very block can have put them there, and reported as a guess;
//! where there is a hole instead, the block is left to what lies below.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::parts::{BitmapPage, RingRecord, Slots, Standing, Verdict, each_data, read_ring};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::{self, Bits, SECTORS, Sector};
use crate::format::geometry::{
    GROUP_STRIDE, SLOT_OFFSETS, bitmap_offset, block_count, block_offset, file_length, group_count,
};
use crate::format::header::{Header, State};
use crate::format::journal::Record;
use crate::live::{next_group, random};
use crate::storage::{Storage, failed, read_exact_at, write_all_at};
use crate::types::{BLOCK_SIZE, Block, GROUP_BLOCKS, GROUP_WORDS, Group, Uuid, WORD_BLOCKS};

/// Blocks that a bitmap sector describes.
const SECTOR_BLOCKS: u64 = GROUP_BLOCKS / SECTORS as u64;
/// Blocks that are copied at a time.
const COPY_BLOCKS: u64 = 64;

/// What became of a range that could not be saved as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// What lies below shows there now.
    Lost,
    /// The data that stood there were taken, though nothing proves that the layer owned them.
    Guessed,
}

/// Why a range could not be saved as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The file ends before it.
    BeyondTheEnd,
    /// The host reported an error on reading it.
    Unreadable,
    /// The bitmap sector that says whether the layer owns it is damaged.
    BitmapSector,
    /// A journal record that may have named it is lost.
    Journal,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BeyondTheEnd => "the file ends before it",
            Self::Unreadable => "it can't be read",
            Self::BitmapSector => "the bitmap sector that says whose it is is damaged",
            Self::Journal => "a journal record that may have named it is lost",
        })
    }
}

/// A range of the device that could not be saved as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Guest offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// What became of it.
    pub fate: Fate,
    /// Why.
    pub reason: Reason,
}

/// What [`repair`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// The header of the new layer.
    pub header: Header,
    /// Blocks that the new layer owns.
    pub blocks: u64,
    /// What could not be saved as it was, in order.
    pub losses: Vec<Loss>,
    /// What else is uncertain, in words.
    pub doubts: Vec<String>,
}

impl Repaired {
    /// The new layer reads as the old one did, for certain.
    pub fn is_complete(&self) -> bool {
        self.losses.is_empty() && self.doubts.is_empty()
    }

    fn lose(&mut self, block: Block, fate: Fate, reason: Reason) {
        self.lose_range(block.0 * BLOCK_SIZE, BLOCK_SIZE, fate, reason);
    }

    fn lose_range(&mut self, offset: u64, length: u64, fate: Fate, reason: Reason) {
        let length = length.min(self.header.virtual_size - offset);
        match self.losses.last_mut() {
            Some(last)
                if (last.fate, last.reason) == (fate, reason)
                    && last.offset + last.length == offset =>
            {
                last.length += length;
            }
            _ => self.losses.push(Loss { offset, length, fate, reason }),
        }
    }
}

/// Saves what can be read of the layer in `file` into `new`, an empty file. The parent link stays as
/// it is, and the parent is not looked at.
///
/// The new layer is cleanly closed, under a new UUID. A frozen layer that was saved completely keeps
/// its UUID and its freeze id instead, since its children may stand on the copy as well.
///
/// # Errors
/// [`ErrorKind::NotAnImage`]; [`ErrorKind::Corrupt`] where no header slot can be made sense of;
/// [`ErrorKind::Unsupported`]; host errors, but for those of reading blocks and bitmap pages.
pub fn repair(file: &dyn Storage, new: &dyn Storage) -> Result<Repaired> {
    let slots = Slots::read(file)?;
    let length = file.length().map_err(failed(file, "reading the length", 0))?;
    let (header, mut doubts) =
        choose_header(&slots, length).map_err(|error| error.in_file(file.path()))?;
    let journal = Journal::read(file, &header)?;
    doubts.extend(journal.doubt.map(str::to_owned));
    let mut salvage = Salvage {
        file,
        new,
        length,
        journal,
        repaired: Repaired { header, blocks: 0, losses: Vec::new(), doubts },
    };
    let size = salvage.repaired.header.virtual_size;
    new.set_length(file_length(size)).map_err(failed(new, "setting the length", 0))?;
    let pages = salvage.copy_groups()?;
    let mut repaired = salvage.repaired;
    new_identity(&mut repaired)?;
    write_metadata(new, &repaired.header, &pages)?;
    Ok(repaired)
}

/// The header to go by, and what that leaves uncertain.
fn choose_header(slots: &Slots, length: u64) -> Result<(Header, Vec<String>)> {
    for slot in &slots.0 {
        match &slot.verdict {
            Verdict::Refused(error) if error.kind() == ErrorKind::Unsupported => {
                return Err(error.clone().at(slot.offset));
            }
            _ => {}
        }
    }
    let [first, second] = slots.0.each_ref().map(super::Slot::header);
    match (first, second) {
        (Some(a), Some(b)) if a.uuid != b.uuid || a.generation == b.generation => {
            let doubt = "the header slots contradict each other";
            let newest = slots.header().unwrap_or(a);
            return Ok((newest.clone(), vec![doubt.into()]));
        }
        _ => {}
    }
    if let Some(header) = slots.header() {
        return Ok((header.clone(), Vec::new()));
    }
    let guesses = slots.0.iter().filter_map(|slot| Header::without_checksum(&slot.bytes).ok());
    let fitting = guesses.filter(|guess| file_length(guess.virtual_size) == length);
    let Some(guess) = fitting.max_by_key(|guess| guess.generation) else {
        let detail = "no header slot has its checksum, and none that lacks it fits the file";
        return Err(Error::new(ErrorKind::Corrupt, detail));
    };
    let doubt = "the header is a guess: neither slot has its checksum".into();
    Ok((guess, vec![doubt]))
}

/// What the journal adds to the bitmap pages, whether or not recovery would take it.
struct Journal {
    owned: BTreeSet<Block>,
    /// Why records may be missing.
    doubt: Option<&'static str>,
}

impl Journal {
    fn read(file: &dyn Storage, header: &Header) -> Result<Self> {
        let mut records: BTreeMap<(u64, u64), Record> = BTreeMap::new();
        let mut doubt = None;
        for place in read_ring(file, header.uuid, Some(header))? {
            match place.content {
                RingRecord::Valid(record, Standing::Live) => {
                    if header.state != State::InUse {
                        doubt = Some("the journal of a closed layer has records");
                    }
                    records.insert((record.epoch, record.sequence), record);
                }
                RingRecord::Valid(record, Standing::Unreachable) => {
                    doubt = Some("journal records are lost, or the header that leads to them");
                    records.insert((record.epoch, record.sequence), record);
                }
                RingRecord::Refused(_) => doubt = Some("a journal record can't be right"),
                RingRecord::Valid(..) | RingRecord::Torn | RingRecord::Damaged => {}
            }
        }
        let blocks = block_count(header.virtual_size);
        let last = records.pop_last().map(|(_, record)| record);
        // Every other one has a successor, so its blocks had been durable.
        let earlier = records.values().flat_map(|record| &record.entries).map(|entry| entry.block);
        let mut owned: BTreeSet<Block> = earlier.filter(|block| block.0 < blocks).collect();
        for entry in last.iter().flat_map(|record| &record.entries) {
            let mut content = [0; BLOCK_SIZE as usize];
            if entry.block.0 < blocks
                && read_exact_at(file, &mut content, block_offset(entry.block).0).is_ok()
                && crc32fast::hash(&content) == entry.crc
            {
                owned.insert(entry.block);
            }
        }
        Ok(Self { owned, doubt })
    }
}

struct Salvage<'a> {
    file: &'a dyn Storage,
    new: &'a dyn Storage,
    length: u64,
    journal: Journal,
    repaired: Repaired,
}

/// What is known of a group's blocks: a set bit says yes.
struct Known {
    owned: Box<Bits>,
    /// Nothing tells whether they are owned.
    unknown: Box<Bits>,
}

impl Salvage<'_> {
    /// Copies all blocks; answers the bitmaps of the new layer.
    fn copy_groups(&mut self) -> Result<BTreeMap<Group, Box<Bits>>> {
        let mut pages = BTreeMap::new();
        let count = group_count(self.repaired.header.virtual_size);
        let mut from = Group(0);
        while let Some(group) = self.next_group(from)?.filter(|group| group.0 < count) {
            let bits = self.copy_group(group)?;
            self.repaired.blocks +=
                bits.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            pages.insert(group, bits);
            from = Group(group.0 + 1);
        }
        // The groups whose page the file has no room for.
        let first = match self.length.checked_sub(bitmap_offset(Group(0)).0 + BLOCK_SIZE) {
            Some(rest) => Group(rest / GROUP_STRIDE + 1),
            None => Group(0),
        };
        if first.0 < count {
            let offset = first.first_word().guest_offset();
            self.repaired.lose_range(offset, u64::MAX, Fate::Lost, Reason::BeyondTheEnd);
        }
        self.repaired.losses.sort_by_key(|loss| loss.offset);
        Ok(pages)
    }

    fn has_page(&self, group: Group) -> bool {
        bitmap_offset(group).0 + BLOCK_SIZE <= self.length
    }

    /// The next group that has a page and may own a block.
    fn next_group(&self, from: Group) -> Result<Option<Group>> {
        let stored = next_group(self.file, from)?;
        let named = self.journal.owned.range(from.first_word().block(0)..).next();
        let named = named.map(|block| block.word().group());
        let next = stored.into_iter().chain(named).min();
        Ok(next.filter(|&group| self.has_page(group)))
    }

    fn known(&self, group: Group) -> Known {
        let blank = || Box::new([0; GROUP_WORDS as usize]);
        let mut known = match BitmapPage::read(self.file, self.repaired.header.uuid, group) {
            Ok(page) => {
                let mut unknown = blank();
                for (number, _) in (0..)
                    .zip(&page.sectors)
                    .filter(|(_, sector)| matches!(sector, Sector::Damaged { .. }))
                {
                    (number * SECTOR_BLOCKS..(number + 1) * SECTOR_BLOCKS)
                        .for_each(|index| set(&mut unknown, index));
                }
                Known { owned: page.bits, unknown }
            }
            Err(_) => Known { owned: blank(), unknown: Box::new([u64::MAX; GROUP_WORDS as usize]) },
        };
        let first = group.first_word().block(0);
        for block in self.journal.owned.range(first..Block(first.0 + GROUP_BLOCKS)) {
            set(&mut known.owned, block.0 - first.0);
        }
        known
    }

    fn copy_group(&mut self, group: Group) -> Result<Box<Bits>> {
        let mut known = self.known(group);
        let stored = self.stored(group)?;
        let first = group.first_word().block(0);
        let count =
            block_count(self.repaired.header.virtual_size).min(first.0 + GROUP_BLOCKS) - first.0;
        for index in 0..GROUP_BLOCKS {
            let block = Block(first.0 + index);
            let data = has(&stored, index);
            if index >= count {
                clear(&mut known.owned, index);
                continue;
            }
            let guess = match (has(&known.owned, index), has(&known.unknown, index)) {
                (true, _) => None,
                (false, true) => Some(Reason::BitmapSector),
                (false, false) if self.journal.doubt.is_some() && data => Some(Reason::Journal),
                (false, false) => continue,
            };
            if block_offset(block).0 + BLOCK_SIZE > self.length {
                clear(&mut known.owned, index);
                self.repaired.lose(block, Fate::Lost, Reason::BeyondTheEnd);
            } else if let Some(reason) = guess {
                self.guess(&mut known.owned, block, index, data, reason);
            }
        }
        self.copy_blocks(group, &mut known.owned, &stored)?;
        Ok(known.owned)
    }

    /// A block of which nothing tells whether the layer owns it.
    fn guess(&mut self, owned: &mut Bits, block: Block, index: u64, data: bool, reason: Reason) {
        let header = &self.repaired.header;
        if data {
            set(owned, index);
            self.repaired.lose(block, Fate::Guessed, reason);
        } else if block.0 * BLOCK_SIZE < header.visible_parent_size {
            // It may have been zeroed. Without a parent it reads as zeros either way.
            self.repaired.lose(block, Fate::Lost, reason);
        }
    }

    /// The blocks of a group at whose place the file has data.
    fn stored(&self, group: Group) -> Result<Box<Bits>> {
        let mut stored = Box::new([0; GROUP_WORDS as usize]);
        let start = block_offset(group.first_word().block(0)).0;
        each_data(self.file, start, start + GROUP_BLOCKS * BLOCK_SIZE, &mut |from, to| {
            ((from - start) / BLOCK_SIZE..(to - start).div_ceil(BLOCK_SIZE))
                .for_each(|index| set(&mut stored, index));
            Ok(())
        })?;
        Ok(stored)
    }

    /// Copies the owned blocks that have data; clears the bits of those that can't be read.
    fn copy_blocks(&mut self, group: Group, owned: &mut Bits, stored: &Bits) -> Result<()> {
        let first = group.first_word().block(0);
        let mut index = 0;
        while index < GROUP_BLOCKS {
            let wanted = |index: &u64| has(owned, *index) && has(stored, *index);
            let run =
                (index..GROUP_BLOCKS.min(index + COPY_BLOCKS)).take_while(wanted).count() as u64;
            if run > 0 && !self.copy(Block(first.0 + index), run)? {
                for index in index..index + run {
                    let block = Block(first.0 + index);
                    if !self.copy(block, 1)? {
                        clear(owned, index);
                        self.repaired.lose(block, Fate::Lost, Reason::Unreadable);
                    }
                }
            }
            index += run.max(1);
        }
        Ok(())
    }

    /// Copies blocks; false where they can't be read.
    fn copy(&self, first: Block, count: u64) -> Result<bool> {
        let mut data = vec![0; (count * BLOCK_SIZE) as usize];
        let offset = block_offset(first).0;
        if read_exact_at(self.file, &mut data, offset).is_err() {
            return Ok(false);
        }
        write_all_at(self.new, &data, offset)
            .map_err(failed(self.new, "writing blocks", offset))
            .map(|()| true)
    }
}

fn bit(index: u64) -> (usize, u64) {
    ((index / WORD_BLOCKS) as usize, 1 << (index % WORD_BLOCKS))
}

fn has(bits: &Bits, index: u64) -> bool {
    let (word, mask) = bit(index);
    bits.get(word).is_some_and(|bits| bits & mask != 0)
}

fn set(bits: &mut Bits, index: u64) {
    let (word, mask) = bit(index);
    if let Some(bits) = bits.get_mut(word) {
        *bits |= mask;
    }
}

fn clear(bits: &mut Bits, index: u64) {
    let (word, mask) = bit(index);
    if let Some(bits) = bits.get_mut(word) {
        *bits &= !mask;
    }
}

/// Identity stands for content: only what is the same may bear the same one.
fn new_identity(repaired: &mut Repaired) -> Result<()> {
    let keep = repaired.is_complete() && repaired.header.is_frozen();
    let header = &mut repaired.header;
    if !keep {
        (header.uuid, header.state) = (Uuid(random()?), State::Writable);
    }
    (header.generation, header.epoch, header.journal_tail) = (1, 0, 0);
    // What these features added to the old file is not in the new one.
    header.read_only_compatible = 0;
    Ok(())
}

/// Blocks first, then what names them; the header comes last, so that a file that was cut off has
/// none.
fn write_metadata(
    new: &dyn Storage,
    header: &Header,
    pages: &BTreeMap<Group, Box<Bits>>,
) -> Result<()> {
    for (&group, bits) in pages {
        let offset = bitmap_offset(group).0;
        write_all_at(new, &bitmap::encode(header.uuid, group, bits), offset).map_err(failed(
            new,
            "writing a bitmap page",
            offset,
        ))?;
    }
    new.sync_data().map_err(failed(new, "syncing the new file", 0))?;
    for (slot, offset) in SLOT_OFFSETS.into_iter().enumerate() {
        let header = Header { generation: slot as u64 + 1, ..header.clone() };
        write_all_at(new, &*header.encode(slot), offset.0).map_err(failed(
            new,
            "writing a header slot",
            offset.0,
        ))?;
    }
    new.sync_data().map_err(failed(new, "syncing the new file", 0))
}

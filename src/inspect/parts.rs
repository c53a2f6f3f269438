//! The structures of a layer's file as they stand, each with its offset and what it is worth.

use std::collections::BTreeSet;
use std::io;

use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::{Bits, PageBytes, SECTORS, Sector, judge, trusted_bits};
use crate::format::geometry::{JOURNAL_OFFSET, JOURNAL_RECORDS, SLOT_OFFSETS, bitmap_offset};
use crate::format::header::{Header, SlotBytes, has_magic};
use crate::format::journal::{self, Record, RecordBytes};
use crate::format::layouts;
use crate::memory::Scatter;
use crate::storage::{Storage, failed};
use crate::types::{BLOCK_SIZE, Block, Group, Uuid, Word, runs};

/// A header slot.
#[derive(Clone, Debug)]
pub struct Slot {
    /// 0 or 1.
    pub number: usize,
    /// Where it stands in the file.
    pub offset: u64,
    /// Its bytes; zeros beyond the end of the file.
    pub bytes: Box<SlotBytes>,
    /// What it is worth.
    pub verdict: Verdict,
}

/// What a header slot is worth.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// It counts, unless the other one is newer.
    Valid(Box<Header>),
    /// The file ends before it does.
    BeyondTheEnd,
    /// It doesn't begin with the magic.
    NoMagic,
    /// Its checksum does not hold.
    BadChecksum,
    /// Its checksum holds, but not what it says, or not for this build.
    Refused(Error),
}

/// A field of an on-disk struct with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldValue<'a> {
    /// The field's name in `format-spec.md`.
    pub name: &'static str,
    /// Where it stands in the file.
    pub offset: u64,
    /// What stands there.
    pub value: Value<'a>,
}

/// The value of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// A number of 4 or 8 bytes.
    Number(u64),
    /// Any other bytes.
    Bytes(&'a [u8]),
}

impl Slot {
    /// All fields, whether or not the slot is valid.
    pub fn fields(&self) -> Vec<FieldValue<'_>> {
        fields("Header slot", self.offset, &*self.bytes)
    }

    /// The header, if the slot is valid.
    pub fn header(&self) -> Option<&Header> {
        match &self.verdict {
            Verdict::Valid(header) => Some(header),
            _ => None,
        }
    }

    fn uuid(&self) -> Option<Uuid> {
        let fields = self.fields();
        let value = fields.iter().find(|field| field.name == "uuid").map(|field| &field.value)?;
        match value {
            Value::Bytes(bytes) => (*bytes).try_into().ok().map(Uuid),
            Value::Number(_) => None,
        }
    }
}

/// The fields of the struct that `format-spec.md` calls `name`, which stands at `offset`.
pub(super) fn fields<'a>(name: &str, offset: u64, bytes: &'a [u8]) -> Vec<FieldValue<'a>> {
    let layout = layouts().into_iter().find(|(title, _)| *title == name);
    let field = |(name, at, size): (&'static str, usize, usize)| {
        let bytes = bytes.get(at..at + size).unwrap_or_default();
        let number = name != "magic" && (size == 4 || size == 8);
        let value = if number { Value::Number(little_endian(bytes)) } else { Value::Bytes(bytes) };
        FieldValue { name, offset: offset + at as u64, value }
    };
    layout.into_iter().flat_map(|(_, layout)| layout).map(field).collect()
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Both slots of a file.
#[derive(Debug)]
pub(super) struct Slots(pub [Slot; 2]);

impl Slots {
    /// Reads both slots.
    ///
    /// # Errors
    /// [`ErrorKind::NotAnImage`] where neither begins with the magic; host errors.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        let length = file.length().map_err(failed(file, "reading the length", 0))?;
        let [first, second] = SLOT_OFFSETS;
        let slots = [read_slot(file, 0, first.0, length)?, read_slot(file, 1, second.0, length)?];
        if slots.iter().any(|slot| has_magic(&slot.bytes)) {
            return Ok(Self(slots));
        }
        let detail = "not a thinply layer: no magic in either slot";
        Err(Error::new(ErrorKind::NotAnImage, detail).in_file(file.path()))
    }

    /// The valid slot with the higher generation.
    pub fn newest(&self) -> Option<&Slot> {
        let valid = self.0.iter().filter(|slot| slot.header().is_some());
        valid.max_by_key(|slot| slot.header().map(|header| header.generation))
    }

    /// The header that counts.
    pub fn header(&self) -> Option<&Header> {
        self.newest().and_then(Slot::header)
    }

    /// The layer's name: from the header that counts, or else from a slot that has the magic.
    pub fn uuid(&self) -> Uuid {
        let named = self.newest().or_else(|| self.0.iter().find(|slot| has_magic(&slot.bytes)));
        named.and_then(Slot::uuid).unwrap_or(Uuid([0; 16]))
    }
}

fn read_slot(file: &dyn Storage, number: usize, offset: u64, length: u64) -> Result<Slot> {
    let mut bytes: Box<SlotBytes> = Box::new([0; BLOCK_SIZE as usize]);
    read_padded(file, &mut *bytes, offset)?;
    let verdict = if offset + BLOCK_SIZE > length {
        Verdict::BeyondTheEnd
    } else if !has_magic(&bytes) {
        Verdict::NoMagic
    } else {
        match Header::decode(number, &bytes) {
            Ok(Some(header)) => Verdict::Valid(Box::new(header)),
            Ok(None) => Verdict::BadChecksum,
            Err(error) => Verdict::Refused(error),
        }
    };
    Ok(Slot { number, offset, bytes, verdict })
}

/// A place of the journal ring that holds anything.
#[derive(Clone, Debug)]
pub struct RingPlace {
    /// Its number in the ring.
    pub number: u64,
    /// Where it stands in the file.
    pub offset: u64,
    /// What it holds.
    pub content: RingRecord,
}

/// What a place of the ring holds.
#[derive(Clone, Debug)]
pub enum RingRecord {
    /// A record whose checksum holds.
    Valid(Record, Standing),
    /// Bytes without the right checksum.
    Torn,
    /// [`RingRecord::Torn`], but one bit away from a record or from nothing.
    Damaged,
    /// A record whose checksum holds but whose numbers cannot be.
    Refused(Error),
}

/// What recovery makes of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It counts.
    Live,
    /// It is left over from what the bitmap pages have by now.
    Stale,
    /// It can't be reached: records before it, or the header that leads to it, are lost.
    Unreachable,
    /// It belongs to another place of the ring, so it counts as torn.
    Misplaced,
    /// No header says which records count.
    Unknown,
}

/// The places of the ring that hold anything, in order.
pub(super) fn read_ring(
    file: &dyn Storage,
    uuid: Uuid,
    header: Option<&Header>,
) -> Result<Vec<RingPlace>> {
    let (start, end) = (JOURNAL_OFFSET.0, JOURNAL_OFFSET.0 + JOURNAL_RECORDS * BLOCK_SIZE);
    let mut places: Vec<RingPlace> = Vec::new();
    each_data(file, start, end, &mut |from, to| {
        let first = (from - start) / BLOCK_SIZE;
        for number in first..(to - start).div_ceil(BLOCK_SIZE) {
            let known = places.last().is_some_and(|last| last.number >= number);
            if let Some(place) = read_place(file, uuid, number)?.filter(|_| !known) {
                places.push(place);
            }
        }
        Ok(())
    })?;
    if let Some(header) = header {
        judge_ring(&mut places, header);
    }
    Ok(places)
}

fn read_place(file: &dyn Storage, uuid: Uuid, number: u64) -> Result<Option<RingPlace>> {
    let offset = JOURNAL_OFFSET.0 + number * BLOCK_SIZE;
    let mut bytes: Box<RecordBytes> = Box::new([0; BLOCK_SIZE as usize]);
    read_padded(file, &mut *bytes, offset)?;
    let content = match journal::decode(uuid, &bytes) {
        Ok(journal::Slot::Empty) => return Ok(None),
        Ok(journal::Slot::Torn) if journal::is_one_bit_off(uuid, &bytes) => RingRecord::Damaged,
        Ok(journal::Slot::Torn) => RingRecord::Torn,
        Ok(journal::Slot::Valid(record)) if record.sequence % JOURNAL_RECORDS != number => {
            RingRecord::Valid(record, Standing::Misplaced)
        }
        Ok(journal::Slot::Valid(record)) => RingRecord::Valid(record, Standing::Unknown),
        Err(error) => RingRecord::Refused(error),
    };
    Ok(Some(RingPlace { number, offset, content }))
}

/// Says of each record what recovery makes of it (`format-spec.md`, "Recovery").
fn judge_ring(places: &mut [RingPlace], header: &Header) {
    let records = |place: &mut RingPlace| match &mut place.content {
        RingRecord::Valid(record, standing) if *standing == Standing::Unknown => {
            Some((record.epoch, record.sequence))
        }
        _ => None,
    };
    let current: BTreeSet<u64> = places
        .iter_mut()
        .filter_map(records)
        .filter(|&(epoch, _)| epoch == header.epoch)
        .map(|(_, sequence)| sequence)
        .collect();
    let tail = header.journal_tail;
    let next = (tail..).find(|sequence| !current.contains(sequence)).unwrap_or(tail);
    for place in places {
        let RingRecord::Valid(record, standing @ Standing::Unknown) = &mut place.content else {
            continue;
        };
        *standing = match (record.epoch.cmp(&header.epoch), record.sequence) {
            (std::cmp::Ordering::Greater, _) => Standing::Unreachable,
            (std::cmp::Ordering::Equal, sequence) if sequence >= next => Standing::Unreachable,
            (std::cmp::Ordering::Equal, sequence) if sequence >= tail => Standing::Live,
            _ => Standing::Stale,
        };
    }
}

/// The bitmap page of a group.
#[derive(Clone, Debug)]
pub struct BitmapPage {
    /// The group.
    pub group: Group,
    /// Where the page stands in the file.
    pub offset: u64,
    /// What each sector is worth.
    pub sectors: [Sector; SECTORS],
    /// The bits of the valid sectors.
    pub bits: Box<Bits>,
}

impl BitmapPage {
    pub(super) fn read(file: &dyn Storage, uuid: Uuid, group: Group) -> Result<Self> {
        let offset = bitmap_offset(group).0;
        let mut bytes: PageBytes = [0; BLOCK_SIZE as usize];
        read_padded(file, &mut bytes, offset)?;
        let sectors = judge(uuid, group, &bytes);
        Ok(Self { group, offset, sectors, bits: trusted_bits(&sectors, &bytes) })
    }

    /// How many blocks the page says are owned.
    pub fn owned(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The runs of owned blocks, each with its first block and its length in blocks.
    pub fn runs(&self) -> Vec<(Block, u64)> {
        block_runs(self.group, &self.bits)
    }
}

/// The runs of blocks of a group whose bits are set, each with its first block and its length in blocks.
pub(super) fn block_runs(group: Group, bits: &Bits) -> Vec<(Block, u64)> {
    let mut found: Vec<(Block, u64)> = Vec::new();
    for (index, &bits) in (0..).zip(bits.iter()) {
        let word = Word(group.first_word().0 + index);
        for (first, end) in runs(bits) {
            let (block, count) = (word.block(first), u64::from(end - first));
            match found.last_mut() {
                Some((start, length)) if start.0 + *length == block.0 => *length += count,
                _ => found.push((block, count)),
            }
        }
    }
    found
}

/// Hands the ranges of `from..to` that are no holes to `visit`, in order.
pub(super) fn each_data(
    file: &dyn Storage,
    from: u64,
    to: u64,
    visit: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let mut at = from;
    while at < to {
        let data = file.next_data(at).map_err(failed(file, "looking for data", at))?;
        let Some(data) = data.filter(|&data| data < to) else { break };
        let end = file.next_hole(data).map_err(failed(file, "looking for a hole", data))?;
        at = end.clamp(data + 1, to);
        visit(data, at)?;
    }
    Ok(())
}

/// Fills `buf`; what lies beyond the end of the file reads as zeros.
pub(super) fn read_padded(file: &dyn Storage, buf: &mut [u8], offset: u64) -> Result<()> {
    let (mut rest, mut at) = (buf, offset);
    while !rest.is_empty() {
        match file.read_at(Scatter::from(&mut *rest), at) {
            Ok(0) => break,
            Ok(n) => {
                rest = rest.get_mut(n..).unwrap_or_default();
                at += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(file, "reading metadata", at)(error)),
        }
    }
    rest.fill(0);
    Ok(())
}

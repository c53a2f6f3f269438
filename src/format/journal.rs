//! Journal records (`format-spec.md`, "Journal record").

use std::mem::size_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Field, is_zero, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{BLOCK_SIZE, Block, Uuid};

/// Most blocks that one record can name.
pub const RECORD_CAPACITY: usize = 338;

const MAGIC: [u8; 4] = *b"TPJR";
/// The checksum covers everything behind it.
const CHECKED_FROM: usize = 8;

/// The bytes of a record.
pub type RecordBytes = [u8; BLOCK_SIZE as usize];

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    block: U64,
    crc: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    magic: [u8; 4],
    crc: U32,
    epoch: U64,
    sequence: U64,
    count: U32,
    reserved: U32,
    entries: [RawEntry; RECORD_CAPACITY],
    padding: [u8; 8],
}

const _: () = assert!(size_of::<RawRecord>() == BLOCK_SIZE as usize);
const _: () = assert!(size_of::<RawEntry>() == 12);

pub(super) fn record_layout() -> Vec<Field> {
    layout!(RawRecord { magic, crc, epoch, sequence, count, reserved, entries, padding })
}

pub(super) fn entry_layout() -> Vec<Field> {
    layout!(RawEntry { block, crc })
}

/// A block that became owned, with the CRC-32 of its 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The block.
    pub block: Block,
    /// CRC-32 (IEEE) of its content when the record was made.
    pub crc: u32,
}

/// One commit: the blocks that it made owned, in ascending order, at most [`RECORD_CAPACITY`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The life of the layer that wrote it.
    pub epoch: u64,
    /// Its place in the order of commits.
    pub sequence: u64,
    /// The blocks; empty where it only confirms its predecessor.
    pub entries: Vec<Entry>,
}

fn checksum(uuid: Uuid, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&uuid.0);
    hasher.update(bytes.get(CHECKED_FROM..).unwrap_or_default());
    hasher.finalize()
}

/// The bytes of a record of the layer `uuid`. At most [`RECORD_CAPACITY`] entries are kept.
pub fn encode(uuid: Uuid, record: &Record) -> Box<RecordBytes> {
    debug_assert!(record.entries.len() <= RECORD_CAPACITY);
    let mut raw = RawRecord::new_zeroed();
    raw.magic = MAGIC;
    raw.epoch = U64::new(record.epoch);
    raw.sequence = U64::new(record.sequence);
    raw.count = U32::new(record.entries.len() as u32);
    for (slot, entry) in raw.entries.iter_mut().zip(&record.entries) {
        *slot = RawEntry { block: U64::new(entry.block.0), crc: U32::new(entry.crc) };
    }
    raw.crc = U32::new(checksum(uuid, raw.as_bytes()));
    Box::new(zerocopy::transmute!(raw))
}

/// What a place in the ring holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Nothing was ever written there, or it was given back.
    Empty,
    /// A record with the right checksum.
    Valid(Record),
    /// Bytes without the right checksum: a record that was being written, or damage.
    Torn,
}

/// Reads one place of the ring of the layer `uuid`. The blocks may lie beyond the device: a stale
/// record can be older than a shrink.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for a record whose checksum holds but whose numbers cannot be.
pub fn decode(uuid: Uuid, bytes: &RecordBytes) -> Result<Slot> {
    if is_zero(bytes) {
        return Ok(Slot::Empty);
    }
    let raw: &RawRecord = zerocopy::transmute_ref!(bytes);
    if raw.magic != MAGIC || raw.crc.get() != checksum(uuid, bytes) {
        return Ok(Slot::Torn);
    }
    let corrupt = |detail: String| {
        Err(Error::new(ErrorKind::Corrupt, format!("journal record {}: {detail}", raw.sequence)))
    };
    let count = raw.count.get() as usize;
    let Some((used, unused)) = raw.entries.split_at_checked(count) else {
        return corrupt(format!("{count} entries, expected at most {RECORD_CAPACITY}"));
    };
    if raw.reserved.get() != 0 || raw.padding != [0; 8] || !is_zero(unused.as_bytes()) {
        return corrupt("reserved bytes are set".into());
    }
    let mut entries: Vec<Entry> = Vec::with_capacity(count);
    for raw in used {
        let block = Block(raw.block.get());
        if entries.last().is_some_and(|last| last.block >= block) {
            return corrupt(format!("block {} out of order", block.0));
        }
        entries.push(Entry { block, crc: raw.crc.get() });
    }
    Ok(Slot::Valid(Record { epoch: raw.epoch.get(), sequence: raw.sequence.get(), entries }))
}

/// Whether bytes that are [`Slot::Torn`] are one bit away from a record, or from none at all: no
/// write or punch that was cut off leaves that.
pub fn is_one_bit_off(uuid: Uuid, bytes: &RecordBytes) -> bool {
    if bytes.iter().map(|byte| byte.count_ones()).sum::<u32>() == 1 {
        return true;
    }
    let raw: &RawRecord = zerocopy::transmute_ref!(bytes);
    let magic = u32::from_le_bytes(raw.magic) ^ u32::from_le_bytes(MAGIC);
    let crc = raw.crc.get() ^ checksum(uuid, bytes);
    let bit = match (magic, crc) {
        (0, crc) if crc.is_power_of_two() => Some(32 + crc.trailing_zeros() as usize),
        (0, crc) => flipped_bit(crc),
        (magic, 0) if magic.is_power_of_two() => Some(magic.trailing_zeros() as usize),
        _ => None,
    };
    let mut mended = Box::new(*bytes);
    let Some(byte) = bit.and_then(|bit| mended.get_mut(bit / 8)) else { return false };
    *byte ^= 1 << (bit.unwrap_or_default() % 8);
    matches!(decode(uuid, &mended), Ok(Slot::Valid(_)))
}

/// Which bit of a record makes its checksum wrong by `wrong`. A CRC is linear, so what a bit does to
/// it depends on the bit's distance to the end alone.
fn flipped_bit(wrong: u32) -> Option<usize> {
    const POLYNOMIAL: u32 = 0xedb8_8320;
    let mut effect = POLYNOMIAL;
    (CHECKED_FROM * 8..BLOCK_SIZE as usize * 8).rev().find(|_| {
        let found = effect == wrong;
        effect = effect >> 1 ^ if effect & 1 == 1 { POLYNOMIAL } else { 0 };
        found
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: Uuid = Uuid([7; 16]);

    fn full() -> Record {
        let entries = (0..RECORD_CAPACITY as u64)
            .map(|n| Entry { block: Block(n * 3), crc: n as u32 })
            .collect();
        Record { epoch: 4, sequence: 700, entries }
    }

    #[test]
    fn records_come_back_and_every_flip_is_found() {
        let record = full();
        let bytes = encode(UUID, &record);
        assert_eq!(decode(UUID, &bytes).unwrap(), Slot::Valid(record));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(UUID, &bad).unwrap(), Slot::Torn);
            assert!(is_one_bit_off(UUID, &bad), "{bit}");
        }
        assert_eq!(decode(Uuid([8; 16]), &bytes).unwrap(), Slot::Torn);
        assert_eq!(decode(UUID, &[0; 4096]).unwrap(), Slot::Empty);
    }

    #[test]
    fn what_is_torn_is_not_one_bit_off() {
        let (old, new) = (encode(UUID, &full()), encode(UUID, &Record { epoch: 5, ..full() }));
        for sector in 1..8 {
            for (front, back) in [(&new, &old), (&new, &Box::new([0; 4096]))] {
                let mut torn = front.clone();
                torn[sector * 512..].copy_from_slice(&back[sector * 512..]);
                assert!(!is_one_bit_off(UUID, &torn));
            }
        }
        assert!(is_one_bit_off(UUID, &std::array::from_fn(|at| u8::from(at == 700))));
        assert!(!is_one_bit_off(UUID, &std::array::from_fn(|at| u8::from(at > 700))));
    }

    #[test]
    fn impossible_numbers_under_a_right_checksum_are_corrupt() {
        let mut unordered = full();
        unordered.entries.swap(0, 1);
        let bytes = encode(UUID, &unordered);
        assert_eq!(decode(UUID, &bytes).unwrap_err().kind(), ErrorKind::Corrupt);
        let mut bytes = *encode(UUID, &full());
        bytes[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = checksum(UUID, &bytes);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(decode(UUID, &bytes).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

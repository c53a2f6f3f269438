//! Whether an invalid header slot is what a crash in the middle of its write left, or damage.
//!
//! A slot is written whole, over one that is two generations older, and tears at sector bounds. So
//! each of its sectors is that of one header or the other: the first one holds everything that
//! differs between the two, the last one the checksum, and those between are the same as in the other
//! slot. A flipped bit breaks this, or leaves a slot that is one bit away from a valid one, which two
//! headers that differ in their generations never are.

use crate::format::header::{Header, SlotBytes, has_magic};
use crate::types::{BLOCK_SIZE, SECTOR_SIZE};

const FIRST: usize = SECTOR_SIZE as usize;
const CHECKSUM: usize = BLOCK_SIZE as usize - 4;

/// Whether `bytes` of slot `number`, whose checksum does not hold, are the halves of two headers that
/// may stand beside the valid one in the other slot.
pub(super) fn is_torn(number: usize, bytes: &SlotBytes, other: &Header) -> bool {
    let beside = other.encode(1 - number);
    has_magic(bytes)
        && bytes.get(FIRST..CHECKSUM) == beside.get(FIRST..CHECKSUM)
        && Header::without_checksum(bytes).is_ok_and(|first| may_stand_beside(&first, other))
        && !is_one_bit_from_valid(number, bytes)
}

fn may_stand_beside(first: &Header, other: &Header) -> bool {
    let varying = Header {
        generation: other.generation,
        state: other.state,
        epoch: other.epoch,
        journal_tail: other.journal_tail,
        virtual_size: other.virtual_size,
        visible_parent_size: other.visible_parent_size,
        parent: other.parent.clone(),
        ..first.clone()
    };
    varying == *other && first.generation.abs_diff(other.generation) == 1
}

fn is_one_bit_from_valid(number: usize, bytes: &SlotBytes) -> bool {
    let mut flipped = Box::new(*bytes);
    (0..FIRST).chain(CHECKSUM..BLOCK_SIZE as usize).any(|at| {
        let byte = bytes.get(at).copied().unwrap_or_default();
        let valid = (0..8).any(|bit| {
            flipped.iter_mut().skip(at).take(1).for_each(|place| *place = byte ^ 1 << bit);
            matches!(Header::decode(number, &flipped), Ok(Some(_)))
        });
        flipped.iter_mut().skip(at).take(1).for_each(|place| *place = byte);
        valid
    })
}

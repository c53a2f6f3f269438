//! The bitmap page of a group (`format-spec.md`, "Bitmap page").

use std::mem::size_of;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Field, is_zero, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{BLOCK_SIZE, GROUP_WORDS, Group, Uuid};

/// Sectors in a bitmap page.
pub const SECTORS: usize = 8;
/// Bytes of bits in a sector.
const SECTOR_BITS: usize = 508;

/// The bits of a group, block 0 of the group in the lowest bit of the first word.
pub type Bits = [u64; GROUP_WORDS as usize];
/// The bytes of a bitmap page.
pub type PageBytes = [u8; BLOCK_SIZE as usize];

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSector {
    bits: [u8; SECTOR_BITS],
    crc: U32,
}

const _: () = assert!(size_of::<RawSector>() == 512);
const _: () = assert!(SECTORS * size_of::<RawSector>() == BLOCK_SIZE as usize);
const _: () = assert!(SECTORS * SECTOR_BITS == size_of::<Bits>());

pub(super) fn sector_layout() -> Vec<Field> {
    layout!(RawSector { bits, crc })
}

/// A checksum that also holds where the sector belongs, so that a misdirected write is caught.
fn checksum(uuid: Uuid, group: Group, sector: usize, bits: &[u8; SECTOR_BITS]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&uuid.0);
    hasher.update(&group.0.to_le_bytes());
    hasher.update(&(sector as u32).to_le_bytes());
    hasher.update(bits);
    hasher.finalize()
}

/// The page that says `bits`. A sector without a bit is all zeros.
pub fn encode(uuid: Uuid, group: Group, bits: &Bits) -> PageBytes {
    let mut page = [RawSector { bits: [0; SECTOR_BITS], crc: U32::ZERO }; SECTORS];
    let mut bytes = bits.iter().flat_map(|word| word.to_le_bytes());
    for (number, sector) in page.iter_mut().enumerate() {
        sector.bits.fill_with(|| bytes.next().unwrap_or(0));
        if sector.bits.iter().any(|&byte| byte != 0) {
            sector.crc = U32::new(checksum(uuid, group, number, &sector.bits));
        }
    }
    zerocopy::transmute!(page)
}

/// What one sector of a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sector {
    /// 512 zero bytes: no bit.
    Empty,
    /// Bits under the right checksum.
    Valid,
    /// Bytes under a checksum that is not theirs.
    Damaged {
        /// The checksum that stands there.
        found: u32,
        /// The one that the bits would need.
        expected: u32,
    },
}

/// Judges each sector of a page by itself.
pub fn judge(uuid: Uuid, group: Group, page: &PageBytes) -> [Sector; SECTORS] {
    let sectors: &[RawSector; SECTORS] = zerocopy::transmute_ref!(page);
    let mut verdicts = [Sector::Empty; SECTORS];
    for ((number, sector), verdict) in sectors.iter().enumerate().zip(&mut verdicts) {
        if is_zero(sector.as_bytes()) {
            continue;
        }
        let (found, expected) = (sector.crc.get(), checksum(uuid, group, number, &sector.bits));
        *verdict =
            if found == expected { Sector::Valid } else { Sector::Damaged { found, expected } };
    }
    verdicts
}

/// The bits of those sectors that `judge` found valid; the others count as empty.
pub fn trusted_bits(verdicts: &[Sector; SECTORS], page: &PageBytes) -> Box<Bits> {
    let sectors: &[RawSector; SECTORS] = zerocopy::transmute_ref!(page);
    let mut bits = Box::new([0; GROUP_WORDS as usize]);
    let mut bytes = [0; SECTORS * SECTOR_BITS];
    let parts = bytes.chunks_exact_mut(SECTOR_BITS);
    for ((sector, verdict), part) in sectors.iter().zip(verdicts).zip(parts) {
        if *verdict == Sector::Valid {
            part.copy_from_slice(&sector.bits);
        }
    }
    let words = bytes.as_chunks().0;
    bits.iter_mut().zip(words).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
    bits
}

/// What a page says, `None` for one without a bit. The error's offset counts from the page's start.
pub fn decode(uuid: Uuid, group: Group, page: &PageBytes) -> Result<Option<Box<Bits>>> {
    if is_zero(page) {
        return Ok(None);
    }
    let verdicts = judge(uuid, group, page);
    for (number, verdict) in verdicts.iter().enumerate() {
        if let Sector::Damaged { found, expected } = verdict {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "bitmap sector {number} of group {} has checksum {found:#010x}, expected {expected:#010x}",
                    group.0,
                ),
            )
            .at((number * size_of::<RawSector>()) as u64));
        }
    }
    Ok(Some(trusted_bits(&verdicts, page)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UUID: Uuid = Uuid([7; 16]);

    #[test]
    fn every_flipped_bit_is_found() {
        let mut bits = [0; GROUP_WORDS as usize];
        bits[0] = 1;
        bits[63] = u64::MAX;
        bits[507] = 1 << 63;
        let page = encode(UUID, Group(3), &bits);
        assert_eq!(*decode(UUID, Group(3), &page).unwrap().unwrap(), bits);
        for bit in 0..page.len() * 8 {
            let mut bad = page;
            bad[bit / 8] ^= 1 << (bit % 8);
            let error = decode(UUID, Group(3), &bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert_eq!(error.offset(), Some(bit as u64 / 8 / 512 * 512));
        }
    }

    #[test]
    fn a_page_in_the_wrong_place_is_found() {
        let mut bits = [0; GROUP_WORDS as usize];
        bits[100] = 5;
        let page = encode(UUID, Group(3), &bits);
        assert!(decode(UUID, Group(4), &page).is_err());
        assert!(decode(Uuid([8; 16]), Group(3), &page).is_err());
        let mut moved = [0; 4096];
        moved[..512].copy_from_slice(&page[512..1024]);
        assert!(decode(UUID, Group(3), &moved).is_err());
    }

    #[test]
    fn an_empty_page_is_all_zeros() {
        assert_eq!(encode(UUID, Group(0), &[0; GROUP_WORDS as usize]), [0; 4096]);
        assert!(decode(UUID, Group(0), &[0; 4096]).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn any_bits_come_back(words in proptest::collection::vec((0usize..508, any::<u64>()), 0..20)) {
            let mut bits = [0; GROUP_WORDS as usize];
            for (index, word) in words {
                bits[index] = word;
            }
            let page = encode(UUID, Group(9), &bits);
            let back = decode(UUID, Group(9), &page).unwrap();
            prop_assert_eq!(back.map_or([0; GROUP_WORDS as usize], |back| *back), bits);
        }
    }
}

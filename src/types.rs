//! Numbers that must not be mixed up: blocks, words and groups of blocks, file offsets, identities.

use std::fmt;

/// Bytes in a sector, the unit of virtual sizes.
pub const SECTOR_SIZE: u64 = 512;
/// Bytes in a block, the unit of allocation (`format-spec.md`, "Units").
pub const BLOCK_SIZE: u64 = 4096;
/// Blocks that one 64-bit word of a bitmap describes.
pub const WORD_BLOCKS: u64 = 64;
/// Guest bytes that one word describes; 256 KiB.
pub const WORD_BYTES: u64 = WORD_BLOCKS * BLOCK_SIZE;
/// Words in the bitmap page of one group.
pub const GROUP_WORDS: u64 = 508;
/// Blocks in one group; a whole number of words.
pub const GROUP_BLOCKS: u64 = GROUP_WORDS * WORD_BLOCKS;
/// Guest bytes in one group; 127 MiB.
pub const GROUP_BYTES: u64 = GROUP_BLOCKS * BLOCK_SIZE;

/// A block number: guest offset divided by [`BLOCK_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u64);

/// A run of 64 blocks that share one word of the bitmap: guest offset divided by [`WORD_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Word(pub u64);

/// A group of [`GROUP_BLOCKS`] blocks that share one bitmap page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group(pub u64);

/// A byte position in a layer file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileOffset(pub u64);

impl Block {
    /// The word that holds this block's bit.
    pub fn word(self) -> Word {
        Word(self.0 / WORD_BLOCKS)
    }

    /// The word with this block's bit alone set.
    pub fn mask(self) -> u64 {
        1 << (self.0 % WORD_BLOCKS)
    }
}

impl Word {
    /// The group that holds this word.
    pub fn group(self) -> Group {
        Group(self.0 / GROUP_WORDS)
    }

    /// This word's index in its group's bitmap.
    pub fn index(self) -> usize {
        (self.0 % GROUP_WORDS) as usize
    }

    /// The guest offset of its first block.
    pub fn guest_offset(self) -> u64 {
        self.0 * WORD_BYTES
    }

    /// Its `bit`-th block.
    pub fn block(self, bit: u32) -> Block {
        Block(self.0 * WORD_BLOCKS + u64::from(bit))
    }
}

impl Group {
    /// Its first word.
    pub fn first_word(self) -> Word {
        Word(self.0 * GROUP_WORDS)
    }
}

/// The bits of the blocks that bytes `from..to` of a word touch; `from < to <= WORD_BYTES`.
pub fn touched(from: u64, to: u64) -> u64 {
    bits(from / BLOCK_SIZE, to.div_ceil(BLOCK_SIZE))
}

/// The bits of the blocks that bytes `from..to` of a word cover wholly.
pub fn covered(from: u64, to: u64) -> u64 {
    bits(from.div_ceil(BLOCK_SIZE), to / BLOCK_SIZE)
}

/// Bits `from..to`, none where that is empty.
fn bits(from: u64, to: u64) -> u64 {
    if from >= to { 0 } else { (u64::MAX >> (WORD_BLOCKS - (to - from))) << from }
}

/// The runs of set bits in `mask` as `(first, end)`, lowest first.
pub fn runs(mut mask: u64) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let first = mask.trailing_zeros();
        let length = (mask >> first).trailing_ones();
        mask &= !bits(u64::from(first), u64::from(first + length));
        Some((first, first + length))
    })
}

/// The name of one layer file for its whole life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

/// 128 random bits drawn when a layer is frozen, so that a child can't take an earlier or a later
/// state of the same file for its parent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FreezeId(pub [u8; 16]);

/// The BLAKE3 root of a packed layer's content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Root(pub [u8; 32]);

/// What a parent link names: content that can't change any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// A frozen live layer.
    Frozen(Uuid, FreezeId),
    /// A packed layer.
    Packed(Root),
}

fn hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g, h, i, rest @ ..] = &self.0;
        for part in [&[*a, *b, *c, *d][..], &[*e, *g], &[*h, *i]] {
            hex(f, part)?;
            f.write_str("-")?;
        }
        let (clock, node) = rest.split_at(2);
        hex(f, clock)?;
        f.write_str("-")?;
        hex(f, node)
    }
}

impl fmt::Display for FreezeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frozen(uuid, freeze) => write!(f, "frozen layer {uuid} ({freeze})"),
            Self::Packed(root) => write!(f, "packed layer {root}"),
        }
    }
}

macro_rules! debug_as_display {
    ($($name:ty),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    )*};
}
debug_as_display!(Uuid, FreezeId, Root);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_follow_the_bytes() {
        assert_eq!(touched(0, WORD_BYTES), u64::MAX);
        assert_eq!(touched(4095, 4097), 0b11);
        assert_eq!(covered(4095, 8192), 0b10);
        assert_eq!(covered(1, 4096), 0);
        assert_eq!(covered(1, 100), 0);
        assert_eq!(touched(WORD_BYTES - 1, WORD_BYTES), 1 << 63);
    }

    #[test]
    fn runs_cover_the_mask_exactly() {
        assert_eq!(runs(0).count(), 0);
        assert_eq!(runs(u64::MAX).collect::<Vec<_>>(), [(0, 64)]);
        assert_eq!(
            runs(0b1011_0001 | 1 << 63).collect::<Vec<_>>(),
            [(0, 1), (4, 6), (7, 8), (63, 64)]
        );
    }

    #[test]
    fn a_uuid_prints_in_the_usual_form() {
        let uuid = Uuid(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
        assert_eq!(uuid.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
    }
}

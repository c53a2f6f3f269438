//! The map of a group: which blocks are present, and which have data.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    CHUNK_FRAMES, Entry, Fits, HEADER_SIZE, Hash, PackedHeader, RawMap, RawWord, checked, checksum,
    node,
};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::Bits;
use crate::format::geometry::block_count;
use crate::types::{BLOCK_SIZE, Block, GROUP_BLOCKS, GROUP_WORDS, Group, Word};

/// Which blocks of a group are present and which have data, and where that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// The group.
    pub group: Group,
    /// Where its first frame stands.
    pub frames_offset: u64,
    /// Where its first chunk stands, right behind the last frame.
    pub chunks_offset: u64,
    /// Present blocks.
    pub present: Box<Bits>,
    /// Those with data.
    pub data: Box<Bits>,
    /// Data blocks before each word.
    rank: Box<[u32; GROUP_WORDS as usize]>,
    /// Data blocks in all.
    pub data_blocks: u32,
    /// The hash of each chunk.
    pub chunks: Vec<Hash>,
}

impl Map {
    /// The map of a group with these bits.
    pub fn new(
        group: Group,
        frames_offset: u64,
        chunks_offset: u64,
        present: Box<Bits>,
        data: Box<Bits>,
        chunks: Vec<Hash>,
    ) -> Self {
        let mut data_blocks = 0;
        let mut rank = Box::new([0; GROUP_WORDS as usize]);
        for (rank, word) in rank.iter_mut().zip(data.iter()) {
            *rank = data_blocks;
            data_blocks += word.count_ones();
        }
        Self { group, frames_offset, chunks_offset, present, data, rank, data_blocks, chunks }
    }

    /// The blocks of a word that have data.
    pub fn data_in(&self, word: Word) -> u64 {
        self.data.get(word.index()).copied().unwrap_or(0)
    }

    /// How many data blocks of the group come before this one.
    pub fn rank(&self, block: Block) -> u32 {
        let word = block.word();
        let before = self.data_in(word) & (block.mask() - 1);
        self.rank.get(word.index()).copied().unwrap_or(0) + before.count_ones()
    }

    /// The occupied words: a bit for each, and their bits one after the other.
    fn words(&self) -> ([u8; 64], Vec<RawWord>) {
        let mut occupied = [0u64; 8];
        let mut words = Vec::new();
        for (index, (&present, &data)) in self.present.iter().zip(self.data.iter()).enumerate() {
            if present != 0 {
                if let Some(bits) = occupied.get_mut(index / 64) {
                    *bits |= 1 << (index % 64);
                }
                words.push(RawWord { present: U64::new(present), data: U64::new(data) });
            }
        }
        (zerocopy::transmute!(occupied.map(U64::new)), words)
    }

    /// The hash that the directory keeps.
    pub fn hash(&self) -> Hash {
        let (occupied, words) = self.words();
        let mut hasher = node("group");
        hasher.update(&self.group.0.to_le_bytes());
        hasher.update(&occupied);
        hasher.update(words.as_bytes());
        hasher.update(self.chunks.as_flattened());
        *hasher.finalize().as_bytes()
    }

    /// The bytes of the map.
    pub fn encode(&self) -> Vec<u8> {
        let (occupied, words) = self.words();
        let raw = RawMap {
            group: U64::new(self.group.0),
            frames_offset: U64::new(self.frames_offset),
            chunks_offset: U64::new(self.chunks_offset),
            word_count: U32::new(words.len() as u32),
            data_blocks: U32::new(self.data_blocks),
            occupied,
        };
        let mut bytes = [raw.as_bytes(), words.as_bytes(), self.chunks.as_flattened()].concat();
        bytes.extend(checksum(&[], &bytes).to_le_bytes());
        bytes
    }

    /// Reads the map that a directory entry speaks of.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn decode(entry: &Entry, header: &PackedHeader, bytes: &[u8]) -> Result<Self> {
        let name = format!("map of group {}", entry.group.0);
        let unfit = |what: &str| Error::new(ErrorKind::Corrupt, format!("{name}: {what}"));
        let body = checked(&name, &[], bytes)?;
        let Ok((raw, rest)) = RawMap::ref_from_prefix(body) else {
            return Err(unfit("cut short"));
        };
        let Ok((words, hashes)) =
            <[RawWord]>::ref_from_prefix_with_elems(rest, raw.word_count.get() as usize)
        else {
            return Err(unfit("its words reach beyond its end"));
        };
        let (chunks, []) = hashes.as_chunks::<32>() else {
            return Err(unfit("a chunk's hash is cut short"));
        };
        let (present, data) = spread(&raw.occupied, words).map_err(unfit)?;
        let map = Self::new(
            Group(raw.group.get()),
            raw.frames_offset.get(),
            raw.chunks_offset.get(),
            present,
            data,
            chunks.to_vec(),
        );
        map.check(entry, header).map_err(unfit)?;
        Ok(map)
    }

    fn check(&self, entry: &Entry, header: &PackedHeader) -> Fits<()> {
        if self.group != entry.group || self.data_blocks != entry.data_blocks {
            return Err("not the group that the directory names");
        }
        let last = block_count(header.virtual_size).saturating_sub(self.group.0 * GROUP_BLOCKS);
        let beyond = self.present.iter().enumerate().any(|(index, &word)| {
            word != 0 && index as u64 * 64 + u64::from(63 - word.leading_zeros()) >= last
        });
        if beyond {
            return Err("blocks beyond the end of the device");
        }
        let frames = self.data_blocks.div_ceil(header.frame_blocks);
        if self.chunks.len() as u64 != u64::from(frames.div_ceil(CHUNK_FRAMES)) {
            return Err("another number of chunks than its data needs");
        }
        let most = u64::from(self.data_blocks) * BLOCK_SIZE;
        let fits = self.frames_offset >= HEADER_SIZE
            && self.chunks_offset >= self.frames_offset
            && self.chunks_offset - self.frames_offset <= most
            && self.chunks_offset <= entry.map_offset;
        if !fits {
            return Err("frames or chunks where they cannot be");
        }
        if self.hash() != entry.hash {
            return Err("not the hash that the directory has");
        }
        Ok(())
    }
}

/// The bits of a group from its occupied words.
fn spread(occupied: &[u8; 64], words: &[RawWord]) -> Fits<(Box<Bits>, Box<Bits>)> {
    let (mut present, mut data) =
        (Box::new([0; GROUP_WORDS as usize]), Box::new([0; GROUP_WORDS as usize]));
    let mut words = words.iter();
    for (byte, bits) in occupied.iter().enumerate() {
        for bit in (0..8).filter(|bit| bits >> bit & 1 == 1) {
            let index = byte * 8 + bit;
            let (Some(word), Some(p), Some(d)) =
                (words.next(), present.get_mut(index), data.get_mut(index))
            else {
                return Err("occupied words beyond the group or its list");
            };
            (*p, *d) = (word.present.get(), word.data.get());
            if *p == 0 || *d & !*p != 0 {
                return Err("an occupied word without a block, or data in an absent block");
            }
        }
    }
    if words.next().is_some() {
        return Err("more words than occupied ones");
    }
    Ok((present, data))
}

//! Frames, and the chunks that describe them.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use super::{CHUNK_FRAMES, CRC_SIZE, Hash, Map, RawFrame, checked, checksum, corrupt, node};
use crate::error::Result;
use crate::types::Group;

/// A frame: the hash of its decoded bytes, and where its stored bytes end, counted from the group's
/// first frame. It begins where the one before it ends, and is stored as it is if that makes it as
/// long as decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// [`super::frame_hash`].
    pub hash: Hash,
    /// End of the stored bytes.
    pub end: u32,
    /// CRC-32 of the stored bytes: a bit that a decompressor ignores counts too.
    pub checksum: u32,
}

/// Up to [`CHUNK_FRAMES`] frames with the CRC-32 of each of their blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The frames.
    pub frames: Vec<Frame>,
    /// CRC-32 of each block.
    pub checksums: Vec<u32>,
}

/// Bytes of a chunk of that many frames and blocks.
fn chunk_length(frames: u32, blocks: u32) -> u32 {
    frames * size_of::<RawFrame>() as u32 + blocks * CRC_SIZE as u32 + CRC_SIZE as u32
}

/// Where a chunk stands, counted from the group's first one: offset, length, frames, blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// From the group's first chunk.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
    /// Frames in it.
    pub frames: u32,
    /// Blocks in it.
    pub blocks: u32,
}

impl ChunkPlace {
    /// The place of chunk `number` of a group with that many data blocks, which must reach into it.
    pub fn new(number: u32, data_blocks: u32, frame_blocks: u32) -> Self {
        let full = CHUNK_FRAMES * frame_blocks;
        let blocks = data_blocks.saturating_sub(number * full).min(full);
        let frames = blocks.div_ceil(frame_blocks);
        Self {
            offset: number * chunk_length(CHUNK_FRAMES, full),
            length: chunk_length(frames, blocks),
            frames,
            blocks,
        }
    }
}

impl Chunk {
    /// The hash that the map keeps: over the frames' hashes.
    pub fn hash(&self) -> Hash {
        let mut hasher = node("chunk");
        for frame in &self.frames {
            hasher.update(&frame.hash);
        }
        *hasher.finalize().as_bytes()
    }

    /// The bytes of chunk `number` of a group.
    pub fn encode(&self, group: Group, number: u32) -> Vec<u8> {
        let frame = |frame: &Frame| RawFrame {
            hash: frame.hash,
            end: U32::new(frame.end),
            crc: U32::new(frame.checksum),
        };
        let frames: Vec<RawFrame> = self.frames.iter().map(frame).collect();
        let mut bytes = frames.as_bytes().to_vec();
        bytes.extend(self.checksums.iter().flat_map(|crc| crc.to_le_bytes()));
        bytes.extend(checksum(&salt(group, number), &bytes).to_le_bytes());
        bytes
    }

    /// Reads chunk `number` of a group.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Corrupt`].
    pub fn decode(map: &Map, number: u32, place: ChunkPlace, bytes: &[u8]) -> Result<Self> {
        let name = format!("chunk {number} of group {}", map.group.0);
        let body = checked(&name, &salt(map.group, number), bytes)?;
        let Ok((frames, rest)) =
            <[RawFrame]>::ref_from_prefix_with_elems(body, place.frames as usize)
        else {
            return corrupt(format!("{name} is cut short"));
        };
        let Ok(checksums) = <[U32]>::ref_from_bytes(rest) else {
            return corrupt(format!("{name} is cut short"));
        };
        let chunk = Self {
            frames: frames
                .iter()
                .map(|raw| Frame { hash: raw.hash, end: raw.end.get(), checksum: raw.crc.get() })
                .collect(),
            checksums: checksums.iter().map(|crc| crc.get()).collect(),
        };
        let ordered = chunk.frames.is_sorted_by(|a, b| a.end < b.end);
        let end = chunk.frames.last().map_or(0, |frame| u64::from(frame.end));
        if !ordered || end > map.chunks_offset - map.frames_offset {
            return corrupt(format!("{name}: frames that overlap or reach beyond the group's"));
        }
        if chunk.checksums.len() != place.blocks as usize
            || map.chunks.get(number as usize) != Some(&chunk.hash())
        {
            return corrupt(format!("{name} does not have the hash that its map has"));
        }
        Ok(chunk)
    }
}

fn salt(group: Group, number: u32) -> [u8; 12] {
    let mut salt = [0; 12];
    let bytes = group.0.to_le_bytes().into_iter().chain(number.to_le_bytes());
    salt.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    salt
}

//! A frame: where it stands, what it must be, and decoding it.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use zstd::bulk::Decompressor;

use crate::error::{Error, ErrorKind, Result};
use crate::format::packed::{CHUNK_FRAMES, Chunk, Frame, Map, PackedHeader, frame_hash};
use crate::types::BLOCK_SIZE;

/// Decompresses a frame that takes at most `room` bytes then, with a context that each thread keeps:
/// to make one costs as much as to decode a frame.
fn decompress(stored: &[u8], room: usize) -> io::Result<Vec<u8>> {
    thread_local! {
        static KEPT: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
    }
    KEPT.with_borrow_mut(|kept| match kept {
        Some(decompressor) => decompressor.decompress(stored, room),
        None => kept.insert(Decompressor::new()?).decompress(stored, room),
    })
}

/// A frame and where it stands.
pub(super) struct Part {
    pub chunk: Arc<Chunk>,
    /// The frame's number in its group.
    pub frame: u32,
    /// Its stored bytes in the file.
    pub stored: (u64, u64),
    /// Its length when decoded.
    pub decoded: u64,
}

impl Part {
    /// A frame whose stored bytes are at `start..end` of its group's.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a place that cannot be.
    pub fn new(
        header: &PackedHeader,
        map: &Map,
        chunk: Arc<Chunk>,
        frame: u32,
        (start, end): (u32, u32),
    ) -> Result<Self> {
        let first = frame * header.frame_blocks;
        let blocks = header.frame_blocks.min(map.data_blocks - first);
        let stored = (map.frames_offset + u64::from(start), map.frames_offset + u64::from(end));
        let decoded = u64::from(blocks) * BLOCK_SIZE;
        if start >= end || stored.1 - stored.0 > decoded {
            let detail = format!(
                "frame {frame} of group {} takes bytes {start} to {end} of the group's, expected 1 \
                 to {decoded} of them",
                map.group.0
            );
            return Err(Error::new(ErrorKind::Corrupt, detail).at(stored.0));
        }
        Ok(Self { chunk, frame, stored, decoded })
    }

    /// The decoded bytes, verified against the hash; else what is wrong.
    pub fn decode(&self, stored: &[u8]) -> std::result::Result<Vec<u8>, String> {
        let decoded = self.expand(stored)?;
        if self.entry().map(|frame| frame.hash) != Some(frame_hash(&decoded)) {
            return Err(format!("frame {} is not what its hash says", self.frame));
        }
        Ok(decoded)
    }

    /// The decoded bytes if what is stored has its checksum; else what is wrong.
    pub fn expand(&self, stored: &[u8]) -> std::result::Result<Vec<u8>, String> {
        let number = self.frame;
        if self.entry().map(|frame| frame.checksum) != Some(crc32fast::hash(stored)) {
            return Err(format!("frame {number} does not have its checksum"));
        }
        if self.is_raw() {
            return Ok(stored.to_vec());
        }
        // The room is exact, so a frame that would grow beyond it is refused.
        let decoded = decompress(stored, self.decoded as usize)
            .map_err(|error| format!("frame {number} can't be decompressed: {error}"))?;
        if decoded.len() as u64 != self.decoded {
            let found = decoded.len();
            return Err(format!("frame {number} has {found} bytes, expected {}", self.decoded));
        }
        Ok(decoded)
    }

    fn entry(&self) -> Option<&Frame> {
        self.chunk.frames.get(self.place())
    }

    fn place(&self) -> usize {
        (self.frame % CHUNK_FRAMES) as usize
    }

    /// Whether the frame is stored as it is.
    pub fn is_raw(&self) -> bool {
        self.stored.1 - self.stored.0 == self.decoded
    }

    /// The checksums of its blocks.
    pub fn checksums(&self, header: &PackedHeader) -> impl Iterator<Item = u32> {
        let first = self.place() * header.frame_blocks as usize;
        self.chunk.checksums.iter().skip(first).copied()
    }

    /// How many bytes from the frame's start on are stored as they are, to the end of its chunk at
    /// most; `None` where the frame itself is compressed.
    pub fn raw_length(&self, header: &PackedHeader, data_blocks: u32) -> Option<u64> {
        if !self.is_raw() {
            return None;
        }
        let mut length = self.decoded;
        let frames = self.chunk.frames.iter().skip(self.place());
        let pairs = frames.clone().zip(frames.skip(1));
        for (number, (frame, next)) in (self.frame + 1..).zip(pairs) {
            let blocks = header.frame_blocks.min(data_blocks - number * header.frame_blocks);
            if u64::from(next.end - frame.end) != u64::from(blocks) * BLOCK_SIZE {
                break;
            }
            length += u64::from(blocks) * BLOCK_SIZE;
        }
        Some(length)
    }
}

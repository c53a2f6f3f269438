//! What all packed layers of a process share, with a bound on its memory: decoded frames, keyed by
//! the content that they belong to, and chunks, keyed by the open file, since they hold its offsets.
//!
//! A simulation keeps nothing: a thread that waits inside a cache for another one would stand still for
//! ever under its scheduler, and what one run left would change how the next one goes.

use std::sync::{Arc, LazyLock};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::error::Result;
use crate::format::packed::Chunk;
use crate::types::{Group, Root};
use crate::wait::{Attempt, NotDone, Wait};

/// Bytes of decoded frames that are kept.
const FRAME_BYTES: u64 = 16 << 20;
/// Bytes of chunks that are kept; they describe some 500 times as much data.
const CHUNK_BYTES: u64 = 16 << 20;

/// The bytes of a decoded frame.
pub(super) type Decoded = Arc<Vec<u8>>;
/// A frame of a group of a layer.
pub(super) type FrameKey = (Root, Group, u32);
/// A chunk of a group of an open file.
pub(super) type ChunkKey = (u64, Group, u32);

#[derive(Clone)]
struct Bytes;

impl Weighter<FrameKey, Decoded> for Bytes {
    fn weight(&self, _: &FrameKey, frame: &Decoded) -> u64 {
        (size_of::<FrameKey>() + frame.len()) as u64
    }
}

impl Weighter<ChunkKey, Arc<Chunk>> for Bytes {
    fn weight(&self, _: &ChunkKey, chunk: &Arc<Chunk>) -> u64 {
        let tables = size_of_val(&*chunk.frames) + size_of_val(&*chunk.checksums);
        (size_of::<ChunkKey>() + tables) as u64
    }
}

static FRAMES: LazyLock<Cache<FrameKey, Decoded, Bytes>> =
    LazyLock::new(|| Cache::with_weighter((FRAME_BYTES / (48 << 10)) as usize, FRAME_BYTES, Bytes));
static CHUNKS: LazyLock<Cache<ChunkKey, Arc<Chunk>, Bytes>> =
    LazyLock::new(|| Cache::with_weighter((CHUNK_BYTES / 5600) as usize, CHUNK_BYTES, Bytes));

/// The decoded frame, made by `make` unless it is known. Threads that race for it wait for the first.
pub(super) fn frame(key: FrameKey, make: impl FnOnce() -> Result<Decoded>) -> Result<Decoded> {
    if cfg!(simulation) { make() } else { FRAMES.get_or_insert_with(&key, make) }
}

/// The decoded frame, if it is known.
pub(super) fn known_frame(key: FrameKey) -> Option<Decoded> {
    FRAMES.get(&key)
}

/// Keeps a decoded frame.
pub(super) fn keep_frame(key: FrameKey, frame: Decoded) {
    if !cfg!(simulation) {
        FRAMES.insert(key, frame);
    }
}

/// The chunk, made by `make`, which may have to wait, unless it is known.
pub(super) fn chunk(
    key: ChunkKey,
    wait: Wait,
    make: impl FnOnce() -> Result<Arc<Chunk>>,
) -> Attempt<Arc<Chunk>> {
    match wait {
        Wait::Allowed if cfg!(simulation) => Ok(make()?),
        Wait::Allowed => Ok(CHUNKS.get_or_insert_with(&key, make)?),
        Wait::Decode | Wait::Never => CHUNKS.get(&key).ok_or(NotDone::WouldWait),
    }
}

/// Forgets all decoded frames of the process: for tests that count what is read.
pub fn forget_frames() {
    FRAMES.clear();
}

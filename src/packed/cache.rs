//! What all packed layers of a process share, with a bound on its memory: decoded frames, keyed by
//! the content that they belong to, and chunks, keyed by the open file, since they hold its offsets.

use std::hash::Hash;
use std::sync::{Arc, LazyLock};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::error::Result;
use crate::format::packed::Chunk;
use crate::storage::Wait;
use crate::types::{Group, Root};

/// Bytes of decoded frames that are kept.
const FRAME_BYTES: u64 = 16 << 20;
/// Bytes of chunks that are kept; they describe some 500 times as much data.
const CHUNK_BYTES: u64 = 16 << 20;

/// A frame of a group of a layer.
pub(super) type FrameKey = (Root, Group, u32);
/// A chunk of a group of an open file.
pub(super) type ChunkKey = (u64, Group, u32);

#[derive(Clone)]
struct Bytes;

impl Weighter<FrameKey, Arc<[u8]>> for Bytes {
    fn weight(&self, _: &FrameKey, frame: &Arc<[u8]>) -> u64 {
        (size_of::<FrameKey>() + frame.len()) as u64
    }
}

impl Weighter<ChunkKey, Arc<Chunk>> for Bytes {
    fn weight(&self, _: &ChunkKey, chunk: &Arc<Chunk>) -> u64 {
        let tables = size_of_val(&*chunk.frames) + size_of_val(&*chunk.checksums);
        (size_of::<ChunkKey>() + tables) as u64
    }
}

static FRAMES: LazyLock<Cache<FrameKey, Arc<[u8]>, Bytes>> =
    LazyLock::new(|| Cache::with_weighter((FRAME_BYTES / (16 << 10)) as usize, FRAME_BYTES, Bytes));
static CHUNKS: LazyLock<Cache<ChunkKey, Arc<Chunk>, Bytes>> =
    LazyLock::new(|| Cache::with_weighter((CHUNK_BYTES / 3500) as usize, CHUNK_BYTES, Bytes));

/// The decoded frame, made by `make` unless it is known; `None` where that would be waiting.
pub(super) fn frame(
    key: FrameKey,
    wait: Wait,
    make: impl FnOnce() -> Result<Arc<[u8]>>,
) -> Result<Option<Arc<[u8]>>> {
    get(&FRAMES, &key, wait, make)
}

/// The chunk, as [`frame`].
pub(super) fn chunk(
    key: ChunkKey,
    wait: Wait,
    make: impl FnOnce() -> Result<Arc<Chunk>>,
) -> Result<Option<Arc<Chunk>>> {
    get(&CHUNKS, &key, wait, make)
}

fn get<K: Copy + Eq + Hash, V: Clone>(
    cache: &Cache<K, V, Bytes>,
    key: &K,
    wait: Wait,
    make: impl FnOnce() -> Result<V>,
) -> Result<Option<V>>
where
    Bytes: Weighter<K, V>,
{
    match wait {
        Wait::Yes => cache.get_or_insert_with(key, make).map(Some),
        Wait::No => Ok(cache.get(key)),
    }
}

/// Forgets all decoded frames, for tests that count what is read.
#[cfg(test)]
pub(super) fn forget_frames() {
    FRAMES.clear();
}

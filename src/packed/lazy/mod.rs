//! A packed layer that is far away: only what is read is fetched, and kept in a local cache.
//!
//! Invariants:
//! - no byte gets out, or into the cache, before hashes lead from it to the root that was asked for;
//! - the cache is never believed: what it gives is verified like what the source gives, and fetched
//!   again if it fails. So whatever a crash, another process or time has done to it costs fetches
//!   and nothing else, and it is never synced;
//! - an error leaves no state behind: the next read tries again.

mod cache;
mod source;

use std::sync::Arc;

use self::cache::Cache;
use super::cache as shared;
use super::opening::Opening;
use super::reader::{Part, next_serial};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::Bits;
use crate::format::packed::{CHUNK_FRAMES, Chunk, ChunkPlace, Entry, Map, PackedHeader};
use crate::storage::{Storage, Wait};
use crate::sync::LazyTable;
use crate::types::{BLOCK_SIZE, Group, Root, Word, runs, touched};

pub use source::{ByteSource, FileSource};

/// Number of the part that is header, directory and footer.
const OPENING: u64 = 0;

/// A packed layer read from a [`ByteSource`] through a cache.
///
/// Opening fetches header, footer and directory; a read fetches the map of its group, the chunks
/// that describe its frames (48 KiB of data each) and those frames, unless the cache has them. All of
/// them are verified up to the root.
#[derive(Debug)]
pub struct LazyPacked<S> {
    source: S,
    cache: Cache,
    /// Tells open layers apart in the cache of chunks.
    serial: u64,
    opening: Opening,
    /// By the entry's place in the directory: number of the group's first part.
    first_parts: Vec<u64>,
    maps: LazyTable<Map>,
}

impl<S: ByteSource> LazyPacked<S> {
    /// Opens the layer with this root. `cache` is an empty file, or one that served as the cache of
    /// the same layer before; any number of processes may share it.
    ///
    /// # Errors
    /// [`ErrorKind::ParentMismatch`] where the source has another layer;
    /// [`ErrorKind::InvalidInput`] for a file that is something else than this layer's cache;
    /// [`ErrorKind::NotAnImage`], [`ErrorKind::Unsupported`], [`ErrorKind::Corrupt`]; those of the
    /// source, after which a later try may succeed.
    pub fn open(source: S, root: Root, cache: Arc<dyn Storage>) -> Result<Self> {
        let length = source.length()?;
        let cache = Cache::open(cache, root, length)?;
        let opening =
            open(&source, &cache, root, length).map_err(|error| error.in_file(source.name()))?;
        let header = &opening.header;
        let mut next = OPENING + 1;
        let first_parts = opening.entries.iter().map(|entry| {
            let first = next;
            next += parts(entry, header);
            first
        });
        let first_parts = first_parts.collect();
        let maps = LazyTable::new(opening.entries.len() as u64);
        Ok(Self { source, cache, serial: next_serial(), opening, first_parts, maps })
    }

    /// The header.
    pub fn header(&self) -> &PackedHeader {
        &self.opening.header
    }

    /// What the layer is.
    pub fn root(&self) -> Root {
        self.opening.footer.root
    }

    /// The present blocks of a group; `None` where there are none.
    ///
    /// # Errors
    /// Those of [`LazyPacked::read`].
    pub fn bits(&self, group: Group) -> Result<Option<Box<Bits>>> {
        Ok(self.map(group)?.map(|(_, map)| map.present.clone()))
    }

    /// The blocks of a word that have data; the other present ones are zeros.
    ///
    /// # Errors
    /// Those of [`LazyPacked::read`].
    pub fn data(&self, word: Word) -> Result<u64> {
        Ok(self.map(word.group())?.map_or(0, |(_, map)| map.data_in(word)))
    }

    /// The first group at or after `from` with a present block.
    pub fn next_group(&self, from: Group) -> Option<Group> {
        let entries = &self.opening.entries;
        let place = entries.partition_point(|entry| entry.group < from);
        entries.get(place).map(|entry| entry.group)
    }

    /// Fills `buf` with present bytes, `from` counted from the word's start, within the word.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where what the source sends is not what the root says; those of the
    /// source. The next read of the same bytes tries again.
    pub fn read(&self, word: Word, from: u64, buf: &mut [u8]) -> Result<()> {
        let to = from + buf.len() as u64;
        let Some((first_part, map)) = self.map(word.group())? else {
            buf.fill(0);
            return Ok(());
        };
        let mut rest = buf;
        let mut at = from;
        for (first, end) in runs(map.data_in(word) & touched(from, to)) {
            let start = at.max(u64::from(first) * BLOCK_SIZE);
            let stop = to.min(u64::from(end) * BLOCK_SIZE);
            let (zeros, after) = rest.split_at_mut((start - at) as usize);
            zeros.fill(0);
            let (run, after) = after.split_at_mut((stop - start) as usize);
            self.read_data(first_part, map, word, start, run)?;
            (rest, at) = (after, stop);
        }
        rest.fill(0);
        Ok(())
    }

    /// Reads bytes of neighbouring data blocks of a word.
    fn read_data(
        &self,
        first_part: u64,
        map: &Map,
        word: Word,
        from: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let in_frame = self.header().frame_blocks;
        let (mut at, mut rest) = (from, buf);
        while !rest.is_empty() {
            let rank = map.rank(word.block((at / BLOCK_SIZE) as u32));
            let frame = self.frame(first_part, map, rank / in_frame)?;
            let within = u64::from(rank % in_frame) * BLOCK_SIZE + at % BLOCK_SIZE;
            let bytes = frame.get(within as usize..).unwrap_or_default();
            let (piece, after) = rest.split_at_mut(rest.len().min(bytes.len()));
            if piece.is_empty() {
                return Err(self.corrupt("a frame that is cut short".into(), map.frames_offset));
            }
            let length = piece.len();
            piece.copy_from_slice(bytes.get(..length).unwrap_or_default());
            (rest, at) = (after, at + length as u64);
        }
        Ok(())
    }

    /// The number of a group's first part, and its map.
    fn map(&self, group: Group) -> Result<Option<(u64, &Map)>> {
        let entries = &self.opening.entries;
        let Ok(place) = entries.binary_search_by_key(&group, |entry| entry.group) else {
            return Ok(None);
        };
        let (Some(entry), Some(&first)) = (entries.get(place), self.first_parts.get(place)) else {
            return Ok(None);
        };
        let map = self.maps.get_or_try_make(place as u64, || {
            let part = first + parts(entry, self.header()) - 1;
            self.part(part, entry.map_offset, entry.map_length.into(), |bytes| {
                Map::decode(entry, self.header(), bytes)
            })
        })?;
        Ok(Some((first, map)))
    }

    fn chunk(&self, first_part: u64, map: &Map, number: u32) -> Result<Arc<Chunk>> {
        let load = || {
            let place = ChunkPlace::new(number, map.data_blocks, self.header().frame_blocks);
            let frames = map.data_blocks.div_ceil(self.header().frame_blocks);
            let part = first_part + u64::from(frames + number);
            let at = map.chunks_offset + u64::from(place.offset);
            self.part(part, at, place.length.into(), |bytes| {
                Chunk::decode(map, number, place, bytes).map(Arc::new)
            })
        };
        let key = (self.serial, map.group, number);
        // Waiting for it is never refused.
        shared::chunk(key, Wait::Yes, load)?
            .ok_or_else(|| self.corrupt("no chunk".into(), map.chunks_offset))
    }

    /// The decoded bytes of a frame.
    fn frame(&self, first_part: u64, map: &Map, frame: u32) -> Result<shared::Decoded> {
        let load = || {
            let (number, place) = (frame / CHUNK_FRAMES, (frame % CHUNK_FRAMES) as usize);
            let chunk = self.chunk(first_part, map, number)?;
            // A frame begins where the one before it ends, which may be in the chunk before.
            let before = match (place, number) {
                (0, 0) => None,
                (0, _) => self.chunk(first_part, map, number - 1)?.frames.last().copied(),
                _ => chunk.frames.get(place - 1).copied(),
            };
            let start = before.map_or(0, |frame| frame.end);
            let end = chunk.frames.get(place).map_or(start, |frame| frame.end);
            let part = Part::new(self.header(), map, chunk, frame, (start, end))?;
            let (from, to) = part.stored;
            self.part(first_part + u64::from(frame), from, to - from, |bytes| {
                part.decode(bytes)
                    .map(Arc::new)
                    .map_err(|what| self.corrupt(format!("group {}: {what}", map.group.0), from))
            })
        };
        let key = (self.root(), map.group, frame);
        shared::frame(key, load)
    }

    /// A part of the layer, from the cache if that has it, else from the source and then into the
    /// cache; `check` verifies the bytes up to the root, wherever they come from.
    fn part<T>(
        &self,
        part: u64,
        at: u64,
        length: u64,
        check: impl Fn(&[u8]) -> Result<T>,
    ) -> Result<T> {
        if let Some(bytes) = self.cache.get(part, at, length)
            && let Ok(value) = check(&bytes)
        {
            return Ok(value);
        }
        let mut bytes = vec![0; length as usize];
        let located = |error: Error| error.at(at).in_file(self.source.name());
        self.source.read(at, &mut bytes).map_err(located)?;
        let value = check(&bytes).map_err(located)?;
        self.cache.put(part, &[(at, &bytes)]);
        Ok(value)
    }

    fn corrupt(&self, detail: String, at: u64) -> Error {
        Error::new(ErrorKind::Corrupt, detail).at(at).in_file(self.source.name())
    }
}

/// How many parts a group has: its frames, its chunks and its map, in this order.
fn parts(entry: &Entry, header: &PackedHeader) -> u64 {
    let frames = u64::from(entry.data_blocks.div_ceil(header.frame_blocks));
    frames + frames.div_ceil(CHUNK_FRAMES.into()) + 1
}

/// Header, footer and directory of the layer with this root.
fn open(source: &impl ByteSource, cache: &Cache, root: Root, length: u64) -> Result<Opening> {
    let check = |opening: Opening| match opening.footer.root {
        found if found == root => Ok(opening),
        found => {
            let detail = format!("the layer with the root {found}, expected {root}");
            Err(Error::new(ErrorKind::ParentMismatch, detail))
        }
    };
    let cached = Opening::read(length, &mut |_, at, buf| {
        let bytes = cache.get(OPENING, at, buf.len() as u64);
        buf.copy_from_slice(&bytes.ok_or_else(|| Error::new(ErrorKind::NotFound, "not cached"))?);
        Ok(())
    });
    if let Ok(opening) = cached.and_then(check) {
        return Ok(opening);
    }
    let mut fetched = Vec::new();
    let opening = Opening::read(length, &mut |_, at, buf| {
        source.read(at, buf).map_err(|error| error.at(at))?;
        fetched.push((at, buf.to_vec()));
        Ok(())
    });
    let opening = opening.and_then(check)?;
    let pieces: Vec<_> = fetched.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
    cache.put(OPENING, &pieces);
    Ok(opening)
}

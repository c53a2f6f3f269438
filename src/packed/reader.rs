//! Reading a packed layer.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use zstd::bulk::Decompressor;

use super::cache::{self, Decoded};
use super::opening::Opening;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::Bits;
use crate::format::header::ParentLink;
use crate::format::packed::{
    CHUNK_FRAMES, Chunk, ChunkPlace, Entry, Footer, Frame, Map, PackedHeader, frame_hash, has_magic,
};
use crate::storage::{Lock, Storage, Wait, failed, read_blocks, read_exact_at, take_lock};
use crate::sync::LazyTable;
use crate::types::{BLOCK_SIZE, GROUP_WORDS, Group, Identity, Root, Word, runs, touched};

/// A group whose map has been read.
#[derive(Debug)]
struct Loaded {
    map: Map,
    /// Blocks whose checksum held since the open.
    checked: Box<[AtomicU64; GROUP_WORDS as usize]>,
    /// Frames whose hash held since the open, a bit for each.
    hashed: Box<[AtomicU64]>,
}

/// A number that tells open files apart.
pub(super) fn next_serial() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A packed layer open for reading, under a shared lock.
///
/// Opening reads header, footer and directory; maps and chunks come on first touch. What it keeps of
/// them follows what is touched; decoded frames and chunks are shared by all layers of the process.
#[derive(Debug)]
pub struct Packed {
    file: Arc<dyn Storage>,
    /// Tells open files apart in the cache of chunks.
    serial: u64,
    header: PackedHeader,
    footer: Footer,
    entries: Vec<Entry>,
    /// By the entry's place in the directory.
    loaded: LazyTable<Loaded>,
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

impl Packed {
    /// Whether a file is a packed layer, by its first bytes.
    ///
    /// # Errors
    /// Host errors.
    pub fn recognise(file: &dyn Storage) -> Result<bool> {
        let mut magic = [0; 8];
        let length = file.length().map_err(failed(file, "reading the length", 0))?;
        if length < magic.len() as u64 {
            return Ok(false);
        }
        read_exact_at(file, &mut magic, 0).map_err(failed(file, "reading the magic", 0))?;
        Ok(has_magic(&magic))
    }

    /// Opens a layer.
    ///
    /// # Errors
    /// [`ErrorKind::NotAnImage`], [`ErrorKind::Unsupported`]; [`ErrorKind::Corrupt`], for a file
    /// that was cut short too; host errors.
    pub fn open(file: Arc<dyn Storage>) -> Result<Self> {
        take_lock(&*file, Lock::Shared)?;
        let length = file.length().map_err(failed(&*file, "reading the length", 0))?;
        let Opening { header, footer, entries } =
            Opening::read(length, &mut |operation, at, buf| {
                read_exact_at(&*file, buf, at).map_err(failed(&*file, operation, at))
            })
            .map_err(|error| error.in_file(file.path()))?;
        let loaded = LazyTable::new(entries.len() as u64);
        Ok(Self { file, serial: next_serial(), header, footer, entries, loaded })
    }

    /// The header.
    pub fn header(&self) -> &PackedHeader {
        &self.header
    }

    /// What the layer is, whatever file it is in.
    pub fn root(&self) -> Root {
        self.footer.root
    }

    /// The identity that children link to.
    pub fn identity(&self) -> Identity {
        Identity::Packed(self.root())
    }

    /// The layer below.
    pub fn parent(&self) -> Option<&ParentLink> {
        self.header.parent.as_ref()
    }

    /// Counts, sizes and the place of the directory.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The file below.
    pub fn file(&self) -> &dyn Storage {
        &*self.file
    }

    /// The present blocks of a group; `None` where there are none.
    pub fn bits(&self, group: Group) -> Result<Option<Box<Bits>>> {
        Ok(self.loaded(group)?.map(|loaded| loaded.map.present.clone()))
    }

    /// The blocks of a word that have data; the other present ones are zeros.
    pub fn data(&self, word: Word) -> Result<u64> {
        Ok(self.loaded(word.group())?.map_or(0, |loaded| loaded.map.data_in(word)))
    }

    /// The first group at or after `from` with a present block.
    pub fn next_group(&self, from: Group) -> Option<Group> {
        let place = self.entries.partition_point(|entry| entry.group < from);
        self.entries.get(place).map(|entry| entry.group)
    }

    fn loaded(&self, group: Group) -> Result<Option<&Loaded>> {
        let Ok(place) = self.entries.binary_search_by_key(&group, |entry| entry.group) else {
            return Ok(None);
        };
        let Some(entry) = self.entries.get(place) else { return Ok(None) };
        let load = || {
            let map = self.read_map(entry)?;
            let checked = Box::new(std::array::from_fn(|_| AtomicU64::new(0)));
            let frames = map.data_blocks.div_ceil(self.header.frame_blocks);
            let hashed = (0..frames.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
            Ok(Loaded { map, checked, hashed })
        };
        self.loaded.get_or_try_make(place as u64, load).map(Some)
    }

    /// The directory.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(crate) fn read_map(&self, entry: &Entry) -> Result<Map> {
        let at = entry.map_offset;
        let mut bytes = vec![0; entry.map_length as usize];
        read_exact_at(&*self.file, &mut bytes, at).map_err(failed(
            &*self.file,
            "reading the map of a group",
            at,
        ))?;
        Map::decode(entry, &self.header, &bytes)
            .map_err(|error| error.at(at).in_file(self.file.path()))
    }

    fn chunk_place(&self, map: &Map, number: u32) -> ChunkPlace {
        ChunkPlace::new(number, map.data_blocks, self.header.frame_blocks)
    }

    pub(super) fn chunk_length(&self, map: &Map, number: u32) -> u64 {
        self.chunk_place(map, number).length.into()
    }

    pub(crate) fn read_chunk(&self, map: &Map, number: u32) -> Result<Chunk> {
        let place = self.chunk_place(map, number);
        let at = map.chunks_offset + u64::from(place.offset);
        let mut bytes = vec![0; place.length as usize];
        read_exact_at(&*self.file, &mut bytes, at).map_err(failed(
            &*self.file,
            "reading a chunk",
            at,
        ))?;
        Chunk::decode(map, number, place, &bytes)
            .map_err(|error| error.at(at).in_file(self.file.path()))
    }

    /// The frame that holds the data block of this rank; `None` where it would take waiting.
    fn part(&self, map: &Map, rank: u32, wait: Wait) -> Result<Option<Part>> {
        let frame = rank / self.header.frame_blocks;
        let number = frame / CHUNK_FRAMES;
        let chunk_at = |number| {
            let key = (self.serial, map.group, number);
            cache::chunk(key, wait, || self.read_chunk(map, number).map(Arc::new))
        };
        let Some(chunk) = chunk_at(number)? else { return Ok(None) };
        let place = (frame % CHUNK_FRAMES) as usize;
        // A frame begins where the one before it ends, which may be in the chunk before.
        let before = match place {
            0 if number == 0 => None,
            0 => match chunk_at(number - 1)? {
                Some(chunk) => chunk.frames.last().copied(),
                None => return Ok(None),
            },
            _ => chunk.frames.get(place - 1).copied(),
        };
        let start = before.map_or(0, |frame| frame.end);
        let end = chunk.frames.get(place).map_or(start, |frame| frame.end);
        self.frame_part(map, chunk, frame, (start, end)).map(Some)
    }

    /// A frame whose stored bytes are at `start..end` of its group's.
    pub(super) fn frame_part(
        &self,
        map: &Map,
        chunk: Arc<Chunk>,
        frame: u32,
        (start, end): (u32, u32),
    ) -> Result<Part> {
        Part::new(&self.header, map, chunk, frame, (start, end))
            .map_err(|error| error.in_file(self.file.path()))
    }

    /// Reads present bytes, `from` counted from the word's start; false where `wait` forbids what it
    /// would take.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a block (compressed: a frame) that is not what was packed.
    pub fn read(&self, word: Word, from: u64, buf: &mut [u8], wait: Wait) -> Result<bool> {
        let Some(loaded) = self.loaded(word.group())? else {
            buf.fill(0);
            return Ok(true);
        };
        let to = from + buf.len() as u64;
        let data = loaded.map.data_in(word) & touched(from, to);
        let mut rest = buf;
        let mut at = from;
        for (first, end) in runs(data) {
            let start = at.max(u64::from(first) * BLOCK_SIZE);
            let stop = to.min(u64::from(end) * BLOCK_SIZE);
            let (zeros, after) = rest.split_at_mut((start - at) as usize);
            zeros.fill(0);
            let (run, after) = after.split_at_mut((stop - start) as usize);
            if !self.read_data(loaded, word, start, run, wait)? {
                return Ok(false);
            }
            (rest, at) = (after, stop);
        }
        rest.fill(0);
        Ok(true)
    }

    /// Reads bytes of neighbouring data blocks of a word.
    fn read_data(
        &self,
        loaded: &Loaded,
        word: Word,
        from: u64,
        buf: &mut [u8],
        wait: Wait,
    ) -> Result<bool> {
        let (mut at, mut rest) = (from, buf);
        while !rest.is_empty() {
            let rank = loaded.map.rank(word.block((at / BLOCK_SIZE) as u32));
            let Some(part) = self.part(&loaded.map, rank, wait)? else { return Ok(false) };
            let within = u64::from(rank % self.header.frame_blocks) * BLOCK_SIZE + at % BLOCK_SIZE;
            let raw = part.raw_length(&self.header, loaded.map.data_blocks);
            let length = (rest.len() as u64).min(raw.unwrap_or(part.decoded) - within);
            let (piece, after) = rest.split_at_mut(length as usize);
            let done = match raw {
                Some(_) => {
                    let stored = part.stored.0 + within;
                    self.read_raw(loaded, &part, word, rank, (at, stored), piece, wait)?
                }
                None => self.read_decoded(loaded, &part, within, piece, wait)?,
            };
            if !done {
                return Ok(false);
            }
            (rest, at) = (after, at + length);
        }
        Ok(true)
    }

    /// Reads bytes that are stored as they are and checks the blocks that were not checked yet.
    /// `rank` is that of the first block, `at` the place in the word and in the file.
    #[expect(clippy::too_many_arguments, reason = "one read's coordinates")]
    fn read_raw(
        &self,
        loaded: &Loaded,
        part: &Part,
        word: Word,
        rank: u32,
        (at, stored): (u64, u64),
        buf: &mut [u8],
        wait: Wait,
    ) -> Result<bool> {
        let mask = touched(at, at + buf.len() as u64);
        let Some(checked) = loaded.checked.get(word.index()) else { return Ok(false) };
        if checked.load(Ordering::Relaxed) & mask == mask {
            return read_blocks(&*self.file, stored, buf, wait);
        }
        let skip = at % BLOCK_SIZE;
        let whole = (skip + buf.len() as u64).next_multiple_of(BLOCK_SIZE);
        let mut room = Vec::new();
        let blocks = if whole == buf.len() as u64 {
            &mut *buf
        } else {
            room.resize(whole as usize, 0);
            &mut room
        };
        if !read_blocks(&*self.file, stored - skip, blocks, wait)? {
            return Ok(false);
        }
        let expected = part.checksums(&self.header);
        let expected = expected.skip((rank % self.header.frame_blocks) as usize);
        for (number, (block, expected)) in
            (0..).zip(blocks.chunks_exact(BLOCK_SIZE as usize).zip(expected))
        {
            let found = crc32fast::hash(block);
            if found != expected {
                let guest = word.guest_offset() + at - skip + number * BLOCK_SIZE;
                let detail = format!(
                    "the block at guest offset {guest} has checksum {found:#010x}, expected \
                     {expected:#010x}"
                );
                return Err(self.corrupt(detail, stored - skip + number * BLOCK_SIZE));
            }
        }
        checked.fetch_or(mask, Ordering::Relaxed);
        let wanted = room.get(skip as usize..).and_then(|rest| rest.get(..buf.len()));
        if let Some(wanted) = wanted {
            buf.copy_from_slice(wanted);
        }
        Ok(true)
    }

    /// Reads bytes of a compressed frame.
    fn read_decoded(
        &self,
        loaded: &Loaded,
        part: &Part,
        within: u64,
        buf: &mut [u8],
        wait: Wait,
    ) -> Result<bool> {
        let Some(frame) = self.frame(loaded, part, wait)? else { return Ok(false) };
        let wanted = frame.get(within as usize..).and_then(|rest| rest.get(..buf.len()));
        match wanted {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => return Err(self.corrupt("a frame that is cut short".into(), part.stored.0)),
        }
        Ok(true)
    }

    /// The decoded bytes of a frame; `None` where `wait` forbids what it takes.
    fn frame(&self, loaded: &Loaded, part: &Part, wait: Wait) -> Result<Option<Decoded>> {
        let key = (self.root(), loaded.map.group, part.frame);
        match wait {
            Wait::Yes => {
                let decode = || match self.decode_once(loaded, part, wait)? {
                    Some(frame) => Ok(frame),
                    None => Err(self.corrupt("no frame".into(), part.stored.0)),
                };
                cache::frame(key, decode).map(Some)
            }
            Wait::No => Ok(cache::known_frame(key)),
            Wait::Decode => match cache::known_frame(key) {
                Some(frame) => Ok(Some(frame)),
                None => {
                    let frame = self.decode_once(loaded, part, wait)?;
                    frame.iter().for_each(|frame| cache::keep_frame(key, frame.clone()));
                    Ok(frame)
                }
            },
        }
    }

    /// The decoded bytes of a frame, verified: against its hash the first time, and against the
    /// checksum of what is stored from then on, which makes the same bytes. `None` where the page
    /// cache lacks a byte and `wait` is not [`Wait::Yes`].
    fn decode_once(&self, loaded: &Loaded, part: &Part, wait: Wait) -> Result<Option<Decoded>> {
        let Some(stored) = self.stored(part, wait)? else { return Ok(None) };
        let bit = 1 << (part.frame % 64);
        let hashed = loaded.hashed.get(part.frame as usize / 64);
        let decoded = if hashed.is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0) {
            part.expand(&stored)
        } else {
            part.decode(&stored)
        };
        let frame = decoded.map_err(|what| self.unlike(loaded.map.group, part, &what))?;
        hashed.map(|word| word.fetch_or(bit, Ordering::Relaxed));
        Ok(Some(Arc::new(frame)))
    }

    /// The decoded bytes of a frame, verified against its hash.
    pub(super) fn decode(&self, group: Group, part: &Part) -> Result<Vec<u8>> {
        let stored = self.stored(part, Wait::Yes)?.unwrap_or_default();
        part.decode(&stored).map_err(|what| self.unlike(group, part, &what))
    }

    fn stored(&self, part: &Part, wait: Wait) -> Result<Option<Vec<u8>>> {
        let (from, to) = part.stored;
        let mut stored = vec![0; (to - from) as usize];
        let all = read_blocks(&*self.file, from, &mut stored, wait)?;
        Ok(all.then_some(stored))
    }

    fn unlike(&self, group: Group, part: &Part, what: &str) -> Error {
        self.corrupt(format!("group {}: {what}", group.0), part.stored.0)
    }

    pub(super) fn corrupt(&self, detail: String, offset: u64) -> Error {
        Error::new(ErrorKind::Corrupt, detail).at(offset).in_file(self.file.path())
    }
}

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
    fn expand(&self, stored: &[u8]) -> std::result::Result<Vec<u8>, String> {
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
    fn raw_length(&self, header: &PackedHeader, data_blocks: u32) -> Option<u64> {
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

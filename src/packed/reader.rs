//! Reading a packed layer.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::cache::{self, Decoded};
use super::opening::Opening;
use super::origin::Origin;
use super::part::Part;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::Bits;
use crate::format::header::ParentLink;
use crate::format::packed::{
    CHUNK_FRAMES, Chunk, ChunkPlace, Entry, Footer, Map, PackedHeader, has_magic,
};
use crate::memory::Scatter;
use crate::storage::{Lock, Storage, failed, read_exact_at, take_lock};
use crate::sync::LazyTable;
use crate::types::{BLOCK_SIZE, GROUP_WORDS, Group, Identity, Root, Word, runs, touched};
use crate::wait::{Attempt, NotDone, Wait, waited};

/// A group whose map has been read.
#[derive(Debug)]
struct Loaded {
    map: Map,
    /// Its place in the directory.
    place: usize,
    /// Blocks whose checksum held since the open.
    checked: Box<[AtomicU64; GROUP_WORDS as usize]>,
    /// Frames whose hash held since the open, a bit for each.
    hashed: Box<[AtomicU64]>,
}

/// A number that tells open layers apart.
fn next_serial() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A packed layer open for reading: a file under a shared lock, or one that is far away.
///
/// Opening reads header, footer and directory; maps, chunks and frames come on first touch. What it
/// keeps of them follows what is touched; decoded frames and chunks are shared by all layers of the
/// process.
#[derive(Debug)]
pub struct Packed {
    origin: Origin,
    /// Tells open layers apart in the cache of chunks.
    serial: u64,
    header: PackedHeader,
    footer: Footer,
    entries: Vec<Entry>,
    /// By the entry's place in the directory.
    loaded: LazyTable<Loaded>,
}

impl Packed {
    /// Whether a file is a packed layer, by its first bytes.
    ///
    /// # Errors
    /// Host errors.
    pub fn is_packed(file: &dyn Storage) -> Result<bool> {
        let mut magic = [0; 8];
        match read_exact_at(file, &mut magic, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            read => {
                read.map_err(failed(file, "reading the magic", 0))?;
                Ok(has_magic(&magic))
            }
        }
    }

    /// Opens the layer in a file.
    ///
    /// # Errors
    /// [`ErrorKind::NotAnImage`], [`ErrorKind::Unsupported`]; [`ErrorKind::Corrupt`], for a file
    /// that was cut short too; host errors.
    pub fn open(file: Arc<dyn Storage>) -> Result<Self> {
        take_lock(&*file, Lock::Shared)?;
        let length = file.length().map_err(failed(&*file, "reading the length", 0))?;
        let opening = Opening::read(length, &mut |operation, at, buf| {
            read_exact_at(&*file, buf, at).map_err(failed(&*file, operation, at))
        })
        .map_err(|error| error.in_file(file.path()))?;
        Ok(Self::new(Origin::File(file), opening))
    }

    pub(super) fn new(origin: Origin, opening: Opening) -> Self {
        let Opening { header, footer, entries } = opening;
        let loaded = LazyTable::new(entries.len() as u64);
        Self { origin, serial: next_serial(), header, footer, entries, loaded }
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

    /// The file; none for a layer that is far away.
    pub fn file(&self) -> Option<&dyn Storage> {
        match &self.origin {
            Origin::File(file) => Some(&**file),
            Origin::Far(_) => None,
        }
    }

    /// What the layer is called in messages: its file, or where it comes from.
    pub fn path(&self) -> &Path {
        self.origin.name()
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The present blocks of a group; `None` where there are none.
    pub fn bits(&self, group: Group, wait: Wait) -> Attempt<Option<Box<Bits>>> {
        let loaded = self.loaded(group, wait)?;
        Ok(loaded.map(|loaded| loaded.map.present.clone()))
    }

    /// The blocks of a word that have data; the other present ones are zeros.
    pub fn data(&self, word: Word, wait: Wait) -> Attempt<u64> {
        Ok(self.loaded(word.group(), wait)?.map_or(0, |loaded| loaded.map.data_in(word)))
    }

    /// The first group at or after `from` with a present block.
    pub fn next_group(&self, from: Group) -> Option<Group> {
        let place = self.entries.partition_point(|entry| entry.group < from);
        self.entries.get(place).map(|entry| entry.group)
    }

    fn loaded(&self, group: Group, wait: Wait) -> Attempt<Option<&Loaded>> {
        let Ok(place) = self.entries.binary_search_by_key(&group, |entry| entry.group) else {
            return Ok(None);
        };
        let Some(entry) = self.entries.get(place) else { return Ok(None) };
        let load = || {
            if wait != Wait::Allowed {
                return Err(NotDone::WouldWait);
            }
            let map = self.read_map(place, entry)?;
            let checked = Box::new(std::array::from_fn(|_| AtomicU64::new(0)));
            let frames = map.data_blocks.div_ceil(self.header.frame_blocks);
            let hashed = (0..frames.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
            Ok(Loaded { map, place, checked, hashed })
        };
        self.loaded.get(place as u64, load).map(Some)
    }

    /// The directory.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The map of the group at this place of the directory.
    pub(crate) fn read_map(&self, place: usize, entry: &Entry) -> Result<Map> {
        let (at, length) = (entry.map_offset, entry.map_length.into());
        let number = self.origin.map_part(place, entry, &self.header);
        waited(self.origin.part(number, (at, length), Wait::Allowed, |bytes| {
            Map::decode(entry, &self.header, bytes)
        }))
    }

    fn chunk_place(&self, map: &Map, number: u32) -> ChunkPlace {
        ChunkPlace::new(number, map.data_blocks, self.header.frame_blocks)
    }

    pub(super) fn chunk_length(&self, map: &Map, number: u32) -> u64 {
        self.chunk_place(map, number).length.into()
    }

    /// The chunk with this number of the group at this place of the directory.
    pub(crate) fn read_chunk(&self, group: usize, map: &Map, number: u32) -> Result<Chunk> {
        let place = self.chunk_place(map, number);
        let at = map.chunks_offset + u64::from(place.offset);
        let frames = map.data_blocks.div_ceil(self.header.frame_blocks);
        let part = self.origin.first_part(group) + u64::from(frames + number);
        waited(self.origin.part(part, (at, place.length.into()), Wait::Allowed, |bytes| {
            Chunk::decode(map, number, place, bytes)
        }))
    }

    /// The frame that holds the data block of this rank.
    fn part(&self, loaded: &Loaded, rank: u32, wait: Wait) -> Attempt<Part> {
        let map = &loaded.map;
        let frame = rank / self.header.frame_blocks;
        let number = frame / CHUNK_FRAMES;
        let chunk_at = |number| {
            let key = (self.serial, map.group, number);
            cache::chunk(key, wait, || self.read_chunk(loaded.place, map, number).map(Arc::new))
        };
        let chunk = chunk_at(number)?;
        let place = (frame % CHUNK_FRAMES) as usize;
        // A frame begins where the one before it ends, which may be in the chunk before.
        let before = match place {
            0 if number == 0 => None,
            0 => chunk_at(number - 1)?.frames.last().copied(),
            _ => chunk.frames.get(place - 1).copied(),
        };
        let start = before.map_or(0, |frame| frame.end);
        let end = chunk.frames.get(place).map_or(start, |frame| frame.end);
        Ok(self.frame_part(map, chunk, frame, (start, end))?)
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
            .map_err(|error| error.in_file(self.path()))
    }

    /// Reads present bytes, `from` counted from the word's start.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a block (compressed or far away: a frame) that is not what was
    /// packed; those of the origin. The next read of the same bytes tries again.
    pub fn read(&self, word: Word, from: u64, mut into: Scatter<'_>, wait: Wait) -> Attempt {
        let Some(loaded) = self.loaded(word.group(), wait)? else {
            into.clear();
            return Ok(());
        };
        let to = from + into.len() as u64;
        let data = loaded.map.data_in(word) & touched(from, to);
        let (mut rest, mut at) = (into, from);
        for (first, end) in runs(data) {
            let start = at.max(u64::from(first) * BLOCK_SIZE);
            let stop = to.min(u64::from(end) * BLOCK_SIZE);
            let (mut zeros, after) = rest.split_at((start - at) as usize);
            zeros.clear();
            let (run, after) = after.split_at((stop - start) as usize);
            self.read_data(loaded, word, start, run, wait)?;
            (rest, at) = (after, stop);
        }
        rest.clear();
        Ok(())
    }

    /// Reads bytes of neighbouring data blocks of a word.
    fn read_data(
        &self,
        loaded: &Loaded,
        word: Word,
        from: u64,
        into: Scatter<'_>,
        wait: Wait,
    ) -> Attempt {
        let (mut at, mut rest) = (from, into);
        while !rest.is_empty() {
            let rank = loaded.map.rank(word.block((at / BLOCK_SIZE) as u32));
            let part = self.part(loaded, rank, wait)?;
            let within = u64::from(rank % self.header.frame_blocks) * BLOCK_SIZE + at % BLOCK_SIZE;
            let raw = match &self.origin {
                Origin::File(file) => part
                    .raw_length(&self.header, loaded.map.data_blocks)
                    .map(|length| (&**file, length)),
                // What comes from afar is verified by whole frames.
                Origin::Far(_) => None,
            };
            let there = raw.map_or(part.decoded, |(_, length)| length);
            let length = (rest.len() as u64).min(there - within);
            let (mut piece, after) = rest.split_at(length as usize);
            match raw {
                Some((file, _)) => {
                    let raw = Raw { file, part: &part, stored: part.stored.0 + within, word, rank };
                    self.read_raw(loaded, &raw, at, piece, wait)?;
                }
                None => {
                    let frame = self.frame(loaded, &part, wait)?;
                    let bytes = frame.get(within as usize..).unwrap_or_default();
                    let bytes = bytes.get(..length as usize).ok_or_else(|| {
                        self.corrupt("a frame that is cut short".into(), part.stored.0)
                    })?;
                    piece.copy_from(bytes);
                }
            }
            (rest, at) = (after, at + length);
        }
        Ok(())
    }

    /// Reads bytes that are stored as they are, from byte `at` of the word on, and checks the blocks
    /// that were not checked yet.
    fn read_raw(
        &self,
        loaded: &Loaded,
        raw: &Raw<'_>,
        at: u64,
        mut into: Scatter<'_>,
        wait: Wait,
    ) -> Attempt {
        let mask = touched(at, at + into.len() as u64);
        let Some(checked) = loaded.checked.get(raw.word.index()) else {
            return Err(self.corrupt("a word beyond its group".into(), raw.stored).into());
        };
        if checked.load(Ordering::Relaxed) & mask == mask {
            return raw.read(raw.stored, into, wait);
        }
        let (skip, length) = (at % BLOCK_SIZE, into.len() as u64);
        let whole = (skip + length).next_multiple_of(BLOCK_SIZE);
        let from = raw.stored - skip;
        // Checked are bytes that nobody else can change meanwhile.
        if let Some(blocks) = into.own().filter(|_| whole == length) {
            raw.read(from, Scatter::from(&mut *blocks), wait)?;
            self.check_raw(raw, at - skip, from, blocks)?;
        } else {
            let mut room = vec![0; whole as usize];
            raw.read(from, (&mut room).into(), wait)?;
            self.check_raw(raw, at - skip, from, &room)?;
            into.copy_from(room.get(skip as usize..).unwrap_or_default());
        }
        checked.fetch_or(mask, Ordering::Relaxed);
        Ok(())
    }

    /// Compares blocks, the first at byte `at` of the word and `from` of the file, with their
    /// checksums.
    fn check_raw(&self, raw: &Raw<'_>, at: u64, from: u64, blocks: &[u8]) -> Result<()> {
        let expected = raw.part.checksums(&self.header);
        let expected = expected.skip((raw.rank % self.header.frame_blocks) as usize);
        let blocks = blocks.chunks_exact(BLOCK_SIZE as usize);
        for (number, (block, expected)) in (0..).zip(blocks.zip(expected)) {
            let found = crc32fast::hash(block);
            if found != expected {
                let guest = raw.word.guest_offset() + at + number * BLOCK_SIZE;
                let detail = format!(
                    "the block at guest offset {guest} has checksum {found:#010x}, expected \
                     {expected:#010x}"
                );
                return Err(self.corrupt(detail, from + number * BLOCK_SIZE));
            }
        }
        Ok(())
    }

    /// The decoded bytes of a frame.
    fn frame(&self, loaded: &Loaded, part: &Part, wait: Wait) -> Attempt<Decoded> {
        let key = (self.root(), loaded.map.group, part.frame);
        match wait {
            Wait::Allowed => {
                Ok(cache::frame(key, || waited(self.decode_once(loaded, part, wait)))?)
            }
            Wait::Never => cache::known_frame(key).ok_or(NotDone::WouldWait),
            Wait::Decode => match cache::known_frame(key) {
                Some(frame) => Ok(frame),
                None => {
                    let frame = self.decode_once(loaded, part, wait)?;
                    cache::keep_frame(key, frame.clone());
                    Ok(frame)
                }
            },
        }
    }

    /// The decoded bytes of a frame, verified: against its hash, and for a file from the second time
    /// on against the checksum of what is stored, which makes the same bytes.
    fn decode_once(&self, loaded: &Loaded, part: &Part, wait: Wait) -> Attempt<Decoded> {
        let bit = 1 << (part.frame % 64);
        let hashed = loaded.hashed.get(part.frame as usize / 64);
        let again = matches!(self.origin, Origin::File(_))
            && hashed.is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0);
        let frame = self.stored(loaded.place, &loaded.map, part, wait, |stored| {
            if again { part.expand(stored) } else { part.decode(stored) }
        })?;
        hashed.map(|word| word.fetch_or(bit, Ordering::Relaxed));
        Ok(Arc::new(frame))
    }

    /// The decoded bytes of a frame of the group at this place of the directory, verified against
    /// its hash.
    pub(super) fn decode(&self, group: usize, map: &Map, part: &Part) -> Result<Vec<u8>> {
        waited(self.stored(group, map, part, Wait::Allowed, |stored| part.decode(stored)))
    }

    /// What `decode` makes of a frame's stored bytes.
    fn stored(
        &self,
        group: usize,
        map: &Map,
        part: &Part,
        wait: Wait,
        decode: impl Fn(&[u8]) -> std::result::Result<Vec<u8>, String>,
    ) -> Attempt<Vec<u8>> {
        let (from, to) = part.stored;
        let number = self.origin.first_part(group) + u64::from(part.frame);
        self.origin.part(number, (from, to - from), wait, |stored| {
            let unlike = |what| self.corrupt(format!("group {}: {what}", map.group.0), from);
            decode(stored).map_err(unlike)
        })
    }

    pub(super) fn corrupt(&self, detail: String, offset: u64) -> Error {
        Error::new(ErrorKind::Corrupt, detail).at(offset).in_file(self.path())
    }
}

/// Where bytes stand that are stored as they are.
struct Raw<'a> {
    file: &'a dyn Storage,
    /// The frame of the first of them.
    part: &'a Part,
    /// Their place in the file.
    stored: u64,
    word: Word,
    /// That of the first block.
    rank: u32,
}

impl Raw<'_> {
    fn read(&self, from: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        crate::storage::read_blocks(self.file, from, into, wait)
    }
}

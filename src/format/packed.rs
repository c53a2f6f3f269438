//! The packed layout (`format-spec.md`, "Packed layout"): header, map and chunks of each group,
//! directory and footer.
//!
//! Hashes make a tree: the root commits to the groups, a group to its bits and chunks, a chunk to
//! its frames, a frame to its decoded bytes. Whoever holds the root can verify any part alone.

use std::mem::size_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::bitmap::Bits;
use super::geometry::{block_count, group_count};
use super::link::{
    ParentLink, check_features, check_sizes, decode_extensions, decode_parent, encode_identity,
    encode_parent,
};
use super::{Field, is_zero, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{BLOCK_SIZE, Block, GROUP_BLOCKS, GROUP_WORDS, Group, Root, Word};

/// First bytes of every packed layer.
pub const MAGIC: [u8; 8] = *b"TPLYPACK";
/// First bytes of its footer.
pub const FOOTER_MAGIC: [u8; 8] = *b"TPLYFOOT";
/// The version of the layout that this build reads and writes.
pub const VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER_SIZE: u64 = 4096;
/// Bytes of the footer.
pub const FOOTER_SIZE: u64 = 128;
/// Bytes of a directory entry.
pub const ENTRY_SIZE: u64 = 56;
/// Bytes of a map with every word occupied and a chunk for every word.
const MAX_MAP_LENGTH: u32 = (size_of::<RawMap>()
    + GROUP_WORDS as usize * (size_of::<RawWord>() + size_of::<Hash>())
    + CRC_SIZE) as u32;
/// Most blocks in a frame, the number this build writes: 48 KiB. What is stored together compresses
/// better, and a read of one block decodes all of it; at this size a packed file system is as small
/// as a qcow2 of compressed 64 KiB clusters, and reads are still twice as fast (docs/tools.md).
pub const FRAME_BLOCKS: u32 = 12;
/// Most frames in a chunk.
pub const CHUNK_FRAMES: u32 = 64;

const MAX_FRAME_BLOCKS: u32 = 64;
const EXTENSIONS_SIZE: usize = 3580;
const CRC_SIZE: usize = size_of::<U32>();

/// A checked part, or what is wrong with it.
type Fits<T> = std::result::Result<T, &'static str>;

/// A BLAKE3 hash.
pub type Hash = [u8; 32];

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    header_size: U32,
    incompatible: U64,
    compatible: U64,
    virtual_size: U64,
    visible_parent_size: U64,
    block_size_log2: U32,
    frame_blocks: U32,
    parent_kind: U32,
    hint_length: U32,
    parent_identity: [u8; 32],
    hint: [u8; 256],
    extensions_length: U32,
    reserved: [u8; 156],
    extensions: [u8; EXTENSIONS_SIZE],
    crc: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawMap {
    group: U64,
    frames_offset: U64,
    chunks_offset: U64,
    word_count: U32,
    data_blocks: U32,
    occupied: [u8; 64],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawWord {
    present: U64,
    data: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFrame {
    hash: Hash,
    end: U32,
    crc: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    group: U64,
    map_offset: U64,
    map_length: U32,
    data_blocks: U32,
    hash: Hash,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFooter {
    magic: [u8; 8],
    directory_offset: U64,
    group_count: U64,
    data_blocks: U64,
    zero_blocks: U64,
    root: Hash,
    directory_crc: U32,
    header_crc: U32,
    reserved: [u8; 44],
    crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_SIZE as usize);
const _: () = assert!(size_of::<RawMap>() == 96);
const _: () = assert!(size_of::<RawFrame>() == 40);
const _: () = assert!(size_of::<RawEntry>() == ENTRY_SIZE as usize);
const _: () = assert!(size_of::<RawFooter>() == FOOTER_SIZE as usize);

pub(super) fn layouts() -> [(&'static str, Vec<Field>); 6] {
    [
        (
            "Packed header",
            layout!(RawHeader {
                magic,
                version,
                header_size,
                incompatible,
                compatible,
                virtual_size,
                visible_parent_size,
                block_size_log2,
                frame_blocks,
                parent_kind,
                hint_length,
                parent_identity,
                hint,
                extensions_length,
                reserved,
                extensions,
                crc,
            }),
        ),
        ("Frame entry", layout!(RawFrame { hash, end, crc })),
        (
            "Group map",
            layout!(RawMap {
                group,
                frames_offset,
                chunks_offset,
                word_count,
                data_blocks,
                occupied,
            }),
        ),
        ("Map word", layout!(RawWord { present, data })),
        ("Directory entry", layout!(RawEntry { group, map_offset, map_length, data_blocks, hash })),
        (
            "Footer",
            layout!(RawFooter {
                magic,
                directory_offset,
                group_count,
                data_blocks,
                zero_blocks,
                root,
                directory_crc,
                header_crc,
                reserved,
                crc,
            }),
        ),
    ]
}

fn corrupt<T>(detail: String) -> Result<T> {
    Err(Error::new(ErrorKind::Corrupt, detail))
}

/// Splits the CRC-32 off the end of a structure and checks it; `salt` comes before the bytes.
fn checked<'a>(what: &str, salt: &[u8], bytes: &'a [u8]) -> Result<&'a [u8]> {
    let Some((body, crc)) = bytes.split_last_chunk::<CRC_SIZE>() else {
        return corrupt(format!("{what} of {} bytes is cut short", bytes.len()));
    };
    let (found, expected) = (u32::from_le_bytes(*crc), checksum(salt, body));
    if found != expected {
        return corrupt(format!("{what} has checksum {found:#010x}, expected {expected:#010x}"));
    }
    Ok(body)
}

fn checksum(salt: &[u8], bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(salt);
    hasher.update(bytes);
    hasher.finalize()
}

/// A hasher for one kind of node in the tree, so that no node passes for one of another kind.
fn node(kind: &str) -> blake3::Hasher {
    blake3::Hasher::new_derive_key(&format!("thinply packed layer 1, {kind}"))
}

/// The hash of a frame: over its decoded bytes.
pub fn frame_hash(decoded: &[u8]) -> Hash {
    *blake3::hash(decoded).as_bytes()
}

/// Whether the bytes begin as a packed layer does.
pub fn has_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedHeader {
    /// Size of the device in bytes.
    pub virtual_size: u64,
    /// How many bytes of the parent show; beyond them there are zeros.
    pub visible_parent_size: u64,
    /// Data blocks in each frame but a group's last.
    pub frame_blocks: u32,
    /// The layer below.
    pub parent: Option<ParentLink>,
    /// Compatible features, kept as they are.
    pub compatible: u64,
    /// Extensions that this build may ignore, as they stand on disk.
    pub extensions: Vec<u8>,
}

impl PackedHeader {
    /// The bytes of the header. The hint must have passed [`super::header::check_hint`].
    pub fn encode(&self) -> Box<[u8; HEADER_SIZE as usize]> {
        let mut raw = RawHeader::new_zeroed();
        raw.magic = MAGIC;
        raw.version = U32::new(VERSION);
        raw.header_size = U32::new(HEADER_SIZE as u32);
        raw.compatible = U64::new(self.compatible);
        raw.virtual_size = U64::new(self.virtual_size);
        raw.visible_parent_size = U64::new(self.visible_parent_size);
        raw.block_size_log2 = U32::new(BLOCK_SIZE.ilog2());
        raw.frame_blocks = U32::new(self.frame_blocks);
        if let Some(parent) = &self.parent {
            (raw.parent_kind, raw.hint_length, raw.parent_identity, raw.hint) =
                encode_parent(parent);
        }
        raw.extensions_length = U32::new(self.extensions.len() as u32);
        raw.extensions.iter_mut().zip(&self.extensions).for_each(|(to, from)| *to = *from);
        let body = raw.as_bytes();
        raw.crc = U32::new(checksum(&[], body.get(..body.len() - CRC_SIZE).unwrap_or_default()));
        Box::new(zerocopy::transmute!(raw))
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`ErrorKind::NotAnImage`] without the magic; [`ErrorKind::Unsupported`] for what a later
    /// version may mean; [`ErrorKind::Corrupt`].
    pub fn decode(bytes: &[u8; HEADER_SIZE as usize]) -> Result<Self> {
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        if raw.magic != MAGIC {
            return Err(Error::new(ErrorKind::NotAnImage, "not a packed layer: no magic"));
        }
        checked("header", &[], bytes)?;
        let version = (raw.version.get(), raw.header_size.get(), raw.block_size_log2.get());
        if version != (VERSION, HEADER_SIZE as u32, BLOCK_SIZE.ilog2()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "header: version {} with a header of {} bytes and blocks of 2^{}, expected \
                     version {VERSION} with {HEADER_SIZE} and 2^12",
                    version.0, version.1, version.2
                ),
            ));
        }
        check_features(raw.incompatible.get())?;
        if !is_zero(&raw.reserved) {
            return corrupt("header: reserved bytes are set".into());
        }
        let header = Self {
            virtual_size: raw.virtual_size.get(),
            visible_parent_size: raw.visible_parent_size.get(),
            frame_blocks: raw.frame_blocks.get(),
            parent: decode_parent(
                raw.parent_kind.get(),
                raw.parent_identity,
                raw.hint_length.get(),
                &raw.hint,
            )?,
            compatible: raw.compatible.get(),
            extensions: decode_extensions(raw.extensions_length.get(), &raw.extensions)?,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<()> {
        check_sizes(self.virtual_size, self.visible_parent_size, self.parent.as_ref())?;
        if !(1..=MAX_FRAME_BLOCKS).contains(&self.frame_blocks) {
            return corrupt(format!(
                "header: {} blocks in a frame, expected 1 to {MAX_FRAME_BLOCKS}",
                self.frame_blocks
            ));
        }
        Ok(())
    }

    /// The root of a layer with this header and these groups in ascending order.
    pub fn root<'a>(&self, groups: impl IntoIterator<Item = &'a Entry>) -> Root {
        let parent = self.parent.as_ref();
        let (kind, identity) =
            parent.map_or((0, [0; 32]), |parent| encode_identity(parent.identity));
        let mut hasher = node("root");
        hasher.update(&self.virtual_size.to_le_bytes());
        hasher.update(&self.visible_parent_size.to_le_bytes());
        hasher.update(&self.frame_blocks.to_le_bytes());
        hasher.update(&kind.to_le_bytes());
        hasher.update(&identity);
        for entry in groups {
            hasher.update(&entry.group.0.to_le_bytes());
            hasher.update(&entry.hash);
        }
        Root(*hasher.finalize().as_bytes())
    }
}

/// A group in the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The group; one without a present block has no entry.
    pub group: Group,
    /// Where its map stands.
    pub map_offset: u64,
    /// Bytes of the map.
    pub map_length: u32,
    /// Blocks with data.
    pub data_blocks: u32,
    /// The hash of bits and chunks.
    pub hash: Hash,
}

impl Entry {
    fn encode(&self) -> [u8; ENTRY_SIZE as usize] {
        zerocopy::transmute!(RawEntry {
            group: U64::new(self.group.0),
            map_offset: U64::new(self.map_offset),
            map_length: U32::new(self.map_length),
            data_blocks: U32::new(self.data_blocks),
            hash: self.hash,
        })
    }
}

/// The directory's bytes.
pub fn encode_directory(entries: &[Entry]) -> Vec<u8> {
    entries.iter().flat_map(Entry::encode).collect()
}

/// What the end of the file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Where the directory stands; it ends at the footer.
    pub directory_offset: u64,
    /// Entries in it.
    pub group_count: u64,
    /// Blocks with data.
    pub data_blocks: u64,
    /// Blocks that are present and zero.
    pub zero_blocks: u64,
    /// The layer's identity.
    pub root: Root,
}

impl Footer {
    /// The bytes for a file with this header and directory.
    pub fn encode(&self, header: &[u8], directory: &[u8]) -> [u8; FOOTER_SIZE as usize] {
        let mut raw = RawFooter::new_zeroed();
        raw.magic = FOOTER_MAGIC;
        raw.directory_offset = U64::new(self.directory_offset);
        raw.group_count = U64::new(self.group_count);
        raw.data_blocks = U64::new(self.data_blocks);
        raw.zero_blocks = U64::new(self.zero_blocks);
        raw.root = self.root.0;
        raw.directory_crc = U32::new(checksum(&[], directory));
        raw.header_crc = U32::new(checksum(&[], header));
        let body = raw.as_bytes();
        raw.crc = U32::new(checksum(&[], body.get(..body.len() - CRC_SIZE).unwrap_or_default()));
        zerocopy::transmute!(raw)
    }

    /// Reads the footer of a file of `length` bytes with this header, and how its directory is read.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn decode(
        bytes: &[u8; FOOTER_SIZE as usize],
        length: u64,
        header: &[u8],
    ) -> Result<(Self, Directory)> {
        let raw: &RawFooter = zerocopy::transmute_ref!(bytes);
        if raw.magic != FOOTER_MAGIC {
            return corrupt("no footer at the end: the file was cut short or is unfinished".into());
        }
        checked("footer", &[], bytes)?;
        if !is_zero(&raw.reserved) {
            return corrupt("footer: reserved bytes are set".into());
        }
        if raw.header_crc.get() != checksum(&[], header) {
            return corrupt("the footer belongs to another header".into());
        }
        let (offset, count) = (raw.directory_offset.get(), raw.group_count.get());
        let end = count.checked_mul(ENTRY_SIZE).and_then(|bytes| bytes.checked_add(offset));
        if offset < HEADER_SIZE || end != length.checked_sub(FOOTER_SIZE) {
            return corrupt(format!(
                "a directory of {count} groups from byte {offset}, expected it to end at the footer"
            ));
        }
        let footer = Self {
            directory_offset: offset,
            group_count: count,
            data_blocks: raw.data_blocks.get(),
            zero_blocks: raw.zero_blocks.get(),
            root: Root(raw.root),
        };
        let directory = Directory {
            end: offset,
            root: footer.root,
            crc: raw.directory_crc.get(),
            hasher: crc32fast::Hasher::new(),
            entries: Vec::new(),
        };
        Ok((footer, directory))
    }
}

/// A directory that is being read. It comes in pieces, and the first one that cannot be ends it: a
/// sparse file that claims many groups costs no memory.
#[derive(Debug)]
pub struct Directory {
    /// Where it stands; maps end there.
    end: u64,
    root: Root,
    /// The CRC-32 that the footer has.
    crc: u32,
    hasher: crc32fast::Hasher,
    entries: Vec<Entry>,
}

impl Directory {
    /// Takes the next bytes, a whole number of entries.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn push(&mut self, bytes: &[u8], header: &PackedHeader) -> Result<()> {
        self.hasher.update(bytes);
        let Ok(raw) = <[RawEntry]>::ref_from_bytes(bytes) else {
            return corrupt("a directory entry is cut short".into());
        };
        let groups = group_count(header.virtual_size);
        self.entries.reserve(raw.len());
        for raw in raw {
            let entry = Entry {
                group: Group(raw.group.get()),
                map_offset: raw.map_offset.get(),
                map_length: raw.map_length.get(),
                data_blocks: raw.data_blocks.get(),
                hash: raw.hash,
            };
            let after = self.entries.last().map_or(0, |last| last.group.0 + 1);
            if !(after..groups).contains(&entry.group.0) {
                return corrupt(format!(
                    "directory names group {}, expected one from {after} below {groups}",
                    entry.group.0
                ));
            }
            let end = entry.map_offset.checked_add(u64::from(entry.map_length));
            if entry.map_offset < HEADER_SIZE
                || end.is_none_or(|end| end > self.end)
                || u64::from(entry.data_blocks) > GROUP_BLOCKS
                || entry.map_length > MAX_MAP_LENGTH
            {
                return corrupt(format!("directory: the map of group {} cannot be", entry.group.0));
            }
            self.entries.push(entry);
        }
        Ok(())
    }

    /// The entries, once all bytes have come.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], also where the root is not the one that the footer names.
    pub fn finish(self, header: &PackedHeader) -> Result<Vec<Entry>> {
        let expected = self.hasher.finalize();
        if self.crc != expected {
            return corrupt(format!(
                "directory has checksum {:#010x}, expected {expected:#010x}",
                self.crc
            ));
        }
        let root = header.root(&self.entries);
        if root != self.root {
            return corrupt(format!("root {root}, expected {}", self.root));
        }
        Ok(self.entries)
    }
}

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

/// A frame: the hash of its decoded bytes, and where its stored bytes end, counted from the group's
/// first frame. It begins where the one before it ends, and is stored as it is if that makes it as
/// long as decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// [`frame_hash`].
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
    /// [`ErrorKind::Corrupt`].
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

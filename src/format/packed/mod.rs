//! The packed layout (`format-spec.md`, "Packed layout"): header, map and chunks of each group,
//! directory and footer.
//!
//! Hashes make a tree: the root commits to the groups, a group to its bits and chunks, a chunk to
//! its frames, a frame to its decoded bytes. Whoever holds the root can verify any part alone.

mod chunk;
mod directory;
mod header;
mod map;

use std::mem::size_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Field, layout};
use crate::types::GROUP_WORDS;

pub use chunk::{Chunk, ChunkPlace, Frame};
pub use directory::{Directory, Entry, Footer, encode_directory};
pub use header::PackedHeader;
pub use map::Map;

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

//! A packed layer as a short input that a fuzzer can change: what it holds, and bytes to put over
//! any of its structures.
//!
//! An input is a byte of [flags](Layer::build), the blocks in a frame, two bytes to cut the file at,
//! the number of blocks, two bytes for each of them (how far from the one before, and what it
//! holds), and patches: a byte that says which kind of structure, its number among its kind, two
//! bytes of offset, a length, and that many bytes. The flags have checksums and hashes taken after
//! the patches, so that changed bytes get past them.

use std::collections::BTreeMap;

use thinply::format::packed::FRAME_BLOCKS;
use thinply::types::{BLOCK_SIZE, GROUP_BLOCKS, Root};

/// Three groups, and a bit of a fourth one that doesn't end at a block.
pub const SIZE: u64 = (3 * GROUP_BLOCKS + 10) * BLOCK_SIZE + 512;
/// Has checksums taken after the patches.
pub const FIX_CHECKSUMS: u8 = 1;
/// Has hashes, the root included, taken after the patches.
pub const FIX_HASHES: u8 = 2;
/// Compresses frames.
pub const COMPRESS: u8 = 4;
/// Cuts the file.
pub const CUT: u8 = 8;

/// What a patch changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Header,
    Frame,
    Chunk,
    Map,
    Entry,
    Footer,
}

const PARTS: [Part; 6] =
    [Part::Header, Part::Frame, Part::Chunk, Part::Map, Part::Entry, Part::Footer];
const CHUNK_FRAMES: usize = 64;
const BLOCK: usize = BLOCK_SIZE as usize;

/// A layer's file, and what it was meant to hold.
pub struct Layer {
    pub bytes: Vec<u8>,
    /// The present blocks; nothing for a zero one.
    pub content: BTreeMap<u64, Option<Vec<u8>>>,
    /// Whether the file is what a writer makes of the content.
    pub intact: bool,
}

struct Patch<'a> {
    part: Part,
    number: u8,
    offset: usize,
    bytes: &'a [u8],
}

struct Builder<'a> {
    flags: u8,
    frame_blocks: usize,
    patches: Vec<Patch<'a>>,
    /// How many structures of each kind have come.
    counts: [u8; PARTS.len()],
    file: Vec<u8>,
    entries: Vec<u8>,
    data_blocks: u64,
}

impl Layer {
    /// Makes the file that an input describes.
    pub fn build(input: &[u8]) -> Self {
        let (&[flags, frame_blocks, low, high, count], rest) =
            input.split_first_chunk().unwrap_or((&[0, FRAME_BLOCKS as u8, 0, 0, 0], &[]));
        let (blocks, rest) = rest.split_at(rest.len().min(usize::from(count % 96) * 2));
        let content = content(blocks);
        let mut builder = Builder {
            flags,
            frame_blocks: usize::from(frame_blocks).clamp(1, 64),
            patches: patches(rest),
            counts: [0; PARTS.len()],
            file: Vec::new(),
            entries: Vec::new(),
            data_blocks: 0,
        };
        let header = builder.header();
        for group in 0..4 {
            let range = group * GROUP_BLOCKS..(group + 1) * GROUP_BLOCKS;
            if content.range(range.clone()).next().is_some() {
                builder.group(group, &content.range(range).collect::<Vec<_>>());
            }
        }
        builder.footer(&header, content.len() as u64);
        let mut bytes = builder.file;
        if flags & CUT != 0 {
            bytes.truncate(usize::from(u16::from_le_bytes([low, high])) * 3 % bytes.len());
        }
        let intact = builder.patches.is_empty() && flags & CUT == 0;
        Self { bytes, content, intact }
    }
}

fn content(blocks: &[u8]) -> BTreeMap<u64, Option<Vec<u8>>> {
    let (mut content, mut at) = (BTreeMap::new(), 0);
    for &[step, kind] in blocks.as_chunks().0 {
        at = match step {
            0..240 => at + u64::from(step),
            _ => (at / GROUP_BLOCKS + 1) * GROUP_BLOCKS - (255 - u64::from(step)),
        };
        if at >= SIZE.div_ceil(BLOCK_SIZE) {
            break;
        }
        let bytes = match kind {
            0..64 => None,
            64..160 => Some(vec![kind; BLOCK]),
            _ => Some(noise(at * 96 + u64::from(kind))),
        };
        content.insert(at, bytes.map(|bytes| inside(at, bytes)));
        at += 1;
    }
    content
}

/// Guest bytes beyond the end of the device are zero.
fn inside(block: u64, mut bytes: Vec<u8>) -> Vec<u8> {
    let end = SIZE.saturating_sub(block * BLOCK_SIZE).min(BLOCK_SIZE) as usize;
    bytes[end..].fill(0);
    bytes
}

fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(BLOCK).collect()
}

fn patches(mut rest: &[u8]) -> Vec<Patch<'_>> {
    let mut patches = Vec::new();
    while let Some((&[part, number, low, high, length], after)) = rest.split_first_chunk::<5>() {
        let (bytes, after) = after.split_at(after.len().min(usize::from(length)));
        patches.push(Patch {
            part: PARTS[usize::from(part) % PARTS.len()],
            number,
            offset: usize::from(u16::from_le_bytes([low, high])),
            bytes,
        });
        rest = after;
    }
    patches
}

fn crc(parts: &[&[u8]]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize().to_le_bytes()
}

fn node(kind: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(&format!("thinply packed layer 1, {kind}"));
    for part in parts {
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

impl Builder<'_> {
    fn fixes(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The structure with its patches; they can't make it longer.
    fn patched(&mut self, part: Part, bytes: &[u8]) -> Vec<u8> {
        let mut changed = bytes.to_vec();
        let count = &mut self.counts[part as usize];
        for patch in &self.patches {
            if patch.part == part && patch.number == *count && !bytes.is_empty() {
                let room = &mut changed[patch.offset % bytes.len()..];
                room.iter_mut().zip(patch.bytes).for_each(|(to, from)| *to = *from);
            }
        }
        *count = count.wrapping_add(1);
        changed
    }

    /// The structure with its patches and its checksum behind it, which is over `salt` too.
    fn sealed(&mut self, part: Part, salt: &[u8], body: &[u8]) -> Vec<u8> {
        let before = crc(&[salt, body]);
        let mut bytes = self.patched(part, &[body, &before].concat());
        if self.fixes(FIX_CHECKSUMS) {
            let (body, sum) = bytes.split_at_mut(body.len());
            sum.copy_from_slice(&crc(&[salt, body]));
        }
        bytes
    }

    fn header(&mut self) -> Vec<u8> {
        let mut body = vec![0; 4092];
        body[..8].copy_from_slice(b"TPLYPACK");
        body[8..16].copy_from_slice(&[1, 0, 0, 0, 0, 16, 0, 0]);
        body[32..40].copy_from_slice(&SIZE.to_le_bytes());
        body[48] = 12;
        body[52] = self.frame_blocks as u8;
        let header = self.sealed(Part::Header, &[], &body);
        self.file.extend_from_slice(&header);
        header
    }

    fn group(&mut self, group: u64, blocks: &[(&u64, &Option<Vec<u8>>)]) {
        if !self.fixes(COMPRESS) {
            self.file.resize(self.file.len().next_multiple_of(BLOCK), 0);
        }
        let (mut present, mut data) = ([0u64; 508], [0u64; 508]);
        let mut full = Vec::new();
        for &(block, bytes) in blocks {
            let (word, bit) = ((block % GROUP_BLOCKS / 64) as usize, block % 64);
            present[word] |= 1 << bit;
            if let Some(bytes) = bytes {
                data[word] |= 1 << bit;
                full.push(bytes.as_slice());
            }
        }
        let frames_offset = self.file.len();
        let frames: Vec<_> = full
            .chunks(self.frame_blocks)
            .map(|blocks| self.frame(&blocks.concat(), frames_offset))
            .collect();
        let chunks_offset = self.file.len();
        let mut hashes = Vec::new();
        for (number, frames) in (0u32..).zip(frames.chunks(CHUNK_FRAMES)) {
            let entries: Vec<u8> = frames.iter().flat_map(|frame| frame.0.clone()).collect();
            let sums: Vec<u8> = frames.iter().flat_map(|frame| frame.1.clone()).collect();
            let salt = [&group.to_le_bytes()[..], &number.to_le_bytes()].concat();
            let chunk = self.sealed(Part::Chunk, &salt, &[&entries[..], &sums].concat());
            let seen = if self.fixes(FIX_HASHES) { &chunk[..entries.len()] } else { &entries };
            let frames: Vec<_> = seen.chunks(40).map(|entry| &entry[..32]).collect();
            hashes.extend(node("chunk", &frames));
            self.file.extend_from_slice(&chunk);
        }
        self.map(group, [frames_offset, chunks_offset], full.len(), [&present, &data], &hashes);
    }

    /// Stores a frame; its entry and the checksums of its blocks.
    fn frame(&mut self, decoded: &[u8], frames_offset: usize) -> (Vec<u8>, Vec<u8>) {
        let small = zstd::bulk::compress(decoded, 1).unwrap();
        let compressed = self.fixes(COMPRESS) && small.len() < decoded.len();
        let stored = if compressed { small } else { decoded.to_vec() };
        let changed = self.patched(Part::Frame, &stored);
        let end = (self.file.len() - frames_offset + stored.len()) as u32;
        self.file.extend_from_slice(&changed);
        let read = match compressed {
            true => zstd::bulk::decompress(&changed, decoded.len()).unwrap_or_default(),
            false => changed.clone(),
        };
        let hashed = if self.fixes(FIX_HASHES) { &read } else { decoded };
        let (summed, blocks) =
            if self.fixes(FIX_CHECKSUMS) { (&changed, &read[..]) } else { (&stored, decoded) };
        let hash = blake3::hash(hashed);
        let entry = [&hash.as_bytes()[..], &end.to_le_bytes(), &crc(&[summed])].concat();
        let mut sums: Vec<u8> = blocks.chunks(BLOCK).flat_map(|block| crc(&[block])).collect();
        sums.resize(decoded.len() / BLOCK * 4, 0);
        (entry, sums)
    }

    fn map(
        &mut self,
        group: u64,
        places: [usize; 2],
        data_blocks: usize,
        [present, data]: [&[u64; 508]; 2],
        hashes: &[u8],
    ) {
        let mut occupied = [0; 64];
        let mut words = Vec::new();
        for (index, (present, data)) in present.iter().zip(data).enumerate() {
            if *present != 0 {
                occupied[index / 8] |= 1 << (index % 8);
                words.extend([present.to_le_bytes(), data.to_le_bytes()].concat());
            }
        }
        let [frames_offset, chunks_offset] = places.map(|place| (place as u64).to_le_bytes());
        let counts = [(words.len() / 16) as u32, data_blocks as u32].map(u32::to_le_bytes);
        let head = [group.to_le_bytes(), frames_offset, chunks_offset].concat();
        let body = [&head[..], &counts.concat(), &occupied, &words, hashes].concat();
        let map = self.sealed(Part::Map, &[], &body);
        let seen = if self.fixes(FIX_HASHES) { &map[..body.len()] } else { &body };
        let hash = node("group", &[&seen[..8], &seen[32..]]);
        let sizes = [map.len() as u32, data_blocks as u32].map(u32::to_le_bytes);
        let at = (self.file.len() as u64).to_le_bytes();
        let entry = [&group.to_le_bytes()[..], &at, &sizes.concat(), &hash].concat();
        let entry = self.patched(Part::Entry, &entry);
        self.file.extend_from_slice(&map);
        self.entries.extend_from_slice(&entry);
        self.data_blocks += data_blocks as u64;
    }

    fn footer(&mut self, header: &[u8], present: u64) {
        let groups: Vec<_> =
            self.entries.chunks(56).flat_map(|entry| [&entry[..8], &entry[24..]]).collect();
        let fields: [&[u8]; 5] =
            [&header[32..48], &header[52..56], &header[56..60], &header[64..96], &groups.concat()];
        let root = Root(node("root", &fields));
        let numbers = [
            self.file.len() as u64,
            self.entries.len() as u64 / 56,
            self.data_blocks,
            present - self.data_blocks,
        ];
        let numbers = numbers.map(u64::to_le_bytes).concat();
        let sums = [crc(&[&self.entries]), crc(&[header])].concat();
        let body = [b"TPLYFOOT", &numbers[..], &root.0, &sums, &[0; 44]].concat();
        let footer = self.sealed(Part::Footer, &[], &body);
        self.file.append(&mut self.entries);
        self.file.extend_from_slice(&footer);
    }
}

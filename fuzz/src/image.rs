//! Two layer files, *base* and *top*, as a short input that a fuzzer can change.
//!
//! An input is a byte of [flags](Image::flags), four bytes to cut the top at, and pieces: a byte
//! that says which file, four bytes of offset, two of length (little-endian), and that many bytes.
//! All else in the files is a hole. The flags have checksums made valid again, so that changed
//! bytes get past them.

use std::sync::Arc;

use thinply::chain::{Chain, Gate, create, seal};
use thinply::device::Device;
use thinply::storage::{Access, Folder, MemoryFolder, Storage, read_exact_at, write_all_at};

/// Virtual size of both layers; ends in the middle of a block.
pub const SIZE: u64 = (1 << 20) + 512;
/// Exact length of the files.
pub const LENGTH: u64 = (4 << 20) + 4096;
/// The names of the files.
pub const NAMES: [&str; 2] = ["base", "top"];

/// Makes the checksums of slots, records and bitmap sectors valid.
pub const FIX_CHECKSUMS: u8 = 1;
/// Has the top link to whatever identity the base has.
pub const FIX_LINK: u8 = 2;
/// Makes the block checksums in journal records valid.
pub const FIX_ENTRIES: u8 = 4;
/// Cuts the top.
pub const CUT: u8 = 8;

const BLOCK: u64 = 4096;
const RING: u64 = 1 << 20;
const BITMAP: u64 = 2 << 20;
const SLOTS: [u64; 2] = [0, 64 << 10];
/// A hole between two pieces is at least so long.
const GAP: usize = 16;

/// Makes the files that an input describes.
pub fn build(input: &[u8]) -> Arc<dyn Folder> {
    let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("fuzz"));
    let files = NAMES.map(|name| {
        let file = folder.create(name).unwrap();
        file.set_length(LENGTH).unwrap();
        file
    });
    let Some((&[flags, cut @ ..], mut rest)) = input.split_first_chunk::<5>() else {
        return folder;
    };
    while let Some((&[file, a, b, c, d, e, f], after)) = rest.split_first_chunk::<7>() {
        let offset = u64::from(u32::from_le_bytes([a, b, c, d])) % LENGTH;
        let length = usize::from(u16::from_le_bytes([e, f])).min(after.len());
        let (bytes, after) = after.split_at(length);
        let bytes = &bytes[..length.min((LENGTH - offset) as usize)];
        write_all_at(&*files[usize::from(file & 1)], bytes, offset).unwrap();
        rest = after;
    }
    let [base, top] = &files;
    if flags & FIX_LINK != 0 {
        fix_link(&**base, &**top);
    }
    for file in [base, top] {
        fix(&**file, flags);
    }
    if flags & CUT != 0 {
        top.set_length(u64::from(u32::from_le_bytes(cut)) % LENGTH).unwrap();
    }
    folder
}

/// A second set of the same files.
pub fn copy(folder: &Arc<dyn Folder>) -> Arc<dyn Folder> {
    let copy: Arc<dyn Folder> = Arc::new(MemoryFolder::new("copy"));
    for name in NAMES {
        let (from, to) = (folder.open(name, Access::Read).unwrap(), copy.create(name).unwrap());
        to.set_length(from.length().unwrap()).unwrap();
        each_data(&*from, |at, bytes| write_all_at(&*to, bytes, at).unwrap());
    }
    copy
}

/// All that stands in a file.
pub fn bytes(folder: &Arc<dyn Folder>, name: &str) -> (u64, Vec<(u64, Vec<u8>)>) {
    let file = folder.open(name, Access::Read).unwrap();
    let mut pieces = Vec::new();
    each_data(&*file, |at, bytes| pieces.push((at, bytes.to_vec())));
    (file.length().unwrap(), pieces)
}

/// The input that describes these files.
pub fn encode(folder: &Arc<dyn Folder>, flags: u8) -> Vec<u8> {
    let mut input = vec![flags, 0, 0, 0, 0];
    for (number, name) in (0..).zip(NAMES) {
        let file = folder.open(name, Access::Read).unwrap();
        each_data(&*file, |at, bytes| {
            for (from, piece) in pieces(bytes) {
                input.push(number);
                input.extend_from_slice(&((at as usize + from) as u32).to_le_bytes());
                input.extend_from_slice(&(piece.len() as u16).to_le_bytes());
                input.extend_from_slice(piece);
            }
        });
    }
    input
}

/// What stands between long runs of zeros.
fn pieces(bytes: &[u8]) -> Vec<(usize, &[u8])> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for at in (0..bytes.len()).filter(|&at| bytes[at] != 0) {
        match found.last_mut() {
            Some((from, end)) if at < *end + GAP && at - *from < 4096 => *end = at + 1,
            _ => found.push((at, at + 1)),
        }
    }
    found.into_iter().map(|(from, end)| (from, &bytes[from..end])).collect()
}

fn each_data(file: &dyn Storage, mut visit: impl FnMut(u64, &[u8])) {
    let mut at = 0;
    while let Some(from) = file.next_data(at).unwrap() {
        at = file.next_hole(from).unwrap();
        let mut bytes = vec![0; (at - from) as usize];
        read_exact_at(file, &mut bytes, from).unwrap();
        visit(from, &bytes);
    }
}

fn page(file: &dyn Storage, offset: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    read_exact_at(file, &mut bytes, offset).unwrap();
    bytes
}

fn crc(parts: &[&[u8]]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize().to_le_bytes()
}

fn uuid(file: &dyn Storage) -> [u8; 16] {
    let slots = SLOTS.map(|offset| page(file, offset));
    let named = slots.iter().find(|slot| slot.starts_with(b"TPLYLIVE")).unwrap_or(&slots[0]);
    named[40..56].try_into().unwrap()
}

/// Writes what `format-spec.md` calls for where there is a structure at all.
fn fix(file: &dyn Storage, flags: u8) {
    let uuid = uuid(file);
    for place in 0..256 {
        let offset = RING + place * BLOCK;
        let mut bytes = page(file, offset);
        if !bytes.starts_with(b"TPJR") {
            continue;
        }
        if flags & FIX_ENTRIES != 0 {
            let count = u32::from_le_bytes(bytes[24..28].try_into().unwrap()).min(338) as usize;
            for entry in bytes[32..][..count * 12].chunks_exact_mut(12) {
                let block = u64::from_le_bytes(entry[..8].try_into().unwrap());
                if block < SIZE.div_ceil(BLOCK) {
                    entry[8..].copy_from_slice(&crc(&[&page(file, (3 << 20) + block * BLOCK)]));
                }
            }
        }
        if flags & FIX_CHECKSUMS != 0 {
            let sum = crc(&[&uuid, &bytes[8..]]);
            bytes[4..8].copy_from_slice(&sum);
        }
        write_all_at(file, &bytes, offset).unwrap();
    }
    if flags & FIX_CHECKSUMS == 0 {
        return;
    }
    for (number, offset) in (0u32..).zip(SLOTS) {
        let mut bytes = page(file, offset);
        if bytes.starts_with(b"TPLYLIVE") {
            let sum = crc(&[&number.to_le_bytes(), &bytes[..4092]]);
            bytes[4092..].copy_from_slice(&sum);
            write_all_at(file, &bytes, offset).unwrap();
        }
    }
    let mut bytes = page(file, BITMAP);
    for (number, sector) in (0u32..).zip(bytes.chunks_exact_mut(512)) {
        if sector.iter().any(|&byte| byte != 0) {
            let sum = crc(&[&uuid, &[0; 8], &number.to_le_bytes(), &sector[..508]]);
            sector[508..].copy_from_slice(&sum);
        }
    }
    if bytes != [0; 4096] {
        write_all_at(file, &bytes, BITMAP).unwrap();
    }
}

/// Copies the base's identity into the top's slots. Both slots of a base are taken to agree.
fn fix_link(base: &dyn Storage, top: &dyn Storage) {
    let slot = page(base, 0);
    for offset in SLOTS {
        let mut bytes = page(top, offset);
        bytes[168..184].copy_from_slice(&slot[40..56]);
        bytes[184..200].copy_from_slice(&slot[144..160]);
        if bytes.starts_with(b"TPLYLIVE") {
            write_all_at(top, &bytes, offset).unwrap();
        }
    }
}

/// How a real image's top was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Closed cleanly.
    Closed,
    /// As a killed writer leaves it.
    Killed,
}

/// A real two-layer image.
pub fn real(ending: Ending) -> Arc<dyn Folder> {
    let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("real"));
    let layers = Arc::new(Gate::default());
    let open = |name| Chain::open(folder.clone(), name, Access::Write, layers.clone()).unwrap();
    create(&folder, "base", Some(SIZE), None, &layers).unwrap();
    let base = open("base");
    for block in 0..3 {
        base.write(block * BLOCK, &[1; 100]).unwrap();
    }
    base.write(SIZE - 100, &[2; 100]).unwrap();
    base.close().unwrap();
    drop(base);
    let parent = seal(&*folder, "base").unwrap();
    create(&folder, "top", None, Some(&parent), &layers).unwrap();
    let top = open("top");
    top.write(5000, &[3; 100]).unwrap();
    top.flush().unwrap();
    top.trim(0, 4096).unwrap();
    top.write(70_000, &[4; 100]).unwrap();
    top.flush().unwrap();
    top.write(300_000, &[5; 100]).unwrap();
    top.write(400_000, &[6; 100]).unwrap();
    top.flush().unwrap();
    if ending == Ending::Closed {
        top.close().unwrap();
    }
    drop(top);
    copy(&folder)
}

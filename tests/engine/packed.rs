//! Packed files of strangers and of great size: what opening and reading them may cost.

use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use testkit::hooked::{Call, Hooked};
use thinply::error::{Error, ErrorKind};
use thinply::format::packed::{
    Chunk, ENTRY_SIZE, Entry, FOOTER_SIZE, Footer, Frame, HEADER_SIZE, Map, PackedHeader,
    encode_directory, frame_hash,
};
use thinply::packed::{Compression, Packed, Writer};
use thinply::storage::{Access, FileFolder, Folder, MemoryFolder, write_all_at};
use thinply::types::{BLOCK_SIZE, Block, GROUP_BLOCKS, Group, Word};
use thinply::wait::{Wait, waited};

/// A file's bytes in a folder that counts the reads.
fn counting(bytes: &[u8]) -> (Arc<dyn Folder>, Arc<AtomicU64>) {
    let hooked = Hooked::new(Arc::new(MemoryFolder::new("m")));
    write_all_at(&*hooked.create("layer").unwrap(), bytes, 0).unwrap();
    let reads = Arc::new(AtomicU64::new(0));
    let count = reads.clone();
    hooked.on_calls(move |call| {
        if let Call::Read { .. } | Call::ReadCached { .. } = call {
            count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(usize::MAX)
    });
    (Arc::new(hooked), reads)
}

#[test]
fn opening_takes_three_reads_whatever_the_size() {
    for groups in [0, 8, 2000] {
        let size = (groups + 1) * GROUP_BLOCKS * BLOCK_SIZE;
        let mut writer = Writer::new(Vec::new(), size, None, Compression::None).unwrap();
        for group in 0..groups {
            writer.data(Block(group * GROUP_BLOCKS), &[1; BLOCK_SIZE as usize]).unwrap();
        }
        let (_, bytes) = writer.finish().unwrap();
        let (folder, reads) = counting(&bytes);
        let file = folder.open("layer", Access::Read).unwrap();
        let layer = Packed::open(file).unwrap();
        let expected = if groups == 0 { 2 } else { 3 };
        assert_eq!(reads.load(Ordering::Relaxed), expected, "{groups} groups");
        assert_eq!(layer.footer().group_count, groups);
        // A block then takes its map, its chunk and itself.
        if groups > 0 {
            let mut block = [0; BLOCK_SIZE as usize];
            let word = Block((groups - 1) * GROUP_BLOCKS).word();
            layer.read(word, 0, (&mut block).into(), Wait::Allowed).unwrap();
            assert_eq!(block, [1; BLOCK_SIZE as usize]);
            assert_eq!(reads.load(Ordering::Relaxed), expected + 3, "{groups} groups");
        }
    }
}

/// A layer of one group and one frame, with these bytes for a frame of 64 blocks.
fn forged(stored: &[u8], decoded: &[u8]) -> Vec<u8> {
    let header = PackedHeader {
        virtual_size: GROUP_BLOCKS * BLOCK_SIZE,
        visible_parent_size: 0,
        frame_blocks: 64,
        parent: None,
        compatible: 0,
        extensions: Vec::new(),
    };
    let frame = Frame {
        hash: frame_hash(decoded),
        end: stored.len() as u32,
        checksum: crc32fast::hash(stored),
    };
    let checksums = decoded.chunks(BLOCK_SIZE as usize).map(crc32fast::hash).collect();
    let chunk = Chunk { frames: vec![frame], checksums };
    let chunks_offset = HEADER_SIZE + stored.len() as u64;
    let mut bits = Box::new([0; 508]);
    bits[0] = u64::MAX;
    let hashes = vec![chunk.hash()];
    let map = Map::new(Group(0), HEADER_SIZE, chunks_offset, bits.clone(), bits, hashes);
    let (chunk, body) = (chunk.encode(Group(0), 0), map.encode());
    let entry = Entry {
        group: Group(0),
        map_offset: chunks_offset + chunk.len() as u64,
        map_length: body.len() as u32,
        data_blocks: 64,
        hash: map.hash(),
    };
    let footer = Footer {
        directory_offset: entry.map_offset + body.len() as u64,
        group_count: 1,
        data_blocks: 64,
        zero_blocks: 0,
        root: header.root(&[entry]),
    };
    let (header, directory) = (header.encode(), encode_directory(&[entry]));
    let footer = footer.encode(&*header, &directory);
    [&header[..], stored, &chunk, &body, &directory, &footer].concat()
}

/// One at a time: memory is that of the process.
static MEMORY: Mutex<()> = Mutex::new(());

/// The most memory that the process ever had.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn error_of(file: Arc<dyn thinply::storage::Storage>) -> Error {
    let layer = match Packed::open(file) {
        Ok(layer) => layer,
        Err(error) => return error,
    };
    let mut block = [0; BLOCK_SIZE as usize];
    waited(layer.read(Word(0), 0, (&mut block).into(), Wait::Allowed)).unwrap_err()
}

#[test]
fn a_frame_that_decompresses_to_a_gibibyte_is_refused_and_takes_no_memory() {
    let _guard = MEMORY.lock().unwrap();
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
    for _ in 0..1024 {
        encoder.write_all(&[0; 1 << 20]).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    let decoded = vec![1; 64 * BLOCK_SIZE as usize];
    assert!(bomb.len() < decoded.len(), "{}", bomb.len());
    // Another layer of the same root would put its frame into the cache.
    let other = vec![2; decoded.len()];
    let right = forged(&zstd::bulk::compress(&other, 3).unwrap(), &other);
    let right = Packed::open(counting(&right).0.open("layer", Access::Read).unwrap()).unwrap();
    let mut block = [0; BLOCK_SIZE as usize];
    right.read(Word(0), 0, (&mut block).into(), Wait::Allowed).unwrap();
    assert_eq!(block, [2; BLOCK_SIZE as usize], "the forgery is right but for the frame");

    let (folder, _) = counting(&forged(&bomb, &decoded));
    let before = peak();
    let error = error_of(folder.open("layer", Access::Read).unwrap());
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("can't be decompressed"), "{error}");
    let taken = peak() - before;
    assert!(taken < 64 << 20, "{taken} bytes");
}

#[test]
fn a_sparse_file_that_claims_a_huge_directory_takes_no_memory() {
    let _guard = MEMORY.lock().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let folder = FileFolder::new(dir.path());
    let file = folder.create("layer").unwrap();
    let header = PackedHeader {
        virtual_size: 1 << 56,
        visible_parent_size: 0,
        frame_blocks: 4,
        parent: None,
        compatible: 0,
        extensions: Vec::new(),
    }
    .encode();
    // As many groups as such a disk has: a directory of 30 GB, all of it a hole.
    let group_count = (1u64 << 56).div_ceil(GROUP_BLOCKS * BLOCK_SIZE);
    let footer = Footer {
        directory_offset: HEADER_SIZE,
        group_count,
        data_blocks: 0,
        zero_blocks: 0,
        root: thinply::types::Root([0; 32]),
    };
    let end = HEADER_SIZE + group_count * ENTRY_SIZE;
    file.set_length(end + FOOTER_SIZE).unwrap();
    write_all_at(&*file, &*header, 0).unwrap();
    write_all_at(&*file, &footer.encode(&*header, &[]), end).unwrap();
    let before = peak();
    let error = error_of(file);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("directory"), "{error}");
    let taken = peak() - before;
    assert!(taken < 64 << 20, "{taken} bytes");
}

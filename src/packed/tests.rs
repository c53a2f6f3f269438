use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Compression, Damage, Packed, Summary, Writer};
use crate::error::{ErrorKind, Result};
use crate::format::header::ParentLink;
use crate::format::packed::{CHUNK_FRAMES, FOOTER_SIZE, FRAME_BLOCKS, Footer, HEADER_SIZE};
use crate::storage::{Folder, MemoryFolder, Storage, write_all_at};
use crate::types::{BLOCK_SIZE, Block, GROUP_BLOCKS, Identity, Root};
use crate::wait::{Wait, waited};

type Bytes = [u8; BLOCK_SIZE as usize];
/// What a layer should hold: bytes, or nothing for a zero block.
type Content = BTreeMap<u64, Option<Box<Bytes>>>;

const SIZE: u64 = (3 * GROUP_BLOCKS + 10) * BLOCK_SIZE;

fn pack(content: &Content, compression: Compression) -> (Summary, Vec<u8>) {
    let parent = ParentLink { identity: Identity::Packed(Root([9; 32])), hint: "base".into() };
    let mut writer =
        Writer::new(Vec::new(), SIZE, Some((parent, SIZE / 2 / 512 * 512)), compression).unwrap();
    for (&block, bytes) in content {
        match bytes {
            Some(bytes) => writer.data(Block(block), bytes).unwrap(),
            None => writer.zero(Block(block)).unwrap(),
        }
    }
    writer.finish().unwrap()
}

fn file(bytes: &[u8]) -> Arc<dyn Storage> {
    let file = MemoryFolder::new("m").create("layer").unwrap();
    write_all_at(&*file, bytes, 0).unwrap();
    file
}

fn open(bytes: &[u8]) -> Result<Packed> {
    Packed::open(file(bytes))
}

fn read(layer: &Packed, block: u64) -> Result<Bytes> {
    let mut bytes = [0xee; BLOCK_SIZE as usize];
    let block = Block(block);
    let from = (block.0 - block.word().block(0).0) * BLOCK_SIZE;
    waited(layer.read(block.word(), from, (&mut bytes).into(), Wait::Allowed))?;
    Ok(bytes)
}

fn damages(layer: &Packed) -> Vec<Damage> {
    let mut found = Vec::new();
    layer.verify(&mut found).unwrap();
    found
}

fn noise(seed: u64) -> Box<Bytes> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    Box::new(std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    }))
}

/// Noise, text that compresses, and zeros, in two groups; frames that mix noise and text too.
fn sample() -> Content {
    let text = |byte: u8| Some(Box::new([byte; BLOCK_SIZE as usize]));
    let mut content = Content::new();
    for block in [0, 1, 2, 3, 5, 63, 64, 65] {
        content.insert(block, Some(noise(block + 1)));
    }
    for block in [100, 101, 102, 103, 104, GROUP_BLOCKS + 7] {
        content.insert(block, text(block as u8));
    }
    content.insert(70, None);
    content.insert(2 * GROUP_BLOCKS, None);
    content
}

#[test]
fn what_is_packed_comes_back_and_the_root_does_not_depend_on_compression() {
    let content = sample();
    let (plain, plain_bytes) = pack(&content, Compression::None);
    let (small, small_bytes) = pack(&content, Compression::Zstd(3));
    assert_eq!(plain.root, small.root);
    assert!(small.length < plain.length);
    assert_eq!((plain.data_blocks, plain.zero_blocks), (14, 2));
    assert_eq!(pack(&content, Compression::Zstd(3)).1, small_bytes, "the same bytes again");
    for bytes in [plain_bytes, small_bytes] {
        let layer = open(&bytes).unwrap();
        assert_eq!(layer.root(), plain.root);
        assert!(damages(&layer).is_empty(), "{:?}", damages(&layer));
        for (&block, expected) in &content {
            let expected = expected.as_ref().map_or([0; BLOCK_SIZE as usize], |bytes| **bytes);
            assert!(read(&layer, block).unwrap() == expected, "block {block}");
            let word = Block(block).word();
            let bits = layer.bits(word.group(), Wait::Allowed).unwrap().unwrap();
            assert!(bits[word.index()] & Block(block).mask() != 0);
        }
    }
}

#[test]
fn uncompressed_blocks_are_contiguous_and_aligned() {
    let (_, bytes) = pack(&sample(), Compression::None);
    let at = HEADER_SIZE as usize;
    for (place, block) in [0, 1, 2, 3, 5, 63].into_iter().enumerate() {
        let from = at + place * BLOCK_SIZE as usize;
        assert_eq!(bytes[from..from + BLOCK_SIZE as usize], *noise(block + 1));
    }
}

/// Flips the chosen bits of a packed layer, one at a time. Either the layer doesn't open, or it is
/// found to be damaged, and every block that can't be read is named. A bit of a block takes that block
/// alone with it, or compressed its frame, and nothing is read of those.
fn flip(content: &Content, compression: Compression, chosen: impl Fn(usize) -> bool) {
    let (_, mut bytes) = pack(content, compression);
    let whole = open(&bytes).unwrap();
    let stored: Vec<_> = whole
        .entries()
        .iter()
        .map(|entry| whole.read_map(0, entry).unwrap())
        .map(|map| map.frames_offset as usize..map.chunks_offset as usize)
        .collect();
    let is_stored = |at: usize| stored.iter().any(|range| range.contains(&at));
    let in_frame = FRAME_BLOCKS as usize;
    for bit in (0..bytes.len() * 8).filter(|&bit| chosen(bit)) {
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(layer) = open(&bytes) {
            let what = || format!("bit {bit} of {compression:?}");
            let damages = damages(&layer);
            assert!(!damages.is_empty(), "{}: not found", what());
            let names = |at| {
                let mut guests = damages.iter().filter_map(|damage| damage.guest);
                guests.any(|(from, length)| (from..from + length).contains(&at))
            };
            super::cache::forget_frames();
            let lost = content.keys().filter(|&&block| read(&layer, block).is_err()).count();
            if is_stored(bit / 8) {
                let alone = if compression == Compression::None { 1 } else { in_frame };
                assert!((1..=alone).contains(&lost), "{}: {lost} blocks lost", what());
            }
            for (&block, expected) in content {
                let expected = expected.as_ref().map_or([0; BLOCK_SIZE as usize], |bytes| **bytes);
                match read(&layer, block) {
                    Ok(found) => assert!(found == expected, "{}: block {block}", what()),
                    Err(error) => assert!(names(block * BLOCK_SIZE), "{}: {error}", what()),
                }
            }
        }
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

fn few_blocks() -> Content {
    sample().into_iter().filter(|(block, _)| block % 3 == 1).collect()
}

#[test]
fn every_flipped_bit_is_found() {
    for compression in [Compression::None, Compression::Zstd(1)] {
        // One bit of each byte in the blocks themselves is enough.
        flip(&few_blocks(), compression, |bit| {
            let in_blocks = bit / 8 >= HEADER_SIZE as usize && bit / 8 < 20_000;
            !in_blocks || bit % 8 == bit / 8 % 8
        });
    }
}

#[test]
#[ignore = "minutes: every bit, of a layer with two chunks too"]
fn every_flipped_bit_is_found_everywhere() {
    for compression in [Compression::None, Compression::Zstd(1)] {
        flip(&few_blocks(), compression, |_| true);
    }
    flip(&two_chunks(), Compression::Zstd(1), |_| true);
}

/// Text in more frames than one chunk holds.
fn two_chunks() -> Content {
    let text = |block: u64| Box::new([block as u8 | 1; BLOCK_SIZE as usize]);
    let blocks = u64::from(CHUNK_FRAMES * FRAME_BLOCKS);
    (0..blocks + 14).map(|block| (block, Some(text(block)))).collect()
}

#[test]
fn what_a_damaged_chunk_takes_with_it_is_named() {
    let content = two_chunks();
    let (_, bytes) = pack(&content, Compression::Zstd(1));
    let layer = open(&bytes).unwrap();
    let map = layer.read_map(0, &layer.entries()[0]).unwrap();
    let chunk = map.chunks_offset as usize..map.chunks_offset as usize + 4;
    flip(&content, Compression::Zstd(1), |bit| chunk.contains(&(bit / 8)));
}

#[test]
fn a_damaged_block_fails_alone_and_a_damaged_frame_alone() {
    let content = sample();
    let (_, mut bytes) = pack(&content, Compression::None);
    bytes[HEADER_SIZE as usize + BLOCK_SIZE as usize + 17] ^= 1;
    let layer = open(&bytes).unwrap();
    for &block in content.keys() {
        let result = read(&layer, block);
        assert_eq!(result.is_err(), block == 1, "block {block}");
    }
    let error = read(&layer, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(error.offset(), Some(HEADER_SIZE + BLOCK_SIZE));
    let guest: Vec<_> = damages(&layer).into_iter().map(|damage| damage.guest).collect();
    assert_eq!(guest, [Some((BLOCK_SIZE, BLOCK_SIZE))]);

    // Other content than any other test's: decoded frames are shared by what they hold.
    let in_frame = u64::from(FRAME_BLOCKS);
    let content: Content = (0..2 * in_frame)
        .map(|block| (block, Some(Box::new([0x40 + block as u8; 4096]))))
        .collect();
    let (_, mut bytes) = pack(&content, Compression::Zstd(3));
    bytes[HEADER_SIZE as usize + 6] ^= 1;
    let layer = open(&bytes).unwrap();
    for block in 0..2 * in_frame {
        assert_eq!(read(&layer, block).is_err(), block < in_frame, "block {block}");
    }
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let content: Content = sample().into_iter().take(2).collect();
    let (_, bytes) = pack(&content, Compression::Zstd(3));
    for length in 0..bytes.len() {
        let error = open(&bytes[..length]).unwrap_err();
        let kind = error.kind();
        assert!(matches!(kind, ErrorKind::Corrupt | ErrorKind::NotAnImage), "{length}: {error}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert_eq!(open(&longer).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(bytes.len() as u64 > HEADER_SIZE + FOOTER_SIZE);
}

#[test]
fn a_footer_that_counts_more_blocks_than_there_are_is_refused() {
    let (_, bytes) = pack(&few_blocks(), Compression::None);
    let good = *open(&bytes).unwrap().footer();
    let end = bytes.len() - FOOTER_SIZE as usize;
    let header = &bytes[..HEADER_SIZE as usize];
    let directory = &bytes[good.directory_offset as usize..end];
    let with = |data_blocks, zero_blocks| {
        let footer = Footer { data_blocks, zero_blocks, ..good };
        open(&[&bytes[..end], &footer.encode(header, directory)].concat())
    };
    let blocks = SIZE / BLOCK_SIZE;
    for (data, zero) in [(blocks, 1), (0, blocks + 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
        assert_eq!(with(data, zero).unwrap_err().kind(), ErrorKind::Corrupt, "{data} {zero}");
    }
    // What could be is for verify to find.
    assert_eq!(damages(&with(blocks, 0).unwrap()).len(), 1);
}

#[test]
fn the_index_is_small_where_data_is_clustered() {
    let data = 8192;
    let content: Content = (0..data).map(|block| (block, Some(noise(block + 1)))).collect();
    let (summary, bytes) = pack(&content, Compression::None);
    let index = summary.length - data * BLOCK_SIZE;
    assert!((index as f64) < 0.004 * (data * BLOCK_SIZE) as f64, "{index} bytes of index");
    assert!(damages(&open(&bytes).unwrap()).is_empty());
}

#[test]
fn blocks_come_in_order_and_inside_the_device() {
    let mut writer = Writer::new(Vec::new(), 8192, None, Compression::None).unwrap();
    writer.zero(Block(1)).unwrap();
    for block in [0, 1, 2] {
        assert_eq!(writer.zero(Block(block)).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_content_comes_back(
        blocks in proptest::collection::btree_map(
            prop_oneof![0u64..300, GROUP_BLOCKS - 5..GROUP_BLOCKS + 70, 3 * GROUP_BLOCKS..3 * GROUP_BLOCKS + 10],
            0u8..4,
            0..200,
        ),
        level in proptest::option::of(1..4),
    ) {
        let content: Content = blocks
            .iter()
            .map(|(&block, &kind)| {
                let bytes = match kind {
                    0 => None,
                    1 => Some(noise(block + 7)),
                    kind => Some(Box::new([kind; BLOCK_SIZE as usize])),
                };
                (block, bytes)
            })
            .collect();
        let (_, bytes) = pack(&content, level.map_or(Compression::None, Compression::Zstd));
        let layer = open(&bytes).unwrap();
        prop_assert!(damages(&layer).is_empty());
        for (&block, expected) in &content {
            let expected = expected.as_ref().map_or([0; BLOCK_SIZE as usize], |bytes| **bytes);
            prop_assert!(read(&layer, block).unwrap() == expected);
        }
    }
}

//! A packed layer with anything in it: opening, reading, verifying and dumping it give answers or
//! errors, and the answers agree with each other.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thinply::error::{ErrorKind, Result};
use thinply::format::packed::FRAME_BLOCKS;
use thinply::packed::{Compression, Packed, Writer};
use thinply::storage::{Folder, MemoryFolder, write_all_at};
use thinply::types::{BLOCK_SIZE, Block, Group, Word, runs};
use thinply::wait::{Wait, waited};
use thinply_fuzz::limits::within_limits;
use thinply_fuzz::packed::Layer;

fuzz_target!(|input: &[u8]| within_limits(|| run(input)));

type Bytes = [u8; BLOCK_SIZE as usize];

/// The present blocks, or what stands in the way of knowing them.
fn present(layer: &Packed) -> Result<Vec<Block>> {
    let (mut blocks, mut from) = (Vec::new(), Group(0));
    while let Some(group) = layer.next_group(from) {
        from = Group(group.0 + 1);
        let bits = waited(layer.bits(group, Wait::Allowed))?.expect("a group of the directory");
        for (word, &bits) in (group.first_word().0..).map(Word).zip(bits.iter()) {
            assert!(
                waited(layer.data(word, Wait::Allowed))? & !bits == 0,
                "data in an absent block"
            );
            let found = runs(bits).flat_map(|(first, end)| first..end);
            blocks.extend(found.map(|bit| word.block(bit)));
        }
    }
    Ok(blocks)
}

fn read(layer: &Packed, block: Block, from: u64, buf: &mut [u8]) -> Result<()> {
    let at = (block.0 - block.word().block(0).0) * BLOCK_SIZE + from;
    waited(layer.read(block.word(), at, buf.into(), Wait::Allowed))
}

fn run(input: &[u8]) {
    let Layer { bytes, content, intact } = Layer::build(input);
    let file = MemoryFolder::new("fuzz").create("layer").unwrap();
    write_all_at(&*file, &bytes, 0).unwrap();
    let layer = match Packed::open(file) {
        Ok(layer) => layer,
        Err(error) => return assert!(!intact, "{error}"),
    };
    let mut damage = Vec::new();
    layer.verify(&mut damage).unwrap();
    assert!(damage.is_empty() || !intact, "{damage:?}");
    let Ok(blocks) = present(&layer) else {
        return assert!(!damage.is_empty(), "a map that can't be read is nothing to verify");
    };
    let mut all = Vec::new();
    for block in blocks {
        let mut whole: Bytes = [0xee; BLOCK_SIZE as usize];
        if let Err(error) = read(&layer, block, 0, &mut whole) {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            let at = block.0 * BLOCK_SIZE;
            let names = |(from, length): (u64, u64)| (from..from + length).contains(&at);
            let named = damage.iter().filter_map(|damage| damage.guest).any(names);
            assert!(named, "verify doesn't name {block:?}: {error}; {damage:?}");
            continue;
        }
        let mut part = [0xee; 100];
        read(&layer, block, 1000, &mut part).expect("what was read once can be read again");
        assert!(part == whole[1000..1100], "a part of {block:?} differs from the whole");
        all.push((block, whole));
    }
    if intact {
        let expected = content.iter().map(|(&block, bytes)| (Block(block), bytes.as_deref()));
        assert!(all.iter().map(|(block, _)| *block).eq(expected.clone().map(|(block, _)| block)));
        let zeros = &[0; BLOCK_SIZE as usize][..];
        let same = all.iter().zip(expected).all(|((_, a), (_, b))| a == b.unwrap_or(zeros));
        assert!(same, "other content than was packed");
    }
    if damage.is_empty() {
        root_follows_content(&layer, &all);
    }
}

/// What is verified and then packed again has the same root.
fn root_follows_content(layer: &Packed, all: &[(Block, Bytes)]) {
    let header = layer.header();
    let is_data =
        |block: Block| layer.data(block.word(), Wait::Allowed).unwrap() & block.mask() != 0;
    // What no writer makes: other frames, data that is zero, bytes beyond the end.
    let unlike = header.frame_blocks != FRAME_BLOCKS
        || all.iter().any(|(block, bytes)| {
            let end = header.virtual_size.saturating_sub(block.0 * BLOCK_SIZE);
            is_data(*block) == (*bytes == [0; BLOCK_SIZE as usize])
                || bytes.iter().skip(end as usize).any(|&byte| byte != 0)
        });
    if unlike {
        return;
    }
    let parent = header.parent.clone().map(|link| (link, header.visible_parent_size));
    let mut writer =
        Writer::new(Vec::new(), header.virtual_size, parent, Compression::Zstd(1)).unwrap();
    for (block, bytes) in all {
        writer.data(*block, bytes).unwrap();
    }
    let (summary, _) = writer.finish().unwrap();
    assert_eq!(summary.root, layer.root(), "the same content under two roots");
}

//! Blocks that a layer has by sharing the space of another file.

use std::sync::Arc;

use testkit::bench::Bench;
use thinply::chain::Chain;
use thinply::device::Device;
use thinply::error::ErrorKind;
use thinply::storage::{Access, Share, Storage, write_all_at};

const BLOCK: u64 = 4096;
/// Into the third group.
const SIZE: u64 = 260 << 20;

/// A file whose blocks all differ.
fn source(bench: &Bench) -> Arc<dyn Storage> {
    let file = bench.folder.create("source").unwrap();
    file.set_length(SIZE).unwrap();
    for block in 0..SIZE / BLOCK {
        write_all_at(&*file, &(block + 1).to_le_bytes(), block * BLOCK).unwrap();
    }
    file
}

fn number(chain: &Chain, block: u64) -> u64 {
    let mut bytes = [0; 8];
    chain.read(block * BLOCK, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn shared_blocks_are_owned_durably_and_nothing_else_is() {
    let bench = Bench::default();
    let file = source(&bench);
    bench.create("a", SIZE);
    let chain = bench.write("a");
    let (from, end) = (100, SIZE / BLOCK - 7);
    // From another place of the source than that of the disk.
    assert_eq!(
        chain.share(from * BLOCK, (end - from) * BLOCK, &*file, 3 * BLOCK).unwrap(),
        Share::Done
    );
    chain.flush().unwrap();
    // A crash: neither closed nor flushed again.
    drop(chain);
    let chain = bench.write("a");
    for block in 0..SIZE / BLOCK {
        let expected = if (from..end).contains(&block) { block - from + 4 } else { 0 };
        assert_eq!(number(&chain, block), expected, "block {block}");
    }
    // What comes from elsewhere is written to like anything.
    chain.write(from * BLOCK, &[9; 8]).unwrap();
    assert_eq!(number(&chain, from), u64::from_le_bytes([9; 8]));
    assert_eq!(number(&chain, from + 1), 5);
    chain.close().unwrap();
}

#[test]
fn what_is_owned_or_not_whole_is_not_shared() {
    let bench = Bench::default();
    let file = source(&bench);
    bench.create("a", SIZE);
    let chain = bench.write("a");
    chain.write(200 * BLOCK, &[1; 10]).unwrap();
    assert_eq!(chain.share(190 * BLOCK, 20 * BLOCK, &*file, 0).unwrap(), Share::Refused);
    assert_eq!(chain.share(512, BLOCK, &*file, 0).unwrap(), Share::Refused);
    assert_eq!(chain.share(0, 512, &*file, 0).unwrap(), Share::Refused);
    assert_eq!((number(&chain, 195), number(&chain, 0)), (0, 0), "nothing changed");
    assert_eq!(chain.share(0, 0, &*file, 0).unwrap(), Share::Done);
    let error = chain.share(SIZE, BLOCK, &*file, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    chain.close().unwrap();
    drop(chain);
    let error = bench.open("a", Access::Read).unwrap().share(0, BLOCK, &*file, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
}

#[test]
fn a_few_shared_blocks_take_the_way_of_a_record() {
    let bench = Bench::default();
    let file = source(&bench);
    bench.create("a", SIZE);
    let chain = bench.write("a");
    assert_eq!(chain.share(7 * BLOCK, 3 * BLOCK, &*file, 0).unwrap(), Share::Done);
    chain.flush().unwrap();
    // Named by the record, so this waits for the next one.
    chain.write(8 * BLOCK, &[5; 8]).unwrap();
    drop(chain);
    let chain = bench.write("a");
    assert_eq!((number(&chain, 7), number(&chain, 9)), (1, 3));
}

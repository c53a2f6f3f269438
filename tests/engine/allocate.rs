//! Space that is allocated: content stays, and what is written there later needs no more of it.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use testkit::bench::{BLOCK, Bench, Disk};
use testkit::hooked::{Call, Hooked};
use thinply::chain::Chain;
use thinply::device::{Detail, Device, Disk as _, ZeroMode};
use thinply::error::ErrorKind;
use thinply::format::geometry::{JOURNAL_OFFSET, JOURNAL_RECORDS};
use thinply::packed::Compression;
use thinply::serve::{Opened, Served};
use thinply::storage::{FileFolder, Folder, MemoryFolder};

const MIB: u64 = 1 << 20;
const B: u64 = BLOCK as u64;
/// Ends in the middle of a block of the second group.
const SIZE: u64 = 127 * MIB + 9 * B + 512;

fn bytes(length: u64, seed: u64) -> Vec<u8> {
    (0..length).map(|at| ((at / 5 + seed) * 7) as u8 | 1).collect()
}

/// A base with data and what was data, perhaps packed, and a top with both of its own; and what it holds.
fn layers(bench: &Bench, packed: bool) -> Disk {
    let mut disk = Disk::new(SIZE);
    let mut fill = |chain: &Chain, writes: &[(u64, u64)], trims: &[(u64, u64)]| {
        for &(offset, length) in writes {
            chain.write(offset, &bytes(length, offset)).unwrap();
            disk.write(offset, &bytes(length, offset));
        }
        for &(offset, length) in trims {
            chain.trim(offset, length).unwrap();
            disk.trim(offset, length);
        }
    };
    bench.create("base", SIZE);
    let writes = [(0, 70 * B), (200 * B, 10), (SIZE - 600, 600), (64 * MIB, MIB)];
    bench.change("base", |chain| fill(chain, &writes, &[(10 * B, 20 * B)]));
    let mut below = "base";
    if packed {
        bench.pack(&bench.read("base"), "packed", Compression::Zstd(1));
        below = "packed";
    }
    bench.overlay("top", below, None);
    let writes = [(5 * B, 10 * B), (100 * B, 3 * B)];
    bench.change("top", |chain| fill(chain, &writes, &[(6 * B, B), (50 * B, 5 * B)]));
    disk
}

/// How many bytes of a range the top owns.
fn owned(chain: &Chain, offset: u64, length: u64) -> u64 {
    let mut owned = 0;
    let count = &mut |extent: thinply::chain::MapExtent| {
        owned += if extent.depth == Some(0) { extent.length } else { 0 };
        ControlFlow::Continue(())
    };
    chain.map(offset, length, Detail::Bitmaps, count).unwrap();
    owned
}

fn same(chain: &Chain, disk: &Disk) {
    for offset in (0..SIZE).step_by(MIB as usize) {
        let length = MIB.min(SIZE - offset) as usize;
        let mut found = vec![0xee; length];
        chain.read(offset, &mut found).unwrap();
        assert!(found == disk.read(offset, length), "the MiB at {offset} differs");
    }
}

#[test]
fn all_blocks_of_a_range_get_space_and_keep_their_content() {
    for packed in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let bench = Bench::in_folder(Arc::new(FileFolder::new(directory.path())));
        let disk = layers(&bench, packed);
        let chain = bench.write("top");
        let before = chain.facts().unwrap().space;
        // Ends in the middle of blocks take the whole of them.
        chain.allocate(B + 1, 300 * B).unwrap();
        assert_eq!(owned(&chain, 0, 400 * B), 301 * B);
        let space = chain.facts().unwrap().space - before;
        assert!(space >= (301 - 13) * B, "{space} bytes more for 301 blocks");
        same(&chain, &disk);
        chain.allocate(SIZE - 20 * B, 20 * B).unwrap();
        chain.allocate(63 * MIB, 3 * MIB).unwrap();
        let whole = 301 * B + 3 * MIB + 20 * B + 512;
        assert!(chain.facts().unwrap().space - before >= whole - 13 * B);
        // A crash: it stays.
        drop(chain);
        let chain = bench.write("top");
        assert_eq!(owned(&chain, 0, SIZE), whole);
        same(&chain, &disk);
        chain.close().unwrap();
    }
}

/// The host is full: neither a write there nor its flush takes space, be it for the journal.
#[test]
fn a_write_to_what_is_allocated_needs_no_space() {
    let hooked = Arc::new(Hooked::new(Arc::new(MemoryFolder::new("m"))));
    let folder: Arc<dyn Folder> = hooked.clone();
    let bench = Bench::in_folder(folder);
    layers(&bench, false);
    let chain = bench.write("top");
    chain.write(0, &[1; 10]).unwrap();
    chain.allocate(0, MIB).unwrap();
    let ring = JOURNAL_OFFSET.0..JOURNAL_OFFSET.0 + JOURNAL_RECORDS * B;
    hooked.on_calls(move |call| match call {
        Call::Allocate { .. } => Err(io::ErrorKind::StorageFull.into()),
        Call::Write { offset, .. } if ring.contains(&offset) => {
            Err(io::ErrorKind::StorageFull.into())
        }
        _ => Ok(usize::MAX),
    });
    for round in 0..3 {
        chain.write(7, &bytes(MIB - 7, round)).unwrap();
        chain.flush().unwrap();
    }
    let error = chain.allocate(90 * MIB, B).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!(owned(&chain, 90 * MIB, B), 0);
}

#[test]
fn a_host_that_can_promise_nothing_is_told_from_one_that_can() {
    let hooked = Arc::new(Hooked::new(Arc::new(MemoryFolder::new("m"))));
    let folder: Arc<dyn Folder> = hooked.clone();
    let bench = Bench::in_folder(folder);
    let disk = layers(&bench, false);
    hooked.on_calls(|call| match call {
        Call::Allocate { .. } => Err(io::ErrorKind::Unsupported.into()),
        _ => Ok(usize::MAX),
    });
    let chain = bench.write("top");
    let before = owned(&chain, 0, SIZE);
    let error = chain.allocate(0, MIB).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.path().is_some(), "{error}");
    assert_eq!(owned(&chain, 0, SIZE), before);
    same(&chain, &disk);
    // All else does without.
    chain.zero(80 * MIB, B, ZeroMode { allocate: true, fast_only: false }).unwrap();
    chain.write(127 * MIB, &[1; 4096]).unwrap();
    chain.close().unwrap();
}

#[test]
fn what_is_not_there_or_only_read_is_not_allocated() {
    let bench = Bench::default();
    layers(&bench, false);
    let chain = bench.write("top");
    for (offset, length) in [(SIZE, 1), (0, SIZE + 1), (u64::MAX, u64::MAX)] {
        let error = chain.allocate(offset, length).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{length} at {offset}");
    }
    chain.allocate(SIZE, 0).unwrap();
    chain.close().unwrap();
    drop(chain);
    let error = bench.read("top").allocate(0, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    let read_only = Opened { read_only: true, ..Opened::new(bench.write("top")) };
    let served = Served::new("d", read_only).unwrap();
    assert_eq!(served.allocate(0, 1).unwrap_err().kind(), ErrorKind::ReadOnly);
}

/// A moment is of what can be read, and that stays.
#[test]
fn a_moment_keeps_nothing_of_what_is_allocated() {
    let bench = Bench::default();
    let disk = layers(&bench, false);
    let served = Arc::new(Served::new("d", Opened::new(bench.write("top"))).unwrap());
    let scratch = MemoryFolder::new("scratch").create("kept").unwrap();
    let moment = served.moment(scratch.clone()).unwrap();
    served.allocate(0, MIB).unwrap();
    assert_eq!(scratch.length().unwrap(), 0);
    served.write(B, &[0; 100]).unwrap();
    assert_eq!(scratch.length().unwrap(), B);
    let mut found = vec![0; MIB as usize];
    moment.read(0, &mut found).unwrap();
    assert!(found == disk.read(0, MIB as usize));
}

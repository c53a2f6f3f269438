//! Long reads over NBD, which are sent from the layers' files.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use testkit::bench::Bench;
use testkit::nbd::{Client, READ, Served};
use thinply::chain::Chain;
use thinply::device::Device;
use thinply::storage::FileFolder;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

fn pattern(seed: u64, length: u64) -> Vec<u8> {
    (0..length).map(|at| (at / 512 * 31 + at + seed) as u8 | 1).collect()
}

/// A base of data up to its last MiB, under a top with a run of its own; and what they show.
fn chain(dir: &tempfile::TempDir) -> (Chain, Vec<u8>) {
    let bench = Bench::in_folder(Arc::new(FileFolder::new(dir.path())));
    let mut shown = pattern(3, SIZE - MIB);
    shown.resize(SIZE as usize, 0);
    bench.create("base", SIZE);
    let base = bench.write("base");
    base.write(0, &shown[..(SIZE - MIB) as usize]).unwrap();
    base.close().unwrap();
    bench.overlay("top", "base", None);
    let top = bench.write("top");
    let own = pattern(8, MIB);
    top.write(2 * MIB, &own).unwrap();
    shown[2 * MIB as usize..3 * MIB as usize].copy_from_slice(&own);
    (top, shown)
}

#[test]
fn long_reads_are_right_wherever_they_begin_and_end() {
    let dir = tempfile::tempdir().unwrap();
    let (chain, shown) = chain(&dir);
    let served = Served::device(&Arc::new(chain));
    for structured in [true, false] {
        let mut client = Client::open(&served.path(), "disk", structured);
        for length in [64 * KIB, 64 * KIB + 512, 256 * KIB, 700 * KIB, 3 * MIB] {
            for at in (0..SIZE - length).step_by(333 * 512) {
                let data = client.read(at, length as u32);
                assert!(data == shown[at as usize..(at + length) as usize], "{length} at {at}");
            }
        }
        // Many at a time: long ones between short ones.
        let reads = (0..64).map(|i| (i * 100 * KIB, if i % 3 == 0 { 4 * KIB } else { 128 * KIB }));
        for (at, length) in reads.clone() {
            client.start(0, READ, at, length as u32);
        }
        for (at, length) in reads {
            let data = client.reply().data();
            assert!(data == shown[at as usize..(at + length) as usize], "{length} at {at}");
        }
    }
}

#[test]
fn a_range_is_told_only_where_one_file_holds_it_in_one_piece() {
    let dir = tempfile::tempdir().unwrap();
    let (chain, shown) = chain(&dir);
    let told = |at, length| chain.host_range(at, length).unwrap();
    // The base, the top, and neither alone.
    for (at, length) in [(0, 2 * MIB), (2 * MIB + 512, MIB - 512), (3 * MIB, 4 * MIB)] {
        let range = told(at, length).unwrap();
        let mut data = vec![0; length as usize];
        File::from(range.file).read_exact_at(&mut data, range.offset).unwrap();
        assert!(data == shown[at as usize..(at + length) as usize], "{length} at {at}");
    }
    for at in [2 * MIB - 512, 3 * MIB - 512, SIZE - MIB - 512, SIZE - MIB] {
        assert!(told(at, 4096).is_none(), "{at}");
    }
    assert!(chain.host_range(SIZE, 1).is_err());
}

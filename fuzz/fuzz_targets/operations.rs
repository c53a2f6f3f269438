//! Any operations on a chain, against a byte array for each of its layers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testkit::bench::{BLOCK, Bench, Disk};
use thinply::chain::Chain;
use thinply::device::{Device, ZeroMode};
use thinply::wait::{Wait, unless_waiting};
use thinply::inspect;
use thinply::storage::Access;
use thinply_fuzz::operations::{Operation, SIZE, decode};

fuzz_target!(|input: &[u8]| run(input));

struct Run {
    bench: Bench,
    chain: Option<Chain>,
    disk: Disk,
    snapshots: Vec<Disk>,
}

fn clip(disk: &Disk, offset: u64, length: u64) -> (u64, u64) {
    let offset = offset.min(disk.size);
    (offset, length.min(disk.size - offset))
}

/// Compares everything that was ever written.
fn compare(chain: &Chain, disk: &Disk) {
    assert_eq!(chain.size(), disk.size);
    for block in disk.blocks() {
        let (offset, length) = clip(disk, block * BLOCK as u64, BLOCK as u64);
        let mut found = vec![0xee; length as usize];
        chain.read(offset, &mut found).unwrap();
        assert!(found == disk.read(offset, length as usize), "block {block} differs");
    }
}

impl Run {
    fn step(&mut self, operation: Operation) {
        let disk = &mut self.disk;
        let chain = self.chain.as_ref().unwrap();
        match operation {
            Operation::Write { offset, length, fill } => {
                let (offset, length) = clip(disk, offset, length);
                let data: Vec<u8> =
                    (offset..offset + length).map(|at| fill ^ (at / 509) as u8 | 1).collect();
                let done = chain.try_write(offset, (&data).into(), Wait::Never).unwrap();
                chain.write(offset + done, &data[done as usize..]).unwrap();
                disk.write(offset, &data);
            }
            Operation::Zero { offset, length, allocate } => {
                let (offset, length) = clip(disk, offset, length);
                chain.zero(offset, length, ZeroMode { allocate, fast_only: false }).unwrap();
                disk.zero(offset, length);
            }
            Operation::Trim { offset, length } => {
                let (offset, length) = clip(disk, offset, length);
                chain.trim(offset, length).unwrap();
                disk.trim(offset, length);
            }
            Operation::Read { offset, length } => {
                let (offset, length) = clip(disk, offset, length);
                let mut found = vec![0xee; length as usize];
                // In memory only what is touched for the first time would wait.
                let tried = chain.try_read(offset, (&mut found).into(), Wait::Never);
                if unless_waiting(tried).unwrap().is_none() {
                    chain.read(offset, &mut found).unwrap();
                }
                assert!(found == disk.read(offset, length as usize), "read at {offset}");
            }
            Operation::Flush => chain.flush().unwrap(),
            Operation::Snapshot => {
                chain.snapshot(&format!("snapshot-{}", self.snapshots.len())).unwrap();
                self.snapshots.push(disk.clone());
            }
            Operation::Resize { size } => {
                chain.resize(size, true).unwrap();
                disk.resize(size);
            }
            Operation::Reopen => {
                chain.close().unwrap();
                self.reopen();
            }
            Operation::Kill => {
                chain.flush().unwrap();
                self.chain = None;
                compare(&self.bench.read("top"), &self.disk);
                self.reopen();
            }
        }
    }

    fn reopen(&mut self) {
        self.chain = None;
        let file = self.bench.folder.open("top", Access::Read).unwrap();
        let report = inspect::check(&*file).unwrap();
        assert!(report.is_clean(), "{report:?}");
        self.chain = Some(self.bench.write("top"));
    }
}

fn run(input: &[u8]) {
    let bench = Bench::default();
    bench.create("top", SIZE);
    let chain = Some(bench.write("top"));
    let mut run = Run { bench, chain, disk: Disk::new(SIZE), snapshots: Vec::new() };
    decode(input, 60).for_each(|operation| run.step(operation));
    run.step(Operation::Reopen);
    compare(run.chain.as_ref().unwrap(), &run.disk);
    let fresh = Bench::in_folder(run.bench.folder.clone());
    for (number, disk) in run.snapshots.iter().enumerate() {
        compare(&fresh.read(&format!("snapshot-{number}")), disk);
    }
}

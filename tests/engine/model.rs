//! Arbitrary sequences of operations over chains of live, frozen and packed layers, and of the verbs
//! that make new layers of them, against a byte array for each layer.

use std::ops::ControlFlow;
use std::sync::Arc;

use proptest::prelude::*;
use testkit::bench::{BLOCK, Bench, Disk};
use thinply::chain::{Chain, Layer, Parent, seal};

use thinply::derive::{Mismatch, Plan, Rule, compare as compare_disks};
use thinply::device::{Detail, Device, ZeroMode};
use thinply::error::ErrorKind;
use thinply::packed::Compression;
use thinply::storage::{Access, write_all_at};
use thinply::wait::{Wait, unless_waiting};

/// One group, and a bit of a second one that doesn't end at a block.
const SIZE: u64 = GROUP + 40 * BLOCK as u64 + 512;
const GROUP: u64 = 127 << 20;
/// Places where something changes: words, sectors of the bitmap page, groups, ends.
const EDGES: [u64; 7] = [0, 256 << 10, 4064 * BLOCK as u64, GROUP, SIZE, GROUP / 2, SIZE / 2];

#[derive(Clone, Debug)]
enum Op {
    Write {
        offset: u64,
        length: u64,
        fill: u8,
    },
    Zero {
        offset: u64,
        length: u64,
        allocate: bool,
    },
    Trim {
        offset: u64,
        length: u64,
    },
    Allocate {
        offset: u64,
        length: u64,
    },
    Read {
        offset: u64,
        length: u64,
    },
    Flush,
    Snapshot,
    Resize {
        size: u64,
    },
    Reopen,
    /// Makes a new layer of the chain, and goes on over it or with it.
    Derive {
        verb: Verb,
        /// Which of the sealed layers has a part in it.
        with: usize,
        packed: bool,
    },
    /// Drops the chain without closing it, after a flush; recovery must bring all back.
    Kill,
}

#[derive(Clone, Copy, Debug)]
enum Verb {
    Pack,
    Flatten,
    Rebase,
    Compact,
    Diff,
}

const VERBS: [Verb; 5] = [Verb::Pack, Verb::Flatten, Verb::Rebase, Verb::Compact, Verb::Diff];

fn range() -> impl Strategy<Value = (u64, u64)> {
    let place = (prop::sample::select(&EDGES[..]), -3i64..3, prop_oneof![Just(0i64), -700i64..700]);
    let length = prop_oneof![
        (1u64..4).prop_map(|n| n * BLOCK as u64),
        1u64..3 * BLOCK as u64,
        1u64..(600 << 10),
    ];
    (place, length).prop_map(|((edge, blocks, bytes), length)| {
        (edge.saturating_add_signed(blocks * BLOCK as i64 + bytes), length)
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (range(), 1u8..).prop_map(|((offset, length), fill)| Op::Write { offset, length, fill }),
        3 => (range(), any::<bool>())
            .prop_map(|((offset, length), allocate)| Op::Zero { offset, length, allocate }),
        3 => range().prop_map(|(offset, length)| Op::Trim { offset, length }),
        2 => range().prop_map(|(offset, length)| Op::Allocate { offset, length }),
        3 => range().prop_map(|(offset, length)| Op::Read { offset, length }),
        3 => Just(Op::Flush),
        2 => Just(Op::Snapshot),
        1 => range().prop_map(|(offset, _)| Op::Resize { size: (offset / 512 * 512).max(512) }),
        1 => Just(Op::Reopen),
        4 => (prop::sample::select(&VERBS[..]), any::<usize>(), any::<bool>())
            .prop_map(|(verb, with, packed)| Op::Derive { verb, with, packed }),
        1 => Just(Op::Kill),
    ]
}

/// Cuts a range to the device.
fn clip(disk: &Disk, offset: u64, length: u64) -> (u64, u64) {
    let offset = offset.min(disk.size);
    (offset, length.min(disk.size - offset))
}

/// Bytes that differ from place to place, so that a misplaced block is noticed.
fn pattern(offset: u64, length: u64, fill: u8) -> Vec<u8> {
    (offset..offset + length).map(|at| fill ^ (at / 509) as u8 | 1).collect()
}

/// Compares everything that was ever written, the edges, and what the extents claim.
fn compare(chain: &Chain, disk: &Disk, what: &str) {
    assert_eq!(chain.size(), disk.size, "{what}");
    let near = EDGES.iter().flat_map(|&edge| {
        let block = edge / BLOCK as u64;
        block.saturating_sub(4)..block + 4
    });
    for block in disk.blocks().chain(near) {
        let (offset, length) = clip(disk, block * BLOCK as u64, BLOCK as u64);
        let mut found = vec![0xee; length as usize];
        chain.read(offset, &mut found).unwrap();
        assert!(found == disk.read(offset, length as usize), "{what}: block {block} differs");
    }
    for detail in [Detail::Bitmaps, Detail::Files] {
        let mut extents = Vec::new();
        chain.extents(0, disk.size, detail, usize::MAX, &mut extents).unwrap();
        assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), disk.size, "{what}");
        let mut at = 0;
        for extent in extents {
            let blocks = at / BLOCK as u64..(at + extent.length).div_ceil(BLOCK as u64);
            for block in disk.blocks().filter(|block| extent.hole && blocks.contains(block)) {
                let (offset, length) = clip(disk, block * BLOCK as u64, BLOCK as u64);
                let (from, to) = (offset.max(at), (offset + length).min(at + extent.length));
                let zeros = disk.read(from, (to - from) as usize).iter().all(|&byte| byte == 0);
                assert!(zeros, "{what}: block {block} is called a hole");
            }
            at += extent.length;
        }
    }
}

struct Run {
    bench: Bench,
    chain: Option<Chain>,
    disk: Disk,
    /// What each sealed layer must show.
    sealed: Vec<(String, Disk)>,
}

impl Run {
    fn new(size: u64) -> Self {
        let bench = Bench::default();
        bench.create("top", size);
        let chain = Some(bench.write("top"));
        Self { bench, chain, disk: Disk::new(size), sealed: Vec::new() }
    }

    fn chain(&self) -> &Chain {
        self.chain.as_ref().unwrap()
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Write { offset, length, fill } => {
                let (offset, length) = clip(&self.disk, offset, length);
                let data = pattern(offset, length, fill);
                let done = self.chain().try_write(offset, (&data).into(), Wait::Never).unwrap();
                self.chain().write(offset + done, &data[done as usize..]).unwrap();
                self.disk.write(offset, &data);
            }
            Op::Zero { offset, length, allocate } => {
                let (offset, length) = clip(&self.disk, offset, length);
                let mode = ZeroMode { allocate, fast_only: false };
                self.chain().zero(offset, length, mode).unwrap();
                self.disk.zero(offset, length);
            }
            Op::Trim { offset, length } => {
                let (offset, length) = clip(&self.disk, offset, length);
                self.chain().trim(offset, length).unwrap();
                self.disk.trim(offset, length);
            }
            Op::Allocate { offset, length } => {
                let (offset, length) = clip(&self.disk, offset, length);
                self.chain().allocate(offset, length).unwrap();
                self.chain()
                    .map(offset, length, Detail::Bitmaps, &mut |extent| {
                        assert_eq!(extent.depth, Some(0), "allocated, not owned: {extent:?}");
                        ControlFlow::Continue(())
                    })
                    .unwrap();
            }
            Op::Read { offset, length } => {
                let (offset, length) = clip(&self.disk, offset, length);
                let mut found = vec![0xee; length as usize];
                let wait = if length % 2 == 0 { Wait::Never } else { Wait::Decode };
                let tried = self.chain().try_read(offset, (&mut found).into(), wait);
                if unless_waiting(tried).unwrap().is_none() {
                    self.chain().read(offset, &mut found).unwrap();
                }
                assert!(found == self.disk.read(offset, length as usize), "read at {offset}");
            }
            Op::Flush => self.chain().flush().unwrap(),
            Op::Snapshot => {
                let name = format!("snapshot-{}", self.sealed.len());
                self.chain().snapshot(&name).unwrap();
                self.sealed.push((name, self.disk.clone()));
            }
            Op::Resize { size } => {
                self.chain().resize(size, true).unwrap();
                self.disk.resize(size);
            }
            Op::Reopen => {
                self.chain.take().unwrap().close().unwrap();
                self.chain = Some(self.bench.write("top"));
            }
            Op::Derive { verb, with, packed } => {
                self.chain.take().unwrap().close().unwrap();
                self.derive(verb, with, packed);
                self.chain = Some(self.bench.write("top"));
            }
            Op::Kill => {
                self.chain().flush().unwrap();
                self.chain = None;
                compare(&self.bench.read("top"), &self.disk, "read-only after a kill");
                self.chain = Some(self.bench.write("top"));
            }
        }
    }

    /// A sealed layer, or none.
    fn choose(&self, with: usize) -> Option<Parent> {
        let (name, _) = self.sealed.get(with.checked_rem(self.sealed.len() + 1)?)?;
        Some(seal(&*self.bench.folder, name).unwrap())
    }

    fn derive(&mut self, verb: Verb, with: usize, packed: bool) {
        let still = self.bench.read("top");
        let depth = still.paths().len();
        let other = self.choose(with);
        let plan = match (verb, &other) {
            (Verb::Pack, _) => return self.pack(depth > 1 && packed),
            (Verb::Flatten, Some(parent)) => match Plan::flatten(&still, Some(&parent.link)) {
                Err(error) if error.kind() == ErrorKind::InvalidInput => return,
                plan => plan.unwrap(),
            },
            (Verb::Flatten, None) => Plan::flatten(&still, None).unwrap(),
            (Verb::Compact, _) => Plan::compact(&still),
            (Verb::Rebase | Verb::Diff, Some(parent)) => Plan::rebase(&still, parent),
            (Verb::Rebase | Verb::Diff, None) => return,
        };
        let name = format!("derived-{}", self.sealed.len());
        self.carry_out(&still, &plan, &name, packed || matches!(verb, Verb::Diff));
        let new = self.bench.read(&name);
        assert_eq!(compare_disks(&still, &new, Rule::Content, &|_| {}).unwrap(), None, "{verb:?}");
        if let Some((name, disk)) = with.checked_rem(self.sealed.len()).map(|n| &self.sealed[n]) {
            let sealed = self.bench.read(name);
            let found = compare_disks(&sealed, &new, Rule::Content, &|_| {}).unwrap();
            let expected = disk.first_difference(&self.disk).map(Mismatch::Content);
            assert_eq!(found, expected, "{name} and {verb:?}");
        }
        drop((still, new));
        self.go_on(name);
    }

    fn carry_out(&self, chain: &Chain, plan: &Plan, name: &str, packed: bool) {
        let (folder, layers, progress) = (&self.bench.folder, Arc::default(), &mut |_| {});
        if packed {
            let zstd = Compression::Zstd(1);
            let made = chain.derive_packed(plan, folder, Vec::new(), layers, zstd, progress);
            write_all_at(&*folder.create(name).unwrap(), &made.unwrap().1, 0).unwrap();
        } else {
            chain.derive_live(plan, folder, name, layers, progress).unwrap();
        }
    }

    /// Packs the layer below the top, or else the top, and goes on over that instead: the same
    /// content under another identity.
    fn pack(&mut self, below: bool) {
        let Some((name, disk)) = self.sealed.last().filter(|_| below).cloned() else {
            let still = self.bench.read("top");
            let name = format!("packed-{}", self.sealed.len());
            self.bench.pack(&still, &name, Compression::None);
            drop(still);
            return self.go_on(name);
        };
        let link = |name: &str| Layer::open(self.bench.folder.open(name, Access::Read).unwrap());
        let parent = link("top").unwrap().parent().cloned();
        let packed = format!("packed-{}", self.sealed.len());
        self.bench.pack(&self.bench.read(&name), &packed, Compression::None);
        let new = seal(&*self.bench.folder, &packed).unwrap();
        let is_parent = parent.map(|link| link.identity) == link(&name).unwrap().identity();
        self.sealed.push((packed, disk));
        if is_parent {
            let still = self.bench.read("top");
            self.carry_out(&still, &Plan::relink(&still, &new), "new", false);
            drop(still);
            self.bench.folder.rename("new", "top").unwrap();
        }
    }

    /// The disk goes on over a new layer that shows the same, or, where that can be written, with it.
    fn go_on(&mut self, name: String) {
        let folder = &self.bench.folder;
        let layer = Layer::open(folder.open(&name, Access::Read).unwrap()).unwrap();
        let writable = layer.identity().is_none();
        drop(layer);
        if writable {
            folder.rename(&name, "top").unwrap();
            return;
        }
        folder.remove("top").unwrap();
        self.bench.overlay("top", &name, None);
        self.sealed.push((name, self.disk.clone()));
    }

    fn finish(mut self) {
        compare(self.chain(), &self.disk, "at the end");
        self.chain.take().unwrap().close().unwrap();
        compare(&self.bench.read("top"), &self.disk, "after closing");
        for (name, disk) in &self.sealed {
            compare(&self.bench.read(name), disk, name);
            // Nobody may have opened it before: all caches empty.
            let fresh = Bench::in_folder(self.bench.folder.clone());
            compare(&fresh.read(name), disk, name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_behaves_as_a_byte_array(ops in prop::collection::vec(op(), 1..40)) {
        let mut run = Run::new(SIZE);
        for op in &ops {
            run.step(op);
        }
        run.finish();
    }
}

#[test]
fn the_smallest_device_works() {
    let mut run = Run::new(512);
    for fill in 1..4 {
        run.step(&Op::Write { offset: 0, length: 512, fill });
        run.step(&Op::Snapshot);
        run.step(&Op::Zero { offset: 10, length: 100, allocate: false });
        run.step(&Op::Kill);
    }
    run.finish();
}

#[test]
fn many_commits_go_round_the_ring() {
    let mut run = Run::new(SIZE);
    for round in 0..700u64 {
        run.step(&Op::Write { offset: round * 3 * BLOCK as u64, length: 512, fill: 7 });
        run.step(&Op::Flush);
        if round % 97 == 0 {
            run.step(&Op::Kill);
        }
    }
    run.finish();
}

//! Power losses and kills at every kind of moment: nothing that a flush acknowledged is lost, and
//! nothing is read that was never written.
//!
//! `THINPLY_CRASH_SEEDS` says how many seeds to run (default 3,000), `THINPLY_CRASH_FIRST` where to
//! begin, to repeat a failure.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::crash::{CrashFolder, Random};
use thinply::chain::{Chain, Layers, create, seal};
use thinply::device::{Device, ZeroMode};
use thinply::error::Result;
use thinply::inspect;
use thinply::storage::{Access, Folder};

const BLOCK: u64 = 4096;
const SECTOR: u64 = 512;
const GROUP: u64 = 127 << 20;
const SIZE: u64 = GROUP + 8 * BLOCK + SECTOR;
/// The blocks that are used: at edges of words, bitmap sectors, the group and the device.
const BLOCKS: [u64; 16] = [
    0,
    1,
    2,
    3,
    63,
    64,
    4063,
    4064,
    8127,
    8128,
    32510,
    32511,
    32512,
    32513,
    32514,
    GROUP / BLOCK + 8,
];

type Sector = Vec<u8>;

/// For each sector that was ever touched: the contents it may have, the latest last.
#[derive(Clone, Default)]
struct Allowed(BTreeMap<u64, Vec<Sector>>);

impl Allowed {
    fn latest(&self, sector: u64) -> Sector {
        self.0.get(&sector).map_or_else(|| vec![0; 512], |values| values.last().unwrap().clone())
    }

    /// The bytes are being written; until a flush both old and new are allowed.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut at = 0;
        while at < data.len() as u64 {
            let position = offset + at;
            let within = (position % SECTOR) as usize;
            let length = (512 - within).min(data.len() - at as usize);
            let mut value = self.latest(position / SECTOR);
            value[within..within + length].copy_from_slice(&data[at as usize..][..length]);
            let values = self.0.entry(position / SECTOR).or_insert_with(|| vec![vec![0; 512]]);
            values.push(value);
            at += length as u64;
        }
    }

    fn flush(&mut self) {
        self.0.values_mut().for_each(|values| drop(values.drain(..values.len() - 1)));
    }

    /// Compares the device and keeps what it shows as the only thing allowed.
    fn settle(&mut self, chain: &Chain, what: &str) {
        for (&sector, values) in &mut self.0 {
            let mut found = vec![0; 512];
            chain.read(sector * SECTOR, &mut found).unwrap();
            assert!(
                values.contains(&found),
                "{what}: sector {sector} (block {}) begins {:?}, expected one of {:?}",
                sector / 8,
                &found[..4],
                values.iter().map(|value| value[..4].to_vec()).collect::<Vec<_>>()
            );
            *values = vec![found];
        }
    }
}

impl Allowed {
    /// What the device shows now is what later writes change; older contents may still come back.
    fn observe(&mut self, chain: &Chain, what: &str) {
        for (&sector, values) in self.0.iter_mut().filter(|(_, values)| values.len() > 1) {
            let mut found = vec![0; 512];
            chain.read(sector * SECTOR, &mut found).unwrap();
            assert!(values.contains(&found), "{what}: sector {sector} shows a stranger's bytes");
            values.push(found);
        }
    }
}

struct Life {
    folder: CrashFolder,
    random: Random,
    allowed: Allowed,
    snapshots: u64,
}

impl Life {
    fn new(seed: u64) -> Self {
        let folder = CrashFolder::default();
        let shared: Arc<dyn Folder> = Arc::new(folder.clone());
        let layers = Arc::new(Layers::default());
        create(&shared, "base", Some(SIZE), None, &layers).unwrap();
        let base = Chain::open(shared.clone(), "base", Access::Write, layers.clone()).unwrap();
        let mut allowed = Allowed::default();
        for block in BLOCKS.iter().step_by(2) {
            let length = BLOCK.min(SIZE - block * BLOCK) as usize;
            base.write(block * BLOCK, &vec![0xba; length]).unwrap();
            allowed.write(block * BLOCK, &vec![0xba; length]);
        }
        base.close().unwrap();
        drop(base);
        let parent = seal(&folder, "base").unwrap();
        create(&shared, "top", None, Some(&parent), &layers).unwrap();
        allowed.flush();
        Self { folder, random: Random::new(seed), allowed, snapshots: 0 }
    }

    fn open(&self) -> Result<Chain> {
        Chain::open(Arc::new(self.folder.clone()), "top", Access::Write, Arc::default())
    }

    fn range(&mut self) -> (u64, u64) {
        let block = *self.random.pick(&BLOCKS) * BLOCK;
        let (from, length) = match self.random.below(4) {
            0 => (self.random.below(8) * SECTOR, (1 + self.random.below(8)) * SECTOR),
            1 => (self.random.below(BLOCK), 1 + self.random.below(2 * BLOCK)),
            _ => (0, (1 + self.random.below(3)) * BLOCK),
        };
        let offset = (block + from).min(SIZE - 1);
        (offset, length.min(SIZE - offset))
    }

    fn step(&mut self, chain: &Chain) -> Result<()> {
        let (offset, length) = self.range();
        match self.random.below(20) {
            0..8 => {
                let data = vec![1 + self.random.below(250) as u8; length as usize];
                self.allowed.write(offset, &data);
                chain.write(offset, &data)
            }
            8..10 => {
                self.allowed.write(offset, &vec![0; length as usize]);
                let allocate = self.random.below(2) == 0;
                chain.zero(offset, length, ZeroMode { allocate, fast_only: false })
            }
            10..12 => {
                let first = offset.next_multiple_of(BLOCK);
                let end = offset + length;
                let end = if end == SIZE { end } else { end / BLOCK * BLOCK };
                if first < end {
                    self.allowed.write(first, &vec![0; (end - first) as usize]);
                }
                chain.trim(offset, length)
            }
            12 => {
                // Many blocks at once: more than a record holds.
                let data = vec![1 + self.random.below(250) as u8; 400 * BLOCK as usize];
                self.allowed.write(8200 * BLOCK, &data);
                chain.write(8200 * BLOCK, &data)
            }
            13 if self.random.below(4) == 0 => {
                self.snapshots += 1;
                chain.snapshot(&format!("snap{}", self.snapshots))
            }
            _ => {
                chain.flush()?;
                self.allowed.flush();
                Ok(())
            }
        }
    }

    /// Some operations until the fuse ends them, or all of them do.
    fn live(&mut self, operations: u64) {
        let Ok(chain) = self.open() else {
            assert!(self.folder.is_dark(), "opening failed with the power on");
            return;
        };
        for _ in 0..operations {
            if let Err(error) = self.step(&chain) {
                assert!(self.folder.is_dark(), "{error} with the power on");
                return;
            }
        }
        if self.random.below(3) == 0 && chain.close().is_ok() {
            self.allowed.flush();
        }
    }

    fn crash(&mut self) {
        self.folder = self.folder.crashed(&mut self.random);
    }

    /// Reopens, perhaps through crashes inside recovery, and compares.
    fn recover(&mut self, what: &str) {
        for _ in 0..self.random.below(3) {
            self.folder.light(self.random.below(40));
            drop(self.open());
            self.folder.quench();
            if self.random.below(2) == 0 {
                self.crash();
            }
        }
        let read_only =
            Chain::open(Arc::new(self.folder.clone()), "top", Access::Read, Arc::default());
        self.allowed.settle(&read_only.unwrap(), &format!("{what}, read-only"));
        let chain = self.open().unwrap();
        self.allowed.settle(&chain, what);
        drop(chain);
        self.crash();
        let chain = self.open().unwrap();
        self.allowed.settle(&chain, &format!("{what}, recovered a second time"));
        chain.close().unwrap();
        let file = self.folder.open("top", Access::Read).unwrap();
        let report = inspect::check(&*file).unwrap();
        assert!(report.is_clean(), "{what}: {report:?}");
    }
}

fn run(seed: u64) {
    let mut life = Life::new(seed);
    let base = life.folder.bytes("base");
    for round in 0..4 {
        let calls = [30, 100, 300][life.random.below(3) as usize];
        life.folder.light(life.random.below(calls));
        let operations = 1 + life.random.below(24);
        life.live(operations);
        life.folder.quench();
        // A kill leaves the page cache; the power may go later, or not.
        if life.random.below(4) != 0 {
            life.crash();
        }
        life.recover(&format!("seed {seed}, round {round}"));
        assert!(life.folder.bytes("base") == base, "seed {seed}: the base has changed");
    }
}

/// One call fails, with the disk full or broken, and all goes on: operations fail or don't, and what
/// a flush acknowledged is there after a power loss.
fn run_with_a_fault(seed: u64) {
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;
    let what = format!("fault, seed {seed}");
    let mut life = Life::new(seed);
    let chain = life.open().unwrap();
    let errno = *life.random.pick(&[EIO, ENOSPC]);
    life.folder.fail(life.random.below(120), errno);
    for _ in 0..30 {
        let snapshots = life.snapshots;
        if life.step(&chain).is_err() {
            assert!(life.folder.has_failed(), "{what}: an error out of nothing");
            life.allowed.observe(&chain, &what);
        }
        if life.snapshots != snapshots && life.folder.has_failed() {
            break;
        }
    }
    drop(chain);
    if life.random.below(2) == 0 {
        life.crash();
    }
    life.folder.fail(u64::MAX >> 2, EIO);
    life.recover(&what);
}

#[test]
fn a_call_that_fails_loses_nothing_acknowledged() {
    let first = number("THINPLY_CRASH_FIRST", 0);
    let seeds = number("THINPLY_CRASH_SEEDS", 3000);
    (first..first + seeds).for_each(run_with_a_fault);
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn nothing_acknowledged_is_lost() {
    let first = number("THINPLY_CRASH_FIRST", 0);
    let seeds = number("THINPLY_CRASH_SEEDS", 3000);
    (first..first + seeds).for_each(run);
}

/// A chain of commits longer than the ring, with power losses around its end.
#[test]
fn the_ring_goes_round_under_power_losses() {
    for seed in 0..number("THINPLY_CRASH_SEEDS", 3000) / 100 {
        let mut life = Life::new(seed);
        let chain = life.open().unwrap();
        for _ in 0..250 + life.random.below(20) {
            let data = vec![1 + life.random.below(250) as u8; 512];
            let offset = (9000 + life.random.below(20_000)) * BLOCK;
            life.allowed.write(offset, &data);
            chain.write(offset, &data).unwrap();
            chain.flush().unwrap();
            life.allowed.flush();
        }
        life.folder.light(life.random.below(60));
        for _ in 0..20 {
            if life.step(&chain).is_err() {
                break;
            }
        }
        drop(chain);
        life.folder.quench();
        life.crash();
        life.recover(&format!("ring, seed {seed}"));
    }
}

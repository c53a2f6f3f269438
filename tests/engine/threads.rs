//! Many threads on one chain at once, copies of its disk at any instant, and what a kill or a power
//! loss makes of each copy: nothing that a flush promised is lost.
//!
//! `THINPLY_THREADS` says how many lives to run (default 2), `THINPLY_THREADS_SEED` where to begin.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use fastrand::Rng;
use testkit::crash::Random;
use testkit::crash::disk::Disk;
use testkit::crash::folder::CrashFolder;
use testkit::load::history::{History, SECTOR, Seen};
use testkit::load::taste::{self, FLUSH, FUA, NO_HOLE, READ, SIZE, TRIM, Taste, WRITE};
use testkit::number;
use thinply::chain::{Chain, create, seal};
use thinply::device::{Device, ZeroMode};
use thinply::inspect;
use thinply::storage::{Access, Folder};
use thinply::wait::Wait;

const THREADS: usize = 6;
/// Copies of the disk in a round.
const COPIES: usize = 8;
const ROUNDS: usize = 4;

fn open(folder: &CrashFolder, name: &str, access: Access) -> Chain {
    Chain::open(Arc::new(folder.clone()), name, access, Arc::default()).unwrap()
}

/// Does what `taste` likes once.
fn step(chain: &Chain, history: &History, taste: &mut Taste) -> Result<(), String> {
    let request = taste.choose();
    let range = &request.range;
    let (offset, length) = (range.start * SECTOR, (range.end - range.start) * SECTOR);
    let failed = |error: thinply::error::Error| format!("{request:?}: {error}");
    match request.command {
        FLUSH => {
            let sent = history.begin_flush();
            chain.flush().map_err(failed)?;
            history.end_flush(sent);
            return Ok(());
        }
        READ if history.begin_read(range) => {
            let mut bytes = vec![0; length as usize];
            chain.read(offset, &mut bytes).map_err(failed)?;
            return history.end_read(range, &bytes);
        }
        READ => return Ok(()),
        _ => {}
    }
    // Somebody else may be at it.
    let Some(version) = history.begin(range, request.command != WRITE) else { return Ok(()) };
    match request.command {
        WRITE => {
            let mut content = Vec::new();
            History::content(range, version, &mut content);
            let tried = chain.try_write(offset, (&content).into(), Wait::Never);
            let done = tried.map_err(failed)?;
            chain.write(offset + done, &content[done as usize..]).map_err(failed)?;
        }
        TRIM => chain.trim(offset, length).map_err(failed)?,
        _ => {
            let allocate = request.flags & NO_HOLE != 0;
            chain.zero(offset, length, ZeroMode { allocate, fast_only: false }).map_err(failed)?;
        }
    }
    let through = request.flags & FUA != 0;
    if through {
        chain.flush().map_err(failed)?;
    }
    history.end(range, through);
    Ok(())
}

/// Compares all that was ever touched with what may show, and settles it.
fn settle(chain: &Chain, history: &History) -> Result<(), String> {
    history.touched(2048).iter().try_for_each(|range| {
        let mut bytes = vec![0; ((range.end - range.start) * SECTOR) as usize];
        chain.read(range.start * SECTOR, &mut bytes).map_err(|error| error.to_string())?;
        history.settle(range, &bytes)
    })
}

struct Life {
    folder: CrashFolder,
    /// The disk as it was when only the base held anything.
    born: Disk,
    history: Arc<History>,
    random: Rng,
    /// Decides what power losses leave.
    luck: Random,
    snapshots: u64,
    /// What each snapshot of this round shows.
    views: Vec<(String, History)>,
}

impl Life {
    fn new(seed: u64) -> Self {
        let (folder, mut random) = (CrashFolder::new(Disk::default()), Rng::with_seed(seed));
        let (shared, layers): (Arc<dyn Folder>, _) = (Arc::new(folder.clone()), Arc::default());
        create(&shared, "base", Some(SIZE * SECTOR), None, &layers).unwrap();
        let base = open(&folder, "base", Access::Write);
        let put = |offset, data: &[u8]| base.write(offset, data).unwrap();
        let history = Arc::new(taste::born(&mut random, put));
        base.close().unwrap();
        drop(base);
        let parent = seal(&folder, "base").unwrap();
        create(&shared, "top", None, Some(&parent), &layers).unwrap();
        let (born, luck) = (folder.disk(), Random::new(seed));
        Self { folder, born, history, random, luck, snapshots: 0, views: Vec::new() }
    }

    fn pause(&mut self, most: u64) {
        thread::sleep(Duration::from_micros(self.random.u64(..most)));
    }

    /// Lets threads loose, and copies the disk under them: each copy, and what it may show.
    fn round(&mut self) -> Result<Vec<(Disk, History)>, String> {
        let chain = open(&self.folder, "top", Access::Write);
        settle(&chain, &self.history)?;
        let (stop, mut copies) = (AtomicBool::new(false), Vec::new());
        let mut taker = Taste::new(self.random.u64(..));
        let tastes: Vec<_> = (0..THREADS).map(|_| Taste::new(self.random.u64(..))).collect();
        thread::scope(|scope| {
            let mut threads: Vec<ScopedJoinHandle<Result<(), String>>> = Vec::new();
            let (chain, stop) = (&chain, &stop);
            for mut taste in tastes {
                let history = self.history.clone();
                threads.push(scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        step(chain, &history, &mut taste)?;
                        taste.rest();
                    }
                    Ok(())
                }));
            }
            // Nobody sees that space is allocated, whatever they do there.
            threads.push(scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let Range { start, end } = taker.choose().range;
                    let taken = chain.allocate(start * SECTOR, (end - start) * SECTOR);
                    taken.map_err(|error| format!("allocating {start}..{end}: {error}"))?;
                    taker.rest();
                }
                Ok(())
            }));
            for _ in 0..COPIES {
                self.pause(4000);
                if self.random.u8(..8) == 0 {
                    self.snapshot(chain);
                }
                let mark = self.history.hold();
                let copy = self.folder.disk();
                copies.push((copy, self.history.crash(mark)));
            }
            stop.store(true, Ordering::Relaxed);
            threads.into_iter().try_for_each(|thread| thread.join().unwrap())
        })?;
        Ok(copies)
    }

    fn snapshot(&mut self, chain: &Chain) {
        self.snapshots += 1;
        let name = format!("snapshot{}", self.snapshots);
        let mark = self.history.hold();
        chain.snapshot(&name).unwrap();
        self.views.push((name, self.history.view(mark)));
    }

    /// Recovers a copy after a kill or a power loss, and compares it; what is left of it.
    fn judge(&mut self, copy: &Disk, allowed: &History) -> Result<CrashFolder, String> {
        let lost = self.random.bool();
        let disk = if lost { copy.crashed(&mut self.luck) } else { copy.clone() };
        let folder = CrashFolder::new(disk);
        settle(&open(&folder, "top", Access::Read), allowed)?;
        settle(&open(&folder, "top", Access::Write), allowed)?;
        // The power goes (again) right after the recovery.
        let folder = CrashFolder::new(folder.disk().crashed(&mut self.luck));
        let chain = open(&folder, "top", Access::Write);
        settle(&chain, allowed)?;
        chain.close().unwrap();
        let disk = folder.disk();
        for name in disk.names().keys() {
            let report = inspect::check(&*folder.open(name, Access::Read).unwrap()).unwrap();
            assert!(report.is_clean(), "{name}: {report:?}");
        }
        let base = disk.names()["base"];
        assert!(disk.same_content(base, &self.born, base), "the base has changed");
        Ok(folder)
    }

    fn live(&mut self) -> Result<(), String> {
        for round in 0..ROUNDS {
            let told = |what| format!("round {round}: {what}");
            let mut copies = self.round().map_err(told)?;
            for (name, view) in std::mem::take(&mut self.views) {
                settle(&open(&self.folder, &name, Access::Read), &view).map_err(told)?;
            }
            let (last, allowed) = copies.pop().unwrap();
            for (number, (copy, allowed)) in copies.iter().enumerate() {
                let told = |what| told(format!("copy {number}: {what}"));
                self.judge(copy, allowed).map_err(told)?;
            }
            self.folder = self.judge(&last, &allowed).map_err(told)?;
            self.history = Arc::new(allowed);
        }
        Ok(())
    }
}

#[test]
fn what_threads_were_promised_outlives_a_crash_at_any_instant() {
    let first = number("THINPLY_THREADS_SEED").unwrap_or(0);
    let mut seen = Seen::default();
    for seed in first..first + number("THINPLY_THREADS").unwrap_or(2) {
        let mut life = Life::new(seed);
        life.live().unwrap_or_else(|what| panic!("seed {seed}: {what}"));
        seen += life.history.seen();
    }
    println!("{seen:?}");
}

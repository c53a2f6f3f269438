//! Clients that run scripts, one alone or several at once.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use thinply::chain::{Chain, Gate, create, seal};
use thinply::device::{Device, ZeroMode};
use thinply::error::{Error, ErrorKind};
use thinply::storage::{Access, Folder};

use super::disk::{Data, Disk, PAGE};
use super::folder::{CrashFolder, Plan, guard};
use super::judge::{Run, TOP};
use super::keeper::CrashKeeper;
use super::oracle::{Ask, Note, Oracle};
use super::script::{BLOCKS, Op, SECTOR, SIZE};

type Result<T, E = Error> = std::result::Result<T, E>;

pub const BASE: &str = "base";
/// Where blocks stand that nobody looks at, and how many are more than a record holds.
const CROWD: u64 = 8200;
const MANY: u64 = 340;

/// The whole blocks inside a range, with the device's last block counted as whole.
pub(super) fn whole_blocks(offset: u64, length: u64) -> (u64, u64) {
    let (first, end) = (offset.next_multiple_of(PAGE), offset + length);
    let end = if end == SIZE { end } else { end / PAGE * PAGE };
    (first, end.saturating_sub(first))
}

/// A base with some data and a top without, all durable; and what that device holds.
pub fn fresh() -> (Disk, Oracle) {
    static FRESH: OnceLock<(Disk, Oracle)> = OnceLock::new();
    FRESH
        .get_or_init(|| {
            let folder = CrashFolder::new(Disk::default());
            let shared: Arc<dyn Folder> = Arc::new(folder.clone());
            let layers = Arc::new(Gate::default());
            create(&shared, BASE, Some(SIZE), None, &layers).unwrap();
            let open = Chain::open(shared.clone(), BASE, Access::Write, layers.clone());
            let client = Client::new(folder.clone(), Oracle::new(SIZE, &BLOCKS), 0);
            let base = open.unwrap();
            for block in BLOCKS.iter().step_by(2) {
                let (offset, length) = (block * PAGE, PAGE.min(SIZE - block * PAGE));
                client.run(&base, &Op::Write { offset, length }).unwrap();
            }
            client.run(&base, &Op::Flush).unwrap();
            base.close().unwrap();
            drop(base);
            let parent = seal(&folder, BASE).unwrap();
            create(&shared, TOP, None, Some(&parent), &layers).unwrap();
            (folder.disk(), client.known().oracle.clone())
        })
        .clone()
}

/// What the clients of a device know together.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) oracle: Oracle,
    /// The next request's number.
    next: usize,
}

/// A client. Clones are others of the same device, which they may use at once.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) folder: CrashFolder,
    known: Arc<Mutex<Known>>,
    /// Somebody keeps what it has open.
    kept: bool,
}

impl Client {
    fn new(folder: CrashFolder, oracle: Oracle, first: usize) -> Self {
        let known = Arc::new(Mutex::new(Known { oracle, next: first }));
        Self { folder, known, kept: false }
    }

    /// A client whose writer has a keeper.
    pub(super) fn kept(self) -> Self {
        Self { kept: true, ..self }
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        guard(&self.known)
    }

    pub(super) fn open(&self) -> Result<Chain> {
        if self.folder.has_lost_a_sync() {
            self.note(Note::Reopened);
        }
        let folder = Arc::new(self.folder.clone());
        match self.kept {
            true => {
                let keeper = Arc::new(CrashKeeper(self.folder.clone()));
                Chain::open_kept(folder, TOP, Arc::default(), keeper)
            }
            false => Chain::open(folder, TOP, Access::Write, Arc::default()),
        }
    }

    pub(super) fn number(&self) -> usize {
        let mut known = self.known();
        known.next += 1;
        known.next - 1
    }

    /// Oracle and record get the notes in the same order.
    fn note(&self, note: Note) {
        let mut known = self.known();
        known.oracle.note(&note);
        self.folder.note(note);
    }

    /// Asks, acts, and says how it went.
    pub(super) fn request(
        &self,
        number: usize,
        ask: Ask,
        act: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.note(Note::Asked(number, ask));
        let result = act();
        self.note(if result.is_ok() { Note::Done(number) } else { Note::Failed(number) });
        result
    }

    pub(super) fn write(
        &self,
        offset: u64,
        length: u64,
        act: impl FnOnce(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let number = self.number();
        self.write_as(number, offset, pattern(number, length), act)
    }

    /// Writes these bytes.
    pub(super) fn write_as(
        &self,
        number: usize,
        offset: u64,
        data: Data,
        act: impl FnOnce(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.request(number, Ask::Write { offset, data: data.clone() }, || act(&data.0))
    }

    pub(super) fn zero(
        &self,
        offset: u64,
        length: u64,
        act: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.request(self.number(), Ask::Zero { offset, length }, act)
    }

    pub(super) fn flush(&self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        self.request(self.number(), Ask::Flush, act)
    }

    pub(super) fn read(&self, device: &dyn Device, block: u64) -> Result<()> {
        let look = self.known().oracle.look(block);
        let mut found = vec![0; (SIZE - block * PAGE).min(PAGE) as usize];
        device.read(block * PAGE, &mut found)?;
        let judged = self.known().oracle.check_read(look, &found);
        judged.map_err(|what| Error::new(ErrorKind::Corrupt, what))
    }

    pub(super) fn run(&self, chain: &Chain, op: &Op) -> Result<()> {
        match *op {
            Op::Write { offset, length } => {
                self.write(offset, length, |data| chain.write(offset, data))
            }
            Op::WriteThrough { offset, length } => {
                self.write(offset, length, |data| chain.write(offset, data))?;
                self.flush(|| chain.flush())
            }
            Op::Zero { offset, length, allocate } => {
                let mode = ZeroMode { allocate, fast_only: false };
                self.zero(offset, length, || chain.zero(offset, length, mode))
            }
            Op::Trim { offset, length } => {
                let (first, whole) = whole_blocks(offset, length);
                self.zero(first, whole, || chain.trim(offset, length))
            }
            Op::Allocate { offset, length } => chain.allocate(offset, length),
            Op::Flush => self.flush(|| chain.flush()),
            Op::Read { offset } => self.read(chain, offset / PAGE),
            Op::Snapshot => {
                let number = self.number();
                let name = format!("snapshot{number}");
                self.request(number, Ask::Snapshot(name.clone()), || {
                    chain.snapshot(&name).map(drop)
                })
            }
            Op::Close => self.flush(|| chain.close()),
            Op::Burst => {
                let at = (CROWD + self.number() as u64 % 7 * 400) * PAGE;
                let write = |at, length| self.write(at, length, |data| chain.write(at, data));
                write(at, 2 * PAGE)?;
                chain.write(at + 2 * PAGE, &vec![1; ((MANY - 4) * PAGE) as usize])?;
                write(at + (MANY - 2) * PAGE, 2 * PAGE)
            }
            Op::Commits(count) => {
                for number in 0..count {
                    let at = (CROWD + 4000 + number) * PAGE;
                    // Not all of them are looked at later.
                    if number % 16 == 0 {
                        self.write(at, PAGE, |data| chain.write(at, data))?;
                    } else {
                        chain.write(at, &[1; PAGE as usize])?;
                    }
                    self.flush(|| chain.flush())?;
                }
                Ok(())
            }
        }
    }

    /// Runs a script to its end, or to a fault after which it makes no sense to go on. Before a
    /// fault everything must succeed; what a fault makes fail must name its file.
    fn run_all(&self, chain: &mut Chain, script: &[Op]) -> Result<(), String> {
        for (number, op) in script.iter().enumerate() {
            let mut result = self.run(chain, op);
            if result.is_ok() && matches!(op, Op::Close) {
                result = self.open().map(|opened| *chain = opened);
            }
            if let Err(error) = result {
                self.excuse(&error, &format!("operation {number}"))?;
                if matches!(op, Op::Close) {
                    break;
                }
            }
        }
        Ok(())
    }

    pub(super) fn excuse(&self, error: &Error, what: &str) -> Result<(), String> {
        if !self.folder.has_failed() {
            return Err(format!("{what}: {error:?}"));
        }
        match error.path() {
            None => Err(format!("{what}: no file is named: {error:?}")),
            Some(_) => Ok(()),
        }
    }
}

/// Bytes that tell what wrote them, and which of its sectors they are.
fn pattern(request: usize, length: u64) -> Data {
    let byte = |at: u64| match at % 8 {
        0..4 => (request + 1).to_le_bytes()[(at % 4) as usize],
        _ => (at / SECTOR).to_le_bytes()[(at % 4) as usize],
    };
    Data((0..length).map(byte).collect())
}

/// Begins a run: a client of a disk, whose every step is recorded, with a fault if one is planned.
pub(super) fn begin(disk: &Disk, oracle: &Oracle, fault: Option<Plan>, seed: u64) -> Client {
    let folder = CrashFolder::new(disk.clone());
    folder.record(seed);
    if let Some(plan) = fault {
        folder.fail(plan);
    }
    Client::new(folder, oracle.clone(), (seed as usize & 0xffff) << 12)
}

/// A client of a disk whose writer has died, and which somebody keeps.
pub(super) fn resume(folder: &CrashFolder, oracle: &Oracle, first: usize) -> Client {
    Client::new(folder.clone(), oracle.clone(), first).kept()
}

pub(super) fn end(client: &Client, disk: Disk, oracle: Oracle) -> Run {
    let folder = &client.folder;
    Run { disk, oracle, events: folder.take_record(), failed: folder.has_failed() }
}

/// Runs a script, with a fault if one is planned. Without one, or before it comes, every operation
/// must succeed; after it, those that fail may.
pub fn run(
    disk: Disk,
    oracle: Oracle,
    script: &[Op],
    fault: Option<Plan>,
    seed: u64,
) -> Result<Run, String> {
    run_as(begin(&disk, &oracle, fault, seed), disk, oracle, script)
}

/// As [`run`], with a keeper.
pub fn run_kept(
    disk: Disk,
    oracle: Oracle,
    script: &[Op],
    fault: Option<Plan>,
    seed: u64,
) -> Result<Run, String> {
    run_as(begin(&disk, &oracle, fault, seed).kept(), disk, oracle, script)
}

fn run_as(client: Client, disk: Disk, oracle: Oracle, script: &[Op]) -> Result<Run, String> {
    match client.open() {
        Ok(mut chain) => client.run_all(&mut chain, script)?,
        Err(error) => client.excuse(&error, "opening")?,
    }
    Ok(end(&client, disk, oracle))
}

/// As [`run`], for scripts that run at once, each in a thread of its own. They don't close the chain.
#[cfg(simulation)]
pub fn run_together(
    disk: Disk,
    oracle: Oracle,
    scripts: &[Vec<Op>],
    fault: Option<Plan>,
    seed: u64,
) -> Result<Run, String> {
    let client = begin(&disk, &oracle, fault, seed).kept();
    match client.open() {
        Ok(chain) => {
            let chain = Arc::new(chain);
            let threads: Vec<_> = scripts
                .iter()
                .map(|script| {
                    let (client, chain, script) = (client.clone(), chain.clone(), script.clone());
                    shuttle::thread::spawn(move || {
                        let judge = |(number, op)| match client.run(&chain, op) {
                            Ok(()) => Ok(()),
                            Err(error) => client.excuse(&error, &format!("{number}, {op:?}")),
                        };
                        script.iter().enumerate().try_for_each(judge)
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap())?;
        }
        Err(error) => client.excuse(&error, "opening")?,
    }
    Ok(end(&client, disk, oracle))
}

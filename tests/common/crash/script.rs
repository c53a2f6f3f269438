//! What clients do to a chain, and running it.

use std::sync::{Arc, OnceLock};

use thinply::chain::{Chain, Layers, create, seal};
use thinply::device::{Device, ZeroMode};
use thinply::error::{Error, Result};
use thinply::storage::{Access, Folder};

use super::Random;
use super::disk::{Data, Disk, PAGE};
use super::folder::{CrashFolder, Plan};
use super::judge::Run;
use super::oracle::{Ask, Note, Oracle};

pub const BASE: &str = "base";
pub const TOP: &str = "top";
const SECTOR: u64 = 512;
const GROUP: u64 = 127 << 20;
/// A group, and some blocks of a second one; the last block is one sector.
pub const SIZE: u64 = GROUP + 8 * PAGE + SECTOR;
/// The blocks that are used: at edges of words, bitmap sectors, the group and the device.
pub const BLOCKS: [u64; 16] = [
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
    GROUP / PAGE + 8,
];
/// Where blocks stand that nobody looks at, and how many are more than a record holds.
const CROWD: u64 = 8200;
const MANY: u64 = 340;

/// One thing that a client does.
#[derive(Clone, Debug)]
pub enum Op {
    Write {
        offset: u64,
        length: u64,
    },
    /// A write that is durable when it is answered.
    WriteThrough {
        offset: u64,
        length: u64,
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
    Flush,
    Read {
        offset: u64,
    },
    Snapshot,
    /// Close and open again.
    Reopen,
    /// More fresh blocks than a record holds.
    Burst,
    /// So many commits, each of a block of its own.
    Commits(u64),
}

impl Op {
    /// Something somewhere, with sectors whole where `aligned`.
    pub fn random(random: &mut Random, aligned: bool) -> Self {
        let block = *random.pick(&BLOCKS) * PAGE;
        let (from, length) = match random.below(4) {
            0 => (random.below(8) * SECTOR, (1 + random.below(8)) * SECTOR),
            1 if !aligned => (random.below(PAGE), 1 + random.below(2 * PAGE)),
            _ => (0, (1 + random.below(3)) * PAGE),
        };
        let offset = (block + from).min(SIZE - SECTOR);
        let length = length.min(SIZE - offset);
        match random.below(20) {
            0..7 => Self::Write { offset, length },
            7 => Self::WriteThrough { offset, length },
            8..10 => Self::Zero { offset, length, allocate: random.one_in(2) },
            10..12 => Self::Trim { offset, length },
            12 => Self::Read { offset },
            13 if random.one_in(4) => Self::Snapshot,
            14 if random.one_in(4) => Self::Reopen,
            15 if random.one_in(8) => Self::Burst,
            _ => Self::Flush,
        }
    }
}

/// The whole blocks inside a range, with the device's last block counted as whole.
fn whole_blocks(offset: u64, length: u64) -> (u64, u64) {
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
            let layers = Arc::new(Layers::default());
            create(&shared, BASE, Some(SIZE), None, &layers).unwrap();
            let open = Chain::open(shared.clone(), BASE, Access::Write, layers.clone());
            let mut client = Client::new(folder.clone(), Oracle::new(SIZE, &BLOCKS), 0);
            let mut base = open.unwrap();
            for block in BLOCKS.iter().step_by(2) {
                let (offset, length) = (block * PAGE, PAGE.min(SIZE - block * PAGE));
                client.run(&mut base, &Op::Write { offset, length }).unwrap();
            }
            client.run(&mut base, &Op::Flush).unwrap();
            base.close().unwrap();
            drop(base);
            let parent = seal(&folder, BASE).unwrap();
            create(&shared, TOP, None, Some(&parent), &layers).unwrap();
            (folder.disk(), client.oracle)
        })
        .clone()
}

/// One client that does one thing at a time.
#[derive(Debug)]
struct Client {
    folder: CrashFolder,
    oracle: Oracle,
    next: usize,
}

impl Client {
    fn new(folder: CrashFolder, oracle: Oracle, first: usize) -> Self {
        Self { folder, oracle, next: first }
    }

    fn open(&self) -> Result<Chain> {
        Chain::open(Arc::new(self.folder.clone()), TOP, Access::Write, Arc::default())
    }

    fn note(&mut self, note: Note) {
        self.oracle.note(&note);
        self.folder.note(note);
    }

    /// Asks, acts, and says how it went.
    fn request(&mut self, ask: Ask, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let request = self.next;
        self.next += 1;
        self.note(Note::Asked(request, ask));
        let result = act();
        self.note(if result.is_ok() { Note::Done(request) } else { Note::Failed(request) });
        result
    }

    fn write(&mut self, chain: &Chain, offset: u64, length: u64) -> Result<()> {
        let data = pattern(self.next, length);
        self.request(Ask::Write { offset, data: data.clone() }, || chain.write(offset, &data.0))
    }

    fn run(&mut self, chain: &mut Chain, op: &Op) -> Result<()> {
        match *op {
            Op::Write { offset, length } => self.write(chain, offset, length),
            Op::WriteThrough { offset, length } => {
                self.write(chain, offset, length)?;
                self.request(Ask::Flush, || chain.flush())
            }
            Op::Zero { offset, length, allocate } => {
                let mode = ZeroMode { allocate, fast_only: false };
                self.request(Ask::Zero { offset, length }, || chain.zero(offset, length, mode))
            }
            Op::Trim { offset, length } => {
                let (first, whole) = whole_blocks(offset, length);
                let ask = Ask::Zero { offset: first, length: whole };
                self.request(ask, || chain.trim(offset, length))
            }
            Op::Flush => self.request(Ask::Flush, || chain.flush()),
            Op::Read { offset } => {
                let block = offset / PAGE;
                let mut found = vec![0; self.oracle.length(block)];
                chain.read(block * PAGE, &mut found)?;
                let judged = self.oracle.check_live(block, &found);
                judged.map_err(|what| Error::new(thinply::error::ErrorKind::Corrupt, what))
            }
            Op::Snapshot => {
                let name = format!("snapshot{}", self.next);
                self.request(Ask::Snapshot(name.clone()), || chain.snapshot(&name))
            }
            Op::Reopen => {
                self.request(Ask::Flush, || chain.close())?;
                *chain = self.open()?;
                Ok(())
            }
            Op::Burst => {
                let at = (CROWD + self.next as u64 % 7 * 400) * PAGE;
                self.write(chain, at, 2 * PAGE)?;
                chain.write(at + 2 * PAGE, &vec![1; ((MANY - 4) * PAGE) as usize])?;
                self.write(chain, at + (MANY - 2) * PAGE, 2 * PAGE)
            }
            Op::Commits(count) => {
                for number in 0..count {
                    let at = (CROWD + 4000 + number) * PAGE;
                    // Not all of them are looked at later.
                    if number % 16 == 0 {
                        self.write(chain, at, PAGE)?;
                    } else {
                        chain.write(at, &[1; PAGE as usize])?;
                    }
                    self.request(Ask::Flush, || chain.flush())?;
                }
                Ok(())
            }
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

/// Every script of so many operations on blocks around the edges of sectors, words, bitmap sectors,
/// groups and the device; `None` behind the last.
pub fn enumerated(length: u32, number: usize) -> Option<Vec<Op>> {
    let [group, sector, word, end] = [32511 * PAGE, 4063 * PAGE, 63 * PAGE, SIZE - SECTOR];
    let alphabet = [
        Op::Write { offset: group, length: 2 * PAGE },
        Op::Write { offset: sector, length: 2 * PAGE },
        Op::Write { offset: word, length: 2 * PAGE },
        Op::Write { offset: 0, length: PAGE },
        Op::Write { offset: group + PAGE - SECTOR, length: 2 * SECTOR },
        Op::Write { offset: 3 * SECTOR, length: SECTOR },
        Op::Write { offset: 1000, length: 100 },
        Op::Write { offset: end, length: SECTOR },
        Op::WriteThrough { offset: 0, length: PAGE },
        Op::WriteThrough { offset: group + PAGE - SECTOR, length: 2 * SECTOR },
        Op::Zero { offset: group, length: 2 * PAGE, allocate: false },
        Op::Zero { offset: 0, length: PAGE, allocate: true },
        Op::Zero { offset: word + PAGE / 2, length: PAGE, allocate: false },
        Op::Trim { offset: sector, length: 2 * PAGE },
        Op::Trim { offset: 0, length: PAGE },
        Op::Flush,
        Op::Snapshot,
        Op::Reopen,
    ];
    let count = alphabet.len();
    (number < count.pow(length)).then(|| {
        (0..length).map(|place| alphabet[number / count.pow(place) % count].clone()).collect()
    })
}

/// Runs a script, with a fault if one is planned. Without one, or before it comes, every operation
/// must succeed; after it, those that fail may.
pub fn run(
    disk: Disk,
    oracle: Oracle,
    script: &[Op],
    fault: Option<Plan>,
    seed: u64,
) -> std::result::Result<Run, String> {
    let folder = CrashFolder::new(disk.clone());
    folder.record(seed);
    if let Some(plan) = fault {
        folder.fail(plan);
    }
    let mut client = Client::new(folder.clone(), oracle.clone(), (seed as usize & 0xffff) << 12);
    let result = run_all(&mut client, script);
    let (events, failed) = (folder.take_record(), folder.has_failed());
    result.map_err(|what| format!("{what}, of {script:?}"))?;
    Ok(Run { disk, oracle, events, failed })
}

fn run_all(client: &mut Client, script: &[Op]) -> std::result::Result<(), String> {
    let judge = |client: &Client, error: Error, what: &str| match () {
        () if !client.folder.has_failed() => Err(format!("{what}: {error:?}")),
        () if error.path().is_none() => Err(format!("{what}: no file is named: {error:?}")),
        () => Ok(()),
    };
    let mut chain = match client.open() {
        Ok(chain) => chain,
        Err(error) => return judge(client, error, "opening"),
    };
    for (number, op) in script.iter().enumerate() {
        if let Err(error) = client.run(&mut chain, op) {
            judge(client, error, &format!("operation {number}"))?;
            if matches!(op, Op::Snapshot | Op::Reopen) {
                break;
            }
        }
    }
    Ok(())
}

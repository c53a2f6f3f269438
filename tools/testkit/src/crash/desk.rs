//! Users and visitors of one disk at a desk, at once.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use shuttle::sync::mpsc;
use thinply::chain::{Chain, seal};
use thinply::derive::PackOptions;
use thinply::device::{Device, Wait, ZeroMode};
use thinply::error::{Error, ErrorKind};
use thinply::packed::Compression;
use thinply::serve::{
    self, Broker, Completion, Desk, Facts, Lease, Leases, Listed, Opened, Payload,
};
use thinply::storage::{Access, Folder, MemoryFolder, Storage, write_all_at};

use super::Random;
use super::client::{Client, begin, end, whole_blocks};
use super::disk::{Disk, PAGE};
use super::folder::{Plan, guard};
use super::judge::{Run, TOP};
use super::oracle::{Ask, Oracle};
use super::script::{BLOCKS, Op, SIZE};

type Result<T, E = Error> = std::result::Result<T, E>;

/// Longer than any run.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What somebody does at the desk.
#[derive(Clone, Debug)]
pub enum Turn {
    /// Uses the disk: gets a lease, makes these requests, and leaves.
    Use(Vec<Op>),
    /// Looks at these blocks of one moment, twice.
    Look(Vec<u64>),
    /// Takes a snapshot beside the users.
    Snapshot,
    /// Takes a snapshot, packs it, and stands the disk on that: what a commit does.
    Commit,
}

/// Who comes to the desk, and whether several may use the disk at a time.
#[derive(Clone, Debug)]
pub struct Script {
    pub shared: bool,
    pub people: Vec<Vec<Turn>>,
}

impl Script {
    /// Two to four people with up to four turns each, on few blocks.
    pub fn random(random: &mut Random) -> Self {
        let first = random.below(BLOCKS.len() as u64 - 3) as usize;
        let blocks = &BLOCKS[first..first + 3];
        let mut turn = || match random.below(12) {
            0 => Turn::Snapshot,
            1 => Turn::Commit,
            2..6 => Turn::Look(blocks.to_vec()),
            _ => {
                let ops = (0..1 + random.below(4)).map(|_| match random.below(3) {
                    0 => Op::Flush,
                    _ => Op::random(random, true, blocks),
                });
                Turn::Use(ops.collect())
            }
        };
        let mut person = |turns: usize| (0..turns).map(|_| turn()).collect::<Vec<_>>();
        let people = (0..4).map(|number| person(1 + number)).collect();
        Self { shared: random.one_in(2), people }
    }
}

/// Opens the top, under any name, and sees to it that nobody else has it then.
struct TopBroker {
    client: Client,
    shared: bool,
    /// What must not have happened.
    wrong: Arc<Mutex<Vec<String>>>,
}

impl Broker for TopBroker {
    type Disk = Chain;

    fn open(&self, _: &str) -> Result<Opened<Chain>> {
        let opened = self.client.open().inspect_err(|error| {
            if error.kind() == ErrorKind::InUse {
                self.log(&format!("opened while it is in use: {error}"));
            }
        });
        Ok(Opened { shared: self.shared, workers: 2, ..Opened::new(opened?) })
    }

    fn facts(&self, _: &str) -> Result<Facts> {
        Ok(Facts::without_layer(0))
    }

    fn list(&self) -> Result<Vec<Listed>> {
        Ok(Vec::new())
    }

    fn scratch(&self) -> Result<Arc<dyn Storage>> {
        Ok(MemoryFolder::new("scratch").create("kept").unwrap())
    }

    fn log(&self, line: &str) {
        guard(&self.wrong).push(line.to_owned());
    }
}

/// Somebody at the desk.
#[derive(Clone)]
struct Person {
    client: Client,
    desk: Desk<TopBroker>,
    shared: bool,
    /// How many have a lease just now.
    users: Arc<Mutex<usize>>,
}

/// Has something done by the disk's threads, and waits for it.
fn wait_for(ask: impl FnOnce(Box<dyn FnOnce(Result<Vec<u8>>) + Send>)) -> Result<Vec<u8>> {
    let (to, answer) = mpsc::channel();
    ask(Box::new(move |result| drop(to.send(result))));
    answer.recv().unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "nobody answered")))
}

/// A boxed completion.
struct Then(Box<dyn FnOnce(Result<Vec<u8>>) + Send>);

impl Completion for Then {
    fn complete(self, result: Result<Vec<u8>>) {
        (self.0)(result);
    }
}

fn submit(lease: &Lease, op: serve::Op, durable: bool) -> Result<()> {
    wait_for(|then| lease.submit(op, durable, Then(then))).map(drop)
}

fn flush(lease: &Lease) -> Result<()> {
    wait_for(|then| lease.flush(Then(then))).map(drop)
}

/// As a front end does it: at once, or by others where that would take a wait.
fn write(lease: &Lease, offset: u64, data: &[u8]) -> Result<()> {
    if lease.try_write(offset, data.into(), Wait::Never)? == data.len() as u64 {
        return Ok(());
    }
    submit(lease, serve::Op::Write { offset, data: Payload::Bytes(data.to_vec()) }, false)
}

impl Person {
    fn turn(&self, turn: &Turn) -> Result<()> {
        match turn {
            Turn::Use(ops) => {
                let lease = self.desk.lease(TOP)?;
                let users = {
                    let mut users = guard(&self.users);
                    *users += 1;
                    *users
                };
                if users > 1 && !self.shared {
                    return Err(Error::new(ErrorKind::Corrupt, "two have the lease of one"));
                }
                let done = ops.iter().try_for_each(|op| self.request(&lease, op));
                *guard(&self.users) -= 1;
                done
            }
            Turn::Look(blocks) => {
                let served = self.desk.visit(TOP)?;
                let change = served.change();
                let moment = served.moment(self.desk.broker().scratch()?)?;
                let looks = || {
                    let look = |block: &u64| {
                        let mut found = vec![0; (SIZE - block * PAGE).min(PAGE) as usize];
                        moment.read(block * PAGE, &mut found).map(|()| found)
                    };
                    blocks.iter().map(look).collect::<Result<Vec<_>>>()
                };
                let same = looks()? == looks()?;
                drop((moment, change));
                served.leave()?;
                if same {
                    return Ok(());
                }
                Err(Error::new(ErrorKind::Corrupt, "a moment that moves"))
            }
            Turn::Snapshot => {
                let served = self.desk.visit(TOP)?;
                self.snapshot(&served.change())?;
                served.leave()
            }
            Turn::Commit => {
                let served = self.desk.visit(TOP)?;
                self.commit(&served.change())?;
                served.leave()
            }
        }
    }

    fn snapshot(&self, chain: &Chain) -> Result<String> {
        let number = self.client.number();
        let name = format!("snapshot{number}");
        let ask = Ask::Snapshot(name.clone());
        self.client.request(number, ask, || chain.snapshot(&name).map(drop))?;
        Ok(name)
    }

    fn commit(&self, chain: &Chain) -> Result<()> {
        let name = self.snapshot(chain)?;
        let folder = Arc::new(self.client.folder.clone());
        let frozen = Chain::open(folder.clone(), &name, Access::Read, Arc::default())?;
        let from = seal(&*folder, &name)?.link.identity;
        let options = PackOptions { compression: Compression::default(), drop_equal: true };
        let (_, bytes) = frozen.pack(Vec::new(), &options, &mut |_| {})?;
        drop(frozen);
        let packed = format!("packed-{name}");
        let fail = |error| Error::io(error, "writing the packed layer").in_file(&packed);
        let file = folder.create(&packed).map_err(fail)?;
        write_all_at(&*file, &bytes, 0).map_err(fail)?;
        file.sync_data().map_err(fail)?;
        drop(file);
        folder.sync().map_err(fail)?;
        chain.relink(from, &seal(&*folder, &packed)?.link)
    }

    fn request(&self, lease: &Lease, op: &Op) -> Result<()> {
        let client = &self.client;
        match *op {
            Op::Write { offset, length } => {
                client.write(offset, length, |data| write(lease, offset, data))
            }
            Op::WriteThrough { offset, length } => client.write(offset, length, |data| {
                let data = Payload::Bytes(data.to_vec());
                submit(lease, serve::Op::Write { offset, data }, true)
            }),
            Op::Zero { offset, length, allocate } => {
                let mode = ZeroMode { allocate, fast_only: false };
                client.zero(offset, length, || {
                    submit(lease, serve::Op::Zero { offset, length, mode }, false)
                })
            }
            Op::Trim { offset, length } => {
                let (first, whole) = whole_blocks(offset, length);
                client
                    .zero(first, whole, || submit(lease, serve::Op::Trim { offset, length }, false))
            }
            Op::Allocate { offset, length } => {
                submit(lease, serve::Op::Allocate { offset, length }, false)
            }
            Op::Read { offset } => client.read(&lease.watch().upgrade().unwrap(), offset / PAGE),
            _ => client.flush(|| flush(lease)),
        }
    }
}

/// Has all people come to the desk at once, each in a thread, and waits until they are gone and the
/// disk is closed.
pub fn run_at_desk(
    disk: Disk,
    oracle: Oracle,
    script: &Script,
    fault: Option<Plan>,
    seed: u64,
) -> Result<Run, String> {
    let client = begin(&disk, &oracle, fault, seed);
    let (shared, wrong) = (script.shared, Arc::<Mutex<Vec<String>>>::default());
    let broker = TopBroker { client: client.clone(), shared, wrong: wrong.clone() };
    let desk = Desk::with_patience(broker, PATIENCE);
    let users = Arc::default();
    let person = Person { client: client.clone(), desk: desk.clone(), shared, users };
    let threads: Vec<_> = script
        .people
        .iter()
        .map(|turns| {
            let (person, turns) = (person.clone(), turns.clone());
            shuttle::thread::spawn(move || {
                turns.iter().enumerate().try_for_each(|(number, turn)| {
                    let excuse = |error| person.client.excuse(&error, &format!("turn {number}"));
                    person.turn(turn).or_else(excuse)
                })
            })
        })
        .collect();
    threads.into_iter().try_for_each(|thread| thread.join().unwrap())?;
    desk.settle(PATIENCE).map_err(|error| error.to_string())?;
    if let Some(what) = guard(&wrong).first()
        && !client.folder.has_failed()
    {
        return Err(what.clone());
    }
    Ok(end(&client, disk, oracle))
}

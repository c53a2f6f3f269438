//! The server's side.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::wire::{BEGIN, DONE, DROP, GREETING, KEEP, KEPT, Message, READY, receive, send};
use crate::error::{Error, ErrorKind, Result};
use crate::live::{FreshMap, Keeper, Keepers, Kept, SharedMap};
use crate::serve::{Keep, Log};
use crate::storage::{Storage, opened};
use crate::sync::guard;

/// Begin of the keys of layers, before a number, the disk and the layer's path, a line each.
const LAYER: &str = "layer\n";

/// A key and its descriptors.
type Inherited = (String, Vec<OwnedFd>);

/// The holder of this process.
pub struct Holder {
    /// None once the holder is gone.
    socket: Mutex<Option<OwnedFd>>,
    /// What the server before has left, until somebody takes it.
    inherited: Mutex<Vec<Inherited>>,
    /// For the next layer.
    number: AtomicU64,
    log: Log,
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder").finish_non_exhaustive()
    }
}

fn failed(error: io::Error) -> Error {
    Error::io(error, "talking to the holder")
}

fn nonsense(said: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the holder says {said:?}"))
}

impl Holder {
    /// Takes from the holder at the other end of `socket` what it has kept. `log` hears when it is gone.
    ///
    /// # Errors
    /// Host errors; [`ErrorKind::Unsupported`] for a holder of another version.
    pub fn connect(socket: OwnedFd, log: Log) -> Result<Arc<Self>> {
        let mut inherited = Vec::new();
        let greeting = next(&socket).map_err(failed)?;
        if format!("{} {}", greeting.word, greeting.key) != GREETING {
            let detail = format!("a holder that says {} {:?}", greeting.word, greeting.key);
            return Err(Error::new(ErrorKind::Unsupported, detail));
        }
        loop {
            let message = next(&socket).map_err(failed)?;
            match message.word.as_str() {
                KEPT => inherited.push((message.key, message.descriptors)),
                BEGIN => break,
                other => return Err(failed(nonsense(other))),
            }
        }
        let layers = inherited.iter().filter_map(|(key, _)| Layer::parse(key));
        let numbers = layers.map(|layer| layer.number);
        let number = AtomicU64::new(numbers.max().map_or(0, |last| last + 1));
        let (socket, inherited) = (Mutex::new(Some(socket)), Mutex::new(inherited));
        Ok(Arc::new(Self { socket, inherited, number, log }))
    }

    /// The names of disks that the server before has left open.
    pub fn disks(&self) -> Vec<String> {
        let inherited = guard(&self.inherited);
        let mut disks: Vec<_> =
            inherited.iter().filter_map(|(key, _)| Layer::parse(key)).map(|key| key.disk).collect();
        disks.dedup();
        disks
    }

    /// Takes what the server before has left under keys that begin so.
    pub fn inherit(&self, begin: &str) -> Vec<Inherited> {
        guard(&self.inherited).extract_if(.., |(key, _)| key.starts_with(begin)).collect()
    }

    /// Tells the holder that this process serves now.
    ///
    /// # Errors
    /// Host errors.
    pub fn ready(&self) -> Result<()> {
        self.ask(READY, "", &[]).map_err(failed)
    }

    /// Asks the holder for something. Once it is gone there is nothing to ask for, and nobody who would
    /// go on.
    fn ask(&self, word: &str, key: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut socket = guard(&self.socket);
        let Some(open) = &*socket else { return Ok(()) };
        let answer = send(open, word, key, descriptors).and_then(|()| receive(open));
        match answer {
            Ok(Some(message)) if message.word == DONE => Ok(()),
            Ok(Some(message)) => Err(nonsense(&message.word)),
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => {
                *socket = None;
                drop(socket);
                (self.log)(
                    "the holder is gone: from now on a death of this process ends its mounts",
                );
                Ok(())
            }
        }
    }
}

fn next(socket: &OwnedFd) -> io::Result<Message> {
    receive(socket)?.ok_or(io::ErrorKind::UnexpectedEof.into())
}

impl Keep for Holder {
    fn keep(&self, key: &str, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        self.ask(KEEP, key, descriptors).map_err(failed)
    }

    fn release(&self, key: &str) {
        if let Err(error) = self.ask(DROP, key, &[]) {
            (self.log)(&format!("the holder keeps what nobody needs any more: {error}"));
        }
    }
}

/// The key of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Layer {
    number: u64,
    disk: String,
    path: PathBuf,
}

impl Layer {
    fn parse(key: &str) -> Option<Self> {
        let mut parts = key.strip_prefix(LAYER)?.splitn(3, '\n');
        let number = parts.next()?.parse().ok()?;
        let disk = parts.next()?.to_owned();
        Some(Self { number, disk, path: parts.next()?.into() })
    }

    fn key(&self) -> String {
        format!("{LAYER}{}\n{}\n{}", self.number, self.disk, self.path.display())
    }
}

impl Keepers for Arc<Holder> {
    fn of(&self, disk: &str) -> Arc<dyn Keeper> {
        Arc::new(DiskKeeper { holder: self.clone(), disk: disk.to_owned() })
    }
}

/// Keeps the layers of one disk.
#[derive(Debug)]
struct DiskKeeper {
    holder: Arc<Holder>,
    disk: String,
}

impl DiskKeeper {
    fn releases(&self, key: String) -> impl Fn() + Send + Sync + 'static {
        let holder = self.holder.clone();
        move || holder.release(&key)
    }
}

impl Keeper for DiskKeeper {
    fn keep(&self, file: &Arc<dyn Storage>, groups: u64) -> Result<Arc<dyn FreshMap>> {
        let fail =
            |error| Error::io(error, "keeping a layer for the next server").in_file(file.path());
        let descriptor =
            file.descriptor().ok_or_else(|| fail(io::ErrorKind::Unsupported.into()))?;
        // Opened anew: only so does it hear of a sync that fails, whoever hears of it first.
        let again = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        let witness = File::options().read(true).write(true).open(again).map_err(fail)?;
        let number = self.holder.number.fetch_add(1, Ordering::Relaxed);
        let layer = Layer { number, disk: self.disk.clone(), path: file.path().to_owned() };
        let map = SharedMap::new(groups, self.releases(layer.key())).map_err(fail)?;
        self.holder.keep(&layer.key(), &[descriptor, witness.as_fd(), map.memory()])?;
        Ok(Arc::new(map))
    }

    fn kept(&self) -> Result<Vec<Kept>> {
        let layers = {
            let mut inherited = guard(&self.holder.inherited);
            let is_ours =
                |key: &str| Layer::parse(key).is_some_and(|layer| layer.disk == self.disk);
            inherited.extract_if(.., |(key, _)| is_ours(key)).collect::<Vec<_>>()
        };
        layers.into_iter().map(|(key, descriptors)| self.open(key, descriptors)).collect()
    }
}

impl DiskKeeper {
    fn open(&self, key: String, descriptors: Vec<OwnedFd>) -> Result<Kept> {
        let path = Layer::parse(&key).map(|layer| layer.path).unwrap_or_default();
        let fail = |error| Error::io(error, "taking over what was kept").in_file(&path);
        let [file, witness, memory]: [OwnedFd; 3] =
            descriptors.try_into().map_err(|_| fail(nonsense("another number of files")))?;
        Ok(Kept {
            file: opened(path.clone(), file.into()).map_err(fail)?,
            witness: opened(path.clone(), witness.into()).map_err(fail)?,
            fresh: Arc::new(SharedMap::open(memory.into(), self.releases(key)).map_err(fail)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::holder::{Came, Vault};
    use crate::types::{Group, Word};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn nobody() -> Log {
        Arc::new(|_| {})
    }

    /// A server's life: what `live` leaves is in the vault afterwards.
    fn lives(vault: &mut Vault, live: impl FnOnce(Arc<Holder>) + Send) -> Came {
        let (ours, theirs) = pair();
        thread::scope(|scope| {
            scope.spawn(|| live(Holder::connect(theirs, nobody()).unwrap()));
            vault.attend(&ours, || {}).unwrap()
        })
    }

    #[test]
    fn a_server_finds_what_the_one_before_has_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a layer\nwith a line in its name");
        std::fs::write(&path, b"layer").unwrap();
        let mut vault = Vault::default();
        let came = lives(&mut vault, |holder| {
            assert!(guard(&holder.inherited).is_empty());
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let file = opened(path.clone(), file).unwrap();
            for disk in ["container/a", "container/b", ""] {
                let map = holder.of(disk).keep(&file, 1).unwrap();
                map.reserve(Group(0)).unwrap();
                map.mark(Word(disk.len() as u64), 5);
                if disk == "container/b" {
                    map.release();
                }
            }
            holder.keep("desk", &[file.descriptor().unwrap()]).unwrap();
        });
        assert_eq!(came, Came::Nowhere);
        let came = lives(&mut vault, |holder| {
            holder.ready().unwrap();
            assert!(!guard(&holder.inherited).is_empty());
            assert_eq!(holder.disks(), ["container/a", ""]);
            assert_eq!(holder.inherit("desk").len(), 1);
            assert_eq!(holder.inherit("desk").len(), 0);
            assert_eq!(holder.of("container/b").kept().unwrap().len(), 0);
            let kept = holder.of("container/a").kept().unwrap();
            let [kept] = &kept[..] else { panic!("{kept:?}") };
            assert_eq!(kept.file.path(), path);
            assert_eq!(kept.fresh.marks().unwrap(), [(Word(11), 5)]);
            kept.fresh.release();
            assert_eq!(holder.of("container/a").kept().unwrap().len(), 0);
        });
        assert_eq!(came, Came::Served);
        // What was taken and not released is there for the next one.
        let keys: Vec<_> = vault.keys().collect();
        assert_eq!(keys.len(), 2, "{keys:?}");
    }

    #[test]
    fn a_server_goes_on_when_its_holder_dies() {
        let (ours, theirs) = pair();
        let told = Arc::new(Mutex::new(Vec::new()));
        let log = told.clone();
        let serving = thread::spawn(move || {
            let log: Log = Arc::new(move |line| guard(&log).push(line.to_owned()));
            let holder = Holder::connect(theirs, log).unwrap();
            let file = tempfile::tempfile().unwrap();
            for _ in 0..2 {
                holder.keep("key", &[file.as_fd()]).unwrap();
                holder.release("key");
            }
        });
        send(&ours, GREETING, "", &[]).unwrap();
        send(&ours, BEGIN, "", &[]).unwrap();
        drop(ours);
        serving.join().unwrap();
        assert_eq!(guard(&told).len(), 1, "told once");
    }

    #[test]
    fn a_server_that_talks_nonsense_is_left_alone() {
        for (word, descriptors) in [("keep", 0), ("drop", 1), ("what", 0)] {
            let (ours, theirs) = pair();
            let file = tempfile::tempfile().unwrap();
            let some = vec![file.as_fd(); descriptors];
            send(&theirs, word, "key", &some).unwrap();
            let error = Vault::default().attend(&ours, || {}).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{word}");
        }
    }
}

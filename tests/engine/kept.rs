//! A process that writes a disk is killed, the machine runs on, and this one goes on with what it keeps
//! of it: on a real kernel, what the crash simulator shows of the model.

#![cfg(not(simulation))]

use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use testkit::crash::Random;
use thinply::chain::{Chain, Gate, create};
use thinply::device::Device;
use thinply::error::{Error, ErrorKind, Result};
use thinply::live::{FreshMap, Keeper, Kept, SharedMap};
use thinply::storage::{Access, FileFolder, Folder, Storage, opened};

const FOLDER: &str = "THINPLY_KEPT_FOLDER";
const SEED: &str = "THINPLY_KEPT_SEED";
const BLOCKS: u64 = 40_000;
const SIZE: u64 = BLOCKS * 4096;

/// What the writer writes, and where.
fn request(number: u64, seed: u64) -> (u64, [u8; 4096]) {
    let mut random = Random::new(seed << 32 | number);
    let block = random.below(BLOCKS);
    let mut data = [0; 4096];
    for part in data.chunks_exact_mut(8) {
        part.copy_from_slice(&(number + 1).to_le_bytes());
    }
    (block, data)
}

fn io(error: impl Into<std::io::Error>) -> Error {
    Error::io(error.into(), "talking to the keeper")
}

/// The writer's end: hands everything that is to be kept to its parent.
#[derive(Debug)]
struct Far(UnixStream);

impl Keeper for Far {
    fn keep(&self, file: &Arc<dyn Storage>, groups: u64) -> Result<Arc<dyn FreshMap>> {
        let map = SharedMap::new(groups, || {}).map_err(io)?;
        let descriptors = [file.descriptor().unwrap(), map.memory()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&self.0, &[IoSlice::new(b"k")], &mut ancillary, SendFlags::empty()).map_err(io)?;
        (&self.0).read_exact(&mut [0]).map_err(io)?;
        Ok(Arc::new(map))
    }

    fn kept(&self) -> Result<Vec<Kept>> {
        Ok(Vec::new())
    }
}

/// Receives what the writer hands over.
fn receive(stream: &UnixStream, path: &Path) -> Kept {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .unwrap();
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let [file, memory]: [OwnedFd; 2] = descriptors.try_into().unwrap();
    let again = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let witness = File::options().read(true).write(true).open(again).unwrap();
    let kept = Kept {
        file: opened(path.to_owned(), File::from(file)).unwrap(),
        witness: opened(path.to_owned(), witness).unwrap(),
        fresh: Arc::new(SharedMap::open(File::from(memory), || {}).unwrap()),
    };
    (&*stream).write_all(b"!").unwrap();
    kept
}

/// What the dead writer left, once.
#[derive(Debug)]
struct Near(Mutex<Vec<Kept>>);

impl Keeper for Near {
    fn keep(&self, _: &Arc<dyn Storage>, _: u64) -> Result<Arc<dyn FreshMap>> {
        unreachable!("nothing else is opened")
    }

    fn kept(&self) -> Result<Vec<Kept>> {
        Ok(std::mem::take(&mut *self.0.lock().unwrap()))
    }
}

/// The process that is killed: this test in another process, where it writes and tells of each write
/// that was answered.
#[test]
fn writer() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let seed: u64 = std::env::var(SEED).unwrap().parse().unwrap();
    let folder: Arc<dyn Folder> = Arc::new(FileFolder::new(&folder));
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let stream = UnixStream::from(stdin);
    let keeper = Arc::new(Far(stream.try_clone().unwrap()));
    let chain = Chain::open_kept(folder, "disk", Arc::new(Gate::default()), keeper).unwrap();
    for number in 0.. {
        let (block, data) = request(number, seed);
        chain.write(block * 4096, &data).unwrap();
        if number % 900 == 899 {
            chain.flush().unwrap();
        }
        (&stream).write_all(&number.to_le_bytes()).unwrap();
    }
}

fn numbers(mut stream: &UnixStream) -> Vec<u64> {
    let mut told = Vec::new();
    let mut number = [0; 8];
    while stream.read_exact(&mut number).is_ok() {
        told.push(u64::from_le_bytes(number));
    }
    told
}

#[test]
fn what_was_answered_is_there_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("disk");
    for seed in 0..6 {
        let _ = std::fs::remove_file(&path);
        let folder: Arc<dyn Folder> = Arc::new(FileFolder::new(dir.path()));
        create(&folder, "disk", Some(SIZE), None, &Gate::default()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writer", "--exact", "--nocapture"])
            .env(FOLDER, dir.path())
            .env(SEED, seed.to_string())
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let kept = receive(&ours, &path);
        let reader = std::thread::spawn(move || numbers(&ours));
        std::thread::sleep(Duration::from_millis(30 * (seed + 1)));
        child.kill().unwrap();
        // The real end: nothing that it had begun is under way any more.
        child.wait().unwrap();
        let told = reader.join().unwrap();
        let answered = told.len() as u64;
        assert!(told.iter().copied().eq(0..answered), "told in order");
        assert!(answered > 0, "killed before it wrote");

        let open = |keeper| Chain::open_kept(folder.clone(), "disk", Arc::default(), keeper);
        let gap = Chain::open(folder.clone(), "disk", Access::Write, Arc::default());
        assert_eq!(gap.unwrap_err().kind(), ErrorKind::InUse);
        let chain = open(Arc::new(Near(Mutex::new(vec![kept])))).unwrap();
        let mut expected = HashMap::new();
        for number in 0..answered {
            let (block, data) = request(number, seed);
            expected.insert(block, data);
        }
        // The next one may have been done, and not answered.
        let (unsure, other) = request(answered, seed);
        let mut found = [0; 4096];
        for block in 0..BLOCKS {
            chain.read(block * 4096, &mut found).unwrap();
            let wanted = expected.get(&block).unwrap_or(&[0; 4096]);
            let same = found == *wanted || block == unsure && found == other;
            assert!(same, "seed {seed}: block {block} after {answered} answers");
        }
        chain.close().unwrap();
    }
}

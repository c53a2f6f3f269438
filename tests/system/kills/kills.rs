//! The real server under a real load, killed with SIGKILL at any instant and started again.
//!
//! A kill leaves the page cache, so this shows that replies to FLUSH and FUA wait for what makes new
//! blocks part of the image, that the image is right at every instant of every step, and that
//! recovery brings all of it back. What power losses do is shown by `power.rs` and the simulator.
//!
//! `THINPLY_KILLS` says how many rounds to run (default 60), `THINPLY_KILLS_SEED` where to begin:
//! the seed that a failure names replays its load, if not the instants.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::fs::statvfs;
use serde_json::Value;
use tempfile::TempDir;

use testkit::load::history::{History, Seen};
use testkit::load::taste::Taste;
use testkit::number;
use testkit::program::{Program, Server, born, digest};

const THINPLY: Program = Program(env!("CARGO_BIN_EXE_thinply"));

/// Kills in the life of one image.
const ROUNDS: u64 = 10;

/// A folder on a disk, or for odd seeds in memory, where commits are so fast that the journal goes
/// round many times.
fn folder(seed: u64) -> TempDir {
    let memory = "/dev/shm";
    let room = statvfs(memory).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    if seed % 2 == 1 && room > 2 << 30 {
        tempfile::tempdir_in(memory).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

/// An image, and all that happens to it.
struct Life {
    folder: TempDir,
    history: Arc<History>,
    random: Rng,
    seed: u64,
    /// What is served, and as what.
    words: &'static [&'static str],
    export: &'static str,
    /// The top layer's file.
    top: &'static str,
    /// Most connections that the export takes.
    connections: u64,
    snapshots: u64,
    /// Digests of the sealed layers.
    sealed: BTreeMap<PathBuf, blake3::Hash>,
}

impl Life {
    /// An image `top.tply` over `base.tply`.
    fn layers(seed: u64) -> Self {
        let life = Self::born(seed, &["top.tply"], "", "top.tply", 6);
        THINPLY.run(life.path(), &["import", "born.raw", "base.tply"]);
        THINPLY.run(life.path(), &["create", "--parent", "base.tply", "top.tply"]);
        life
    }

    /// A container `web` over an image.
    fn container(seed: u64) -> Self {
        let top = "store/containers/web.tply";
        let life = Self::born(seed, &["--all"], "container/web", top, 1);
        THINPLY.run(life.path(), &["image", "import", "born.raw", "base"]);
        THINPLY.run(life.path(), &["container", "create", "base", "--name", "web"]);
        life
    }

    /// A folder with `born.raw`, what the image holds at first.
    fn born(
        seed: u64,
        words: &'static [&'static str],
        export: &'static str,
        top: &'static str,
        connections: u64,
    ) -> Self {
        let (folder, mut random) = (folder(seed), Rng::with_seed(seed));
        let history = Arc::new(born(folder.path(), &mut random));
        let (snapshots, sealed) = (0, BTreeMap::new());
        Self { folder, history, random, seed, words, export, top, connections, snapshots, sealed }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.random.u64(..count) == 0
    }

    /// Sleeps for at most `most` microseconds: often for some, as often for thousands.
    fn pause(&mut self, most: u64) {
        let bits = most.ilog2();
        let most = if self.random.bool() { most } else { most >> self.random.u32(..bits) };
        thread::sleep(Duration::from_micros(self.random.u64(..=most)));
    }

    fn must<T>(&self, result: Result<T, String>) -> T {
        result.unwrap_or_else(|error| panic!("seed {}: {error}", self.seed))
    }

    fn serve(&self) -> Server {
        THINPLY.serve(self.path(), self.words)
    }

    /// Compares what `server` shows with what it may show, and lets clients loose on it until `end`
    /// has ended it.
    fn live(&mut self, mut server: Server, end: impl FnOnce(&mut Self, &mut Server)) {
        let count = self.random.u64(1..=self.connections);
        let clients: Vec<_> = (0..count).map(|_| server.client(self.export)).collect();
        let tastes: Vec<_> = (0..count).map(|_| Taste::new(self.random.u64(..))).collect();
        thread::scope(|scope| {
            let mut loads = Vec::new();
            for (mut client, mut taste) in clients.into_iter().zip(tastes) {
                if loads.is_empty() {
                    self.must(client.settle(&self.history));
                }
                let history = self.history.clone();
                loads.push(scope.spawn(move || client.load(&history, &mut taste, u64::MAX)));
            }
            end(self, &mut server);
            for load in loads {
                self.must(load.join().unwrap());
            }
        });
    }

    /// A server that goes in one of the ways in which servers go.
    fn round(&mut self) {
        if self.one_in(10) {
            let mut server = THINPLY.launch(self.path(), self.words);
            self.pause(10_000);
            server.kill();
            return;
        }
        let server = self.serve();
        self.live(server, |life, server| {
            life.pause(100_000);
            let stop = life.one_in(6);
            if stop {
                server.ask_to_stop();
                life.pause(10_000);
            }
            if stop && life.one_in(2) {
                server.wait();
                life.history.closed();
            } else {
                server.kill();
            }
        });
    }

    /// A server that is killed while snapshots are made under the load. Answers what each snapshot
    /// that was made may show, by its export's name.
    fn round_with_snapshots(&mut self) -> Vec<(String, History)> {
        let (server, mut views) = (self.serve(), Vec::new());
        self.live(server, |life, server| {
            for left in (0..life.random.u64(1..4)).rev() {
                life.pause(40_000);
                life.snapshots += 1;
                let name = format!("s{}", life.snapshots);
                let mark = life.history.hold();
                let words = ["container", "snapshot", "web", &name];
                let mut command = THINPLY.command(life.path(), &words).spawn().unwrap();
                if left == 0 {
                    life.pause(30_000);
                    server.kill();
                }
                let done = command.wait().unwrap().success();
                assert!(done || left == 0, "seed {}: no snapshot {name}", life.seed);
                let view = life.history.view(mark);
                // With the server dead the command may have made it of what the crash left.
                if left > 0 {
                    views.push((format!("{}@{name}", life.export), view));
                }
            }
        });
        views
    }

    /// Makes a snapshot while nobody serves. It may be killed too, best while both layers change
    /// places, which is soon after the old one has its second name.
    fn snapshot(&mut self) {
        self.snapshots += 1;
        let name = format!("s{}.tply", self.snapshots);
        let mut command =
            THINPLY.command(self.path(), &["snapshot", "top.tply", &name]).spawn().unwrap();
        let killed = self.one_in(2);
        if killed {
            if self.random.bool() {
                while command.try_wait().unwrap().is_none() && !self.path().join(&name).exists() {
                    thread::sleep(Duration::from_micros(50));
                }
            }
            self.pause(10_000);
            command.kill().unwrap();
        }
        let done = command.wait().unwrap().success();
        assert!(done || killed, "seed {}: no snapshot {name}", self.seed);
    }

    /// Nothing is wrong with the files, and the layers below the top are what they ever were.
    fn inspect(&mut self) {
        // Only a store has the second folder.
        let blobs = ["--layers", "store/blobs/sha256"];
        let blobs = if self.words == ["--all"] { &blobs[..] } else { &[] };
        let words = [&["check", "--chain", "--json", self.top], blobs].concat();
        let text = THINPLY.run(self.path(), &words);
        let report: Value = serde_json::from_str(&text).unwrap();
        for layer in &report["layers"].as_array().unwrap()[1..] {
            let file = self.folder.path().join(layer["file"].as_str().unwrap());
            self.sealed.entry(file).or_insert_with_key(|file| digest(file));
        }
    }

    fn finish(self) -> Seen {
        for (file, digest_then) in &self.sealed {
            assert!(digest(file) == *digest_then, "seed {}: {file:?} changed", self.seed);
        }
        self.history.seen()
    }
}

/// The seeds of the lives that make up `share` percent of the rounds.
fn seeds(share: u64) -> Range<u64> {
    let first = number("THINPLY_KILLS_SEED").unwrap_or(0);
    let rounds = number("THINPLY_KILLS").unwrap_or(60) * share / 100;
    first..first + rounds.div_ceil(ROUNDS)
}

#[test]
fn what_a_killed_server_promised_is_there() {
    let mut seen = Seen::default();
    for seed in seeds(70) {
        let mut life = Life::layers(seed);
        for _ in 0..ROUNDS {
            life.round();
            life.inspect();
            if life.one_in(3) {
                let server = THINPLY.serve(life.path(), &["--read-only", "top.tply"]);
                life.must(server.client("").settle(&life.history));
            }
            if life.one_in(2) {
                life.snapshot();
                life.inspect();
            }
        }
        seen += life.finish();
    }
    println!("{seen:?}");
}

#[test]
fn a_store_killed_amid_snapshots_loses_nothing_it_promised() {
    let mut seen = Seen::default();
    for seed in seeds(30) {
        let mut life = Life::container(seed);
        for _ in 0..ROUNDS {
            let views = life.round_with_snapshots();
            life.inspect();
            THINPLY.run(life.path(), &["store", "check"]);
            let server = life.serve();
            for (name, view) in views {
                life.must(server.client(&name).settle(&view));
            }
        }
        seen += life.finish();
    }
    println!("{seen:?}");
}

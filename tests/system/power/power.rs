//! Power cuts: the real server in a virtual machine, on a real kernel's ext4, on a disk that loses
//! what was not flushed when the machine is killed.
//!
//! The clients are outside, so what they got a reply to was replied to before the cut. A cut may
//! fall into the load, into the recovery after the one before, or into a snapshot.
//!
//! `tests/system/power/run` runs this. `THINPLY_MACHINE` is the folder that `tests/system/power/machine` has made,
//! `THINPLY_CUTS` says how many cuts (default 50), `THINPLY_CUTS_SEED` replays a load.

mod disk;

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use tempfile::TempDir;

use testkit::load::client::Client;
use testkit::load::history::History;
use testkit::load::taste::Taste;
use testkit::nbd::Served;
use testkit::number;
use testkit::program::{Program, born, digest};

use disk::Disk;

const THINPLY: Program = Program(env!("CARGO_BIN_EXE_thinply"));

/// Longer than the machine takes for anything, on a busy host.
const TOO_LONG: Duration = Duration::from_secs(300);
/// Room for a few layers, which are sparse.
const DISK: u64 = 400 << 20;

/// Runs a program of the host that must do its work.
fn host(program: &str, words: &[&str]) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(words).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
}

/// A virtual machine that is on.
struct Machine {
    qemu: Child,
    console: Receiver<String>,
    said: Vec<String>,
    port: u16,
    disk: Arc<Disk>,
    served: Served,
}

impl Machine {
    /// Switches it on, and returns once it has checked its disk. `words` go to its kernel's command
    /// line.
    fn boot(disk: &Arc<Disk>, words: &str) -> Self {
        let folder = PathBuf::from(std::env::var_os("THINPLY_MACHINE").expect("see above"));
        disk.power_up();
        let served = Served::device(disk);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new(folder.join("qemu"));
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "256"]);
        command.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
        command.arg("-kernel").arg(folder.join("kernel"));
        command.arg("-initrd").arg(folder.join("initrd"));
        let quiet = "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off";
        command.args(["-append", &format!("{quiet} {words}")]);
        let socket = served.path();
        command.args(["-device", "virtio-blk-pci,drive=disk", "-drive"]);
        command.arg(format!(
            "if=none,id=disk,format=raw,cache=writeback,file=nbd:unix:{}:exportname=disk",
            socket.display()
        ));
        command.args(["-device", "virtio-net-pci,netdev=net", "-netdev"]);
        command.arg(format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:10809"));
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut qemu = command.spawn().unwrap();
        let (sender, console) = mpsc::channel();
        let lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
        // Ends with the machine.
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let (said, disk) = (Vec::new(), disk.clone());
        let mut machine = Self { qemu, console, said, port, disk, served };
        machine.wait_for_fsck("fsck:");
        machine
    }

    /// A file system must be right after a journal replay.
    fn wait_for_fsck(&mut self, start: &str) {
        let status: u32 = self.wait_for(start).parse().unwrap();
        assert!(status <= 1, "{:#?}", self.said);
    }

    /// Waits for a line that begins so; what follows.
    fn wait_for(&mut self, start: &str) -> String {
        loop {
            let Ok(line) = self.console.recv_timeout(TOO_LONG) else {
                panic!("no line {start:?} on the console: {:#?}", self.said);
            };
            self.said.push(line.clone());
            if let Some(rest) = line.strip_prefix(start) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Waits until the layer was checked, which must be right.
    fn wait_until_checked(&mut self) {
        let check = self.wait_for("check:");
        assert!(check == "0", "{:#?}", self.said);
    }

    fn client(&self) -> Client {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(TOO_LONG)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client::connect(Box::new(stream), "").unwrap()
    }

    /// Cuts the power; how many sectors were at risk.
    fn cut(&mut self, random: &mut Rng) -> usize {
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
        let lost = self.disk.cut(random);
        self.served.stop().unwrap();
        lost
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A disk with a file system that has `base.tply`, made of `born.raw` in `folder`, and `top.tply`
/// over it.
fn disk_with_layers(folder: &Path) -> Arc<Disk> {
    let (files, image) = (folder.join("disk"), folder.join("image"));
    fs::create_dir(&files).unwrap();
    THINPLY.run(folder, &["import", "born.raw", "disk/base.tply"]);
    THINPLY.run(folder, &["create", "--parent", "disk/base.tply", "disk/top.tply"]);
    make_file_system(&image, DISK, &["-d", files.to_str().unwrap()]);
    Arc::new(Disk::new(fs::read(&image).unwrap()))
}

fn make_file_system(image: &Path, size: u64, words: &[&str]) {
    fs::File::create(image).unwrap().set_len(size).unwrap();
    host("mkfs.ext4", &[&["-q", "-F"], words, &[image.to_str().unwrap()]].concat());
}

/// Sleeps for at most `most` milliseconds.
fn pause(random: &mut Rng, most: u64) {
    thread::sleep(Duration::from_millis(random.u64(..most)));
}

struct Life {
    folder: TempDir,
    history: Arc<History>,
    random: Rng,
    disk: Arc<Disk>,
    snapshots: u64,
    /// A snapshot that was made since anything was written.
    fresh: Option<String>,
    /// What each snapshot shows.
    views: Vec<(String, History)>,
}

impl Life {
    fn new(seed: u64) -> Self {
        let (folder, mut random) = (tempfile::tempdir().unwrap(), Rng::with_seed(seed));
        let history = Arc::new(born(folder.path(), &mut random));
        let disk = disk_with_layers(folder.path());
        Self { folder, history, random, disk, snapshots: 0, fresh: None, views: Vec::new() }
    }

    /// One life of the machine, and its end.
    fn round(&mut self) {
        let mut words = String::new();
        let snapshot = self.random.u8(..3) == 0 && self.views.len() < 8;
        if snapshot {
            self.snapshots += 1;
            words = format!("snapshot=s{}.tply", self.snapshots);
        }
        let mut machine = Machine::boot(&self.disk, &words);
        let (when, most) = match self.random.u8(..10) {
            0..3 if snapshot => ("in a snapshot", 400),
            0..3 => ("while opening", 400),
            _ => ("under load", 8000),
        };
        match when {
            "in a snapshot" => drop(machine.wait_for("snapshot: begins")),
            _ if snapshot => {
                assert_eq!(machine.wait_for("snapshot: begins"), "");
                assert_eq!(machine.wait_for("snapshot:"), "0", "{:#?}", machine.said);
                self.fresh = Some(format!("s{}.tply", self.snapshots));
            }
            _ => {}
        }
        if when == "while opening" {
            machine.wait_for("serve: begins");
        }
        let lost = match when {
            "under load" => {
                machine.wait_until_checked();
                machine.wait_for("nbd:");
                self.live(&mut machine, most)
            }
            _ => {
                pause(&mut self.random, most);
                machine.cut(&mut self.random)
            }
        };
        println!("cut {when}: {lost} sectors in the disk's cache; {:?}", self.history.seen());
    }

    /// Compares, and lets clients loose until the cut.
    fn live(&mut self, machine: &mut Machine, most: u64) -> usize {
        let count = self.random.u64(1..6);
        let mut clients: Vec<_> = (0..count).map(|_| machine.client()).collect();
        let mut tastes: Vec<_> = (0..count).map(|_| Taste::new(self.random.u64(..))).collect();
        self.settle(&mut clients[0]);
        thread::scope(|scope| {
            let history = self.history.clone();
            let pairs = clients.iter_mut().zip(&mut tastes);
            let loads: Vec<_> = pairs
                .map(|(client, taste)| {
                    let history = history.clone();
                    scope.spawn(move || client.load(&history, taste, u64::MAX))
                })
                .collect();
            pause(&mut self.random, most);
            let lost = machine.cut(&mut self.random);
            for load in loads {
                load.join().unwrap().unwrap();
            }
            lost
        })
    }

    fn settle(&mut self, client: &mut Client) {
        client.settle(&self.history).unwrap();
        if let Some(name) = self.fresh.take() {
            self.views.push((name, self.history.view(self.history.hold())));
        }
    }

    /// Takes the layers off the disk and looks at each.
    fn finish(mut self, base: blake3::Hash) {
        let mut machine = Machine::boot(&self.disk, "once=--once");
        machine.wait_until_checked();
        machine.wait_for("nbd:");
        self.settle(&mut machine.client());
        assert_eq!(machine.wait_for("serve:"), "0");
        assert_eq!(machine.wait_for("umount:"), "0");
        machine.qemu.wait().unwrap();
        machine.served.stop().unwrap();
        let path = self.folder.path();
        let (image, out) = (path.join("image"), path.join("out"));
        fs::write(&image, self.disk.media()).unwrap();
        fs::create_dir(&out).unwrap();
        let dump = format!("rdump / {}", out.display());
        host("debugfs", &["-R", &dump, image.to_str().unwrap()]);
        assert!(digest(&out.join("base.tply")) == base, "the base has changed");
        THINPLY.run(&out, &["check", "--chain", "top.tply"]);
        self.views.push(("top.tply".into(), self.history.view(self.history.hold())));
        for (name, view) in &self.views {
            let server = THINPLY.serve(&out, &["--read-only", name]);
            server.client("").settle(view).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

#[test]
#[ignore = "takes minutes and a virtual machine: tests/system/power/run"]
fn what_was_promised_before_a_power_cut_is_there() {
    let seed = number("THINPLY_CUTS_SEED").unwrap_or(0);
    let mut life = Life::new(seed);
    let base = digest(&life.folder.path().join("disk/base.tply"));
    for _ in 0..number("THINPLY_CUTS").unwrap_or(50) {
        life.round();
    }
    life.finish(base);
}

/// Files that are synced one by one in a file system over the layer: what guests do, with the
/// kernel's client between.
#[test]
#[ignore = "takes minutes and a virtual machine: tests/system/power/run"]
fn files_over_the_kernels_client_outlive_power_cuts() {
    let (folder, mut random) = (tempfile::tempdir().unwrap(), Rng::with_seed(1));
    make_file_system(&folder.path().join("born.raw"), 64 << 20, &[]);
    let disk = disk_with_layers(folder.path());
    let mut synced = 0;
    for _ in 0..number("THINPLY_CUTS").unwrap_or(50).div_ceil(5) {
        let mut machine = Machine::boot(&disk, "files=keep");
        machine.wait_until_checked();
        machine.wait_for_fsck("inner fsck:");
        let kept: u64 = machine.wait_for("kept:").parse().unwrap();
        assert!(kept >= synced, "{synced} files were synced, but {:#?}", machine.said);
        pause(&mut random, 8000);
        let lost = machine.cut(&mut random);
        // What was on the console before the cut.
        let last = machine.console.iter().filter_map(|line| {
            line.strip_prefix("synced:").and_then(|number| number.trim().parse::<u64>().ok())
        });
        let next = last.last().map_or(kept, |number| number + 1);
        println!("cut: {lost} sectors in the disk's cache; {kept} files kept, then {next} synced");
        synced = next;
    }
}

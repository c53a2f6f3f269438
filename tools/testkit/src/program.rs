//! The command as a process of its own, and its server, to be killed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fastrand::Rng;
use rustix::fs::{SeekFrom, seek};

use crate::load::client::Client;
use crate::load::history::{History, SECTOR};
use crate::load::taste::{self, SIZE};

/// Longer than any reply takes.
const TOO_LONG: Duration = Duration::from_secs(60);

/// The path of the command: in a test, `Program(env!("CARGO_BIN_EXE_thinply"))`.
#[derive(Clone, Copy)]
pub struct Program(pub &'static str);

impl Program {
    /// A command of thinply, in `folder`.
    pub fn command(self, folder: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(self.0);
        command.args(words).current_dir(folder);
        command.env_remove("THINPLY_LAYERS").env("THINPLY_ROOT", folder.join("store"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command that must do its work; its standard output.
    pub fn run(self, folder: &Path, words: &[&str]) -> String {
        let output = self.command(folder, words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts to serve; `words` say what.
    pub fn launch(self, folder: &Path, words: &[&str]) -> Server {
        let socket = folder.join("nbd.sock");
        let mut command = self.command(folder, &["serve", "--socket", "nbd.sock"]);
        let child = command.args(words).spawn().unwrap();
        Server { child, socket }
    }

    /// Serves, and returns once clients can connect.
    pub fn serve(self, folder: &Path, words: &[&str]) -> Server {
        let mut server = self.launch(folder, words);
        let mut line = String::new();
        let output = server.child.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        assert!(line.starts_with("nbd+unix:"), "no ready line: {line:?} {}", server.errors());
        server
    }
}

/// Makes `born.raw` in `folder`: what an image begins with, and its history.
pub fn born(folder: &Path, random: &mut Rng) -> History {
    let raw = File::create(folder.join("born.raw")).unwrap();
    raw.set_len(SIZE * SECTOR).unwrap();
    taste::born(random, |offset, data| raw.write_all_at(data, offset).unwrap())
}

/// A hash of what a file reads as: where its holes are may change.
pub fn digest(path: &Path) -> blake3::Hash {
    let file = File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&length.to_le_bytes());
    let mut at = 0;
    // Fails where there is no data any more.
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        at = seek(&file, SeekFrom::Hole(start)).unwrap();
        let mut bytes = vec![0; (at - start) as usize];
        file.read_exact_at(&mut bytes, start).unwrap();
        for (sector, place) in bytes.chunks(SECTOR as usize).zip((start..).step_by(512)) {
            if sector.iter().any(|&byte| byte != 0) {
                hasher.update(&place.to_le_bytes()).update(sector);
            }
        }
    }
    hasher.finalize()
}

/// `thinply serve` on a socket in its folder.
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// A client of the export `name`.
    pub fn client(&self, name: &str) -> Client {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(TOO_LONG)).unwrap();
        stream.set_write_timeout(Some(TOO_LONG)).unwrap();
        Client::connect(Box::new(stream), name).unwrap()
    }

    /// SIGKILL, and waits until the process, with its locks, is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM: the server may take its time to end.
    pub fn ask_to_stop(&self) {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    }

    /// Waits for a server that was asked to stop; it must end well.
    pub fn wait(&mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "ended with {status}: {}", self.errors());
    }

    /// What a server that has ended said on standard error.
    fn errors(&mut self) -> String {
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! A folder to work in, and running the command there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use serde_json::Value;
use tempfile::TempDir;
use thinply::chain::{Chain, Layers};
use thinply::device::Device;
use thinply::storage::{Access, FileFolder};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

pub struct Folder {
    dir: TempDir,
}

/// What a run gave back.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Run {
    /// It ended with exit code 2, said why, and printed nothing else.
    pub fn refused(&self) -> &str {
        assert_eq!(self.code, 2, "{self:?}");
        assert_eq!(self.stdout, "");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        assert!(!self.stderr.is_empty());
        &self.stderr
    }
}

impl Folder {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command, with this folder as its working directory.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_thinply"));
        command.args(args).current_dir(self.path());
        command.env_remove("THINPLY_LAYERS").env_remove("COLUMNS").stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Run {
        self.command(args).output().unwrap().into()
    }

    /// A run that must do its work; its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let run = self.run(args);
        assert_eq!(run.code, 0, "{args:?}: {run:?}");
        run.stdout
    }

    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    pub fn write(&self, name: &str, data: &[u8]) {
        fs::write(self.join(name), data).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.join(name)).unwrap()
    }

    /// What the file costs on disk.
    pub fn cost(&self, name: &str) -> u64 {
        fs::metadata(self.join(name)).unwrap().blocks() * 512
    }

    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into()).collect();
        names.sort();
        names
    }

    /// Opens a chain in this process, which holds its lock.
    pub fn open(&self, name: &str, access: Access) -> Chain {
        let folder = Arc::new(FileFolder::new(self.path()));
        Chain::open(folder, name, access, Arc::new(Layers::default())).unwrap()
    }

    /// Writes to a disk and closes it.
    pub fn change(&self, name: &str, offset: u64, data: &[u8]) {
        let chain = self.open(name, Access::Write);
        chain.write(offset, data).unwrap();
        chain.close().unwrap();
    }

    /// Leaves a disk as a killed writer does.
    pub fn crash(&self, name: &str, offset: u64, data: &[u8]) {
        let chain = self.open(name, Access::Write);
        chain.write(offset, data).unwrap();
        chain.flush().unwrap();
    }
}

/// Bytes that no two blocks have in common, the same for every `seed`.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(&mut next).take(length).collect()
}

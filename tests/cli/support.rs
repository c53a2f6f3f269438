//! A folder to work in, and running the command there.

use std::fs;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use thinply::chain::{Chain, Gate};
use thinply::device::Device;
use thinply::storage::{Access, FileFolder, Folder as _, Lock};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// Every subcommand, as the help lists them.
pub const VERBS: [&str; 32] = [
    "create",
    "snapshot",
    "info",
    "map",
    "dump",
    "check",
    "repair",
    "import",
    "export",
    "pack",
    "verify",
    "flatten",
    "rebase",
    "compact",
    "diff",
    "compare",
    "resize",
    "serve",
    "mount",
    "umount",
    "attach",
    "detach",
    "mounts",
    "image",
    "container",
    "volume",
    "df",
    "gc",
    "store",
    "demo",
    "completions",
    "man",
];

/// Says that a test can't run here, which is a failure where nothing may be skipped.
pub fn skip(reason: &str) {
    assert!(std::env::var("THINPLY_STRICT").as_deref() != Ok("1"), "strict mode: {reason}");
    println!("skipped: {reason}");
}

/// Held where a child is started, and where a lock on a layer is taken or given back. A child has
/// the parent's open files, with their locks, until it has become another program.
static STARTING: Mutex<()> = Mutex::new(());

/// Starts a child.
pub fn start(command: &mut Command) -> Child {
    let _guard = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    command.spawn().unwrap()
}

/// Does something while no child is being started, so that none has this process's open files.
pub fn alone<T>(act: impl FnOnce() -> T) -> T {
    let _guard = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    act()
}

/// Runs a child to its end.
pub fn output(command: &mut Command) -> Output {
    start(command).wait_with_output().unwrap()
}

/// A chain that this process has open.
pub struct Open {
    chain: Option<Chain>,
    folder: FileFolder,
    name: String,
}

impl Deref for Open {
    type Target = Chain;

    fn deref(&self) -> &Chain {
        self.chain.as_ref().unwrap()
    }
}

impl Open {
    /// Closes it cleanly; dropping it leaves what a crash leaves.
    pub fn close(mut self) {
        self.release(|chain| chain.close().unwrap());
    }

    fn release(&mut self, end: impl FnOnce(Chain)) {
        let Some(chain) = self.chain.take() else { return };
        let _guard = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        end(chain);
        // A child that has just been started may still have the lock for a moment: starting it
        // returns shortly before its inherited files are closed.
        let file = self.folder.open(&self.name, Access::Write).unwrap();
        while file.lock(Lock::Exclusive).is_err() {
            std::thread::yield_now();
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.release(drop);
    }
}

/// The name of a blob with these bytes.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

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

    /// One on a file system in memory, if there is one.
    pub fn in_memory() -> Self {
        tempfile::tempdir_in("/dev/shm").map_or_else(|_| Self::new(), |dir| Self { dir })
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
        command.env_remove("THINPLY_LAYERS").env_remove("COLUMNS");
        command.env("THINPLY_ROOT", self.join("store"));
        command.env("THINPLY_HOST_KEY", self.join("host.key"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run(&self, args: &[&str]) -> Run {
        output(&mut self.command(args)).into()
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

    /// What a disk shows, by the command itself.
    pub fn export(&self, name: &str) -> Vec<u8> {
        self.ok(&["export", name, "exported"]);
        let bytes = self.read("exported");
        fs::remove_file(self.join("exported")).unwrap();
        bytes
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
    pub fn open(&self, name: &str, access: Access) -> Open {
        let folder = FileFolder::new(self.path());
        let layers = Arc::new(Gate::default());
        let chain = Chain::open(Arc::new(folder.clone()), name, access, layers).unwrap();
        Open { chain: Some(chain), folder, name: name.to_owned() }
    }

    /// Writes to a disk and closes it.
    pub fn change(&self, name: &str, offset: u64, data: &[u8]) {
        let chain = self.open(name, Access::Write);
        chain.write(offset, data).unwrap();
        chain.close();
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

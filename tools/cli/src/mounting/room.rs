//! Where the run-time state is: a folder of the user's own, with a room in it for each store or layer
//! that a server was started for.
//!
//! | in a room | what |
//! | --- | --- |
//! | `lock` | locked by whoever looks for the server, or starts it |
//! | `files` | the folder that the server shows the disks in |
//! | `pid` | the process that was started: the server's holder |
//! | `log` | what the server said |
//! | `uses/N` | who attached the device with the sequence number N, and when |

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use thinply::error::{Error, ErrorKind, Result};

/// Names another folder than `/run/thinply`, or `thinply` in `XDG_RUNTIME_DIR`.
const VARIABLE: &str = "THINPLY_RUN";
/// How long somebody else may look for a server, or start it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest file of the room that is read.
const MOST: u64 = 64 << 10;
/// How much of a log is shown.
const LAST_BYTES: u64 = 2 << 10;

/// A room.
#[derive(Clone, Debug)]
pub struct Room {
    folder: PathBuf,
}

/// Who attached a device, and when.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Note {
    /// User id.
    pub user: u32,
    /// RFC 3339.
    pub since: String,
    /// The number of the partition, where it shows only that.
    pub partition: Option<usize>,
}

/// The folder of all rooms.
fn base() -> Result<PathBuf> {
    let variable =
        |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(named) = variable(VARIABLE) {
        return Ok(named);
    }
    if geteuid().is_root() {
        return Ok("/run/thinply".into());
    }
    variable("XDG_RUNTIME_DIR").map(|folder| folder.join("thinply")).ok_or_else(|| {
        let detail =
            format!("nowhere to keep what runs: XDG_RUNTIME_DIR is not set, nor {VARIABLE}");
        Error::new(ErrorKind::NotFound, detail)
    })
}

fn failed(folder: &Path) -> impl Fn(io::Error) -> Error + '_ {
    move |error| Error::io(error, "making a folder for what runs").in_file(folder)
}

/// Makes a folder, where there is nothing.
fn make(folder: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(folder)(error)),
        _ => Ok(()),
    }
}

/// Makes a folder that nobody else may look into, or makes sure that it is one.
fn private(folder: &Path) -> Result<()> {
    make(folder)?;
    let found = fs::symlink_metadata(folder).map_err(failed(folder))?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o077 != 0 {
        let detail = "is not a folder of this user's that nobody else may look into (mode 0700)";
        return Err(Error::new(ErrorKind::PermissionDenied, detail).in_file(folder));
    }
    Ok(())
}

fn name_of(served: &Path) -> String {
    blake3::hash(served.as_os_str().as_bytes()).to_hex()[..16].to_owned()
}

impl Room {
    /// The room of what is served at a path, which is made where it is missing. All others are kept from
    /// looking for its server, or starting it, for as long as the file is open.
    ///
    /// # Errors
    /// [`ErrorKind::PermissionDenied`] for a folder that is somebody else's or open to others;
    /// [`ErrorKind::InUse`] where somebody stays; host errors.
    pub fn enter(served: &Path) -> Result<(Self, File)> {
        let base = base()?;
        private(&base)?;
        let room = Self { folder: base.join(name_of(served)) };
        loop {
            private(&room.folder)?;
            // They may be mounted on, and nobody else gets this far.
            make(&room.files())?;
            make(&room.uses())?;
            let lock = room.lock()?;
            // Unless it was cleared away meanwhile.
            if is_at(&lock, &room.lock_file()) {
                room.clear_others(&base);
                return Ok((room, lock));
            }
        }
    }

    /// Clears away the rooms whose server has ended.
    fn clear_others(&self, base: &Path) {
        let rooms = fs::read_dir(base).into_iter().flatten().flatten();
        let others = rooms.map(|entry| Self { folder: entry.path() });
        for other in others.filter(|other| other.folder != self.folder) {
            let Ok(lock) = File::open(other.lock_file()) else { continue };
            let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
            // Fails where files are shown in it still.
            if locked && other.pid().is_none() && fs::remove_dir(other.files()).is_ok() {
                let _ = fs::remove_dir_all(&other.folder);
            }
        }
    }

    /// The room of what is served at a path, if there is one.
    pub fn find(served: &Path) -> Option<Self> {
        let folder = base().ok()?.join(name_of(served));
        let owned = |found: fs::Metadata| found.is_dir() && found.uid() == geteuid().as_raw();
        fs::symlink_metadata(&folder).is_ok_and(owned).then_some(Self { folder })
    }

    fn lock(&self) -> Result<File> {
        let path = self.lock_file();
        let fail = |error| Error::io(error, "waiting for others who mount").in_file(&path);
        let mut options = OpenOptions::new();
        let flags = OFlags::NOFOLLOW.bits() as i32;
        let file = options.create(true).append(true).mode(0o600).custom_flags(flags).open(&path);
        let file = file.map_err(fail)?;
        let start = Instant::now();
        while let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if start.elapsed() > PATIENCE {
                let detail = format!("somebody else has been mounting for long: {error}");
                return Err(Error::new(ErrorKind::InUse, detail).in_file(path));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(file)
    }

    fn lock_file(&self) -> PathBuf {
        self.folder.join("lock")
    }

    fn uses(&self) -> PathBuf {
        self.folder.join("uses")
    }

    /// Where the server shows the disks.
    pub fn files(&self) -> PathBuf {
        self.folder.join("files")
    }

    /// Where the process that is started for the room notes its id.
    pub fn pid_file(&self) -> PathBuf {
        self.folder.join("pid")
    }

    /// The process that was started for the room, where it still runs.
    pub fn pid(&self) -> Option<u32> {
        let pid: u32 = read(&self.pid_file()).ok()?.trim().parse().ok()?;
        // Another process may have the number by now.
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let files = self.files();
        let mut arguments = command.split(|&byte| byte == 0);
        arguments.any(|argument| argument == files.as_os_str().as_bytes()).then_some(pid)
    }

    /// A file for what a new server says.
    ///
    /// # Errors
    /// Host errors.
    pub fn new_log(&self) -> Result<File> {
        let path = self.folder.join("log");
        let _ = fs::remove_file(&path);
        let file = OpenOptions::new().create_new(true).append(true).mode(0o600).open(&path);
        file.map_err(|error| Error::io(error, "making the server's log").in_file(&path))
    }

    /// The last line that the server said, possibly empty.
    pub fn last_words(&self) -> String {
        let read = || {
            let mut log = File::open(self.folder.join("log"))?;
            let length = log.metadata()?.len();
            io::Seek::seek(&mut log, io::SeekFrom::Start(length.saturating_sub(LAST_BYTES)))?;
            let mut bytes = Vec::new();
            log.take(LAST_BYTES).read_to_end(&mut bytes)?;
            let text = String::from_utf8_lossy(&bytes);
            Ok::<_, io::Error>(text.trim().lines().last().unwrap_or_default().to_owned())
        };
        read().unwrap_or_default()
    }

    /// Notes who attached a device, and when. Those of devices that are gone are forgotten.
    pub fn note(&self, sequence: &str, note: &Note, attached: impl Fn(&str) -> bool) {
        let folder = self.uses();
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_none_or(|known| !attached(known)) {
                let _ = fs::remove_file(entry.path());
            }
        }
        // It is for people: what it tells is unknown where it can't be written.
        let mut options = OpenOptions::new();
        let file = options.create_new(true).write(true).mode(0o600).open(folder.join(sequence));
        let text = serde_json::to_vec(note).unwrap_or_default();
        let _ = file.and_then(|mut file| file.write_all(&text));
    }

    /// Who attached a device.
    pub fn noted(&self, sequence: &str) -> Option<Note> {
        // It is a number that the kernel gave.
        let number: u64 = sequence.parse().ok()?;
        serde_json::from_str(&read(&self.uses().join(number.to_string())).ok()?).ok()
    }
}

/// Whether a path leads to a file that is open.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |found: fs::Metadata| (found.dev(), found.ino());
    let found = fs::symlink_metadata(path).map(identity);
    file.metadata().map(identity).is_ok_and(|open| found.is_ok_and(|found| found == open))
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MOST).read_to_string(&mut text)?;
    Ok(text)
}

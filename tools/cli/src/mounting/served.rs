//! The server that shows a disk as a file: found, or started.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::geteuid;
use thinply::error::{Error, ErrorKind, Result, shown};
use thinply::fuse;

use super::filesystem::unmount_at;
use super::room::Room;
use super::target::Target;
use crate::io::mountinfo::{self, Mounted};
use crate::io::paths;
use crate::options::LayersArg;

/// Has a server that is started leave the session of whoever starts it, and note its process id in the file
/// that this names.
pub const DETACHED: &str = "THINPLY_DETACHED";
/// How long a server that is just coming to its end may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may seem to be that, where something else may be wrong.
const DOUBT: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);

/// A disk's file.
#[derive(Debug)]
pub struct DiskFile {
    /// It, open.
    pub file: File,
    /// Its path.
    pub path: PathBuf,
    /// Where the run-time state of its server is.
    pub room: Room,
    /// Keeps others from attaching it meanwhile.
    _lock: File,
}

/// What a disk's file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be written.
    Write,
    /// To be read, while nobody writes a layer.
    Read,
    /// To be looked at, while another program opens it for writing.
    Look,
}

/// Opens the file of a disk. Its server is started where there is none, and then ends with the last file
/// that is open.
///
/// # Errors
/// [`ErrorKind::InUse`] for a disk that has a writer; those of the server's start; host errors.
pub fn open(target: &Target, purpose: Purpose, layers: &LayersArg) -> Result<DiskFile> {
    let served = target.served()?;
    let room = Room::of(&served)?;
    let lock = room.lock()?;
    let start = Instant::now();
    loop {
        let folder = match shown_in(&served)? {
            Some(folder) => folder,
            // It has taken its files away, and holds the store or the layer still.
            None if room.pid().is_some() && start.elapsed() < PATIENCE => {
                thread::sleep(PAUSE);
                continue;
            }
            None => started(target, &served, purpose, layers, (&room, &lock))?,
        };
        let path = folder.join(target.file());
        let file = OpenOptions::new()
            .read(true)
            .write(purpose == Purpose::Write)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&path);
        match file {
            Ok(file) => return Ok(DiskFile { file, path, room, _lock: lock }),
            Err(error) if start.elapsed() < ending(&error) => thread::sleep(PAUSE),
            Err(error) => return Err(refused(error, target, &room)),
        }
    }
}

/// How long an error may come of the end of the server that was there.
fn ending(error: &std::io::Error) -> Duration {
    match Errno::from_io_error(error) {
        Some(Errno::NOTCONN | Errno::CONNABORTED) => PATIENCE,
        Some(Errno::NOENT | Errno::IO) => DOUBT,
        _ => Duration::ZERO,
    }
}

fn refused(error: std::io::Error, target: &Target, room: &Room) -> Error {
    let path = target.shown();
    match Errno::from_io_error(&error) {
        Some(Errno::BUSY) => Error::new(ErrorKind::InUse, "somebody else writes it").in_file(path),
        Some(Errno::ROFS) => {
            Error::new(ErrorKind::ReadOnly, "can only be read; --read-only does").in_file(path)
        }
        _ => {
            let said = room.last_words();
            let said = said.lines().last().map(|line| format!(" ({})", shown(line)));
            let operation = format!("opening the disk's file{}", said.unwrap_or_default());
            Error::io(error, operation).in_file(path)
        }
    }
}

/// The folder in which a server shows what is served at a path. One that nobody serves is cleared away.
fn shown_in(served: &Path) -> Result<Option<PathBuf>> {
    for mounted in shows(served)? {
        match std::fs::symlink_metadata(&mounted.folder) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTCONN) => {
                // Both its server and its holder were killed.
                unmount_at(&mounted.folder, mounted.id, true)?;
            }
            _ => return Ok(Some(mounted.folder)),
        }
    }
    Ok(None)
}

/// The mounts that show what is served at a path.
pub fn shows(served: &Path) -> Result<Vec<Mounted>> {
    let all = mountinfo::all()?.into_iter();
    Ok(all.filter(|found| is_ours(found) && found.source == served).collect())
}

/// Whether a mount shows disks to this user.
pub fn is_ours(mounted: &Mounted) -> bool {
    mounted.kind == fuse::KIND && mounted.user == Some(geteuid().as_raw())
}

/// Starts a server, and answers the folder that it shows the disks in once they are there.
fn started(
    target: &Target,
    served: &Path,
    purpose: Purpose,
    layers: &LayersArg,
    (room, lock): (&Room, &File),
) -> Result<PathBuf> {
    let fail = |error| Error::io(error, "starting a server");
    let files = room.files();
    let mut command = Command::new("/proc/self/exe");
    command.args(["serve", "--once", "--fuse"]).arg(&files);
    match target {
        Target::Layer(_) => {
            for folder in layers.folders()? {
                command.arg("--layers").arg(paths::real(folder.path())?);
            }
            command.args((purpose == Purpose::Read).then_some("--read-only")).arg("--").arg(served);
        }
        Target::Disk { .. } => {
            command.arg("--all").arg("--root").arg(served);
        }
    }
    // It outlives this process, and the session that this one is in. Should this process die, others go on
    // to wait for the lock until there are files.
    command.env(DETACHED, room.pid_file()).current_dir("/");
    command.stdin(lock.try_clone().map_err(fail)?);
    let child = command.stdout(Stdio::piped()).stderr(room.new_log()?).spawn().map_err(fail)?;
    await_start(child, room)?;
    Ok(files)
}

/// Waits for the line by which a server says that it serves.
fn await_start(mut child: Child, room: &Room) -> Result<()> {
    let fail = |error| Error::io(error, "starting a server");
    let mut line = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout.take(64 << 10)).read_until(b'\n', &mut line).map_err(fail)?;
    }
    if line.is_empty() {
        let status = child.wait().map_err(fail)?;
        let said = room.last_words();
        let said = said.lines().last().unwrap_or_default();
        let said = said.strip_prefix("thinply: ").unwrap_or(said);
        let detail = match said {
            "" => format!("the server ended ({status})"),
            said => shown(said).to_string(),
        };
        return Err(Error::new(ErrorKind::Io, detail));
    }
    Ok(())
}

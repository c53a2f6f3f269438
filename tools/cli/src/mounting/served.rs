//! The server that shows a disk as a file: found, or started.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{geteuid, getuid};
use thinply::control::line;
use thinply::error::{Error, ErrorKind, Result, shown};
use thinply::fuse;

use super::content::read_until_end;
use super::loops::{self, Attached, Device};
use super::partitions;
use super::room::{Note, Room};
use super::target::Target;
use super::{while_alive, within};
use crate::io::mountinfo::{self, Mounted};
use crate::io::{paths, table};
use crate::options::LayersArg;

/// Has a server that is started leave the session of whoever starts it, and note its process id in the file
/// that this names.
pub const DETACHED: &str = "THINPLY_DETACHED";
/// How long a server that is just coming to its end may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may seem to be that, where something else may be wrong.
const DOUBT: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);
/// How long a server may take to close a layer.
const LEAVE: Duration = Duration::from_secs(10);
/// How long a server may take to answer before it is asked whether it still does.
const HANG: Duration = Duration::from_secs(5);

/// A disk's file.
#[derive(Debug)]
pub struct DiskFile {
    /// It, open.
    pub file: File,
    /// Its path.
    pub path: PathBuf,
    /// The disk, as people name it.
    shown: PathBuf,
    /// The folder that all of its server's disks are in.
    shown_in: PathBuf,
    /// Where the run-time state of its server is.
    room: Room,
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
    let (room, lock) = Room::enter(&served)?;
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
        if purpose == Purpose::Write && matches!(target, Target::Disk { .. }) {
            // Its server would wait for a while whether that one goes.
            if let Some(writer) = loops::over(&path)?.iter().find(|device| !device.read_only) {
                return Err(in_use(writer)?.in_file(target.shown()));
            }
        }
        match opened(target, &path, purpose == Purpose::Write)? {
            Ok(file) => {
                let shown = target.shown();
                return Ok(DiskFile { file, path, shown, shown_in: folder, room, _lock: lock });
            }
            Err(error) if start.elapsed() < ending(&error) => thread::sleep(PAUSE),
            Err(error) => return Err(refused(error, target, &room)),
        }
    }
}

impl DiskFile {
    /// Lets go of it, and waits for a while until its server has done so too, unless somebody else has
    /// it.
    ///
    /// # Errors
    /// Host errors.
    pub fn leave(self, target: &Target) -> Result<()> {
        let layer = target.layer()?;
        drop(self.file);
        match layer {
            Some(layer) if loops::over(&self.path)?.is_empty() => layer.await_free(LEAVE).map(drop),
            _ => Ok(()),
        }
    }

    /// Whether its server was started for mounts, and gives disks to nobody else.
    pub fn is_for_mounts(&self) -> bool {
        self.shown_in == self.room.files()
    }

    /// Makes sure that no device is over the same bytes where one of both is for writing: what is
    /// mounted through one would not see what the other changes.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`]; host errors.
    pub fn check_free(&self, options: &loops::Options) -> Result<()> {
        let conflicts =
            |other: &&Attached| other.overlaps(options) && !(other.read_only && options.read_only);
        match loops::over(&self.path)?.iter().find(conflicts) {
            Some(other) => Err(in_use(other)?.in_file(&self.shown)),
            None => Ok(()),
        }
    }

    /// Makes a block device of it, which [`DiskFile::check_free`] allows, with a note of who did.
    ///
    /// # Errors
    /// Those of [`loops::attach`].
    pub fn attach(&self, options: &loops::Options, partition: Option<usize>) -> Result<Device> {
        let device = loops::attach(self.file.as_fd(), options)?;
        if let Some(sequence) = device.sequence() {
            let note = Note { user: getuid().as_raw(), since: table::now(), partition };
            let devices = loops::over(&self.shown_in)?;
            self.room.note(&sequence, &note, |known| {
                devices.iter().any(|device| device.sequence == known)
            });
        }
        Ok(device)
    }

    /// Offset and length of a part of it; all of it where no partition is named.
    ///
    /// # Errors
    /// Those of [`partitions::find`].
    pub fn part(&self, partition: Option<usize>) -> Result<(u64, u64)> {
        let Some(number) = partition else { return Ok((0, 0)) };
        let fail = |error| Error::io(error, "looking at the disk");
        let size = self.file.metadata().map_err(fail)?.len();
        let found = partitions::find(number, size, &|sector| self.sector(sector));
        found.map(|part| (part.offset, part.length)).map_err(|error| error.in_file(&self.shown))
    }

    /// The numbers of its partitions.
    ///
    /// # Errors
    /// Host errors.
    pub fn partitions(&self) -> Result<Vec<usize>> {
        let all = partitions::all(&|sector| self.sector(sector))?;
        Ok(all.iter().map(|part| part.number).collect())
    }

    fn sector(&self, number: u64) -> Result<[u8; 512]> {
        let mut bytes = [0; 512];
        let Some(offset) = number.checked_mul(512) else { return Ok(bytes) };
        read_until_end(&self.file, &mut bytes, offset)
            .map_err(|error| Error::io(error, "reading the partition table").at(offset))?;
        Ok(bytes)
    }
}

/// Opens a disk's file, unless its server hangs.
fn opened(target: &Target, path: &Path, writes: bool) -> Result<std::io::Result<File>> {
    let mut options = OpenOptions::new();
    options.read(true).write(writes).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    let path = path.to_owned();
    let is_alive = || match target {
        Target::Layer(_) => false,
        Target::Disk { store, .. } => line::is_answering(store),
    };
    while_alive(HANG, is_alive, move || options.open(path)).ok_or_else(|| hangs(target.shown()))
}

/// Why what a server that hangs shows can't be had.
pub fn hangs(shown: PathBuf) -> Error {
    let detail = "its server does not answer; `umount --force` ends it";
    Error::new(ErrorKind::Io, detail).in_file(shown)
}

/// Why what a device shows can't be had beside it.
fn in_use(device: &Attached) -> Result<Error> {
    let mounted = mountinfo::all()?.into_iter().find(|mounted| device.is_at(mounted));
    let detail = match mounted {
        Some(mounted) => format!("is mounted at {} already", mounted.folder.display()),
        None => format!("is attached as {} already", device.path.display()),
    };
    let how = if device.read_only { " (read-only)" } else { "" };
    Ok(Error::new(ErrorKind::InUse, detail + how))
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
            let said = if said.is_empty() { said } else { format!(" ({})", shown(&said)) };
            Error::io(error, format!("opening the disk's file{said}")).in_file(path)
        }
    }
}

/// The folder in which a server shows what is served at a path. One that nobody serves is cleared away.
fn shown_in(served: &Path) -> Result<Option<PathBuf>> {
    let all = mountinfo::all()?.into_iter();
    for mounted in all.filter(|found| is_ours(found) && found.source == served) {
        match state(&mounted) {
            // Both its server and its holder were killed.
            State::Dead => fuse::Mount::listed(&mounted.folder, mounted.id).remove()?,
            State::Hangs => return Err(hangs(served.to_owned())),
            State::Serves => return Ok(Some(mounted.folder)),
        }
    }
    Ok(None)
}

/// How the server of a mount is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It answers.
    Serves,
    /// It does not answer.
    Hangs,
    /// There is none any more, and no other will come.
    Dead,
}

/// How the server of a mount is.
pub fn state(shows: &Mounted) -> State {
    let folder = shows.folder.clone();
    match within(HANG, move || std::fs::symlink_metadata(folder)) {
        None => State::Hangs,
        // The latter where it died while it was asked.
        Some(Err(error))
            if matches!(
                Errno::from_io_error(&error),
                Some(Errno::NOTCONN | Errno::CONNABORTED)
            ) =>
        {
            State::Dead
        }
        Some(_) => State::Serves,
    }
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
        let detail = match said.strip_prefix("thinply: ").unwrap_or(&said) {
            "" => format!("the server ended ({status})"),
            said => shown(said).to_string(),
        };
        return Err(Error::new(ErrorKind::Io, detail));
    }
    Ok(())
}

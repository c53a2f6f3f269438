//! Has the mounted file systems of a store's disks hold still (FIFREEZE), for as long as the server that asks
//! lives, and for a limit at most.
//!
//! A process of its own does it, which has nothing but the folder and a socket to the server. What is written
//! on the way there the server has to take in, and as long as a thread waits for that in the kernel its
//! process can't end: neither the server could be followed by another one then, nor its holder, which has the
//! mount's device, be ended.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use thinply::error::{Error, ErrorKind, Result};
use thinply::store::{DiskName, Freezer, Still};

use super::filesystem::{freeze, root_of, thaw};
use super::uses;
use crate::io::mountinfo::Mounted;

/// Says to a process that it is one that freezes: the folder is its standard input, the socket its standard
/// output.
const FREEZES: &str = "THINPLY_FREEZES";
/// How long a file system may be made to hold still.
const LIMIT: Duration = Duration::from_secs(2);

/// What the process that freezes says: it holds still.
const FROZEN: &str = "frozen";
/// Somebody else has frozen it, and will have it go on.
const BUSY: &str = "busy";
/// It can't be frozen; with the error's number.
const FAILED: &str = "failed ";
/// It has gone on, as it was told.
const THAWED: &str = "thawed";
/// It had gone on before.
const LATE: &str = "late";
/// What the server says.
const THAW: &str = "thaw";

/// Whether this process is one that freezes.
pub fn is_one() -> bool {
    std::env::var_os(FREEZES).as_deref() == Some(OsStr::new("1"))
}

/// Freezes, says so, and thaws once the server says so, or is gone, or takes too long.
///
/// # Errors
/// Host errors of talking to the server. It has been thawed then.
pub fn hold_still() -> io::Result<()> {
    let folder = io::stdin().as_fd().try_clone_to_owned()?;
    let server = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    match freeze(&folder) {
        Err(Errno::BUSY) => return say(&server, BUSY),
        Err(error) => return say(&server, &format!("{FAILED}{}", error.raw_os_error())),
        Ok(()) => {}
    }
    let told = await_end(&server);
    let thawed = thaw(&folder);
    say(&server, if told.is_ok() && thawed.is_ok() { THAWED } else { LATE })
}

fn await_end(server: &UnixStream) -> io::Result<()> {
    server.set_read_timeout(Some(LIMIT))?;
    say(server, FROZEN)?;
    match heard(&mut BufReader::new(server))?.as_str() {
        THAW => Ok(()),
        // It is gone, or talks nonsense.
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn say(mut to: &UnixStream, line: &str) -> io::Result<()> {
    to.write_all(format!("{line}\n").as_bytes())
}

/// The next line; an empty one from a process that is gone.
fn heard(from: &mut BufReader<&UnixStream>) -> io::Result<String> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// For the disks of one store, in the process that shows them as files.
#[derive(Debug)]
pub struct MountFreezer {
    store: PathBuf,
}

impl MountFreezer {
    /// For those of the store at a real path.
    pub fn new(store: PathBuf) -> Self {
        Self { store }
    }
}

impl Freezer for MountFreezer {
    fn freeze(&self, disk: &DiskName) -> Result<Box<dyn Still>> {
        let name = disk.export();
        let mut file_systems = BTreeMap::<_, Vec<Mounted>>::new();
        for one in uses::known()? {
            let is_it = one.target == Path::new(&name) && one.store.as_ref() == Some(&self.store);
            if is_it && one.attached.is_some() && !one.read_only {
                for mounted in one.mounts {
                    file_systems.entry(mounted.device.clone()).or_default().push(mounted);
                }
            }
        }
        let mut frozen = Vec::new();
        for mounts in file_systems.values() {
            let folder = mounts.iter().find_map(|mounted| root_of(mounted).ok());
            let folder = folder.ok_or_else(|| {
                let detail = "something else is mounted over it: it can't be made to hold still";
                Error::new(ErrorKind::InUse, detail).in_file(&name)
            })?;
            frozen.push(Frozen::start(folder).map_err(|error| error.in_file(&name))?);
        }
        Ok(Box::new(AllFrozen(frozen)))
    }
}

struct AllFrozen(Vec<Frozen>);

impl Still for AllFrozen {
    fn end(self: Box<Self>) -> Result<()> {
        // All of them, whatever has become of one.
        let held: Vec<_> = self.0.into_iter().map(|mut frozen| frozen.end()).collect();
        if held.into_iter().all(|held| held) {
            return Ok(());
        }
        let limit = LIMIT.as_secs();
        let detail =
            format!("its file system could not be made to hold still for longer than {limit} s");
        Err(Error::new(ErrorKind::Io, detail))
    }
}

/// A file system that holds still until this is dropped.
struct Frozen {
    folder: OwnedFd,
    freezing: Child,
    /// None where somebody else had frozen it before, or once it has gone on.
    socket: Option<UnixStream>,
}

impl Frozen {
    /// Has the file system of a folder hold still.
    fn start(folder: OwnedFd) -> Result<Self> {
        let fail = |error| Error::io(error, "freezing a file system");
        let (ours, theirs) = UnixStream::pair().map_err(fail)?;
        let mut command = Command::new("/proc/self/exe");
        command.env(FREEZES, "1").stdin(Stdio::from(folder.try_clone().map_err(fail)?));
        let freezing = command.stdout(Stdio::from(OwnedFd::from(theirs))).spawn().map_err(fail)?;
        // Its copy of the other end would keep this process from hearing of a death.
        drop(command);
        let mut frozen = Self { folder, freezing, socket: Some(ours) };
        let said = frozen.hear().map_err(fail)?;
        if said == BUSY {
            frozen.socket = None;
        } else if let Some(error) = said.strip_prefix(FAILED) {
            frozen.socket = None;
            return Err(refused(error.parse().unwrap_or_default()));
        } else if said != FROZEN {
            // What has been killed is not gone before it is through with the freezing.
            return Err(fail(io::ErrorKind::BrokenPipe.into()));
        }
        Ok(frozen)
    }

    fn hear(&self) -> io::Result<String> {
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        heard(&mut BufReader::new(socket))
    }

    /// Has it go on, unless somebody else had frozen it. Answers whether it held still until now.
    fn end(&mut self) -> bool {
        let said = match &self.socket {
            None => return true,
            Some(socket) => say(socket, THAW).and_then(|()| self.hear()),
        };
        self.socket = None;
        match said.as_deref() {
            Ok(THAWED) => true,
            Ok(LATE) => false,
            // The process that froze it was killed.
            _ => thaw(&self.folder).is_ok(),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.end();
        let _ = self.freezing.wait();
    }
}

fn refused(error: i32) -> Error {
    match Errno::from_raw_os_error(error) {
        Errno::OPNOTSUPP | Errno::NOTTY => {
            Error::new(ErrorKind::Unsupported, "the file system can't be made to hold still")
        }
        error => Error::io(error.into(), "freezing a file system"),
    }
}

//! What is mounted and attached where, as the kernel tells.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::syncfs;
use serde::Serialize;
use thinply::control::{Answer, DiskUse, Request, line};
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::{Access, Lock};
use thinply::store::Store;

use super::loops::{self, Attached};
use super::room::Room;
use super::served::is_ours;
use crate::io::mountinfo::{self, Mounted};
use crate::io::paths::{self, Place};

/// How long a server may take to say what it does.
const ANSWER: Duration = Duration::from_secs(1);
/// How long the end of a use is waited for.
const END: Duration = Duration::from_secs(10);

/// A disk that is attached, and where it is mounted.
#[derive(Clone, Debug, Serialize)]
pub struct Use {
    /// The disk: its name in the store, or the layer's path.
    pub target: PathBuf,
    /// The store, where it is in one.
    pub store: Option<PathBuf>,
    /// Where its file system is mounted; the last one last.
    pub folders: Vec<PathBuf>,
    /// Its block device; none where fuse2fs mounts the file itself.
    pub device: Option<PathBuf>,
    /// Whether it may only be read.
    pub read_only: bool,
    /// The process that serves it, as far as that is known.
    pub pid: Option<u32>,
    /// How many of its requests wait for space on the host, as far as its server tells.
    pub waiting: Option<usize>,
    /// Who attached it, by number; unknown where another program did.
    pub user: Option<u32>,
    /// Since when, RFC 3339.
    pub since: Option<String>,
    #[serde(skip)]
    pub mounts: Vec<Mounted>,
    #[serde(skip)]
    pub attached: Option<Attached>,
}

/// All that is attached of what this user's servers show.
///
/// # Errors
/// Host errors.
pub fn all() -> Result<Vec<Use>> {
    gather(true)
}

/// The same as the kernel tells, without asking servers, which takes longer and may have to wait.
///
/// # Errors
/// Host errors.
pub fn known() -> Result<Vec<Use>> {
    gather(false)
}

fn gather(asks: bool) -> Result<Vec<Use>> {
    let mounts = mountinfo::all()?;
    let mut uses = Vec::new();
    for shows in mounts.iter().filter(|mounted| is_ours(mounted)) {
        let server = if asks { Server::asked(shows) } else { Server::of(shows) };
        for attached in loops::over(&shows.folder)? {
            // Some file systems have a device number of their own.
            let shows = |at: &&Mounted| at.device == attached.device || at.source == attached.path;
            let mounts: Vec<_> = mounts.iter().filter(shows).cloned().collect();
            uses.push(server.usage(&attached.file.clone(), mounts, Some(attached)));
        }
        // Those that a program mounts which opens the file itself.
        let mut direct = BTreeMap::<_, Vec<_>>::new();
        let inside =
            |at: &&Mounted| at.source.starts_with(&shows.folder) && at.kind.starts_with("fuse");
        for at in mounts.iter().filter(inside) {
            direct.entry(at.source.clone()).or_default().push(at.clone());
        }
        uses.extend(direct.into_iter().map(|(file, mounts)| server.usage(&file, mounts, None)));
    }
    Ok(uses)
}

/// What is mounted at a folder.
///
/// # Errors
/// [`ErrorKind::NotFound`]; host errors.
pub fn at(folder: &Path) -> Result<(Use, Mounted)> {
    // Not asking the file system that is mounted there, which may hang.
    let folder = match folder.parent().zip(folder.file_name()) {
        Some((parent, name)) => {
            let parent = if parent == Path::new("") { Path::new(".") } else { parent };
            paths::real(parent)?.join(name)
        }
        None => paths::real(folder)?,
    };
    let top = mountinfo::at(&folder)?;
    let found = top.and_then(|top| {
        let uses = known().ok()?.into_iter();
        let mut uses = uses.filter(|one| one.mounts.iter().any(|mounted| mounted.id == top.id));
        uses.next().map(|one| (one, top))
    });
    found.ok_or_else(|| {
        let detail = "nothing of thinply is mounted there";
        Error::new(ErrorKind::NotFound, detail).in_file(folder)
    })
}

/// Has what programs wrote to the mounted file systems of a container written to its disk.
///
/// # Errors
/// Host errors.
pub fn sync(store: &Store, container: &str) -> Result<()> {
    let name = Path::new("container").join(container);
    let store = paths::real(store.path())?;
    let uses = known()?.into_iter();
    let uses = uses.filter(|one| one.target == name && one.store.as_ref() == Some(&store));
    for mounted in uses.filter_map(|one| one.mounts.into_iter().next()) {
        let fail = |error| Error::io(error, "syncing its file system").in_file(&mounted.folder);
        let folder = File::open(&mounted.folder).map_err(fail)?;
        syncfs(&folder).map_err(|error| fail(error.into()))?;
    }
    Ok(())
}

/// Waits, for a while, until nobody has the disk of a use open any more that has just ended: then all
/// verbs may have it.
///
/// # Errors
/// Host errors.
pub fn await_end(used: &Use) -> Result<()> {
    let deadline = Instant::now() + END;
    while !is_free(used)? && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn is_free(used: &Use) -> Result<bool> {
    let sequence = used.attached.as_ref().map(|attached| &attached.sequence);
    let there = known()?.iter().any(|one| match (&one.attached, sequence) {
        (Some(attached), Some(sequence)) => attached.sequence == *sequence,
        (attached, sequence) => {
            attached.is_none() && sequence.is_none() && one.target == used.target
        }
    });
    if there {
        // Mounted elsewhere too, it stays.
        return Ok(used.mounts.len() > 1);
    }
    // Its server lets go of the layer only now.
    let layer = match &used.store {
        Some(store) => layer_of(store, &used.target),
        None => Some(used.target.clone()),
    };
    let Some(layer) = layer else { return Ok(true) };
    let opened = Place::existing(&layer)?.open(Access::Read)?;
    Ok(opened.lock(Lock::Shared).is_ok())
}

/// The file of a container's or volume's own layer.
fn layer_of(store: &Path, name: &Path) -> Option<PathBuf> {
    let (kind, name) = name.to_str()?.split_once('/')?;
    let folder = match kind {
        "container" if !name.contains('@') => "containers",
        "volume" => "volumes",
        _ => return None,
    };
    Some(store.join(folder).join(format!("{name}.tply")))
}

/// Asks the process that serves a store, unless it is long in answering.
fn ask(store: &Store, request: Request) -> Option<Answer> {
    let (tell, told) = sync_channel(1);
    let store = store.clone();
    thread::spawn(move || tell.send(line::ask(&store, &request)));
    told.recv_timeout(ANSWER).ok().flatten()?.ok()
}

/// Who shows the disks.
struct Server<'a> {
    shows: &'a Mounted,
    room: Option<Room>,
    pid: Option<u32>,
    store: Option<PathBuf>,
    /// The disks of the store, and who uses them.
    disks: Vec<DiskUse>,
}

impl<'a> Server<'a> {
    fn of(shows: &'a Mounted) -> Self {
        let room = Room::find(&shows.source);
        let pid = room.as_ref().and_then(Room::pid);
        let store = Store::open(&shows.source).ok().map(|_| shows.source.clone());
        Self { shows, room, pid, store, disks: Vec::new() }
    }

    /// [`Server::of`], with what the server says of itself.
    fn asked(shows: &'a Mounted) -> Self {
        let mut server = Self::of(shows);
        let Some(Ok(store)) = server.store.as_deref().map(Store::open) else { return server };
        if let Some(Answer::List { disks }) = ask(&store, Request::List {}) {
            server.disks = disks;
        }
        if server.pid.is_none()
            && let Some(Answer::Status { pid, .. }) = ask(&store, Request::Status {})
        {
            server.pid = Some(pid);
        }
        server
    }

    fn usage(&self, file: &Path, mounts: Vec<Mounted>, attached: Option<Attached>) -> Use {
        let name = file.strip_prefix(&self.shows.folder).unwrap_or(file);
        let target = if self.store.is_some() { name.to_owned() } else { self.shows.source.clone() };
        let sequence = attached.as_ref().map(|attached| attached.sequence.clone());
        let note = self.room.as_ref().zip(sequence).and_then(|(room, number)| room.noted(&number));
        let read_only = match &attached {
            Some(attached) => attached.read_only,
            None => mounts.iter().all(|mounted| mounted.read_only),
        };
        let told = self.disks.iter().find(|disk| Path::new(&disk.name) == target);
        Use {
            waiting: told.map(|disk| disk.waiting),
            target,
            store: self.store.clone(),
            folders: mounts.iter().map(|mounted| mounted.folder.clone()).collect(),
            device: attached.as_ref().map(|attached| attached.path.clone()),
            read_only,
            pid: self.pid,
            user: note.as_ref().map(|note| note.user),
            since: note.map(|note| note.since),
            mounts,
            attached,
        }
    }
}

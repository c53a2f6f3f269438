//! What is mounted and attached where, as the kernel tells.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::syncfs;
use serde::Serialize;
use thinply::control::{Answer, DiskUse, Request, line};
use thinply::error::{Error, ErrorKind, Result};
use thinply::store::{DiskName, Store};

use super::filesystem::root_of;
use super::loops::{self, Attached};
use super::room::Room;
use super::served::is_ours;
use super::target::Target;
use super::{while_alive, within};
use crate::io::mountinfo::{self, Mounted};
use crate::io::paths::{self, Place};
use crate::options::StoreArg;

/// How long a server may take to say what it does.
const ANSWER: Duration = Duration::from_secs(1);
/// How long the end of a use is waited for.
const END: Duration = Duration::from_secs(10);
/// How soon it is asked whether somebody else keeps it.
const ELSEWHERE: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(2);
/// As many links as the kernel follows.
const MOST_LINKS: usize = 40;

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
    /// The number of the partition that it shows; none where it shows the whole disk.
    pub partition: Option<usize>,
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
    /// Where its server shows the disks.
    #[serde(skip)]
    pub shows: Mounted,
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
            let mounts: Vec<_> =
                mounts.iter().filter(|mounted| attached.is_at(mounted)).cloned().collect();
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

/// What somebody names to end it, with what of its mounts: the one at the folder that he names, or else
/// all those of the device or the disk.
///
/// # Errors
/// [`ErrorKind::NotFound`]; host errors.
pub fn named(named: &Path, store: &StoreArg) -> Result<(Use, Vec<Mounted>)> {
    let nothing = |detail| Error::new(ErrorKind::NotFound, detail).in_file(named);
    let none = "nothing of thinply is mounted there";
    let Some(top) = mounted_at(named)? else {
        let found = of(named, store)?.into_iter().next().ok_or_else(|| nothing(none))?;
        let mounts = found.mounts.clone();
        return Ok((found, mounts));
    };
    let all = known()?;
    let is_hidden = all.iter().any(|one| one.folders.contains(&top.folder));
    let found = all.into_iter().find(|one| one.mounts.iter().any(|mounted| mounted.id == top.id));
    found
        .map(|one| (one, vec![top]))
        .ok_or_else(|| nothing(if is_hidden { "something else is mounted over it" } else { none }))
}

/// The mount at a folder, or at what a link leads to.
fn mounted_at(folder: &Path) -> Result<Option<Mounted>> {
    let mut folder = folder.to_owned();
    for _ in 0..MOST_LINKS {
        // Not asking the file system that is mounted there, which may hang.
        let place = match paths::split(&folder) {
            Ok(Some((parent, name))) => parent.join(name),
            Ok(None) => paths::real(&folder)?,
            Err(_) => return Ok(None),
        };
        let found = mountinfo::at(&place)?;
        let leads_to = if found.is_none() { std::fs::read_link(&place).ok() } else { None };
        match leads_to {
            Some(target) => folder = place.parent().unwrap_or(&place).join(target),
            None => return Ok(found),
        }
    }
    Ok(None)
}

/// The uses of a disk, or of a device.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a disk that there isn't; host errors.
pub fn of(named: &Path, store: &StoreArg) -> Result<Vec<Use>> {
    let mut uses = known()?;
    if named.starts_with("/dev") {
        uses.retain(|one| one.device.as_deref() == Some(named));
        return Ok(uses);
    }
    let target = Target::find(named, store)?;
    let (served, shown) = (target.served()?, target.shown());
    uses.retain(|one| one.target == shown && one.shows.source == served);
    Ok(uses)
}

/// Has what programs wrote to the mounted file systems of a container written to its disk.
///
/// # Errors
/// Host errors.
pub fn sync(store: &Store, container: &str) -> Result<()> {
    let name = Path::new("container").join(container);
    let served = paths::real(store.path())?;
    let uses = known()?.into_iter();
    let uses = uses.filter(|one| one.target == name && one.store.as_ref() == Some(&served));
    // What something else hides everywhere, the server refuses.
    for folder in uses.filter_map(|one| one.mounts.iter().find_map(|at| root_of(at).ok())) {
        let fail = |error| Error::io(error, "syncing its file system").in_file(&name);
        let is_alive = || line::is_answering(store);
        let synced = while_alive(ANSWER, is_alive, move || syncfs(&folder));
        let hangs = || fail(io::Error::other("its server does not answer"));
        synced.ok_or_else(hangs)?.map_err(|error| fail(error.into()))?;
    }
    Ok(())
}

/// Waits until nobody has the disk of a use any more that has just ended: then all verbs may have it.
///
/// # Errors
/// [`ErrorKind::InUse`] where somebody has it still; host errors.
pub fn await_end(used: &Use) -> Result<()> {
    let start = Instant::now();
    let mut looked = false;
    while is_there(used)? {
        let device = used.attached.as_ref().map(|attached| &attached.device);
        if start.elapsed() > END {
            return Err(stays(used, "somebody has it open"));
        }
        if start.elapsed() > ELSEWHERE && !std::mem::replace(&mut looked, true) {
            let elsewhere = device.and_then(|device| mountinfo::elsewhere(device));
            if let Some(process) = elsewhere {
                let who = format!("process {process} has it mounted in a namespace of its own");
                return Err(stays(used, &who));
            }
        }
        thread::sleep(PAUSE);
    }
    // Its server lets go of the layer only now.
    match used.layer()? {
        Some(layer) if !layer.await_free(END)? => {
            Err(stays(used, "its server has not closed the layer"))
        }
        _ => Ok(()),
    }
}

fn stays(used: &Use, why: &str) -> Error {
    Error::new(ErrorKind::InUse, format!("stays in use: {why}")).in_file(&used.target)
}

/// Whether the device of a use, or its mount where it has none, is still there.
fn is_there(used: &Use) -> Result<bool> {
    match &used.attached {
        Some(attached) => {
            let devices = loops::over(&attached.file)?;
            Ok(devices.iter().any(|device| device.sequence == attached.sequence))
        }
        None => {
            let mounts = mountinfo::all()?;
            Ok(mounts.iter().any(|at| used.mounts.iter().any(|mounted| mounted.id == at.id)))
        }
    }
}

impl Use {
    /// The layer that its server writes; none of what nobody may change.
    ///
    /// # Errors
    /// Host errors.
    pub fn layer(&self) -> Result<Option<Place>> {
        let Some(store) = &self.store else { return Place::existing(&self.target).map(Some) };
        let disk = self.target.to_str().and_then(DiskName::of_export);
        let path = disk.map(|disk| Ok(Store::open(store)?.layer_path(&disk)));
        path.map(|path| Place::existing(&path?)).transpose()
    }

    /// Whether its server was started for mounts, and shows nothing else that is in use.
    ///
    /// # Errors
    /// Host errors.
    pub fn has_server_alone(&self) -> Result<bool> {
        let others = known()?.into_iter().filter(|one| one.shows.id == self.shows.id);
        Ok(self.pid.is_some() && others.count() <= 1)
    }
}

/// Asks the process that serves a store, unless it is long in answering.
fn ask(store: &Store, request: Request) -> Option<Answer> {
    let store = store.clone();
    within(ANSWER, move || line::ask(&store, &request)).flatten()?.ok()
}

/// Who shows the disks.
struct Server<'a> {
    shows: &'a Mounted,
    room: Option<Room>,
    pid: Option<u32>,
    /// The disks of the store, and who uses them.
    disks: Vec<DiskUse>,
}

impl<'a> Server<'a> {
    fn of(shows: &'a Mounted) -> Self {
        let room = Room::find(&shows.source);
        let pid = room.as_ref().and_then(Room::pid);
        Self { shows, room, pid, disks: Vec::new() }
    }

    /// [`Server::of`], with what the server says of itself.
    fn asked(shows: &'a Mounted) -> Self {
        let mut server = Self::of(shows);
        // What it serves may be a layer.
        let Ok(store) = Store::open(&shows.source) else { return server };
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
        // Those of a store are in folders. (Its own may be hidden by what is mounted on it.)
        let store = (name.components().count() > 1).then(|| self.shows.source.clone());
        let target = if store.is_some() { name.to_owned() } else { self.shows.source.clone() };
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
            store,
            folders: mounts.iter().map(|mounted| mounted.folder.clone()).collect(),
            device: attached.as_ref().map(|attached| attached.path.clone()),
            read_only,
            pid: self.pid,
            partition: note.as_ref().and_then(|note| note.partition),
            user: note.as_ref().map(|note| note.user),
            since: note.map(|note| note.since),
            shows: self.shows.clone(),
            mounts,
            attached,
        }
    }
}

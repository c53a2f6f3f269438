//! The server: a mount, the threads that read its requests, and its end.

use std::cell::Cell;
use std::collections::HashMap;
use std::collections::hash_map;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::handles::{Handles, Open};
use super::mount::{Mount, another};
use super::proto::{self, Command, MAX_IO, Place, SENT_AGAIN, WRITE_HEADER};
use super::tree::{Entry, Tree};
use super::tries::Tries;
use super::{names, work};
use crate::error::{Error, ErrorKind, Result};
use crate::serve::{Buffer, Crew, Keep, Leases, Log, Used, guard, spawn};

/// Most requests that the kernel sends in the background before it holds its callers back. A loop device has
/// 128: where all of those of one disk wait for space, others must come through.
const MAX_BACKGROUND: u16 = 1024;
/// How long a server that stops with the last file waits for the first.
const FIRST_FILE: Duration = Duration::from_secs(60);
/// Threads for what is about names.
const NAMES: usize = 8;
/// Where the arguments of a request that was read begin, so that the data of a write begins at a page.
const DATA: usize = 4096;

/// Limits and habits of a server.
#[derive(Clone)]
pub struct ServerConfig {
    /// Folders that are there even if nothing is in them. Default none.
    pub folders: Vec<String>,
    /// The file of the disk whose name is empty. Default `disk`.
    pub default_name: String,
    /// Where the disks come from: lists of mounts name it, and the mount shows the space of its file
    /// system. Default the root folder.
    pub source: PathBuf,
    /// Threads that read requests. Default one a processor, two at least and eight at most.
    pub threads: usize,
    /// Whether to come to the end once the last file is closed, or none was opened for a minute.
    pub stop_with_last_file: bool,
    /// Whether a change that finds no space on the host waits until there is some. Default yes.
    pub wait_for_space: bool,
    /// How long running requests have to finish at shutdown. Default 10 seconds.
    pub drain_timeout: Duration,
    /// How long the flushes at the end may take. Default 60 seconds.
    pub flush_timeout: Duration,
    /// Keeps the mount beyond the end of this process. Default nobody.
    pub keep: Option<Arc<dyn Keep>>,
    /// Hears of errors. Default nobody.
    pub log: Log,
}

impl Default for ServerConfig {
    fn default() -> Self {
        let processors = thread::available_parallelism().map_or(2, usize::from);
        Self {
            folders: Vec::new(),
            default_name: "disk".into(),
            source: "/".into(),
            threads: processors.clamp(2, 8),
            stop_with_last_file: false,
            wait_for_space: true,
            drain_timeout: Duration::from_secs(10),
            flush_timeout: Duration::from_secs(60),
            keep: None,
            log: Arc::new(|_| {}),
        }
    }
}

/// A mounted file system of disks. [`Server::run`] serves.
pub struct Server {
    mount: Mount,
    channels: Vec<Arc<Channel>>,
    shared: Arc<Shared>,
}

/// Stops a server from another thread.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

/// What all threads of a server know.
pub(super) struct Shared {
    pub config: ServerConfig,
    pub tree: Tree,
    pub handles: Handles,
    tries: Tries,
    /// What was listed of folders that are open.
    pub folders: Mutex<HashMap<u64, Arc<Vec<Entry>>>>,
    pub next_folder: AtomicU64,
    /// For what is about names.
    pub names: Arc<Crew>,
    /// Requests that are not answered yet.
    running: AtomicUsize,
    /// Those that wait for space, and whether whoever sent them had a signal since.
    waiting: Mutex<HashMap<u64, bool>>,
    stopping: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Disks that were used, to be flushed at the end.
    pub used: Used,
}

/// What the next server gets to know of this one.
struct Memory {
    handles: Handles,
    tries: Tries,
}

#[derive(Default)]
struct State {
    readers: usize,
    stop: bool,
    failed: Option<Error>,
}

/// A descriptor from which requests come and to which their answers go.
pub(super) struct Channel {
    device: OwnedFd,
}

impl Server {
    /// Mounts the disks that `disks` gives out on a folder, for this process's user alone. Its requests
    /// are answered once [`Server::run`] is called.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where FUSE or `fusermount3` is missing; host errors.
    pub fn mount(folder: &Path, disks: Arc<dyn Leases>, config: ServerConfig) -> Result<Self> {
        let fail = |error| Error::io(error, "mounting").in_file(folder);
        let memory =
            Memory { handles: Handles::new().map_err(fail)?, tries: Tries::new().map_err(fail)? };
        let (mount, device) = Mount::make(folder, &config.source)?;
        // Where there are fewer, those do as well.
        let clones: Vec<_> = (1..config.threads).map_while(|_| another(&device).ok()).collect();
        let devices = std::iter::once(device).chain(clones);
        let server = Self::over(mount, devices, memory, disks, config);
        // Before the first request is read: a device that isn't kept takes its requests with it.
        if let Some(keep) = &server.shared.config.keep {
            let devices = server.channels.iter().map(|channel| channel.device.as_fd());
            let memory = [server.shared.handles.memory(), server.shared.tries.memory()];
            let all: Vec<_> = devices.chain(memory).collect();
            keep.keep(&server.mount.key(), &all).inspect_err(|_| drop(server.mount.remove()))?;
        }
        Ok(server)
    }

    /// Goes on with a mount of another process that is gone, with all that it had begun: `key` and
    /// `kept` are what it gave to be kept. What it had not answered is answered by this one.
    ///
    /// # Errors
    /// Host errors; then the mount is taken away.
    pub fn resume(
        key: &str,
        kept: Vec<OwnedFd>,
        disks: Arc<dyn Leases>,
        config: ServerConfig,
    ) -> Result<Self> {
        let mount = Mount::of_key(key).ok_or_else(|| nonsense(key))?;
        let mut devices = kept;
        let (Some(tries), Some(handles)) = (devices.pop(), devices.pop()) else {
            return Err(nonsense(key));
        };
        let memory = || {
            Ok(Memory { handles: Handles::of(handles.into())?, tries: Tries::of(tries.into())? })
        };
        let resumed = memory()
            .map_err(|error: io::Error| Error::io(error, "taking over what is open"))
            .and_then(|memory| {
                let server = Self::over(mount.clone(), devices, memory, disks, config);
                server.reopen()?;
                Ok(server)
            });
        resumed.inspect_err(|_| drop(mount.remove()))
    }

    fn over(
        mount: Mount,
        devices: impl IntoIterator<Item = OwnedFd>,
        memory: Memory,
        disks: Arc<dyn Leases>,
        config: ServerConfig,
    ) -> Self {
        let Memory { handles, tries } = memory;
        let channels = devices.into_iter().map(|device| Arc::new(Channel { device })).collect();
        let (folders, default) = (config.folders.clone(), config.default_name.clone());
        let shared = Arc::new(Shared {
            tree: Tree::new(disks, folders, default),
            handles,
            tries,
            folders: Mutex::default(),
            next_folder: AtomicU64::new(0),
            names: Crew::new("fuse-names", NAMES),
            running: AtomicUsize::new(0),
            waiting: Mutex::default(),
            stopping: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
            used: Used::default(),
            config,
        });
        Self { mount, channels, shared }
    }

    /// Opens again what clients had open, and asks for the requests that were read and not answered.
    fn reopen(&self) -> Result<()> {
        let fail = |error| Error::io(error, "taking over a mount").in_file(self.folder());
        for (handle, kept) in self.shared.handles.kept().map_err(fail)? {
            let (writes, durable) = (kept.writes(), kept.durable());
            // What can't be opened is there still, and answers with an error.
            if let Ok(disk) = names::leased(&self.shared, kept.node, writes) {
                self.shared.handles.restore(handle, Open { disk, writes, durable });
            }
        }
        let channel = self.channels.first().ok_or_else(|| nonsense("no device"))?;
        rustix::io::write(&channel.device, &proto::send_again())
            .map_err(|error| fail(error.into()))?;
        Ok(())
    }

    /// Where it is mounted, without links.
    pub fn folder(&self) -> &Path {
        self.mount.folder()
    }

    /// What stops this server.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
    }

    /// Serves until [`Handle::shutdown`], or until somebody unmounts. Then it gives running requests
    /// `drain_timeout` to finish, flushes every disk that was used, lets go of them and takes the mount
    /// away; who has files open still gets `EIO` from then on. Fails with the first flush's error, or
    /// with [`ErrorKind::Io`] if requests or flushes were still running at the end.
    pub fn run(self) -> Result<()> {
        let Self { mount, channels, shared } = self;
        for channel in channels {
            guard(&shared.state).readers += 1;
            let reader = Reader(shared.clone());
            let started = spawn("fuse", move || reader.run(&channel));
            started.map_err(|error| Error::io(error, "starting a thread"))?;
        }
        let failed = shared.wait_for_the_end();
        let drained = shared.drain();
        let flushed = shared.used.flush(shared.config.flush_timeout);
        shared.handles.clear();
        shared.names.close();
        let removed = mount.remove();
        if let Some(keep) = &shared.config.keep {
            keep.release(&mount.key());
        }
        failed.and(flushed).and(drained).and(removed)
    }
}

fn nonsense(kept: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("kept of a mount is {kept:?}, which says nothing"))
}

impl Handle {
    /// Has [`Server::run`] come to its end; doesn't wait for it. From now on requests fail with `EIO`.
    pub fn shutdown(&self) {
        self.0.stop();
    }
}

/// One of the threads that read requests, taken off the count at its end, even by a panic.
struct Reader(Arc<Shared>);

impl Drop for Reader {
    fn drop(&mut self) {
        guard(&self.0.state).readers -= 1;
        self.0.changed.notify_all();
    }
}

impl Reader {
    fn run(&self, channel: &Arc<Channel>) {
        let mut buffer = Buffer::default();
        buffer.set_length(DATA + MAX_IO);
        // A thread that has taken a request and then has to find memory for it may be killed in between.
        buffer.lock();
        loop {
            match channel.read(&mut buffer) {
                Ok(length) => self.handle(channel, &mut buffer, length),
                // Given up before it was read.
                Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => {}
                // Unmounted.
                Err(Errno::NODEV) => return,
                Err(error) => {
                    let error = Error::io(error.into(), "reading requests of the kernel");
                    guard(&self.0.state).failed.get_or_insert(error);
                    return;
                }
            }
        }
    }

    /// Answers a request, or hands it on.
    fn handle(&self, channel: &Arc<Channel>, buffer: &mut Buffer, length: usize) {
        let shared = &self.0;
        let Some(bytes) = buffer.get(DATA - WRITE_HEADER..DATA - WRITE_HEADER + length) else {
            return;
        };
        let request = match proto::parse(bytes) {
            Ok(request) => request,
            Err(violation) => {
                shared.log(&format!("the kernel sent what is no request: {}", violation.0));
                if let Some(unique) = proto::number(bytes) {
                    channel.answer(unique, Err(Errno::INVAL));
                }
                return;
            }
        };
        let (unique, node) = (request.unique, request.node);
        match request.command {
            Command::Silent => return,
            Command::Interrupt { unique } => return shared.interrupt(unique),
            _ => {}
        }
        let ticket = Ticket::new(shared, channel, unique);
        match request.command {
            Command::Release { handle } => names::release(ticket, handle),
            Command::ReleaseFolder { handle } => names::release_folder(ticket, handle),
            Command::Destroy => ticket.succeed(&[]),
            _ if shared.stopping.load(Ordering::Relaxed) => ticket.fail(Errno::IO),
            _ if !shared.may_try(unique) => ticket.fail(Errno::IO),
            Command::Init(kernel) => {
                if shared.config.keep.is_some() && !kernel.sends_again() {
                    shared
                        .log("this kernel (before Linux 6.9) ends the mount when its server dies");
                }
                ticket.give(proto::init(&kernel, MAX_BACKGROUND));
            }
            Command::Read { handle, offset, length } => {
                work::read(ticket, buffer, handle, offset, length);
            }
            Command::Write { handle, offset, data, durable } => {
                work::write(ticket, handle, offset, data, durable);
            }
            Command::Sync { handle } => work::sync(ticket, handle),
            Command::Allocate { handle, offset, length, mode } => {
                work::allocate(ticket, handle, (offset, length), mode);
            }
            Command::Seek { handle, offset, hole } => work::seek(ticket, handle, offset, hole),
            Command::Copy { handle, offset, to, length } => {
                work::copy(ticket, Place { node, handle, offset }, to, length);
            }
            Command::Lookup { name } => names::lookup(ticket, node, name.to_vec()),
            Command::GetAttributes => names::attributes(ticket, node),
            Command::SetAttributes { size, others, .. } if others || size.is_none() => {
                // Times are those of the layer; who may use it is decided there.
                if others { ticket.fail(Errno::PERM) } else { names::attributes(ticket, node) }
            }
            Command::SetAttributes { handle, size, .. } => {
                names::cut(ticket, node, handle, size.unwrap_or(0));
            }
            Command::Open(access) => names::open(ticket, node, access),
            Command::OpenFolder => names::open_folder(ticket),
            Command::ReadFolder { handle, offset, length } => {
                names::read_folder(ticket, node, handle, offset, length);
            }
            Command::Space => names::space(ticket),
            Command::Change => ticket.fail(Errno::PERM),
            Command::Silent | Command::Interrupt { .. } | Command::Unknown => {
                ticket.fail(Errno::NOSYS);
            }
        }
    }
}

impl Shared {
    /// Tells a line to whoever hears, and goes on whatever comes of that.
    pub(super) fn log(&self, line: &str) {
        let _ = catch_unwind(AssertUnwindSafe(|| (self.config.log)(line)));
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        guard(&self.state).stop = true;
        self.changed.notify_all();
    }

    /// A file was closed, which may have been the last.
    pub(super) fn file_closed(&self) {
        if self.config.stop_with_last_file && self.handles.end_with_none() {
            self.stop();
        }
    }

    /// Whether a request may be carried out: not where several servers have died at it.
    fn may_try(&self, unique: u64) -> bool {
        let may = self.tries.begin(unique).unwrap_or_else(|error| {
            self.log(&format!("counting how often a request is tried: {error}"));
            true
        });
        if !may {
            self.log("a request at which three servers died is given up");
        }
        may
    }

    /// Has a request wait for space no more.
    fn interrupt(&self, unique: u64) {
        if let Some(interrupted) = guard(&self.waiting).get_mut(&(unique & !SENT_AGAIN)) {
            *interrupted = true;
        }
    }

    /// The errno of a disk's error, which is logged as a whole unless it says what is no news.
    pub(super) fn told(&self, what: &str, error: &Error) -> Errno {
        let errno = super::errno(error);
        if !matches!(errno, Errno::BUSY | Errno::NOENT) {
            self.log(&format!("{what} failed: {error}"));
        }
        errno
    }

    fn wait_for_the_end(&self) -> Result<()> {
        let goes_on = |state: &mut State| !state.stop && state.readers > 0;
        let mut state = guard(&self.state);
        if self.config.stop_with_last_file {
            let waited = self.changed.wait_timeout_while(state, FIRST_FILE, goes_on);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.stop |= self.handles.end_with_none();
        }
        let waited = self.changed.wait_while(state, goes_on);
        let failed = waited.unwrap_or_else(PoisonError::into_inner).failed.take();
        self.stopping.store(true, Ordering::Relaxed);
        failed.map_or(Ok(()), Err)
    }

    /// Waits until all requests are answered.
    fn drain(&self) -> Result<()> {
        let deadline = Instant::now() + self.config.drain_timeout;
        loop {
            let running = self.running.load(Ordering::Acquire);
            if running == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let detail = format!("{running} requests were still running at shutdown");
                return Err(Error::new(ErrorKind::Io, detail));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Channel {
    /// Reads one request so that the data of a write begins at [`DATA`]. Answers its length.
    fn read(&self, buffer: &mut Buffer) -> rustix::io::Result<usize> {
        let space = buffer.get_mut(DATA - WRITE_HEADER..).unwrap_or_default();
        rustix::io::readv(&self.device, &mut [IoSliceMut::new(space)])
    }

    /// Answers a request. One that was given up meanwhile, or whose mount has gone, wants none.
    fn answer(&self, unique: u64, result: std::result::Result<&[u8], Errno>) {
        let header = proto::answer_header(unique, result.map(<[u8]>::len));
        let parts = [IoSlice::new(&header), IoSlice::new(result.unwrap_or_default())];
        let _ = rustix::io::writev(&self.device, &parts);
    }
}

/// What answers a request. Dropped without an answer (somebody panicked) it answers `EIO`.
pub(super) struct Ticket {
    pub shared: Arc<Shared>,
    channel: Arc<Channel>,
    pub unique: u64,
    answered: bool,
    /// It has waited for space.
    waited: Cell<bool>,
}

impl Ticket {
    fn new(shared: &Arc<Shared>, channel: &Arc<Channel>, unique: u64) -> Self {
        shared.running.fetch_add(1, Ordering::Relaxed);
        let (shared, channel, waited) = (shared.clone(), channel.clone(), Cell::new(false));
        Self { shared, channel, unique, answered: false, waited }
    }

    /// Who hears that the request waits for space on the host, if it may: not where whoever sent it had a
    /// signal, which might be there to kill it.
    pub fn waits(&self) -> Option<Log> {
        let shared = &self.shared;
        if !shared.config.wait_for_space || shared.stopping.load(Ordering::Relaxed) {
            return None;
        }
        let may = match guard(&shared.waiting).entry(self.unique & !SENT_AGAIN) {
            hash_map::Entry::Occupied(known) => !known.get(),
            hash_map::Entry::Vacant(new) => {
                new.insert(false);
                true
            }
        };
        // A server that dies now does not die at this one.
        if !self.waited.replace(true)
            && let Err(error) = shared.tries.forget(self.unique)
        {
            shared.log(&format!("counting how often a request is tried: {error}"));
        }
        may.then(|| shared.config.log.clone())
    }

    pub fn succeed(mut self, content: &[u8]) {
        self.answered = true;
        self.channel.answer(self.unique, Ok(content));
    }

    pub fn fail(mut self, errno: Errno) {
        self.answered = true;
        self.channel.answer(self.unique, Err(errno));
    }

    /// Answers with what was found.
    pub fn give(self, result: std::result::Result<Vec<u8>, Errno>) {
        match result {
            Ok(content) => self.succeed(&content),
            Err(errno) => self.fail(errno),
        }
    }

    /// Answers with the error of a disk.
    pub fn fail_with(self, what: &str, error: &Error) {
        let number = self.unique & !SENT_AGAIN;
        if self.waited.get() && guard(&self.shared.waiting).get(&number) == Some(&true) {
            return self.fail(Errno::INTR);
        }
        let errno = self.shared.told(what, error);
        self.fail(errno);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.answered {
            self.channel.answer(self.unique, Err(Errno::IO));
        }
        if self.waited.get() {
            guard(&self.shared.waiting).remove(&(self.unique & !SENT_AGAIN));
        }
        self.shared.running.fetch_sub(1, Ordering::Release);
    }
}

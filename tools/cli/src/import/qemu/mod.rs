//! Images that QEMU reads for thinply, through its `qemu-nbd`.
//!
//! One program reads one image alone: without a backing file, and without any other file than those
//! it is fed ([`feed`]). What an image refers to is found, opened and put under it or behind it by thinply.
//! The format is said; the program never guesses. Invariants: no name that stands in an image becomes a
//! file that is opened; nothing the program does outlives thinply.

mod feed;
mod process;

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use thinply::device::Extent;
use thinply::error::{Error, ErrorKind, Result};
use thinply::nbd::client::{Client, Context};
use thinply::nbd::{Address, Place};

pub use feed::Feed;

use super::format::Format;
use super::image::{Image, Part};
use feed::Feeding;
use process::Process;

/// What the program must know of an image.
pub struct Description {
    pub format: Format,
    /// The image's own file, then its data file if it has one.
    pub files: Vec<Feed>,
    /// Whether something may lie under it.
    pub over: bool,
    /// Whether it may be compressed.
    pub compressed: bool,
}

/// An image that the program reads.
pub struct QemuImage {
    format: Format,
    path: PathBuf,
    files: Vec<Arc<Feed>>,
    over: bool,
    compressed: bool,
    size: u64,
    /// Started when it is needed.
    running: Mutex<Option<Running>>,
}

impl QemuImage {
    /// An image whose size the program tells.
    pub fn open(described: Description) -> Result<Self> {
        let mut image = Self::of_size(described, 0);
        let running = image.start()?;
        image.size = running.content.client.size();
        image.running = Mutex::new(Some(running));
        Ok(image)
    }

    /// An image of that size, which is not opened before it is read.
    pub fn of_size(described: Description, size: u64) -> Self {
        let Description { format, files, over, compressed } = described;
        let path = files.first().map_or_else(PathBuf::new, |feed| feed.path().to_owned());
        let files = files.into_iter().map(Arc::new).collect();
        Self { format, path, files, over, compressed, size, running: Mutex::default() }
    }

    /// Fails where the program is not there.
    pub fn check(&self) -> Result<()> {
        self.program().map(drop)
    }

    /// Ends the program until the image is read again.
    pub fn rest(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn program(&self) -> Result<PathBuf> {
        process::find().ok_or_else(|| process::missing(&self.format.name()).in_file(&self.path))
    }

    /// The node that is exported, where the files have these numbers.
    fn node(&self, connections: &[RawFd]) -> Value {
        let file = |number: usize| {
            json!({
                "driver": "nbd",
                "server": { "type": "fd", "str": connections[number].to_string() },
                "export": number.to_string(),
            })
        };
        let mut node = json!({ "driver": self.format.of_qemu(), "file": file(0) });
        if matches!(self.format, Format::Qcow2 | Format::Vmdk) {
            // Whatever the image says of one.
            node["backing"] = Value::Null;
        }
        if self.files.len() > 1 {
            node["data-file"] = file(1);
        }
        node
    }

    fn start(&self) -> Result<Running> {
        let program = self.program()?;
        let failed = |error| Error::io(error, "making a socket").in_file(&self.path);
        // Nobody else gets in; the names are gone once everybody is connected.
        let folder = tempfile::tempdir().map_err(failed)?;
        let place = folder.path().join("nbd");
        let socket = UnixListener::bind(&place).map_err(failed)?;
        let (feeding, connections) = Feeding::start(&self.files, folder.path())?;
        let arguments = |numbers: &[RawFd]| {
            let users = ["--read-only", "--allocation-depth", "--shared=2"];
            let node = format!("json:{}", self.node(numbers));
            users.into_iter().map(str::to_owned).chain([node]).collect()
        };
        let process = Process::start(program, socket, &connections, arguments)?;
        drop(connections);
        let address = Address { place: Place::Unix(place), export: String::new() };
        let connected = || {
            let content = Status::of(Client::connect(&address)?);
            let depth = self.over.then(|| Client::connect_for(&address, Context::Depth));
            Ok((content, depth.transpose()?.map(Status::of)))
        };
        match connected() {
            Ok((content, owned)) => Ok(Running { content, owned, process, _feeding: feeding }),
            Err(error) => Err(self.failed(&error, process)),
        }
    }

    /// What went wrong, with what the program says of it. It ends.
    fn failed(&self, error: &Error, process: Process) -> Error {
        if let Some(cut_off) = self.files.iter().find_map(|feed| feed.cut_off()) {
            return cut_off;
        }
        let format = self.format.name();
        let said = match process.last_words() {
            lines if lines.is_empty() => String::new(),
            lines => format!("; it said last: {}", lines.join("; ")),
        };
        let kind = error.kind();
        // What the server calls not found or denied is no file of the user's.
        let kind = if kind == ErrorKind::Unsupported { kind } else { ErrorKind::Io };
        let what = error.to_string();
        let what = what.split_once("/nbd: ").map_or(&*what, |(_, what)| what);
        let detail = format!("qemu-nbd, which reads this {format} image for thinply: {what}{said}");
        Error::new(kind, detail).in_file(&self.path)
    }

    /// Asks the running program, which is started for that if need be.
    fn ask<T>(&self, ask: impl FnOnce(&mut Running) -> Result<T>) -> Result<T> {
        let mut running = self.lock();
        let live = match &mut *running {
            Some(live) => live,
            none => none.insert(self.start_again()?),
        };
        let answer = ask(live);
        answer.map_err(|error| match running.take() {
            Some(Running { process, .. }) => self.failed(&error, process),
            None => error,
        })
    }

    fn start_again(&self) -> Result<Running> {
        let started = self.start()?;
        let size = started.content.client.size();
        if size == self.size {
            return Ok(started);
        }
        let detail = format!("holds {size} bytes, expected {}", self.size);
        Err(Error::new(ErrorKind::Corrupt, detail).in_file(&self.path))
    }
}

impl Image for QemuImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn part(&self, offset: u64, length: u64) -> Result<(Part, u64)> {
        self.ask(|running| {
            let (zeros, mut length) = running.content.at(offset, length)?;
            if let Some(owned) = &mut running.owned {
                let (below, there) = owned.at(offset, length)?;
                length = there;
                if below {
                    return Ok((Part::Below, length));
                }
            }
            let data = Part::Data { compressed: self.compressed };
            Ok((if zeros { Part::Zeros } else { data }, length))
        })
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.ask(|running| running.content.client.read(offset, buf))
    }
}

/// A program that runs, and what it is asked over.
struct Running {
    /// Tells of zeros.
    content: Status,
    /// Tells of what the image itself doesn't hold.
    owned: Option<Status>,
    process: Process,
    _feeding: Feeding,
}

/// A connection, with what the server told last.
struct Status {
    client: Client,
    at: u64,
    told: VecDeque<Extent>,
}

impl Status {
    fn of(client: Client) -> Self {
        Self { client, at: 0, told: VecDeque::new() }
    }

    /// Whether there is a hole at an offset, and how far it is so.
    fn at(&mut self, offset: u64, length: u64) -> Result<(bool, u64)> {
        while let Some(first) = self.told.front()
            && self.at + first.length <= offset
        {
            self.at += first.length;
            self.told.pop_front();
        }
        if self.told.is_empty() || offset < self.at {
            self.told = self.client.extents(offset, length)?.into();
            self.at = offset;
        }
        // The client never answers with nothing.
        let first = self.told.front().copied().unwrap_or(Extent { length, hole: false });
        Ok((first.hole, (self.at + first.length - offset).min(length)))
    }
}

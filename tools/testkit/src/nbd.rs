//! A server to test and a plain NBD client over a raw socket, which can also misbehave.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use thinply::error::Result;
use thinply::nbd::server::{Handle, Listener, Server, ServerConfig};
use thinply::serve::{Disk, Leases, Opened, Table};

pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
pub const ERR_UNSUP: u32 = 0x8000_0001;
pub const ERR_POLICY: u32 = 0x8000_0002;
pub const ERR_INVALID: u32 = 0x8000_0003;
pub const ERR_UNKNOWN: u32 = 0x8000_0006;
pub const ERR_TOO_BIG: u32 = 0x8000_0009;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const ENOTSUP: u32 = 95;
pub const ESHUTDOWN: u32 = 108;

/// Longer than anything a working server takes.
const TOO_LONG: Duration = Duration::from_secs(20);

/// A running server. Shut down when dropped, if it wasn't before.
pub struct Served {
    folder: tempfile::TempDir,
    pub handle: Handle,
    thread: Option<JoinHandle<Result<()>>>,
    pub events: Arc<Mutex<Vec<String>>>,
}

impl Served {
    /// Serves `device` as `disk`.
    pub fn device(device: &Arc<impl Disk + 'static>) -> Self {
        Self::with_config(device, ServerConfig::default())
    }

    pub fn with_config(device: &Arc<impl Disk + 'static>, config: ServerConfig) -> Self {
        Self::opened(Opened::new(device.clone()), config)
    }

    /// Serves what was opened as `disk`.
    pub fn opened(opened: Opened<impl Disk + 'static>, config: ServerConfig) -> Self {
        let table = Table::new();
        insert(&table, "disk", Opened { description: "a test".into(), ..opened });
        Self::exports(Arc::new(table), config)
    }

    pub fn exports(exports: Arc<impl Leases + 'static>, mut config: ServerConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let events = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&events);
        config.log = Arc::new(move |event| log.lock().unwrap().push(event.to_owned()));
        let listener = Listener::unix(folder.path().join("socket")).unwrap();
        let server = Server::new(vec![listener], exports, config).unwrap();
        let handle = server.handle();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { folder, handle, thread, events }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// A client with structured replies and `base:allocation`, in the transmission phase.
    pub fn client(&self) -> Client {
        Client::open(&self.path(), "disk", true)
    }

    /// Waits for a server that was told to shut down.
    pub fn wait(&mut self) -> Result<()> {
        self.thread.take().unwrap().join().unwrap()
    }

    pub fn stop(&mut self) -> Result<()> {
        self.handle.shutdown();
        self.wait()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.handle.shutdown();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Adds a disk to what is served.
pub fn insert(table: &Table, name: &str, opened: Opened<impl Disk + 'static>) {
    table.insert(Arc::new(thinply::serve::Served::new(name, opened).unwrap())).unwrap();
}

/// A part of a read's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Data(u64, Vec<u8>),
    Hole(u64, u32),
}

/// All that answers one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub error: u32,
    pub message: String,
    pub error_offset: Option<u64>,
    pub parts: Vec<Part>,
    /// Lengths and flags of `base:allocation`.
    pub status: Vec<(u32, u32)>,
}

pub struct Client {
    pub stream: UnixStream,
    next: u64,
    /// Read lengths by cookie: what a simple reply brings.
    reads: HashMap<u64, u32>,
    /// From the answer to GO.
    pub size: u64,
    pub flags: u16,
}

impl Client {
    /// Connects, reads the greeting, sends the client flags.
    pub fn raw(path: &Path) -> Self {
        let mut client = Self::silent(path);
        let greeting = client.take(18);
        assert_eq!(greeting[..16], *b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[16..], [0, 3]);
        client.send(&[0, 0, 0, 3]);
        client
    }

    /// Only connects.
    pub fn silent(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(TOO_LONG)).unwrap();
        stream.set_write_timeout(Some(TOO_LONG)).unwrap();
        Self { stream, next: 1000, reads: HashMap::new(), size: 0, flags: 0 }
    }

    pub fn open(path: &Path, name: &str, structured: bool) -> Self {
        let mut client = Self::raw(path);
        if structured {
            assert_eq!(client.ask(OPT_STRUCTURED_REPLY, &[]), [(REP_ACK, vec![])]);
            let answer = client.ask(OPT_SET_META_CONTEXT, &meta(name, &["base:allocation"]));
            assert_eq!(answer.len(), 2);
        }
        client.go(name);
        client
    }

    pub fn go(&mut self, name: &str) {
        let answer = self.ask(OPT_GO, &info(name, &[]));
        assert_eq!(answer.last().unwrap().0, REP_ACK, "{answer:x?}");
        let export = &answer[0].1;
        self.size = u64::from_be_bytes(export[2..10].try_into().unwrap());
        self.flags = u16::from_be_bytes(export[10..12].try_into().unwrap());
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server has hung up. Waits for it, or for a byte.
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0]) {
            Ok(length) => length == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    /// Sends an option and takes its replies, up to the last one.
    pub fn ask(&mut self, code: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&option(code, data));
        self.option_replies(code)
    }

    pub fn option_replies(&mut self, code: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            let header = self.take(20);
            assert_eq!(header[..8], REPLY_MAGIC.to_be_bytes());
            assert_eq!(header[8..12], code.to_be_bytes());
            let kind = u32_at(&header, 12);
            let payload = self.take(u32_at(&header, 16) as usize);
            replies.push((kind, payload));
            if kind == REP_ACK || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    /// A request without its payload, which answers to the cookie.
    pub fn encode(&mut self, flags: u16, kind: u16, offset: u64, length: u32) -> (u64, Vec<u8>) {
        let cookie = self.next;
        self.next += 1;
        if kind == READ {
            self.reads.insert(cookie, length);
        }
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        (cookie, bytes)
    }

    pub fn start(&mut self, flags: u16, kind: u16, offset: u64, length: u32) -> u64 {
        let (cookie, bytes) = self.encode(flags, kind, offset, length);
        self.send(&bytes);
        cookie
    }

    pub fn start_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u64 {
        let (cookie, mut bytes) = self.encode(flags, WRITE, offset, data.len() as u32);
        bytes.extend_from_slice(data);
        self.send(&bytes);
        cookie
    }

    /// The next reply, whichever request it answers.
    pub fn reply(&mut self) -> Reply {
        let mut reply = Reply::default();
        loop {
            let magic = self.take(4);
            let header = self.take(12);
            if magic == 0x6744_6698u32.to_be_bytes() {
                reply.error = u32_at(&header, 0);
                reply.cookie = u64_at(&header, 4);
                let read = self.reads.remove(&reply.cookie);
                if let (Some(length), 0) = (read, reply.error) {
                    reply.parts.push(Part::Data(0, self.take(length as usize)));
                }
                return reply;
            }
            assert_eq!(magic, 0x668e_33efu32.to_be_bytes());
            reply.cookie = u64_at(&header, 4);
            let length = u32_at(&self.take(4), 0) as usize;
            let payload = self.take(length);
            reply.add(u32_at(&header, 0) as u16, &payload);
            if header[1] & 1 == 1 {
                return reply;
            }
        }
    }

    pub fn command(&mut self, flags: u16, kind: u16, offset: u64, length: u32) -> Reply {
        let cookie = self.start(flags, kind, offset, length);
        let reply = self.reply();
        assert_eq!(reply.cookie, cookie);
        reply
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        let reply = self.command(0, READ, offset, length);
        assert_eq!(reply.error, 0, "{}", reply.message);
        reply.data()
    }

    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> Reply {
        let cookie = self.start_write(flags, offset, data);
        let reply = self.reply();
        assert_eq!(reply.cookie, cookie);
        reply
    }
}

impl Reply {
    fn add(&mut self, kind: u16, payload: &[u8]) {
        match kind {
            0 => assert!(payload.is_empty()),
            1 => self.parts.push(Part::Data(u64_at(payload, 0), payload[8..].to_vec())),
            2 => self.parts.push(Part::Hole(u64_at(payload, 0), u32_at(payload, 8))),
            5 => {
                assert_eq!(u32_at(payload, 0), 1);
                let pairs = payload[4..].chunks_exact(8);
                self.status = pairs.map(|pair| (u32_at(pair, 0), u32_at(pair, 4))).collect();
            }
            0x8001 | 0x8002 => {
                self.error = u32_at(payload, 0);
                let end = 6 + usize::from(u16::from_be_bytes(payload[4..6].try_into().unwrap()));
                self.message = String::from_utf8(payload[6..end].to_vec()).unwrap();
                self.error_offset = (kind == 0x8002).then(|| u64_at(payload, end));
            }
            _ => panic!("chunk of type {kind}"),
        }
    }

    /// What was read, holes filled in.
    pub fn data(&self) -> Vec<u8> {
        let mut data = Vec::new();
        for part in &self.parts {
            match part {
                Part::Data(_, bytes) => data.extend_from_slice(bytes),
                Part::Hole(_, length) => data.resize(data.len() + *length as usize, 0),
            }
        }
        data
    }
}

pub fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&code.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Data of INFO and GO.
pub fn info(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(kinds.len() as u16).to_be_bytes());
    kinds.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend_from_slice(&string(query)));
    data
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

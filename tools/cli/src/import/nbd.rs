//! A disk that an NBD server shows: how to get at formats that other programs read.
//!
//! Fixed newstyle, one request at a time, structured replies and `base:allocation` where the server
//! has them. The server is not trusted: what it sends is bounded by what was asked for.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use thinply::chain::Chain;
use thinply::error::{Error, ErrorKind, Result};

use super::source::Disk;
use crate::io::pump::{BUFFER, Feeder, Piece};

const PORT: u16 = 10809;
/// How long a server may keep silent, or take nothing, in the middle of something.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest answer to an option that is taken.
const MAX_ANSWER: u32 = 64 << 10;
/// How much of the disk is asked about at once, and how many extents an answer may have.
const STATUS_LENGTH: u64 = 1 << 30;
const MAX_EXTENTS: u32 = 1 << 20;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const ANSWER_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;

const ACK: u32 = 1;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;
const ERROR_BIT: u32 = 1 << 31;

const READ: u16 = 0;
const DISCONNECT: u16 = 2;
const BLOCK_STATUS: u16 = 7;

const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;
const DONE: u16 = 1;

/// In `base:allocation`: reads as zeros.
const ZERO: u32 = 2;

/// The URI that a source is, if it is one.
pub fn uri(source: &Path) -> Option<&str> {
    let text = source.to_str()?;
    let (scheme, _) = text.split_once("://")?;
    scheme.starts_with("nbd").then_some(text)
}

/// Where a URI leads.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    target: Target,
    export: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Target {
    Unix(String),
    Tcp(String),
}

impl Address {
    fn parse(uri: &str) -> Result<Self> {
        let wrong = || {
            let detail = "expected nbd://HOST[:PORT]/[EXPORT] or \
                          nbd+unix:///[EXPORT]?socket=PATH";
            Error::new(ErrorKind::InvalidInput, format!("{uri}: {detail}"))
        };
        let (scheme, rest) = uri.split_once("://").ok_or_else(wrong)?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export).ok_or_else(wrong)?;
        let target = match scheme {
            "nbd" if !host.is_empty() && query.is_empty() => {
                let port = host.rsplit_once(':').filter(|(_, port)| !port.contains(']'));
                let full = if port.is_some() { host.into() } else { format!("{host}:{PORT}") };
                Target::Tcp(full)
            }
            "nbd+unix" if host.is_empty() => {
                let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
                Target::Unix(socket.and_then(decode).ok_or_else(wrong)?)
            }
            _ => return Err(wrong()),
        };
        Ok(Self { target, export })
    }
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

fn wrong(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server sent {what}"))
}

/// Connects to the first address of a host that answers in time.
fn connect(host: &str, patience: Duration) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in host.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// An error that a person understands: a call that has timed out says that it would block.
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "the server is there, but keeps silent")
        }
        _ => error,
    }
}

/// A connection to an export.
struct Connection {
    stream: Box<dyn Stream>,
    size: u64,
    structured: bool,
    /// The id of `base:allocation`.
    allocation: Option<u32>,
    cookie: u64,
    /// Whether it takes requests.
    ready: bool,
}

/// A part of a structured reply.
struct Chunk {
    kind: u16,
    done: bool,
    length: u32,
}

impl Connection {
    fn open(address: &Address, patience: Duration) -> io::Result<Self> {
        let limit = Some(patience);
        let stream: Box<dyn Stream> = match &address.target {
            Target::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)?;
                Box::new(stream)
            }
            Target::Tcp(host) => {
                let stream = connect(host, patience)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)?;
                Box::new(stream)
            }
        };
        let mut connection =
            Self { stream, size: 0, structured: false, allocation: None, cookie: 0, ready: false };
        connection.negotiate(&address.export)?;
        Ok(connection)
    }

    fn u16(&mut self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.stream.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn negotiate(&mut self, export: &str) -> io::Result<()> {
        let mut greeting = [0; 18];
        self.stream.read_exact(&mut greeting)?;
        if !greeting.starts_with(b"NBDMAGICIHAVEOPT") || greeting[17] & 1 == 0 {
            return Err(wrong("no greeting of a fixed newstyle NBD server"));
        }
        // Fixed newstyle, and no padding if the server knows of that.
        let flags = 1 | u32::from(greeting[17] & 2);
        self.stream.write_all(&flags.to_be_bytes())?;
        self.structured = self.option(STRUCTURED_REPLY, &[], &mut |_, _| Ok(()))?.is_ok();
        let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
        if self.structured {
            let context = "base:allocation";
            let queries = [1, context.len() as u32].map(u32::to_be_bytes).concat();
            let body = [&name, &queries, context.as_bytes()].concat();
            let mut id = None;
            let chosen = self.option(SET_META_CONTEXT, &body, &mut |kind, answer| {
                if kind == META_CONTEXT {
                    id = answer.first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
                }
                Ok(())
            })?;
            self.allocation = chosen.ok().and(id);
        }
        let mut size = None;
        let body = [&name[..], &[0, 0]].concat();
        let gone = self.option(GO, &body, &mut |kind, answer| {
            if kind == INFO && answer.starts_with(&[0, 0]) {
                size = answer[2..].first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
            }
            Ok(())
        })?;
        gone.map_err(|message| io::Error::other(format!("the server refused: {message}")))?;
        self.size = size.ok_or_else(|| wrong("no size of the export"))?;
        self.ready = true;
        Ok(())
    }

    /// Sends an option and hands each answer to `visit` until the last one; the inner error is the
    /// server's refusal.
    fn option(
        &mut self,
        option: u32,
        body: &[u8],
        visit: &mut dyn FnMut(u32, &[u8]) -> io::Result<()>,
    ) -> io::Result<std::result::Result<(), String>> {
        let head = [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes()].concat();
        let message = [&head[..], &(body.len() as u32).to_be_bytes(), body].concat();
        self.stream.write_all(&message)?;
        // A server says a few things about an option; one that never stops is no server.
        for _ in 0..1024 {
            if self.u64()? != ANSWER_MAGIC || self.u32()? != option {
                return Err(wrong("no answer to an option"));
            }
            let (kind, length) = (self.u32()?, self.u32()?);
            if length > MAX_ANSWER {
                return Err(wrong(format_args!("an answer of {length} bytes")));
            }
            let mut answer = vec![0; length as usize];
            self.stream.read_exact(&mut answer)?;
            match kind {
                ACK => return Ok(Ok(())),
                _ if kind & ERROR_BIT != 0 => {
                    let message = String::from_utf8_lossy(&answer);
                    return Ok(Err(format!("error {} {message}", kind & !ERROR_BIT)));
                }
                _ => visit(kind, &answer)?,
            }
        }
        Err(wrong("answers without end"))
    }

    fn request(&mut self, command: u16, offset: u64, length: u32) -> io::Result<()> {
        self.cookie += 1;
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.stream.write_all(&bytes)
    }

    /// Fills `buf`.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.request(READ, offset, buf.len() as u32)?;
        if !self.structured {
            self.simple_reply()?;
            return self.stream.read_exact(buf);
        }
        let mut filled = 0;
        loop {
            let chunk = self.chunk(buf.len() as u32 + 8)?;
            match chunk.kind {
                CHUNK_NONE if chunk.length == 0 => {}
                CHUNK_DATA if chunk.length > 8 => {
                    let part = self.u64()?.checked_sub(offset);
                    let part = place(buf, part, chunk.length - 8)?;
                    self.stream.read_exact(part)?;
                    filled += part.len();
                }
                CHUNK_HOLE if chunk.length == 12 => {
                    let (part, length) = (self.u64()?.checked_sub(offset), self.u32()?);
                    let part = place(buf, part, length)?;
                    part.fill(0);
                    filled += part.len();
                }
                kind => return Err(wrong(format_args!("a chunk of kind {kind} to a read"))),
            }
            if chunk.done {
                break;
            }
        }
        // Chunks don't overlap, so together they are everything.
        if filled != buf.len() {
            return Err(wrong(format_args!("{filled} bytes of {}", buf.len())));
        }
        Ok(())
    }

    fn simple_reply(&mut self) -> io::Result<()> {
        let (magic, error, cookie) = (self.u32()?, self.u32()?, self.u64()?);
        if magic != SIMPLE_MAGIC || cookie != self.cookie {
            return Err(wrong("no reply to the request"));
        }
        match error {
            0 => Ok(()),
            error => Err(io::Error::other(format!("the server reports error {error}"))),
        }
    }

    /// The head of the next chunk of at most `most` bytes; an error chunk is an error.
    fn chunk(&mut self, most: u32) -> io::Result<Chunk> {
        let magic = self.u32()?;
        let (flags, kind) = (self.u16()?, self.u16()?);
        let (cookie, length) = (self.u64()?, self.u32()?);
        if magic != STRUCTURED_MAGIC || cookie != self.cookie {
            return Err(wrong("no reply to the request"));
        }
        if kind & CHUNK_ERROR != 0 && (6..=MAX_ANSWER).contains(&length) {
            let error = self.u32()?;
            let mut rest = vec![0; length as usize - 4];
            self.stream.read_exact(&mut rest)?;
            let said = usize::from(u16::from_be_bytes([rest[0], rest[1]]));
            let message = String::from_utf8_lossy(rest[2..].get(..said).unwrap_or_default());
            let detail = format!("the server reports error {error} {message}");
            return Err(io::Error::other(detail));
        }
        if length > most {
            return Err(wrong(format_args!("a chunk of {length} bytes, expected at most {most}")));
        }
        Ok(Chunk { kind, done: flags & DONE != 0, length })
    }

    /// The extents from `offset` on, as lengths and whether they read as zeros.
    fn extents(&mut self, offset: u64, length: u64) -> io::Result<Vec<(u64, bool)>> {
        let Some(allocation) = self.allocation else { return Ok(vec![(length, false)]) };
        self.request(BLOCK_STATUS, offset, length as u32)?;
        let mut extents = Vec::new();
        loop {
            let chunk = self.chunk(4 + 8 * MAX_EXTENTS)?;
            match chunk.kind {
                CHUNK_NONE if chunk.length == 0 => {}
                CHUNK_STATUS if chunk.length % 8 == 4 => {
                    let context = self.u32()?;
                    for _ in 0..chunk.length / 8 {
                        let extent = (u64::from(self.u32()?), self.u32()? & ZERO != 0);
                        if context == allocation {
                            extents.push(extent);
                        }
                    }
                }
                kind => return Err(wrong(format_args!("a chunk of kind {kind} to a status"))),
            }
            if chunk.done {
                break;
            }
        }
        if extents.is_empty() || extents.iter().any(|&(length, _)| length == 0) {
            return Err(wrong("an extent without length, or none"));
        }
        Ok(extents)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.ready {
            // The server may be gone, or in the middle of a reply.
            let _ = self.request(DISCONNECT, 0, 0);
        }
    }
}

/// The part of `buf` that a chunk fills.
fn place(buf: &mut [u8], from: Option<u64>, length: u32) -> io::Result<&mut [u8]> {
    from.and_then(|from| usize::try_from(from).ok())
        .and_then(|from| buf.get_mut(from..)?.get_mut(..length as usize))
        .ok_or_else(|| wrong("bytes that were not asked for"))
}

/// A disk that a server shows.
pub struct NbdDisk {
    uri: String,
    size: u64,
    connection: Mutex<Connection>,
}

impl NbdDisk {
    /// Connects to the export that a URI names.
    pub fn connect(uri: &str) -> Result<Self> {
        let address = Address::parse(uri)?;
        let connection = Connection::open(&address, PATIENCE)
            .map_err(|error| Error::io(in_words(error), format!("{uri}: connecting")))?;
        let size = connection.size;
        Ok(Self { uri: uri.to_owned(), size, connection: Mutex::new(connection) })
    }

    fn failed(&self, error: io::Error, offset: u64) -> Error {
        Error::io(in_words(error), format!("{}: reading at {offset}", self.uri))
    }
}

impl Disk for NbdDisk {
    fn length(&self) -> Option<u64> {
        Some(self.size)
    }

    fn read(&self, feeder: &Feeder, _: Option<&Chain>) -> Result<()> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = 0;
        while at < self.size {
            let window = STATUS_LENGTH.min(self.size - at);
            let extents = connection.extents(at, window).map_err(|e| self.failed(e, at))?;
            // The last one may reach beyond what was asked for.
            let window_end = at + window;
            for (length, zeros) in extents {
                let end = (at + length).min(window_end);
                if zeros && end > at && !feeder.send(Piece::Zeros(at, end - at)) {
                    return Ok(());
                }
                while !zeros && at < end {
                    let length = (end - at).min(BUFFER as u64) as usize;
                    let Some(mut buffer) = feeder.buffer(length) else { return Ok(()) };
                    connection.read(at, &mut buffer).map_err(|e| self.failed(e, at))?;
                    if !feeder.send(Piece::Data(at, buffer)) {
                        return Ok(());
                    }
                    at += length as u64;
                }
                at = end;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_lead_somewhere_or_are_refused() {
        let address = |uri| Address::parse(uri).unwrap();
        let tcp = |host: &str| Target::Tcp(host.into());
        let unix = |path: &str| Target::Unix(path.into());
        for (uri, target, export) in [
            ("nbd://host", tcp("host:10809"), ""),
            ("nbd://host:1/disk", tcp("host:1"), "disk"),
            ("nbd://[::1]/a%20b/c", tcp("[::1]:10809"), "a b/c"),
            ("nbd://[::1]:7/", tcp("[::1]:7"), ""),
            ("nbd+unix:///?socket=/tmp/s", unix("/tmp/s"), ""),
            ("nbd+unix:///x?a=b&socket=/tmp/%2541", unix("/tmp/%41"), "x"),
        ] {
            assert_eq!(address(uri), Address { target, export: export.into() });
        }
        for uri in ["nbd://", "nbds://host", "nbd+unix:///x", "nbd+unix://h/?socket=/s"] {
            let error = Address::parse(uri).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{uri}");
        }
        assert!(Address::parse("nbd://h/%f").is_err() && Address::parse("nbd://h/%ff").is_err());
        assert_eq!(uri(Path::new("./nbd:/x")), None);
    }

    /// A connection to a server that says `bytes` and takes anything.
    fn connection(bytes: Vec<u8>) -> Connection {
        struct Fixed(io::Cursor<Vec<u8>>);
        impl Read for Fixed {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                self.0.read(buf)
            }
        }
        impl Write for Fixed {
            fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
                Ok(buf.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        Connection {
            stream: Box::new(Fixed(io::Cursor::new(bytes))),
            size: 0,
            structured: true,
            allocation: Some(1),
            cookie: 0,
            ready: true,
        }
    }

    #[test]
    fn a_server_that_keeps_silent_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket").display().to_string();
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let address = Address { target: Target::Unix(path), export: String::new() };
        let patience = Duration::from_millis(20);
        let open = || Connection::open(&address, patience).map(drop).map_err(in_words);
        assert_eq!(open().unwrap_err().kind(), io::ErrorKind::TimedOut);
        // It greets, and says no more.
        let greeting = [&b"NBDMAGICIHAVEOPT"[..], &[0, 1]].concat();
        let error = std::thread::scope(|scope| {
            let stay = scope.spawn(|| {
                let mut first = listener.accept().unwrap().0;
                let mut second = listener.accept().unwrap().0;
                second.write_all(&greeting).unwrap();
                // Until the client has given up.
                let _ = (first.read(&mut [0; 99]), second.read_to_end(&mut Vec::new()));
            });
            let error = open().unwrap_err();
            stay.join().unwrap();
            error
        });
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("silent"), "{error}");
    }

    fn chunk(flags: u16, kind: u16, length: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = STRUCTURED_MAGIC.to_be_bytes().to_vec();
        bytes.extend([flags, kind].map(u16::to_be_bytes).concat());
        bytes.extend(1u64.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn data(offset: u64, bytes: &[u8], flags: u16) -> Vec<u8> {
        let body = [&offset.to_be_bytes()[..], bytes].concat();
        chunk(flags, CHUNK_DATA, body.len() as u32, &body)
    }

    #[test]
    fn a_read_takes_what_was_asked_for_and_nothing_else() {
        let read = |bytes| {
            let mut buf = [9; 4];
            connection(bytes).read(100, &mut buf).map(|()| buf)
        };
        let hole = [&102u64.to_be_bytes()[..], &2u32.to_be_bytes()].concat();
        let good = [data(100, &[1, 2], 0), chunk(DONE, CHUNK_HOLE, 12, &hole)].concat();
        assert_eq!(read(good).unwrap(), [1, 2, 0, 0]);
        for bad in [
            data(100, &[1, 2], DONE),
            data(99, &[1, 2, 3, 4], DONE),
            data(102, &[1, 2, 3, 4], DONE),
            data(u64::MAX, &[1, 2, 3, 4], DONE),
            chunk(DONE, CHUNK_DATA, u32::MAX, &[]),
            chunk(DONE, CHUNK_DATA, 8, &[0; 8]),
            chunk(DONE, CHUNK_STATUS, 4, &[0; 4]),
            chunk(DONE, CHUNK_ERROR | 1, 6, &[0, 0, 0, 5, 0, 9]),
            chunk(DONE, CHUNK_ERROR | 1, 2, &[0, 0]),
            vec![0; 64],
            vec![],
        ] {
            assert!(read(bad.clone()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_status_has_extents_with_lengths() {
        let status = |words: &[u32]| {
            let body = words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
            let bytes = chunk(DONE, CHUNK_STATUS, body.len() as u32, &body);
            connection(bytes).extents(0, 100)
        };
        assert_eq!(status(&[1, 10, 3, 90, 0]).unwrap(), [(10, true), (90, false)]);
        assert!(status(&[2, 10, 3]).is_err(), "of another context");
        assert!(status(&[1, 0, 3]).is_err());
        assert!(status(&[1]).is_err());
    }
}

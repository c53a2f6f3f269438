//! The conversation with a server, byte by byte.

use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use crate::device::Extent;
use crate::nbd::address::Place;
use crate::nbd::proto::numbers::*;
use crate::nbd::proto::{MAX_EXTENTS, request_header};
use crate::serve::socket;

use super::blocks::Blocks;

/// Longest answer to an option, and longest message of an error, that is taken.
const MAX_ANSWER: u32 = 64 << 10;
/// Most answers to one option.
const MAX_ANSWERS: u32 = 1024;

/// What a server is spoken to over.
pub trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// What a server is asked about the ranges of an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`; a hole is what reads as zeros.
    #[default]
    Allocation,
    /// `qemu:allocation-depth`, of QEMU's servers; a hole is what no image of the chain holds, not
    /// even as zeros.
    Depth,
}

impl Context {
    fn name(self) -> &'static str {
        match self {
            Self::Allocation => ALLOCATION_NAME,
            Self::Depth => "qemu:allocation-depth",
        }
    }

    fn is_hole(self, state: u32) -> bool {
        match self {
            Self::Allocation => state & STATE_ZERO != 0,
            Self::Depth => state == 0,
        }
    }
}

/// Connects to a server; whatever waits for it later waits for `patience` at most.
pub fn stream(place: &Place, patience: Duration) -> io::Result<Box<dyn Stream>> {
    let limit = Some(patience);
    Ok(match place {
        Place::Unix(path) => {
            let stream = socket::connect(path)?;
            stream.set_read_timeout(limit)?;
            stream.set_write_timeout(limit)?;
            Box::new(stream)
        }
        Place::Tcp(host) => {
            let stream = connect(host, patience)?;
            stream.set_nodelay(true)?;
            socket::notice_lost_host(&stream)?;
            stream.set_read_timeout(limit)?;
            stream.set_write_timeout(limit)?;
            Box::new(stream)
        }
    })
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

fn wrong(what: impl fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server sent {what}"))
}

/// An error that the server reports about a request.
fn reported(number: u32, message: &str) -> io::Error {
    // Of all numbers only those that the protocol has: others could pass for something of ours.
    let kind = match number {
        1 => io::ErrorKind::PermissionDenied,
        28 => io::ErrorKind::StorageFull,
        95 => io::ErrorKind::Unsupported,
        _ => io::ErrorKind::Other,
    };
    let message = if message.is_empty() { String::new() } else { format!(": {message}") };
    io::Error::new(kind, format!("the server reports error {number}{message}"))
}

/// A connection, in the transmission phase once it is made.
pub struct Connection {
    /// Only what is read is buffered.
    pub(super) stream: BufReader<Box<dyn Stream>>,
    /// Size of the export in bytes.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
    /// What requests it takes.
    pub blocks: Blocks,
    pub(super) structured: bool,
    /// What is asked about, and the server's id for it.
    pub(super) context: Context,
    pub(super) status: Option<u32>,
    pub(super) cookie: u64,
    /// Whether every request was answered to its end, so that the next bytes belong to the next one.
    pub(super) in_step: bool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("size", &self.size).finish_non_exhaustive()
    }
}

/// A part of a reply; a simple one is the only part, and has no length.
struct Chunk {
    simple: bool,
    kind: u16,
    done: bool,
    length: u32,
}

impl Connection {
    /// Agrees with a server on an export, and on what it is asked about.
    pub fn negotiate(stream: Box<dyn Stream>, export: &str, context: Context) -> io::Result<Self> {
        let mut connection = Self {
            stream: BufReader::new(stream),
            size: 0,
            flags: 0,
            blocks: Blocks::default(),
            structured: false,
            context,
            status: None,
            cookie: 0,
            in_step: false,
        };
        let greeting: [u8; 18] = connection.take()?;
        let magic = [INIT_MAGIC, OPTION_MAGIC].map(u64::to_be_bytes).concat();
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        if !greeting.starts_with(&magic) || flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(wrong("no greeting of a fixed newstyle NBD server"));
        }
        // No padding if the server knows of that.
        let flags = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        connection.stream.get_mut().write_all(&u32::from(flags).to_be_bytes())?;
        let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
        connection.structured =
            connection.option(OPT_STRUCTURED_REPLY, &[], &mut |_, _| {})?.is_ok();
        if connection.structured {
            connection.status = connection.choose_context(&name)?;
        }
        connection.go(&name)?;
        connection.in_step = true;
        Ok(connection)
    }

    fn choose_context(&mut self, name: &[u8]) -> io::Result<Option<u32>> {
        let context = self.context.name();
        let queries = [1, context.len() as u32].map(u32::to_be_bytes).concat();
        let body = [name, &queries, context.as_bytes()].concat();
        let mut id = None;
        let chosen = self.option(OPT_SET_META_CONTEXT, &body, &mut |kind, answer| {
            if kind == REP_META_CONTEXT {
                id = answer.first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
            }
        })?;
        Ok(chosen.ok().and(id))
    }

    fn go(&mut self, name: &[u8]) -> io::Result<()> {
        let (mut export, mut blocks) = (None, None);
        // Who asks for the sizes of blocks promises to keep to them.
        let asked = [1, INFO_BLOCK_SIZE].map(u16::to_be_bytes).concat();
        let gone = self.option(OPT_GO, &[name, &asked].concat(), &mut |kind, answer| {
            let info = answer.split_first_chunk().filter(|_| kind == REP_INFO);
            match info.map(|(number, info)| (u16::from_be_bytes(*number), info)) {
                Some((INFO_EXPORT, info)) => {
                    if let Some((&size, flags)) = info.split_first_chunk()
                        && let Some(&flags) = flags.first_chunk()
                    {
                        export = Some((u64::from_be_bytes(size), u16::from_be_bytes(flags)));
                    }
                }
                Some((INFO_BLOCK_SIZE, info)) => blocks = Some(Blocks::decode(info)),
                _ => {}
            }
        })?;
        gone.map_err(|message| io::Error::other(format!("the server refused: {message}")))?;
        (self.size, self.flags) = export.ok_or_else(|| wrong("no size of the export"))?;
        if let Some(blocks) = blocks {
            self.blocks = blocks.ok_or_else(|| wrong("sizes of blocks that can't be"))?;
        }
        Ok(())
    }

    /// Sends an option and hands each answer to `visit` until the last one; the inner error is the
    /// server's refusal.
    fn option(
        &mut self,
        option: u32,
        body: &[u8],
        visit: &mut dyn FnMut(u32, &[u8]),
    ) -> io::Result<Result<(), String>> {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((body.len() as u32).to_be_bytes());
        message.extend(body);
        self.stream.get_mut().write_all(&message)?;
        // A server says a few things about an option; one that never stops is no server.
        for _ in 0..MAX_ANSWERS {
            let magic = u64::from_be_bytes(self.take()?);
            let [echo, kind, length] = self.words()?;
            if magic != OPTION_REPLY_MAGIC || echo != option {
                return Err(wrong("no answer to an option"));
            }
            if length > MAX_ANSWER {
                return Err(wrong(format_args!("an answer of {length} bytes")));
            }
            let answer = self.bytes(length)?;
            match kind {
                REP_ACK => return Ok(Ok(())),
                _ if kind & REP_FLAG_ERROR != 0 => {
                    let message = String::from_utf8_lossy(&answer);
                    return Ok(Err(format!("error {} {message}", kind & !REP_FLAG_ERROR)));
                }
                _ => visit(kind, &answer),
            }
        }
        Err(wrong("answers without end"))
    }

    fn request(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) -> io::Result<()> {
        if !std::mem::take(&mut self.in_step) {
            return Err(io::Error::other("an error before this one ended the conversation"));
        }
        self.cookie += 1;
        self.stream.get_mut().write_all(&request_header(
            0,
            command,
            self.cookie,
            offset,
            length,
        ))?;
        self.stream.get_mut().write_all(data)
    }

    /// Fills `buf`.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.request(CMD_READ, offset, buf.len() as u32, &[])?;
        let mut filled = 0;
        loop {
            let chunk = self.chunk((buf.len() as u32).saturating_add(8))?;
            match chunk.kind {
                _ if chunk.simple && !self.structured => {
                    self.stream.read_exact(buf)?;
                    filled = buf.len();
                }
                _ if chunk.simple => return Err(wrong("a simple reply to a read")),
                REPLY_TYPE_NONE if chunk.length == 0 && chunk.done => {}
                REPLY_TYPE_OFFSET_DATA if chunk.length > 8 => {
                    let from = u64::from_be_bytes(self.take()?).checked_sub(offset);
                    let part = place(buf, from, chunk.length - 8)?;
                    self.stream.read_exact(part)?;
                    filled += part.len();
                }
                REPLY_TYPE_OFFSET_HOLE if chunk.length == 12 => {
                    let from = u64::from_be_bytes(self.take()?).checked_sub(offset);
                    let part = place(buf, from, u32::from_be_bytes(self.take()?))?;
                    part.fill(0);
                    filled += part.len();
                }
                kind => return Err(wrong(format_args!("a chunk of kind {kind} to a read"))),
            }
            // Chunks don't overlap, so together they are everything.
            if chunk.done && filled == buf.len() {
                self.in_step = true;
                return Ok(());
            }
            if chunk.done || filled > buf.len() {
                return Err(wrong(format_args!("{filled} bytes of {}", buf.len())));
            }
        }
    }

    /// Writes `data`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.request(CMD_WRITE, offset, data.len() as u32, data)?;
        self.done()
    }

    /// Makes what was written durable.
    pub fn flush(&mut self) -> io::Result<()> {
        self.request(CMD_FLUSH, 0, 0, &[])?;
        self.done()
    }

    /// Says goodbye, which has no reply.
    pub fn disconnect(&mut self) -> io::Result<()> {
        self.request(CMD_DISC, 0, 0, &[])
    }

    /// The reply of a command that has nothing to tell.
    fn done(&mut self) -> io::Result<()> {
        let chunk = self.chunk(0)?;
        if chunk.kind != REPLY_TYPE_NONE || !chunk.done {
            return Err(wrong(format_args!("a chunk of kind {} to a change", chunk.kind)));
        }
        self.in_step = true;
        Ok(())
    }

    /// The extents from `offset` on, each with a length. They may end before `length` or after it.
    pub fn extents(&mut self, offset: u64, length: u32) -> io::Result<Vec<Extent>> {
        let Some(status) = self.status else {
            return Ok(vec![Extent { length: length.into(), hole: false }]);
        };
        self.request(CMD_BLOCK_STATUS, offset, length, &[])?;
        let mut extents = Vec::new();
        loop {
            let chunk = self.chunk(4 + 8 * MAX_EXTENTS as u32)?;
            match chunk.kind {
                REPLY_TYPE_NONE if chunk.length == 0 && chunk.done && !chunk.simple => {}
                REPLY_TYPE_BLOCK_STATUS if chunk.length % 8 == 4 && extents.is_empty() => {
                    let bytes = self.bytes(chunk.length)?;
                    let mut words =
                        bytes.as_chunks().0.iter().map(|word| u32::from_be_bytes(*word));
                    if words.next() != Some(status) {
                        return Err(wrong("a status that was not asked for"));
                    }
                    while let (Some(length), Some(state)) = (words.next(), words.next()) {
                        let (length, hole) = (length.into(), self.context.is_hole(state));
                        extents.push(Extent { length, hole });
                    }
                    if extents.is_empty() || extents.iter().any(|extent| extent.length == 0) {
                        return Err(wrong("an extent without length, or none"));
                    }
                }
                kind => return Err(wrong(format_args!("a chunk of kind {kind} to a status"))),
            }
            if chunk.done {
                break;
            }
        }
        if extents.is_empty() {
            return Err(wrong("no status"));
        }
        self.in_step = true;
        Ok(extents)
    }

    /// The head of the next part of a reply, of at most `most` bytes. What the server reports is an
    /// error.
    fn chunk(&mut self, most: u32) -> io::Result<Chunk> {
        match u32::from_be_bytes(self.take()?) {
            SIMPLE_REPLY_MAGIC => {
                let [error] = self.words()?;
                self.check_cookie()?;
                if error != 0 {
                    self.in_step = true;
                    return Err(reported(error, ""));
                }
                Ok(Chunk { simple: true, kind: REPLY_TYPE_NONE, done: true, length: 0 })
            }
            STRUCTURED_REPLY_MAGIC if self.structured => {
                let [flags_and_kind] = self.words()?;
                self.check_cookie()?;
                let [length] = self.words()?;
                let done = (flags_and_kind >> 16) as u16 & REPLY_FLAG_DONE != 0;
                let kind = flags_and_kind as u16;
                if kind & REPLY_TYPE_FLAG_ERROR != 0 && (6..=MAX_ANSWER).contains(&length) {
                    let error = self.error_chunk(length)?;
                    self.in_step = done;
                    return Err(error);
                }
                if length > most {
                    let expected = format_args!("expected at most {most}");
                    return Err(wrong(format_args!("a chunk of {length} bytes, {expected}")));
                }
                Ok(Chunk { simple: false, kind, done, length })
            }
            _ => Err(wrong("no reply to the request")),
        }
    }

    fn check_cookie(&mut self) -> io::Result<()> {
        match u64::from_be_bytes(self.take()?) {
            cookie if cookie == self.cookie => Ok(()),
            _ => Err(wrong("a reply to another request")),
        }
    }

    fn error_chunk(&mut self, length: u32) -> io::Result<io::Error> {
        let body = self.bytes(length)?;
        let number = body.first_chunk().map_or(0, |number| u32::from_be_bytes(*number));
        let said = body.get(4..).and_then(|rest| rest.split_first_chunk());
        let message =
            said.and_then(|(length, rest)| rest.get(..usize::from(u16::from_be_bytes(*length))));
        Ok(reported(number, &String::from_utf8_lossy(message.unwrap_or_default())))
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn words<const N: usize>(&mut self) -> io::Result<[u32; N]> {
        let mut words = [0; N];
        for word in &mut words {
            *word = u32::from_be_bytes(self.take()?);
        }
        Ok(words)
    }

    /// That many bytes; the caller has bounded them.
    fn bytes(&mut self, length: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.in_step {
            // The server may be gone.
            let _ = self.disconnect();
        }
    }
}

/// The part of `buf` that a chunk fills, which is not nothing.
fn place(buf: &mut [u8], from: Option<u64>, length: u32) -> io::Result<&mut [u8]> {
    from.filter(|_| length > 0)
        .and_then(|from| usize::try_from(from).ok())
        .and_then(|from| buf.get_mut(from..)?.get_mut(..length as usize))
        .ok_or_else(|| wrong("bytes that were not asked for"))
}

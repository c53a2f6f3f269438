//! The least NBD client: fixed newstyle, an export taken by its name, simple replies. What goes
//! wrong is an error, which some tests wait for.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use thinply::nbd::proto::numbers::{
    CMD_DISC as DISCONNECT, CMD_FLUSH as FLUSH, CMD_READ as READ, CMD_WRITE as WRITE,
    OPT_EXPORT_NAME, OPTION_MAGIC, SIMPLE_REPLY_MAGIC,
};
use thinply::nbd::proto::request_header;

/// A stream to a server. It ends when the server does.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A connection in the transmission phase.
pub struct Client {
    stream: Box<dyn Stream>,
    next: u64,
    /// Of the export, in bytes.
    pub size: u64,
}

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("the server sent {what}"))
}

impl Client {
    /// Takes the export `name` of a server that listens at a path.
    pub fn connect(socket: &Path, name: &str) -> Result<Self> {
        Self::over(Box::new(UnixStream::connect(socket)?), name)
    }

    /// Takes the export `name`.
    pub fn over(mut stream: Box<dyn Stream>, name: &str) -> Result<Self> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if !greeting.starts_with(b"NBDMAGICIHAVEOPT") {
            return Err(wrong("no NBD greeting"));
        }
        // Fixed newstyle without the padding, then NBD_OPT_EXPORT_NAME.
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(OPT_EXPORT_NAME.to_be_bytes());
        hello.extend((name.len() as u32).to_be_bytes());
        hello.extend(name.as_bytes());
        stream.write_all(&hello)?;
        let (mut size, mut flags) = ([0; 8], [0; 2]);
        stream.read_exact(&mut size)?;
        stream.read_exact(&mut flags)?;
        Ok(Self { stream, next: 0, size: u64::from_be_bytes(size) })
    }

    /// Appends a request without its payload to `out`; its cookie.
    pub fn request(
        &mut self,
        out: &mut Vec<u8>,
        flags: u16,
        command: u16,
        offset: u64,
        length: u32,
    ) -> u64 {
        self.next += 1;
        out.extend(request_header(flags, command, self.next, offset, length));
        self.next
    }

    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next reply: its error and cookie.
    pub fn reply(&mut self) -> Result<(u32, u64)> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        if reply[..4] != SIMPLE_REPLY_MAGIC.to_be_bytes() {
            return Err(wrong("no reply"));
        }
        let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| reply[at + i]));
        Ok((word(4), u64::from(word(8)) << 32 | u64::from(word(12))))
    }

    /// What follows the reply to a read.
    pub fn data(&mut self, length: u32) -> Result<Vec<u8>> {
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// A request while nothing else is under way.
    fn ask(&mut self, command: u16, offset: u64, length: u32, payload: &[u8]) -> Result<()> {
        let mut out = Vec::new();
        let cookie = self.request(&mut out, 0, command, offset, length);
        out.extend(payload);
        self.send(&out)?;
        match self.reply()? {
            (0, answered) if answered == cookie => Ok(()),
            (0, _) => Err(wrong("a reply to nothing")),
            (error, _) => Err(wrong(&format!("error {error}"))),
        }
    }

    /// Reads `length` bytes.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>> {
        self.ask(READ, offset, length, &[])?;
        self.data(length)
    }

    /// Writes `data` and makes it durable.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.ask(WRITE, offset, data.len() as u32, data)?;
        self.ask(FLUSH, 0, 0, &[])
    }

    /// Hangs up politely.
    pub fn disconnect(mut self) -> Result<()> {
        let mut out = Vec::new();
        self.request(&mut out, 0, DISCONNECT, 0, 0);
        self.send(&out)
    }
}

//! The least NBD client that can show a write: fixed newstyle, simple replies, one request at a
//! time.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

/// A connection to one export.
pub struct Client(UnixStream);

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("the server sent {what}"))
}

impl Client {
    /// Connects to the export `name`.
    pub fn connect(socket: &Path, name: &str) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if !greeting.starts_with(b"NBDMAGICIHAVEOPT") {
            return Err(wrong("no NBD greeting"));
        }
        // Fixed newstyle without the padding, then NBD_OPT_EXPORT_NAME.
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1u32.to_be_bytes());
        hello.extend((name.len() as u32).to_be_bytes());
        hello.extend(name.as_bytes());
        stream.write_all(&hello)?;
        let mut size_and_flags = [0; 10];
        stream.read_exact(&mut size_and_flags)?;
        Ok(Self(stream))
    }

    fn request(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) -> Result<()> {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        self.0.write_all(&bytes)
    }

    fn reply(&mut self) -> Result<()> {
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply)?;
        match reply {
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, ..] => Ok(()),
            [0x67, 0x44, 0x66, 0x98, ..] => Err(wrong("an error")),
            _ => Err(wrong("no reply")),
        }
    }

    /// Writes `data` and makes it durable.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.request(WRITE, offset, data.len() as u32, data)?;
        self.reply()?;
        self.request(FLUSH, 0, 0, &[])?;
        self.reply()
    }

    /// Reads `length` bytes.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>> {
        self.request(READ, offset, length, &[])?;
        self.reply()?;
        let mut data = vec![0; length as usize];
        self.0.read_exact(&mut data)?;
        Ok(data)
    }

    /// Hangs up politely.
    pub fn disconnect(mut self) -> Result<()> {
        self.request(DISCONNECT, 0, 0, &[])
    }
}

//! A client: what an NBD server shows, read and written from here.
//!
//! Fixed newstyle, one request at a time, structured replies and a metadata [`Context`]
//! where the server has them. The server is not trusted: what it sends is bounded by what was asked for, and an
//! answer that fits nothing ends the conversation.

mod blocks;
mod connection;

use std::io;
use std::time::Duration;

use connection::Connection;
pub use connection::Context;

use super::address::Address;
use super::proto::numbers::{FLAG_READ_ONLY, FLAG_SEND_FLUSH};
use crate::device::Extent;
use crate::error::{Error, ErrorKind, Result};

/// How long a server may keep silent, or take nothing, in the middle of something.
const PATIENCE: Duration = Duration::from_secs(60);

/// How much is asked about at once: what one answer tells is kept in memory.
const STATUS_LENGTH: u64 = 1 << 30;

/// An export of a server, in use over a connection of its own, which ends when this is dropped.
///
/// Errors name the server and what was asked of it. After one that the server did not report itself
/// nothing is known about what comes next on the connection, so that all that follows fails too.
#[derive(Debug)]
pub struct Client {
    address: Address,
    connection: Connection,
}

impl Client {
    /// Connects to a server and takes an export. Waits for a minute at most for each answer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] where there is no such socket, [`ErrorKind::Io`] where nobody
    /// answers, the server refuses, or speaks something else.
    pub fn connect(address: &Address) -> Result<Self> {
        Self::connect_for(address, Context::default())
    }

    /// [`Client::connect`], where [`Client::extents`] asks about this.
    ///
    /// # Errors
    ///
    /// Likewise.
    pub fn connect_for(address: &Address, context: Context) -> Result<Self> {
        Self::connect_within(address, context, PATIENCE)
    }

    fn connect_within(address: &Address, context: Context, patience: Duration) -> Result<Self> {
        let failed = |what: &str, error| Error::io(in_words(error), format!("{address}: {what}"));
        let stream = connection::stream(&address.place, patience)
            .map_err(|error| failed("connecting", error))?;
        let connection = Connection::negotiate(stream, &address.export, context)
            .map_err(|error| failed("agreeing on the export", error))?;
        Ok(Self { address: address.clone(), connection })
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.connection.size
    }

    /// Whether the server refuses changes.
    pub fn is_read_only(&self) -> bool {
        self.connection.flags & FLAG_READ_ONLY != 0
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] beyond the end, else what the server reports.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let what = self.range("reading", offset, buf.len() as u64)?;
        let (from, length) = self.around(offset, buf.len() as u64);
        if (from, length) == (offset, buf.len() as u64) {
            return self.read_blocks(&what, offset, buf);
        }
        let mut whole = vec![0; length as usize];
        self.read_blocks(&what, from, &mut whole)?;
        let skip = (offset - from) as usize;
        buf.copy_from_slice(&whole[skip..skip + buf.len()]);
        Ok(())
    }

    /// Whole blocks of the server's around a range.
    fn around(&self, offset: u64, length: u64) -> (u64, u64) {
        self.connection.blocks.around(offset, length, self.size())
    }

    fn read_blocks(&mut self, what: &str, mut at: u64, buf: &mut [u8]) -> Result<()> {
        for part in buf.chunks_mut(self.connection.blocks.most() as usize) {
            self.connection.read(at, part).map_err(|error| self.failed(what, error))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes `data` at `offset`. It is durable after a [`Client::flush`]. Where the server takes
    /// only larger blocks, what stands around it is read before, and written again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] beyond the end, [`ErrorKind::ReadOnly`] where the server refuses
    /// changes, else what the server reports; some of it may be written then.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let what = self.range("writing", offset, data.len() as u64)?;
        if self.is_read_only() {
            let detail = format!("{}: {what}: the export is read-only", self.address);
            return Err(Error::new(ErrorKind::ReadOnly, detail));
        }
        let (from, length) = self.around(offset, data.len() as u64);
        if (from, length) == (offset, data.len() as u64) {
            return self.write_blocks(&what, offset, data);
        }
        let mut whole = vec![0; length as usize];
        self.read_blocks(&what, from, &mut whole)?;
        let skip = (offset - from) as usize;
        whole[skip..skip + data.len()].copy_from_slice(data);
        self.write_blocks(&what, from, &whole)
    }

    fn write_blocks(&mut self, what: &str, mut at: u64, data: &[u8]) -> Result<()> {
        for part in data.chunks(self.connection.blocks.most() as usize) {
            self.connection.write(at, part).map_err(|error| self.failed(what, error))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes every write before it durable.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] where the server can't, else what it reports.
    pub fn flush(&mut self) -> Result<()> {
        if self.connection.flags & FLAG_SEND_FLUSH == 0 {
            let detail = format!("{}: the server does not flush", self.address);
            return Err(Error::new(ErrorKind::Unsupported, detail));
        }
        self.connection.flush().map_err(|error| self.failed("flushing", error))
    }

    /// The extents of a range, as the server tells them, in order: all of the range, or as much of
    /// its beginning as one answer describes. Never none, unless `length` is zero. A server that
    /// doesn't know shows one extent of data.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] beyond the end, else what the server reports.
    pub fn extents(&mut self, offset: u64, length: u64) -> Result<Vec<Extent>> {
        let what = self.range("asking about", offset, length)?;
        let length = length.min(STATUS_LENGTH);
        if length == 0 {
            return Ok(Vec::new());
        }
        let (from, whole) = self.around(offset, length);
        let told = self.connection.extents(from, whole as u32);
        let mut extents = told.map_err(|error| self.failed(&what, error))?;
        // The first one may begin before what was asked for, and the last one reach beyond it.
        let (mut before, mut left) = (offset - from, length);
        extents.retain_mut(|extent| {
            let skip = extent.length.min(before);
            before -= skip;
            extent.length = (extent.length - skip).min(left);
            left -= extent.length;
            extent.length > 0
        });
        if extents.is_empty() {
            let error = io::Error::new(io::ErrorKind::InvalidData, "the server told of less");
            return Err(self.failed(&what, error));
        }
        Ok(extents)
    }

    /// Hangs up. Dropping does so too, but can't tell whether the server was still there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] where it was not.
    pub fn disconnect(mut self) -> Result<()> {
        self.connection.disconnect().map_err(|error| self.failed("hanging up", error))
    }

    /// What is done to a range, in words, if the export has that range.
    fn range(&self, verb: &str, offset: u64, length: u64) -> Result<String> {
        let what = format!("{verb} {length} bytes at {offset}");
        match offset.checked_add(length) {
            Some(end) if end <= self.size() => Ok(what),
            _ => {
                let size = self.size();
                let detail = format!("{}: {what}: the export has {size} bytes", self.address);
                Err(Error::new(ErrorKind::OutOfRange, detail))
            }
        }
    }

    fn failed(&self, what: &str, error: io::Error) -> Error {
        Error::io(in_words(error), format!("{}: {what}", self.address))
    }
}

/// An error that a person understands: a call that has timed out says that it would block, and one
/// at the end of a stream that it could not fill a buffer.
fn in_words(error: io::Error) -> io::Error {
    use io::ErrorKind as Host;
    match error.kind() {
        Host::WouldBlock | Host::TimedOut => {
            io::Error::new(Host::TimedOut, "the server is there, but keeps silent")
        }
        Host::UnexpectedEof
        | Host::BrokenPipe
        | Host::ConnectionReset
        | Host::ConnectionAborted => {
            io::Error::new(Host::UnexpectedEof, "the server hung up instead of answering")
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests;

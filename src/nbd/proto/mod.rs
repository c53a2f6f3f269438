//! The NBD wire format: bytes to checked values and back. No I/O, no clock, no threads.
//!
//! Invariants: no input makes anything here panic; whatever is parsed says exactly how many bytes
//! it took; a value that could be built was checked, so that the server acts on it without looking
//! at the numbers again.

#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

use byteorder::{BigEndian, ByteOrder, ReadBytesExt};

mod negotiation;
pub mod numbers;
mod reply;
mod request;

pub use negotiation::{Catalog, Description, Negotiation, Refused, Session, Step};
pub use reply::{
    CHUNK_HEADER_LENGTH, DATA_HEADER_LENGTH, SIMPLE_REPLY_LENGTH, data_header, empty_chunk,
    error_chunk, error_offset_chunk, hole_chunk, simple_reply, status_chunk,
};
pub use request::{Command, REQUEST_LENGTH, Refusal, Request, Terms, Violation, request_header};

/// Longest export name or metadata query in bytes ("Values": strings).
pub const MAX_NAME: usize = 4096;

/// Most data bytes that one READ or WRITE carries ("Block size constraints").
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// Most bytes of a refused option or write that are read and dropped to stay in step with a
/// client; who announces more is hung up on.
pub const MAX_DRAIN: u32 = 64 << 20;

/// Most extents that one BLOCK_STATUS reply describes.
pub const MAX_EXTENTS: usize = 1 << 20;

/// Id of the one metadata context there is, `base:allocation`.
pub const BASE_ALLOCATION: u32 = 1;

/// Error values of the protocol ("Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted: a change to a read-only export.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Cannot allocate memory.
    NoMem = 12,
    /// Invalid argument.
    Invalid = 22,
    /// No space left on device, or a change beyond the end of the export.
    NoSpace = 28,
    /// Operation not supported: a fast zero that would be slow.
    NotSupported = 95,
    /// The server is shutting down.
    Shutdown = 108,
}

/// Takes big-endian fields off the front of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn u16(&mut self) -> Option<u16> {
        self.0.read_u16::<BigEndian>().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.0.read_u32::<BigEndian>().ok()
    }

    fn u64(&mut self) -> Option<u64> {
        self.0.read_u64::<BigEndian>().ok()
    }

    fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head)
    }

    /// A string behind its 32-bit length.
    fn string(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.bytes(length)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn put_u16(out: &mut Vec<u8>, value: u16) {
    let mut bytes = [0; 2];
    BigEndian::write_u16(&mut bytes, value);
    out.extend_from_slice(&bytes);
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    let mut bytes = [0; 4];
    BigEndian::write_u32(&mut bytes, value);
    out.extend_from_slice(&bytes);
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    let mut bytes = [0; 8];
    BigEndian::write_u64(&mut bytes, value);
    out.extend_from_slice(&bytes);
}

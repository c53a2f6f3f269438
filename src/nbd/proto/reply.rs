//! Encodes what the server sends in the transmission phase: simple replies and chunks of
//! structured ones.

use byteorder::{BigEndian, ByteOrder};

use super::numbers::*;
use super::{BASE_ALLOCATION, Errno, put_u16, put_u32, put_u64};
use crate::device::Extent;

/// Length of a simple reply without data.
pub const SIMPLE_REPLY_LENGTH: usize = 16;
/// Length of a structured reply chunk without its payload.
pub const CHUNK_HEADER_LENGTH: usize = 20;
/// What stands before the data of an `OFFSET_DATA` chunk: the header and the offset.
pub const DATA_HEADER_LENGTH: usize = CHUNK_HEADER_LENGTH + 8;

/// A simple reply ("Simple reply message"); the data of a read follows it.
pub fn simple_reply(cookie: u64, error: Option<Errno>) -> [u8; SIMPLE_REPLY_LENGTH] {
    let mut bytes = [0; SIMPLE_REPLY_LENGTH];
    BigEndian::write_u32(&mut bytes[..4], SIMPLE_REPLY_MAGIC);
    BigEndian::write_u32(&mut bytes[4..8], error.map_or(0, |errno| errno as u32));
    BigEndian::write_u64(&mut bytes[8..], cookie);
    bytes
}

fn chunk_header(cookie: u64, done: bool, kind: u16, payload: u32) -> [u8; CHUNK_HEADER_LENGTH] {
    let mut bytes = [0; CHUNK_HEADER_LENGTH];
    BigEndian::write_u32(&mut bytes[..4], STRUCTURED_REPLY_MAGIC);
    BigEndian::write_u16(&mut bytes[4..6], if done { REPLY_FLAG_DONE } else { 0 });
    BigEndian::write_u16(&mut bytes[6..8], kind);
    BigEndian::write_u64(&mut bytes[8..16], cookie);
    BigEndian::write_u32(&mut bytes[16..], payload);
    bytes
}

/// The chunk that ends a read of zero bytes (`NBD_REPLY_TYPE_NONE`).
pub fn empty_chunk(cookie: u64) -> [u8; CHUNK_HEADER_LENGTH] {
    chunk_header(cookie, true, REPLY_TYPE_NONE, 0)
}

/// What stands before the `length` data bytes of a read's chunk (`NBD_REPLY_TYPE_OFFSET_DATA`).
/// `length` is at most [`MAX_PAYLOAD`](super::MAX_PAYLOAD).
pub fn data_header(cookie: u64, done: bool, offset: u64, length: u32) -> [u8; DATA_HEADER_LENGTH] {
    let mut bytes = [0; DATA_HEADER_LENGTH];
    let header = chunk_header(cookie, done, REPLY_TYPE_OFFSET_DATA, length.saturating_add(8));
    bytes[..CHUNK_HEADER_LENGTH].copy_from_slice(&header);
    BigEndian::write_u64(&mut bytes[CHUNK_HEADER_LENGTH..], offset);
    bytes
}

/// A range of a read that is all zeros (`NBD_REPLY_TYPE_OFFSET_HOLE`).
pub fn hole_chunk(cookie: u64, done: bool, offset: u64, length: u32) -> [u8; 32] {
    let mut bytes = [0; 32];
    let header = chunk_header(cookie, done, REPLY_TYPE_OFFSET_HOLE, 12);
    bytes[..CHUNK_HEADER_LENGTH].copy_from_slice(&header);
    BigEndian::write_u64(&mut bytes[20..28], offset);
    BigEndian::write_u32(&mut bytes[28..], length);
    bytes
}

/// The chunk that fails a request, with a message for people (`NBD_REPLY_TYPE_ERROR`).
pub fn error_chunk(cookie: u64, errno: Errno, message: &str) -> Vec<u8> {
    error(cookie, REPLY_TYPE_ERROR, errno, message, None)
}

/// [`error_chunk`] that also says where on the device it failed (`NBD_REPLY_TYPE_ERROR_OFFSET`).
pub fn error_offset_chunk(cookie: u64, errno: Errno, message: &str, offset: u64) -> Vec<u8> {
    error(cookie, REPLY_TYPE_ERROR_OFFSET, errno, message, Some(offset))
}

fn error(cookie: u64, kind: u16, errno: Errno, message: &str, offset: Option<u64>) -> Vec<u8> {
    // The protocol allows 4096 bytes; our messages are a line each.
    let message = message.get(..message.len().min(512)).unwrap_or_default();
    let length = 6 + message.len() + if offset.is_some() { 8 } else { 0 };
    let mut out = Vec::with_capacity(CHUNK_HEADER_LENGTH + length);
    out.extend_from_slice(&chunk_header(cookie, true, kind, length as u32));
    put_u32(&mut out, errno as u32);
    put_u16(&mut out, message.len() as u16);
    out.extend_from_slice(message.as_bytes());
    if let Some(offset) = offset {
        put_u64(&mut out, offset);
    }
    out
}

/// The answer to BLOCK_STATUS in the `base:allocation` context (`NBD_REPLY_TYPE_BLOCK_STATUS`).
/// `extents` cover at most the 32-bit length of the request and are at most
/// [`MAX_EXTENTS`](super::MAX_EXTENTS).
pub fn status_chunk(cookie: u64, extents: &[Extent]) -> Vec<u8> {
    let length = 4 + 8 * extents.len();
    let mut out = Vec::with_capacity(CHUNK_HEADER_LENGTH + length);
    out.extend_from_slice(&chunk_header(cookie, true, REPLY_TYPE_BLOCK_STATUS, length as u32));
    put_u32(&mut out, BASE_ALLOCATION);
    for extent in extents {
        put_u32(&mut out, u32::try_from(extent.length).unwrap_or(u32::MAX));
        put_u32(&mut out, if extent.hole { STATE_HOLE | STATE_ZERO } else { 0 });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_have_the_documented_bytes() {
        let ok = simple_reply(0x0102_0304_0506_0708, None);
        assert_eq!(ok, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(simple_reply(0, Some(Errno::NoSpace))[4..8], [0, 0, 0, 28]);

        let data = data_header(9, true, 0x1000, 512);
        assert_eq!(data[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
        assert_eq!(data[8..], [0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 2, 8, 0, 0, 0, 0, 0, 0, 0x10, 0]);

        let hole = hole_chunk(9, false, 0x1000, 512);
        assert_eq!(hole[4..8], [0, 0, 0, 2]);
        assert_eq!(hole[16..], [0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0]);

        let error = error_offset_chunk(9, Errno::Io, "no", 7);
        assert_eq!(error[4..8], [0, 1, 0x80, 2]);
        assert_eq!(error[16..20], [0, 0, 0, 16]);
        assert_eq!(error[20..], [0, 0, 0, 5, 0, 2, b'n', b'o', 0, 0, 0, 0, 0, 0, 0, 7]);
        assert_eq!(error_chunk(9, Errno::Io, "no")[16..20], [0, 0, 0, 8]);
    }

    #[test]
    fn status_clamps_a_length_beyond_32_bits() {
        let extents = [Extent { length: 1 << 32, hole: true }, Extent { length: 512, hole: false }];
        let chunk = status_chunk(1, &extents);
        assert_eq!(chunk[4..8], [0, 1, 0, 5]);
        assert_eq!(chunk[20..24], [0, 0, 0, 1]);
        assert_eq!(chunk[24..32], [255, 255, 255, 255, 0, 0, 0, 3]);
        assert_eq!(chunk[32..], [0, 0, 2, 0, 0, 0, 0, 0]);
    }
}

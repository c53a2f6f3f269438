//! Header, footer and directory of a packed layer: what has to be read before anything else.

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::block_count;
use crate::format::packed::{
    ENTRY_SIZE, Entry, FOOTER_SIZE, Footer, HEADER_SIZE, PackedHeader, has_magic,
};

/// Bytes of the directory that are read at a time, a whole number of entries.
const STEP: u64 = (16 << 10) * ENTRY_SIZE;

/// The parts, checked against each other and the root.
#[derive(Debug)]
pub(super) struct Opening {
    pub header: PackedHeader,
    pub footer: Footer,
    pub entries: Vec<Entry>,
}

/// Fills a buffer from an offset; the first argument says what for.
pub(super) type ReadAt<'a> = &'a mut dyn FnMut(&'static str, u64, &mut [u8]) -> Result<()>;

impl Opening {
    /// Reads the parts of a file of `length` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::NotAnImage`], [`ErrorKind::Unsupported`], [`ErrorKind::Corrupt`], those of
    /// `read`.
    pub fn read(length: u64, read: ReadAt<'_>) -> Result<Self> {
        let mut header = Box::new([0; HEADER_SIZE as usize]);
        if length < HEADER_SIZE + FOOTER_SIZE {
            return Err(too_short(length, read)?);
        }
        read("reading the header", 0, &mut *header)?;
        let parsed = PackedHeader::decode(&header).map_err(|error| error.at(0))?;
        let at = length - FOOTER_SIZE;
        let mut footer = [0; FOOTER_SIZE as usize];
        read("reading the footer", at, &mut footer)?;
        let (footer, mut directory) =
            Footer::decode(&footer, length, &*header).map_err(|error| error.at(at))?;
        check_counts(&footer, &parsed).map_err(|error| error.at(at))?;
        let (mut at, end) = (footer.directory_offset, at);
        debug_assert_eq!(end - at, footer.group_count * ENTRY_SIZE);
        let mut bytes = vec![0; STEP.min(end - at) as usize];
        while at < end {
            bytes.truncate((end - at) as usize);
            read("reading the directory", at, &mut bytes)?;
            directory.push(&bytes, &parsed).map_err(|error| error.at(at))?;
            at += bytes.len() as u64;
        }
        let at = footer.directory_offset;
        let entries = directory.finish(&parsed).map_err(|error| error.at(at))?;
        Ok(Self { header: parsed, footer, entries })
    }
}

/// Nothing may count on more blocks than the device has.
fn check_counts(footer: &Footer, header: &PackedHeader) -> Result<()> {
    let blocks = block_count(header.virtual_size);
    let present = footer.data_blocks.checked_add(footer.zero_blocks);
    if present.is_none_or(|present| present > blocks) {
        let (data, zero) = (footer.data_blocks, footer.zero_blocks);
        let detail = format!("footer: {data} data and {zero} zero blocks of a device of {blocks}");
        return Err(Error::new(ErrorKind::Corrupt, detail));
    }
    Ok(())
}

/// What is wrong with a file that has no room for header and footer.
fn too_short(length: u64, read: ReadAt<'_>) -> Result<Error> {
    let mut magic = [0; 8];
    if length >= magic.len() as u64 {
        read("reading the magic", 0, &mut magic)?;
    }
    if has_magic(&magic) {
        let detail = format!("file of {length} bytes, too short for a packed layer");
        return Ok(Error::new(ErrorKind::Corrupt, detail).at(length));
    }
    Ok(Error::new(ErrorKind::NotAnImage, "not a packed layer: no magic"))
}

//! What is looked at in VHD images before QEMU reads them: whether they are whole disks.

use thinply::error::{Error, ErrorKind, Result};

use super::file::ImageFile;
use super::format::VHD;

/// Length of the footer; it had 511 bytes once.
const FOOTER: u64 = 512;
const TYPE: usize = 60;
const FIXED: u32 = 2;
const GROWING: u32 = 3;
const DIFFERENCING: u32 = 4;

/// Refuses what QEMU would read as a whole disk and isn't one.
pub fn check(file: &ImageFile) -> Result<()> {
    let fail = |kind, detail| Err(Error::new(kind, detail).in_file(&file.path));
    let first: [u8; FOOTER as usize] = file.bytes(0)?;
    let footer = if first.starts_with(VHD) {
        first
    } else {
        file.bytes(file.length.saturating_sub(FOOTER))?
    };
    if !footer.starts_with(VHD) {
        return fail(ErrorKind::InvalidInput, "not a VHD image: no footer".into());
    }
    match footer[TYPE..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes)) {
        FIXED | GROWING => Ok(()),
        DIFFERENCING => fail(
            ErrorKind::Unsupported,
            "a VHD image that holds only what differs from another one, which is not read here: \
             merge the two first"
                .into(),
        ),
        kind => fail(ErrorKind::Corrupt, format!("a VHD image of type {kind}, expected 2 or 3")),
    }
}

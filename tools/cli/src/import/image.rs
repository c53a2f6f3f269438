//! Disk images, of which any part can be read: one alone, and a stack of them as one disk.

use thinply::chain::{Chain, Kind, MapExtent};
use thinply::derive::Content;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Rights;
use thinply::types::Identity;

use super::file::ImageFile;
use super::source::Disk;
use crate::io::pump::{BUFFER, Feeder, Piece, is_zero};

/// What stands at a place of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What lies under the image.
    Below,
    Zeros,
    /// Bytes of a file, compressed or not.
    Data {
        compressed: bool,
    },
}

impl Part {
    pub const PLAIN: Self = Self::Data { compressed: false };
}

/// An image without what lies under it. Offsets and ranges lie inside it.
pub trait Image: Send + Sync {
    /// Size of the disk in bytes.
    fn size(&self) -> u64;

    /// What stands at an offset, and for how many bytes at least, of `length` at most.
    fn part(&self, offset: u64, length: u64) -> Result<(Part, u64)>;

    /// Fills `buf` from `offset`. What lies under the image is undefined.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
}

/// A file whose bytes are the disk's.
impl Image for ImageFile {
    fn size(&self) -> u64 {
        self.length
    }

    fn part(&self, offset: u64, length: u64) -> Result<(Part, u64)> {
        let (hole, there) = self.hole(offset)?;
        Ok((if hole { Part::Zeros } else { Part::PLAIN }, there.min(length)))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.fill(offset, buf)
    }
}

/// Images, the top one first, as one disk. Nothing lies under it.
pub struct Stack(pub Vec<Box<dyn Image>>);

impl Stack {
    /// Whose the bytes at an offset are, and what [`Image::part`] says of them.
    fn owner(&self, offset: u64, mut length: u64) -> Result<(Option<&dyn Image>, Part, u64)> {
        for image in &self.0 {
            // A shorter image reads as zeros behind its end, whatever lies under it.
            let Some(left) = image.size().checked_sub(offset).filter(|left| *left > 0) else {
                break;
            };
            let (part, there) = image.part(offset, length.min(left))?;
            length = there;
            if part != Part::Below {
                return Ok((Some(&**image), part, length));
            }
        }
        Ok((None, Part::Zeros, length))
    }
}

impl Image for Stack {
    fn size(&self) -> u64 {
        self.0.first().map_or(0, |image| image.size())
    }

    fn part(&self, offset: u64, length: u64) -> Result<(Part, u64)> {
        self.owner(offset, length).map(|(_, part, length)| (part, length))
    }

    fn read(&self, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            let (image, part, length) = self.owner(offset, buf.len() as u64)?;
            let (now, later) = buf.split_at_mut(length as usize);
            match (image, part) {
                (Some(image), Part::Data { .. }) => image.read(offset, now)?,
                _ => now.fill(0),
            }
            (offset, buf) = (offset + length, later);
        }
        Ok(())
    }
}

/// The most that the files of an image can hold: no two places of it share their bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Room {
    /// Bytes of all files.
    pub stored: u64,
    /// Bytes that they may expand to.
    pub expanded: u64,
}

impl Room {
    fn check(self, plain: u64, compressed: u64) -> Result<()> {
        // The last cluster may be cut short.
        const SLACK: u64 = 4 << 20;
        if plain > self.stored.saturating_add(SLACK)
            || compressed > self.expanded.saturating_add(SLACK)
        {
            let detail = format!("holds more than its files of {} bytes can", self.stored);
            return Err(Error::new(ErrorKind::Corrupt, detail));
        }
        Ok(())
    }
}

/// An image to be read once, from beginning to end. What lies under it is left out.
pub struct ImageDisk {
    pub image: Box<dyn Image>,
    pub rights: Rights,
    pub room: Room,
}

impl ImageDisk {
    /// As much as is alike from `offset` on; of data, a buffer at most.
    fn extent(&self, offset: u64, size: u64) -> Result<(Part, u64)> {
        let (part, mut length) = self.image.part(offset, size - offset)?;
        let most = if let Part::Data { .. } = part { BUFFER as u64 } else { u64::MAX };
        while offset + length < size && length < most {
            let (next, more) = self.image.part(offset + length, size - offset - length)?;
            if next != part {
                break;
            }
            length += more;
        }
        Ok((part, length.min(most)))
    }
}

impl Disk for ImageDisk {
    fn length(&self) -> Option<u64> {
        Some(self.image.size())
    }

    fn rights(&self) -> Rights {
        self.rights.clone()
    }

    fn read(&self, feeder: &Feeder, _: Option<&Chain>) -> Result<()> {
        let size = self.image.size();
        let (mut at, mut plain, mut compressed) = (0, 0, 0);
        while at < size {
            let (part, length) = self.extent(at, size)?;
            let open = match part {
                Part::Below => true,
                Part::Zeros => feeder.send(Piece::Zeros(at, length)),
                Part::Data { compressed: packed } => {
                    let Some(mut buffer) = feeder.buffer(length as usize) else { return Ok(()) };
                    self.image.read(at, &mut buffer[..])?;
                    // Not every format tells of zeros that it doesn't hold.
                    if !buffer.chunks(4096).all(is_zero) {
                        *(if packed { &mut compressed } else { &mut plain }) += length;
                        self.room.check(plain, compressed)?;
                    }
                    feeder.send(Piece::Data(at, buffer))
                }
            };
            if !open {
                return Ok(());
            }
            at += length;
        }
        Ok(())
    }
}

/// A whole disk to be compared with another.
impl Content for ImageDisk {
    fn length(&self) -> u64 {
        self.image.size()
    }

    fn owners(&self) -> Vec<Option<Identity>> {
        Vec::new()
    }

    fn next(&self, offset: u64) -> Result<u64> {
        let size = self.image.size();
        let mut at = offset;
        while at < size {
            let (part, length) = self.image.part(at, size - at)?;
            if let Part::Data { .. } = part {
                break;
            }
            at += length;
        }
        // A whole number of the pieces that are compared in one go.
        Ok((at >> 24 << 24).max(offset).min(size))
    }

    fn extents(&self, offset: u64, length: u64, out: &mut Vec<MapExtent>) -> Result<()> {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let (part, length) = self.image.part(at, end - at)?;
            let kind = if let Part::Data { .. } = part { Kind::Data } else { Kind::Absent };
            out.push(MapExtent { offset: at, length, depth: None, kind });
            at += length;
        }
        Ok(())
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.image.read(offset, buf)
    }
}

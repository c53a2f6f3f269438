//! VMDK images: the descriptor, which is read here, and the extents that it names.
//!
//! Flat extents are read as they are, sparse ones by QEMU, each alone: so no name in a descriptor is
//! ever followed by anybody but the opener, which asks the user.

use std::sync::{Mutex, PoisonError};

use thinply::error::{Error, ErrorKind, Result};
use thinply::types::SECTOR_SIZE;

use super::file::ImageFile;
use super::format::{VMDK_DESCRIPTOR, VMDK_SPARSE};
use super::image::{Image, Part};
use super::qemu::QemuImage;

/// Largest descriptor that is read.
const MAX_DESCRIPTOR: u64 = 1 << 20;
/// A content id that means none.
const NO_PARENT: u32 = u32::MAX;
/// Length of a sparse extent's header.
pub const HEADER_SIZE: usize = 512;

fn corrupt<T>(detail: String) -> Result<T> {
    Err(Error::new(ErrorKind::Corrupt, format!("VMDK image: {detail}")))
}

fn unsupported<T>(what: &str) -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, format!("a VMDK image with {what}, not read here")))
}

/// Where an extent's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Zeros,
    /// As they are, in a file of that name, from that byte on.
    Flat(String, u64),
    /// In a sparse extent of that name.
    Sparse(String),
}

/// What a descriptor says that matters to a reader.
#[derive(Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Changes with the content.
    pub id: u32,
    /// The parent's name, and the id that it had, if this holds only what differs from one.
    pub parent: Option<(String, u32)>,
    /// Length in bytes and place of each extent, in order.
    pub extents: Vec<(u64, Kind)>,
}

impl Descriptor {
    /// The descriptor in a file, from `offset` on, of at most `length` bytes.
    pub fn read(file: &ImageFile, offset: u64, length: u64) -> Result<Self> {
        let length = length.min(file.length.saturating_sub(offset));
        if length > MAX_DESCRIPTOR {
            return corrupt(format!(
                "a descriptor of {length} bytes, expected at most {MAX_DESCRIPTOR}"
            ));
        }
        let mut bytes = vec![0; length as usize];
        file.fill(offset, &mut bytes)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Self::parse(&bytes[..end])
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        if !bytes.starts_with(VMDK_DESCRIPTOR) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "not a VMDK image of a kind that is read here: neither a sparse extent nor a descriptor",
            ));
        }
        // A name in another encoding is only shown, or matched by what the user calls it.
        let text = str::from_utf8(bytes)
            .map_or_else(|_| bytes.iter().copied().map(char::from).collect(), ToOwned::to_owned);
        let (mut id, mut parent_id, mut parent) = (0, NO_PARENT, None);
        let mut extents = Vec::new();
        for line in text.lines().map(str::trim) {
            match line.split_once('=').map(|(key, value)| (key.trim(), value.trim())) {
                _ if line.starts_with('#') => {}
                Some(("CID", value)) => id = content_id(value)?,
                Some(("parentCID", value)) => parent_id = content_id(value)?,
                Some(("parentFileNameHint", value)) => parent = Some(unquoted(value).to_owned()),
                // The storage's own making has its bytes elsewhere.
                Some(("isNativeSnapshot", value)) if unquoted(value) != "no" => {
                    return unsupported("a snapshot that the storage has made");
                }
                _ => extents.extend(extent(line)?),
            }
        }
        let parent = match (parent_id, parent) {
            (NO_PARENT, _) => None,
            (parent_id, Some(parent)) => Some((parent, parent_id)),
            _ => return corrupt("has a parent, but doesn't name it".into()),
        };
        Ok(Self { id, parent, extents })
    }
}

fn content_id(value: &str) -> Result<u32> {
    u32::from_str_radix(value, 16)
        .or_else(|_| corrupt(format!("content id {value:?}, expected a number of 32 bits")))
}

fn unquoted(value: &str) -> &str {
    value.trim_matches('"')
}

/// An extent, as in `RW 4192256 SPARSE "disk-s001.vmdk"`; none for a line that is none.
fn extent(line: &str) -> Result<Option<(u64, Kind)>> {
    let wrong = || corrupt(format!("an extent described as {line:?}"));
    let (access, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match access {
        "RW" | "RDONLY" => {}
        "NOACCESS" => return unsupported("an extent that nobody may read"),
        _ => return Ok(None),
    }
    let (before, name) = match rest.split_once('"') {
        Some((before, rest)) => match rest.split_once('"') {
            Some((name, after)) => (before, Some((name, after.trim()))),
            None => return wrong(),
        },
        None => (rest, None),
    };
    let words: Vec<_> = before.split_whitespace().collect();
    let [sectors, kind] = words[..] else { return wrong() };
    let bytes = |sectors: &str| sectors.parse::<u64>().ok()?.checked_mul(SECTOR_SIZE);
    let Some(length) = bytes(sectors).filter(|length| *length > 0) else { return wrong() };
    let kind = match (kind, name) {
        ("ZERO", None) => Kind::Zeros,
        ("FLAT" | "VMFS", Some((name, ""))) => Kind::Flat(name.to_owned(), 0),
        ("FLAT" | "VMFS", Some((name, offset))) => match bytes(offset) {
            Some(offset) => Kind::Flat(name.to_owned(), offset),
            None => return wrong(),
        },
        ("SPARSE", Some((name, ""))) => Kind::Sparse(name.to_owned()),
        ("ZERO" | "FLAT" | "VMFS" | "SPARSE", _) => return wrong(),
        (kind, _) => return unsupported(&format!("an extent of type {kind:?}")),
    };
    Ok(Some((length, kind)))
}

/// What matters of a sparse extent's header.
#[derive(Debug)]
pub struct Sparse {
    bytes: [u8; HEADER_SIZE],
    /// Size of the disk, or of the part of one, in bytes.
    pub size: u64,
    pub compressed: bool,
}

impl Sparse {
    /// Checks the header of a sparse extent.
    pub fn check(bytes: [u8; HEADER_SIZE]) -> Result<Self> {
        if !bytes.starts_with(VMDK_SPARSE) {
            return Err(Error::new(ErrorKind::InvalidInput, "not a sparse extent of a VMDK image"));
        }
        let mut sparse = Self { bytes, size: 0, compressed: bytes[77] != 0 };
        let sectors = sparse.u64_at(12);
        // Then nothing says that this is the extent, and all of the image.
        if sectors == 0 || sectors > u64::MAX / 2 / SECTOR_SIZE {
            return corrupt(format!("a sparse extent of {sectors} sectors"));
        }
        sparse.size = sectors * SECTOR_SIZE;
        Ok(sparse)
    }

    fn u64_at(&self, at: usize) -> u64 {
        self.bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// Place and most bytes of the descriptor inside, if there is one.
    pub fn descriptor(&self) -> (u64, u64) {
        let bytes = |at| self.u64_at(at).saturating_mul(SECTOR_SIZE);
        (bytes(28), bytes(36))
    }

    /// The header as QEMU gets it.
    pub fn header(&self) -> &[u8] {
        &self.bytes
    }

    /// The first sectors of an extent without a descriptor inside, so that QEMU takes it for an
    /// image of its own: content ids stand where it looks for them. There the spare directory is
    /// otherwise, which nobody needs then.
    pub fn alone(&self) -> Result<Vec<u8>> {
        const IDS: &[u8] = b"CID=00000000\nparentCID=ffffffff\n";
        const FLAGS: usize = 8;
        const HAS_SPARE_DIRECTORY: u8 = 1 << 1;
        let directory = self.u64_at(56);
        if directory < 2 {
            return unsupported("a grain directory right behind its header");
        }
        let mut bytes = self.bytes.to_vec();
        bytes[FLAGS] &= !HAS_SPARE_DIRECTORY;
        bytes.extend(IDS);
        bytes.resize(2 * HEADER_SIZE, 0);
        Ok(bytes)
    }
}

/// An extent that is open.
pub enum Extent {
    Zeros,
    Flat(ImageFile, u64),
    Sparse(Box<QemuImage>),
}

/// Extents one behind the other.
pub struct Extents {
    /// Each with its end on the disk.
    extents: Vec<(u64, Extent)>,
    /// The one that was read last. Of the others no program runs.
    current: Mutex<usize>,
}

impl Extents {
    /// The disk of these extents, each with its length.
    pub fn new(extents: Vec<(u64, Extent)>) -> Result<Self> {
        let mut end = 0u64;
        let mut ends = Vec::new();
        for (length, extent) in extents {
            let Some(next) = end.checked_add(length).filter(|end| *end <= u64::MAX / 2) else {
                return corrupt("extents of more than 2^63 bytes".into());
            };
            end = next;
            ends.push((end, extent));
        }
        if ends.is_empty() {
            return corrupt("a descriptor without extents".into());
        }
        Ok(Self { extents: ends, current: Mutex::default() })
    }

    /// The extent at an offset, where that is in it, and how much of it is left.
    fn at(&self, offset: u64) -> Option<(&Extent, u64, u64)> {
        let index = self.extents.partition_point(|(end, _)| *end <= offset);
        let (end, extent) = self.extents.get(index)?;
        let begin = index.checked_sub(1).map_or(0, |before| self.extents[before].0);
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if *current != index
            && let Some((_, Extent::Sparse(last))) = self.extents.get(*current)
        {
            last.rest();
        }
        *current = index;
        Some((extent, offset - begin, end - offset))
    }
}

impl Image for Extents {
    fn size(&self) -> u64 {
        self.extents.last().map_or(0, |(end, _)| *end)
    }

    fn part(&self, offset: u64, length: u64) -> Result<(Part, u64)> {
        let Some((extent, inside, left)) = self.at(offset) else {
            return Ok((Part::Zeros, length));
        };
        let length = length.min(left);
        match extent {
            Extent::Zeros => Ok((Part::Zeros, length)),
            Extent::Flat(file, begin) => file.part(begin + inside, length),
            Extent::Sparse(image) => image.part(inside, length),
        }
    }

    fn read(&self, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        while let Some((extent, inside, left)) = self.at(offset).filter(|_| !buf.is_empty()) {
            let length = left.min(buf.len() as u64);
            let (now, later) = buf.split_at_mut(length as usize);
            match extent {
                Extent::Zeros => now.fill(0),
                Extent::Flat(file, begin) => file.fill(begin + inside, now)?,
                Extent::Sparse(image) => image.read(inside, now)?,
            }
            (offset, buf) = (offset + length, later);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Descriptor> {
        Descriptor::parse(format!("# Disk DescriptorFile\nversion=1\n{body}").as_bytes())
    }

    #[test]
    fn a_descriptor_is_read_as_vmware_and_qemu_write_it() {
        let read = parse(
            "encoding = \"windows-1252\"\r\nCID=16afd15\r\nparentCID=ffffffff\r\n\
             isNativeSnapshot=\"no\"\ncreateType=\"vmfs\"\nchangeTrackPath=\"a-ctk.vmdk\"\n\
             RW 8 VMFS \"VM FS.vmdk\"\nRW 16 FLAT \"FLAT\" 128\nRDONLY 24 SPARSE \"a-s003.vmdk\"\n\
             RW 32 ZERO\nddb.encoding = \"x\"\n",
        );
        let wanted = vec![
            (4096, Kind::Flat("VM FS.vmdk".into(), 0)),
            (8192, Kind::Flat("FLAT".into(), 65536)),
            (12288, Kind::Sparse("a-s003.vmdk".into())),
            (16384, Kind::Zeros),
        ];
        assert_eq!(read.unwrap(), Descriptor { id: 0x16a_fd15, parent: None, extents: wanted });
        let delta = parse("CID=1\nparentCID=2\nparentFileNameHint=\"C:\\a.vmdk\"\n").unwrap();
        assert_eq!(delta.parent, Some(("C:\\a.vmdk".into(), 2)));
        let old = b"# Disk DescriptorFile\nRW 8 FLAT \"\xfc.vmdk\" 0";
        let name = Kind::Flat("\u{fc}.vmdk".into(), 0);
        assert_eq!(Descriptor::parse(old).unwrap().extents, [(4096, name)]);
    }

    #[test]
    fn what_a_descriptor_may_not_say_is_refused() {
        for (line, what) in [
            ("RW 8 FLAT", "described"),
            ("RW 8 FLAT \"a", "described"),
            ("RW 8 FLAT \"a\" x", "described"),
            ("RW 8 SPARSE \"a\" 0", "described"),
            ("RW x FLAT \"a\"", "described"),
            ("RW 0 FLAT \"a\"", "described"),
            ("RW 36028797018963968 FLAT \"a\"", "described"),
            ("RW 8 FLAT FLAT \"a\"", "described"),
            ("RW 8 VMFSRAW \"a\"", "VMFSRAW"),
            ("RW 8 SESPARSE \"a\"", "SESPARSE"),
            ("NOACCESS 8 FLAT \"a\"", "nobody may read"),
            ("isNativeSnapshot=yes", "snapshot"),
            ("CID=x", "content id"),
            ("parentCID=1", "doesn't name it"),
        ] {
            let message = parse(line).unwrap_err().to_string();
            assert!(message.contains(what), "{line}: {message}");
        }
        assert!(Descriptor::parse(b"RW 8 FLAT \"a\"").is_err());
        assert!(Extents::new(Vec::new()).is_err());
        let long = || (u64::MAX / 2, Extent::Zeros);
        assert!(Extents::new(vec![long(), long()]).is_err());
    }

    #[test]
    fn a_header_leads_to_no_descriptor_that_names_files() {
        let mut bytes = [0; HEADER_SIZE];
        assert!(Sparse::check(bytes).is_err());
        bytes[..4].copy_from_slice(VMDK_SPARSE);
        // No sectors, and a descriptor.
        bytes[28] = 1;
        assert!(Sparse::check(bytes).unwrap_err().to_string().contains("0 sectors"));
        bytes[12..20].fill(255);
        assert!(Sparse::check(bytes).is_err());
        bytes[12..20].copy_from_slice(&8u64.to_le_bytes());
        let sparse = Sparse::check(bytes).unwrap();
        assert_eq!((sparse.size, sparse.descriptor()), (4096, (512, 0)));
        assert!(sparse.alone().is_err());
        (bytes[8], bytes[56]) = (3, 2);
        let alone = Sparse::check(bytes).unwrap().alone().unwrap();
        assert_eq!((alone.len(), alone[8]), (1024, 1));
        assert!(alone[512..].starts_with(b"CID="));
    }
}

//! The header of a qcow2 image, checked before anybody acts on it: what is not read, or what a
//! reader wouldn't notice, is refused, and tables lie inside the file, so that memory follows the
//! file. And what it says of other files.

use thinply::error::{Error, ErrorKind, Result};

use super::file::ImageFile;
use super::format::{QCOW2, serve_it};

/// Bytes of the header that are looked at, but for what it refers to.
pub const HEADER_SIZE: usize = 112;
/// Largest table of one level that is kept, and all of the other level's that are.
const MAX_TABLES: u64 = 64 << 20;
/// Second-level tables that the library keeps.
const KEPT_TABLES: u64 = 128;
const MAX_SIZE: u64 = 1 << 56;
/// Longest name of a backing file.
const MAX_NAME: u32 = 1023;

/// Extensions of the header.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE_NAME: u32 = 0x4441_5441;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const ZSTD: u8 = 1;

fn corrupt<T>(detail: String) -> Result<T> {
    Err(Error::new(ErrorKind::Corrupt, format!("qcow2 image: {detail}")))
}

fn unsupported<T>(what: &str) -> Result<T> {
    let detail =
        format!("a qcow2 image with {what}, which is not read here: {}", serve_it("qcow2"));
    Err(Error::new(ErrorKind::Unsupported, detail))
}

/// What matters of a header that was checked.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The size of a cluster in bytes.
    pub cluster: u64,
    /// Whether it has what the library doesn't read: clusters of zstd, or extended L2 entries.
    pub for_qemu: bool,
    /// The backing file as it stands in the image, and its format if it stands there.
    pub backing: Option<(String, Option<String>)>,
    /// The data file, if all of the content is in one.
    pub data_file: Option<String>,
}

impl Header {
    /// Checks the header of an image, and reads what it refers to.
    pub fn read(file: &ImageFile) -> Result<Self> {
        let bytes = file.bytes(0)?;
        let mut header = check(&bytes, file.length)?;
        let [version, length] = [4, 100].map(|at| u32_at(&bytes, at));
        // The first cluster holds all of it.
        let mut first = vec![0; header.cluster.min(file.length) as usize];
        file.fill(0, &mut first)?;
        let name_at = u64_at(&bytes, 8);
        let extensions = if version == 2 { 72 } else { u64::from(length).max(104) };
        let end = if name_at == 0 { header.cluster } else { name_at };
        let (format, data_file) = references(part(&first, extensions, end)?)?;
        let name_length = u32_at(&bytes, 16);
        if name_at != 0 && name_length != 0 {
            if name_length > MAX_NAME {
                return corrupt(format!("the name of a backing file has {name_length} bytes"));
            }
            let name = part(&first, name_at, name_at.saturating_add(name_length.into()))?;
            header.backing = Some((text(name)?, format));
        }
        if u64_at(&bytes, 72) & DATA_FILE != 0 && version == 3 {
            header.data_file = Some(data_file.unwrap_or_default());
        }
        Ok(header)
    }
}

/// A part of the first cluster.
fn part(first: &[u8], from: u64, to: u64) -> Result<&[u8]> {
    let range = usize::try_from(from).ok().zip(usize::try_from(to).ok());
    // A file may end within it.
    let range = range.map(|(from, to)| from..to.min(first.len().max(from)));
    match range.and_then(|range| first.get(range)) {
        Some(bytes) => Ok(bytes),
        None => corrupt(format!("bytes {from} to {to} of a header of {}", first.len())),
    }
}

fn text(bytes: &[u8]) -> Result<String> {
    String::from_utf8(bytes.to_vec())
        .or_else(|_| corrupt("a name in the header that is not UTF-8".into()))
}

/// The backing file's format and the data file's name, from the extensions of a header.
fn references(mut rest: &[u8]) -> Result<(Option<String>, Option<String>)> {
    let (mut format, mut data_file) = (None, None);
    while let Some((head, after)) = rest.split_first_chunk::<8>() {
        let [kind, length] = [0, 4].map(|at| u32_at(head, at));
        if kind == END {
            break;
        }
        let Some((bytes, next)) = after.split_at_checked(length as usize) else {
            return corrupt(format!("an extension {kind:#x} of {length} bytes in its header"));
        };
        match kind {
            BACKING_FORMAT => format = Some(text(bytes)?),
            DATA_FILE_NAME => data_file = Some(text(bytes)?),
            _ => {}
        }
        // Each is padded to eight bytes.
        let padding = length.next_multiple_of(8) - length;
        rest = next.get(padding as usize..).unwrap_or_default();
    }
    Ok((format, data_file))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// Checks the header of an image of `length` bytes; `header` has zeros where the file is shorter.
fn check(header: &[u8; HEADER_SIZE], length: u64) -> Result<Header> {
    if !header.starts_with(QCOW2) {
        return Err(Error::new(ErrorKind::InvalidInput, "not a qcow2 image: no magic"));
    }
    let version = u32_at(header, 4);
    if !(2..=3).contains(&version) {
        return unsupported(&format!("version {version}"));
    }
    if u32_at(header, 32) != 0 {
        return unsupported("encryption");
    }
    let for_qemu = version == 3 && check_features(u64_at(header, 72), header[104])?;
    let bits = u32_at(header, 20);
    if !(9..=21).contains(&bits) {
        return corrupt(format!("clusters of 2^{bits} bytes, expected 2^9 to 2^21"));
    }
    let entry = if version == 3 && u64_at(header, 72) & EXTENDED_L2 != 0 { 16 } else { 8 };
    let (size, table) = (u64_at(header, 24), u64_at(header, 40));
    check_tables((1 << bits, entry), size, table, u32_at(header, 36).into(), length)?;
    Ok(Header { cluster: 1 << bits, for_qemu, ..Header::default() })
}

/// Answers whether only QEMU reads it.
fn check_features(features: u64, compression: u8) -> Result<bool> {
    if features & CORRUPT != 0 {
        return corrupt(format!(
            "marked as corrupt by a program that found it so: `qemu-img check -r all SRC` mends what \
             it can, or, to take it as it is, {}",
            serve_it("qcow2")
        ));
    }
    if features & DIRTY != 0 {
        return unsupported(
            "reference counts that were not written back when it was last in use (`qemu-img check \
             -r all SRC` mends them)",
        );
    }
    if features & COMPRESSION != 0 && compression != ZSTD {
        return unsupported("an unknown compression");
    }
    match features & !(DATA_FILE | COMPRESSION | EXTENDED_L2) {
        0 => Ok(features & (COMPRESSION | EXTENDED_L2) != 0),
        unknown => unsupported(&format!("unknown features {unknown:#x}")),
    }
}

/// The first-level table must lie in the file and cover the disk, by second-level tables of a cluster
/// each with entries of that size.
fn check_tables(
    (cluster, entry): (u64, u64),
    size: u64,
    offset: u64,
    entries: u64,
    length: u64,
) -> Result<()> {
    if size > MAX_SIZE {
        return corrupt(format!("a disk of {size} bytes, expected at most 2^56"));
    }
    // Both factors are at most 2^21.
    let needed = size.div_ceil(cluster * (cluster / entry));
    if entries < needed {
        return corrupt(format!("an L1 table of {entries} entries, expected {needed}"));
    }
    let table = entries * 8;
    if !offset.is_multiple_of(cluster) || offset.checked_add(table).is_none_or(|end| end > length) {
        return corrupt(format!(
            "an L1 table of {table} bytes at byte {offset}, expected one in a file of {length}"
        ));
    }
    if table > MAX_TABLES / 2 || needed.min(KEPT_TABLES) * cluster > MAX_TABLES {
        return unsupported("tables that take more than 64 MiB of memory");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of version 3 that is right, for a file of 1 MiB.
    fn header() -> [u8; HEADER_SIZE] {
        let mut header = [0; HEADER_SIZE];
        header[..4].copy_from_slice(b"QFI\xfb");
        header[7] = 3;
        header[23] = 16;
        header[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        header[39] = 2;
        header[45] = 3;
        header
    }

    fn refusal(change: impl Fn(&mut [u8; HEADER_SIZE])) -> String {
        let mut changed = header();
        change(&mut changed);
        check(&changed, 1 << 20).unwrap_err().to_string()
    }

    #[test]
    fn what_would_be_misread_is_refused() {
        let plain = check(&header(), 1 << 20).unwrap();
        assert_eq!(plain, Header { cluster: 65536, ..Header::default() });
        assert!(refusal(|h| h[0] = 0).contains("no magic"));
        assert!(refusal(|h| h[7] = 1).contains("version 1"));
        assert!(refusal(|h| h[35] = 1).contains("encryption"));
        assert!(refusal(|h| h[79] = 1).contains("qemu-img check"));
        assert!(refusal(|h| h[79] = 2).contains("corrupt"));
        assert!(refusal(|h| (h[79], h[104]) = (8, 2)).contains("unknown compression"));
        // Such entries take twice the tables.
        assert!(refusal(|h| h[79] = 16).contains("expected 4"));
        assert!(refusal(|h| h[78] = 1).contains("0x100"));
        assert!(refusal(|h| h[23] = 8).contains("2^8"));
        assert!(refusal(|h| h[20] = 255).contains("clusters"));
        assert!(refusal(|h| h[24] = 2).contains("2^56"));
        assert!(refusal(|h| h[39] = 1).contains("expected 2"));
        assert!(refusal(|h| h[36] = 255).contains("a file of"));
        assert!(refusal(|h| h[40] = 255).contains("a file of"));
        assert!(refusal(|h| h[47] = 1).contains("a file of"));
    }

    #[test]
    fn only_qemu_reads_some() {
        let changed = |change: &dyn Fn(&mut [u8; HEADER_SIZE])| {
            let mut changed = header();
            change(&mut changed);
            check(&changed, 1 << 20).unwrap().for_qemu
        };
        assert!(!changed(&|h| h[79] = 4));
        assert!(changed(&|h| (h[79], h[104]) = (8, 1)));
        assert!(changed(&|h| (h[79], h[39]) = (16, 4)));
    }

    #[test]
    fn references_are_read_from_the_extensions() {
        let extension = |kind: u32, bytes: &[u8]| {
            let head = [kind, bytes.len() as u32].map(u32::to_be_bytes).concat();
            let mut extension = [&head, bytes].concat();
            extension.resize(extension.len().next_multiple_of(8), 0);
            extension
        };
        let both = [
            extension(0x6803_f857, b"names"),
            extension(BACKING_FORMAT, b"raw"),
            extension(DATA_FILE_NAME, b"data.raw"),
            extension(END, b""),
            extension(BACKING_FORMAT, b"vmdk"),
        ];
        let found = references(&both.concat()).unwrap();
        assert_eq!(found, (Some("raw".into()), Some("data.raw".into())));
        assert_eq!(references(&[]).unwrap(), (None, None));
        assert!(references(&extension(1, b"12345678")[..15]).is_err());
        assert!(references(&extension(BACKING_FORMAT, b"\xff")).is_err());
        assert_eq!(part(&[1, 2, 3], 1, 9).unwrap(), [2, 3]);
        assert!(part(&[1, 2, 3], 4, 9).is_err() && part(&[1, 2, 3], 2, 1).is_err());
        assert!(part(&[], u64::MAX, u64::MAX).is_err());
    }

    #[test]
    fn memory_for_tables_is_bounded() {
        let mut wide = header();
        wide[23] = 21;
        // A disk of 32 TiB in clusters of 2 MiB.
        wide[24..32].copy_from_slice(&(1u64 << 45).to_be_bytes());
        wide[39] = 64;
        wide[40..48].copy_from_slice(&(1u64 << 21).to_be_bytes());
        assert!(check(&wide, 1 << 30).unwrap_err().to_string().contains("memory"));
        wide[24..32].copy_from_slice(&(1u64 << 44).to_be_bytes());
        check(&wide, 1 << 30).unwrap();
    }
}

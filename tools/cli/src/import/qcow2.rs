//! The header of a qcow2 image, checked before a library acts on it: what it doesn't read, or
//! wouldn't notice, is refused, and tables lie inside the file, so that memory follows the file.

use thinply::error::{Error, ErrorKind, Result};

use super::format::serve_it;

/// Bytes of the header that are looked at.
pub const HEADER_SIZE: usize = 112;
/// Largest table of one level that is kept, and all of the other level's that are.
const MAX_TABLES: u64 = 64 << 20;
/// Second-level tables that the library keeps.
const KEPT_TABLES: u64 = 128;
const MAX_SIZE: u64 = 1 << 56;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

fn corrupt<T>(detail: String) -> Result<T> {
    Err(Error::new(ErrorKind::Corrupt, format!("qcow2 image: {detail}")))
}

fn unsupported<T>(what: &str) -> Result<T> {
    let detail =
        format!("a qcow2 image with {what}, which is not read here: {}", serve_it("qcow2"));
    Err(Error::new(ErrorKind::Unsupported, detail))
}

/// Checks the header of an image of `length` bytes; `header` has zeros where the file is shorter.
/// Answers the size of a cluster in bytes.
pub fn check(header: &[u8; HEADER_SIZE], length: u64) -> Result<u64> {
    let u32_at = |at: usize| header[at..].first_chunk().map_or(0, |b| u32::from_be_bytes(*b));
    let u64_at = |at: usize| header[at..].first_chunk().map_or(0, |b| u64::from_be_bytes(*b));
    if !header.starts_with(b"QFI\xfb") {
        return Err(Error::new(ErrorKind::InvalidInput, "not a qcow2 image: no magic"));
    }
    let version = u32_at(4);
    if !(2..=3).contains(&version) {
        return unsupported(&format!("version {version}"));
    }
    if u32_at(32) != 0 {
        return unsupported("encryption");
    }
    if version == 3 {
        check_features(u64_at(72), header[104])?;
    }
    let bits = u32_at(20);
    if !(9..=21).contains(&bits) {
        return corrupt(format!("clusters of 2^{bits} bytes, expected 2^9 to 2^21"));
    }
    check_tables(1 << bits, u64_at(24), u64_at(40), u32_at(36).into(), length)?;
    Ok(1 << bits)
}

fn check_features(features: u64, compression: u8) -> Result<()> {
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
    if features & EXTENDED_L2 != 0 {
        return unsupported("extended L2 entries");
    }
    if features & COMPRESSION != 0 {
        let zstd = compression == 1;
        return unsupported(if zstd { "zstd clusters" } else { "an unknown compression" });
    }
    match features & !DATA_FILE {
        0 => Ok(()),
        unknown => unsupported(&format!("unknown features {unknown:#x}")),
    }
}

/// The first-level table must lie in the file and cover the disk.
fn check_tables(cluster: u64, size: u64, offset: u64, entries: u64, length: u64) -> Result<()> {
    if size > MAX_SIZE {
        return corrupt(format!("a disk of {size} bytes, expected at most 2^56"));
    }
    // Both factors are at most 2^21.
    let needed = size.div_ceil(cluster * (cluster / 8));
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
        assert_eq!(check(&header(), 1 << 20).unwrap(), 65536);
        assert!(refusal(|h| h[0] = 0).contains("no magic"));
        assert!(refusal(|h| h[7] = 1).contains("version 1"));
        assert!(refusal(|h| h[35] = 1).contains("encryption"));
        assert!(refusal(|h| h[79] = 1).contains("qemu-img check"));
        assert!(refusal(|h| h[79] = 2).contains("corrupt"));
        assert!(refusal(|h| (h[79], h[104]) = (8, 1)).contains("zstd"));
        assert!(refusal(|h| h[79] = 16).contains("extended L2"));
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

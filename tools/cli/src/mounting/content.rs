//! What file system a disk holds. The kernel is told which one it is: it is not let probe.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thinply::error::{Error, Result};

/// How far from its beginning a file system is told by.
const LOOKED_AT: usize = 72 << 10;
/// Largest sectors that a loop device is given.
const LARGEST_SECTOR: u32 = 4096;

/// A file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Its type, as the kernel calls it.
    pub kind: &'static str,
    /// Size of the largest sectors that the block device under it may have, in bytes.
    pub sector: u32,
    /// Whether its journal holds what its blocks lack: it must be written to be read.
    pub unclean: bool,
}

/// The file system that begins at `offset` of a disk, if it is one that is known.
///
/// # Errors
/// Host errors.
pub fn find(disk: &File, offset: u64) -> Result<Option<FileSystem>> {
    let mut bytes = vec![0; LOOKED_AT];
    let fail = |error| Error::io(error, "looking for a file system").at(offset);
    let length = read_until_end(disk, &mut bytes, offset).map_err(fail)?;
    bytes.truncate(length);
    Ok(told(&bytes))
}

/// Fills a buffer from an offset of a disk, as far as the disk goes. Answers how far that was.
pub fn read_until_end(disk: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match disk.read_at(rest, offset + done as u64)? {
            0 => break,
            more => done += more,
        }
    }
    Ok(done)
}

/// The file system that begins with these bytes.
fn told(bytes: &[u8]) -> Option<FileSystem> {
    let part = |at: usize, length: usize| bytes.get(at..at + length).unwrap_or_default();
    let number = |at: usize, length: usize| {
        part(at, length).iter().rev().fold(0u32, |number, &byte| number << 8 | u32::from(byte))
    };
    let found = |kind, sector: u32| {
        let fits = sector.is_power_of_two() && sector >= 512;
        let sector = if fits { sector.min(LARGEST_SECTOR) } else { 512 };
        Some(FileSystem { kind, sector, unclean: false })
    };
    if part(1024 + 0x38, 2) == [0x53, 0xef] {
        // Those of before are read by the same driver.
        let sector = 1024u32.checked_shl(number(1024 + 0x18, 4)).unwrap_or(0);
        let unclean = number(1024 + 0x60, 4) & 4 != 0;
        return found("ext4", sector).map(|known| FileSystem { unclean, ..known });
    }
    if part(0, 4) == b"XFSB" && bytes.len() >= 104 {
        return found("xfs", (number(102, 2) as u16).swap_bytes().into());
    }
    if part(0x10040, 8) == b"_BHRfS_M" {
        return found("btrfs", number(0x10090, 4));
    }
    if part(1024, 4) == [0xe2, 0xe1, 0xf5, 0xe0] {
        return found("erofs", 1u32.checked_shl(number(1024 + 12, 1)).unwrap_or(0));
    }
    if part(0, 4) == b"hsqs" {
        return found("squashfs", 512);
    }
    if part(82, 5) == b"FAT32" || part(54, 4) == b"FAT1" {
        return found("vfat", number(11, 2));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; LOOKED_AT];
        for (at, part) in parts {
            bytes[*at..at + part.len()].copy_from_slice(part);
        }
        bytes
    }

    #[test]
    fn file_systems_are_told_with_the_sectors_that_they_bear() {
        let ext4: (usize, &[u8]) = (1080, &[0x53, 0xef]);
        for (parts, kind, sector, unclean) in [
            (&[ext4, (1048, &[2])][..], "ext4", 4096, false),
            (&[ext4, (1048, &[0]), (1120, &[4])], "ext4", 1024, true),
            // 64 KiB, and what can't be.
            (&[ext4, (1048, &[6])], "ext4", 4096, false),
            (&[ext4, (1048, &[99])], "ext4", 512, false),
            (&[(0, b"XFSB"), (102, &[2, 0])], "xfs", 512, false),
            (&[(0, b"XFSB"), (102, &[16, 0])], "xfs", 4096, false),
            (&[(0x10040, b"_BHRfS_M"), (0x10090, &[0, 16])], "btrfs", 4096, false),
            (&[(1024, &[0xe2, 0xe1, 0xf5, 0xe0]), (1036, &[12])], "erofs", 4096, false),
            (&[(0, b"hsqs")], "squashfs", 512, false),
            (&[(82, b"FAT32   "), (11, &[0, 2])], "vfat", 512, false),
            (&[(54, b"FAT16   "), (11, &[0, 16])], "vfat", 4096, false),
        ] {
            assert_eq!(told(&with(parts)), Some(FileSystem { kind, sector, unclean }), "{kind}");
        }
        assert_eq!(told(&with(&[])), None);
        for length in [0, 3, 4, 1024, 1082] {
            let bytes = &with(&[(0, b"XFSB")])[..length];
            assert_eq!(told(bytes).map(|found| found.kind), (length >= 104).then_some("xfs"));
        }
    }
}

//! The inodes of an ext4 image that mke2fs has just made with our features: 4 KiB blocks, extents,
//! descriptors of 64 bytes, checksums.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crc::{Algorithm, CRC_32_ISCSI, Crc};
use thinply::error::{Error, ErrorKind, Result};

use super::{BLOCK, INODE_SIZE};

pub const ROOT: u32 = 2;
/// Where the part behind the first 128 bytes begins, with its own length.
pub const EXTRA: usize = 128;
/// The extra fields end behind the time of making and its fraction.
const EXTRA_LENGTH: u16 = 28;

const SUPERBLOCK: u64 = 1024;
const MAGIC: (usize, u16) = (56, 0xef53);
const DESCRIPTOR: usize = 64;
const EXTENT_MAGIC: u16 = 0xf30a;
const DEEPEST: u16 = 5;

/// CRC-32C without the inversion at its end.
pub static CRC: Crc<u32> = Crc::<u32>::new(&Algorithm { xorout: 0, ..CRC_32_ISCSI });

/// What mke2fs has made is not what it was asked for.
pub fn unexpected(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, format!("mke2fs made an image with {}", what.into()))
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Result<[u8; N]> {
    let found = from.get(at..).and_then(<[u8]>::first_chunk);
    found.copied().ok_or_else(|| unexpected("a structure that is cut short"))
}

pub fn u16_at(from: &[u8], at: usize) -> Result<u16> {
    bytes(from, at).map(u16::from_le_bytes)
}

pub fn u32_at(from: &[u8], at: usize) -> Result<u32> {
    bytes(from, at).map(u32::from_le_bytes)
}

/// An inode's bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Inode(pub [u8; INODE_SIZE as usize]);

impl Inode {
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    pub fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    pub fn put_u16(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    pub fn put_u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub fn size(&self) -> u64 {
        u64::from(self.u32(4)) | u64::from(self.u32(108)) << 32
    }

    /// The block with attributes that the inode has no room for.
    pub fn attribute_block(&self) -> Option<u64> {
        let block = u64::from(self.u32(104)) | u64::from(self.u16(118)) << 32;
        Some(block).filter(|&block| block != 0)
    }
}

/// The inodes of an image.
pub struct Inodes {
    file: File,
    uuid: [u8; 16],
    per_group: u32,
    /// The first block of each group's table.
    tables: Vec<u64>,
}

impl Inodes {
    pub fn open(raw: &Path) -> Result<Self> {
        let open = OpenOptions::new().read(true).write(true).open(raw);
        let file = open.map_err(|error| Error::io(error, "opening the image"))?;
        let mut superblock = [0; 1024];
        file.read_exact_at(&mut superblock, SUPERBLOCK).map_err(reading)?;
        if u16_at(&superblock, MAGIC.0)? != MAGIC.1 {
            return Err(unexpected("another magic number than ext4's"));
        }
        if u32_at(&superblock, 24)? != 2 || u64::from(u16_at(&superblock, 88)?) != INODE_SIZE {
            return Err(unexpected("blocks or inodes of another size"));
        }
        let (count, per_group) = (u32_at(&superblock, 0)?, u32_at(&superblock, 40)?.max(1));
        let mut descriptors = vec![0; count.div_ceil(per_group) as usize * DESCRIPTOR];
        file.read_exact_at(&mut descriptors, BLOCK).map_err(reading)?;
        let table =
            |group: &[u8]| Ok(u64::from(u32_at(group, 8)?) | u64::from(u32_at(group, 40)?) << 32);
        let tables = descriptors.chunks(DESCRIPTOR).map(table).collect::<Result<_>>()?;
        Ok(Self { file, uuid: bytes(&superblock, 104)?, per_group, tables })
    }

    fn place(&self, number: u32) -> Result<u64> {
        let index = number.wrapping_sub(1);
        let table = self.tables.get((index / self.per_group) as usize);
        let table = table.ok_or_else(|| unexpected(format!("no inode {number}")))?;
        Ok(table * BLOCK + u64::from(index % self.per_group) * INODE_SIZE)
    }

    pub fn read(&self, number: u32) -> Result<Inode> {
        let mut inode = Inode([0; INODE_SIZE as usize]);
        self.file.read_exact_at(&mut inode.0, self.place(number)?).map_err(reading)?;
        if inode.u16(EXTRA) < EXTRA_LENGTH {
            return Err(unexpected(format!("no room for times in inode {number}")));
        }
        Ok(inode)
    }

    /// Writes an inode with its checksum.
    pub fn write(&self, number: u32, inode: &Inode) -> Result<()> {
        let mut inode = inode.clone();
        inode.put_u16(124, 0);
        inode.put_u16(130, 0);
        let mut digest = CRC.digest();
        digest.update(&self.uuid);
        digest.update(&number.to_le_bytes());
        digest.update(&inode.u32(100).to_le_bytes());
        digest.update(&inode.0);
        let checksum = digest.finalize();
        inode.put_u16(124, checksum as u16);
        inode.put_u16(130, (checksum >> 16) as u16);
        self.file.write_all_at(&inode.0, self.place(number)?).map_err(writing)
    }

    pub fn read_block(&self, block: u64) -> Result<Vec<u8>> {
        let mut found = vec![0; BLOCK as usize];
        self.file.read_exact_at(&mut found, block * BLOCK).map_err(reading)?;
        Ok(found)
    }

    /// Writes a block of attributes with its checksum, which is at byte 16.
    pub fn write_attributes(&self, block: u64, bytes: &mut [u8]) -> Result<()> {
        bytes[16..20].fill(0);
        let mut digest = CRC.digest();
        digest.update(&self.uuid);
        digest.update(&block.to_le_bytes());
        digest.update(bytes);
        bytes[16..20].copy_from_slice(&digest.finalize().to_le_bytes());
        self.file.write_all_at(bytes, block * BLOCK).map_err(writing)
    }

    /// The names in a folder and their inodes, by the names' bytes, without `.` and `..`.
    pub fn folder(&self, inode: &Inode) -> Result<Vec<(Vec<u8>, u32)>> {
        let mut blocks = Vec::new();
        self.extents(&inode.0[40..100], DEEPEST, &mut blocks)?;
        let mut found = Vec::new();
        for block in blocks {
            let bytes = self.read_block(block)?;
            let mut entry = &bytes[..];
            while !entry.is_empty() {
                let (number, length) = (u32_at(entry, 0)?, usize::from(u16_at(entry, 4)?));
                let [name_length] = self::bytes(entry, 6)?;
                let name = entry.get(8..8 + usize::from(name_length));
                let name =
                    name.filter(|_| length >= 8).ok_or_else(|| unexpected("a bad folder"))?;
                if number != 0 && name != b"." && name != b".." {
                    found.push((name.to_vec(), number));
                }
                entry = entry.get(length..).ok_or_else(|| unexpected("a bad folder"))?;
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// The blocks that a node of an extent tree leads to.
    fn extents(&self, node: &[u8], deepest: u16, blocks: &mut Vec<u64>) -> Result<()> {
        let depth = u16_at(node, 6)?;
        if u16_at(node, 0)? != EXTENT_MAGIC || depth > deepest {
            return Err(unexpected("a bad extent tree"));
        }
        for number in 0..usize::from(u16_at(node, 2)?) {
            let at = 12 + 12 * number;
            if depth == 0 {
                let first =
                    u64::from(u16_at(node, at + 6)?) << 32 | u64::from(u32_at(node, at + 8)?);
                blocks.extend(first..first + u64::from(u16_at(node, at + 4)?));
            } else {
                let below =
                    u64::from(u16_at(node, at + 8)?) << 32 | u64::from(u32_at(node, at + 4)?);
                self.extents(&self.read_block(below)?, depth - 1, blocks)?;
            }
        }
        Ok(())
    }
}

fn reading(error: io::Error) -> Error {
    Error::io(error, "reading what mke2fs made")
}

fn writing(error: io::Error) -> Error {
    Error::io(error, "writing to what mke2fs made")
}

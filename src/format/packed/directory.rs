//! Directory and footer: the groups, and what finds them.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{
    CRC_SIZE, ENTRY_SIZE, FOOTER_MAGIC, FOOTER_SIZE, HEADER_SIZE, Hash, MAX_MAP_LENGTH,
    PackedHeader, RawEntry, RawFooter, checked, checksum, corrupt,
};
use crate::error::Result;
use crate::format::geometry::group_count;
use crate::format::is_zero;
use crate::types::{GROUP_BLOCKS, Group, Root};

/// A group in the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The group; one without a present block has no entry.
    pub group: Group,
    /// Where its map stands.
    pub map_offset: u64,
    /// Bytes of the map.
    pub map_length: u32,
    /// Blocks with data.
    pub data_blocks: u32,
    /// The hash of bits and chunks.
    pub hash: Hash,
}

impl Entry {
    fn encode(&self) -> [u8; ENTRY_SIZE as usize] {
        zerocopy::transmute!(RawEntry {
            group: U64::new(self.group.0),
            map_offset: U64::new(self.map_offset),
            map_length: U32::new(self.map_length),
            data_blocks: U32::new(self.data_blocks),
            hash: self.hash,
        })
    }
}

/// The directory's bytes.
pub fn encode_directory(entries: &[Entry]) -> Vec<u8> {
    entries.iter().flat_map(Entry::encode).collect()
}

/// What the end of the file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Where the directory stands; it ends at the footer.
    pub directory_offset: u64,
    /// Entries in it.
    pub group_count: u64,
    /// Blocks with data.
    pub data_blocks: u64,
    /// Blocks that are present and zero.
    pub zero_blocks: u64,
    /// The layer's identity.
    pub root: Root,
}

impl Footer {
    /// The bytes for a file with this header and directory.
    pub fn encode(&self, header: &[u8], directory: &[u8]) -> [u8; FOOTER_SIZE as usize] {
        let mut raw = RawFooter::new_zeroed();
        raw.magic = FOOTER_MAGIC;
        raw.directory_offset = U64::new(self.directory_offset);
        raw.group_count = U64::new(self.group_count);
        raw.data_blocks = U64::new(self.data_blocks);
        raw.zero_blocks = U64::new(self.zero_blocks);
        raw.root = self.root.0;
        raw.directory_crc = U32::new(checksum(&[], directory));
        raw.header_crc = U32::new(checksum(&[], header));
        let body = raw.as_bytes();
        raw.crc = U32::new(checksum(&[], body.get(..body.len() - CRC_SIZE).unwrap_or_default()));
        zerocopy::transmute!(raw)
    }

    /// Reads the footer of a file of `length` bytes with this header, and how its directory is read.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Corrupt`].
    pub fn decode(
        bytes: &[u8; FOOTER_SIZE as usize],
        length: u64,
        header: &[u8],
    ) -> Result<(Self, Directory)> {
        let raw: &RawFooter = zerocopy::transmute_ref!(bytes);
        if raw.magic != FOOTER_MAGIC {
            return corrupt("no footer at the end: the file was cut short or is unfinished".into());
        }
        checked("footer", &[], bytes)?;
        if !is_zero(&raw.reserved) {
            return corrupt("footer: reserved bytes are set".into());
        }
        if raw.header_crc.get() != checksum(&[], header) {
            return corrupt("the footer belongs to another header".into());
        }
        let (offset, count) = (raw.directory_offset.get(), raw.group_count.get());
        let end = count.checked_mul(ENTRY_SIZE).and_then(|bytes| bytes.checked_add(offset));
        if offset < HEADER_SIZE || end != length.checked_sub(FOOTER_SIZE) {
            return corrupt(format!(
                "a directory of {count} groups from byte {offset}, expected it to end at the footer"
            ));
        }
        let footer = Self {
            directory_offset: offset,
            group_count: count,
            data_blocks: raw.data_blocks.get(),
            zero_blocks: raw.zero_blocks.get(),
            root: Root(raw.root),
        };
        let directory = Directory {
            end: offset,
            root: footer.root,
            crc: raw.directory_crc.get(),
            hasher: crc32fast::Hasher::new(),
            entries: Vec::new(),
        };
        Ok((footer, directory))
    }
}

/// A directory that is being read. It comes in pieces, and the first one that cannot be ends it: a
/// sparse file that claims many groups costs no memory.
#[derive(Debug)]
pub struct Directory {
    /// Where it stands; maps end there.
    end: u64,
    root: Root,
    /// The CRC-32 that the footer has.
    crc: u32,
    hasher: crc32fast::Hasher,
    entries: Vec<Entry>,
}

impl Directory {
    /// Takes the next bytes, a whole number of entries.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Corrupt`].
    pub fn push(&mut self, bytes: &[u8], header: &PackedHeader) -> Result<()> {
        self.hasher.update(bytes);
        let Ok(raw) = <[RawEntry]>::ref_from_bytes(bytes) else {
            return corrupt("a directory entry is cut short".into());
        };
        let groups = group_count(header.virtual_size);
        self.entries.reserve(raw.len());
        for raw in raw {
            let entry = Entry {
                group: Group(raw.group.get()),
                map_offset: raw.map_offset.get(),
                map_length: raw.map_length.get(),
                data_blocks: raw.data_blocks.get(),
                hash: raw.hash,
            };
            let after = self.entries.last().map_or(0, |last| last.group.0 + 1);
            if !(after..groups).contains(&entry.group.0) {
                return corrupt(format!(
                    "directory names group {}, expected one from {after} below {groups}",
                    entry.group.0
                ));
            }
            let end = entry.map_offset.checked_add(u64::from(entry.map_length));
            if entry.map_offset < HEADER_SIZE
                || end.is_none_or(|end| end > self.end)
                || u64::from(entry.data_blocks) > GROUP_BLOCKS
                || entry.map_length > MAX_MAP_LENGTH
            {
                return corrupt(format!("directory: the map of group {} cannot be", entry.group.0));
            }
            self.entries.push(entry);
        }
        Ok(())
    }

    /// The entries, once all bytes have come.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Corrupt`], also where the root is not the one that the footer names.
    pub fn finish(self, header: &PackedHeader) -> Result<Vec<Entry>> {
        let expected = self.hasher.finalize();
        if self.crc != expected {
            return corrupt(format!(
                "directory has checksum {:#010x}, expected {expected:#010x}",
                self.crc
            ));
        }
        let root = header.root(&self.entries);
        if root != self.root {
            return corrupt(format!("root {root}, expected {}", self.root));
        }
        Ok(self.entries)
    }
}

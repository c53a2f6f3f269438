//! The header of a packed layer, and the root that it begins.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::{
    CRC_SIZE, Entry, HEADER_SIZE, MAGIC, MAX_FRAME_BLOCKS, RawHeader, VERSION, checked, checksum,
    corrupt, node,
};
use crate::error::{Error, ErrorKind, Result};
use crate::format::is_zero;
use crate::format::link::{
    ParentLink, check_features, check_sizes, decode_extensions, decode_parent, encode_identity,
    encode_parent,
};
use crate::types::{BLOCK_SIZE, Root};

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedHeader {
    /// Size of the device in bytes.
    pub virtual_size: u64,
    /// How many bytes of the parent show; beyond them there are zeros.
    pub visible_parent_size: u64,
    /// Data blocks in each frame but a group's last.
    pub frame_blocks: u32,
    /// The layer below.
    pub parent: Option<ParentLink>,
    /// Compatible features, kept as they are.
    pub compatible: u64,
    /// Extensions that this build may ignore, as they stand on disk.
    pub extensions: Vec<u8>,
}

impl PackedHeader {
    /// The bytes of the header. The hint must have passed [`crate::format::header::check_hint`].
    pub fn encode(&self) -> Box<[u8; HEADER_SIZE as usize]> {
        let mut raw = RawHeader::new_zeroed();
        raw.magic = MAGIC;
        raw.version = U32::new(VERSION);
        raw.header_size = U32::new(HEADER_SIZE as u32);
        raw.compatible = U64::new(self.compatible);
        raw.virtual_size = U64::new(self.virtual_size);
        raw.visible_parent_size = U64::new(self.visible_parent_size);
        raw.block_size_log2 = U32::new(BLOCK_SIZE.ilog2());
        raw.frame_blocks = U32::new(self.frame_blocks);
        if let Some(parent) = &self.parent {
            (raw.parent_kind, raw.hint_length, raw.parent_identity, raw.hint) =
                encode_parent(parent);
        }
        raw.extensions_length = U32::new(self.extensions.len() as u32);
        raw.extensions.iter_mut().zip(&self.extensions).for_each(|(to, from)| *to = *from);
        let body = raw.as_bytes();
        raw.crc = U32::new(checksum(&[], body.get(..body.len() - CRC_SIZE).unwrap_or_default()));
        Box::new(zerocopy::transmute!(raw))
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`ErrorKind::NotAnImage`] without the magic; [`ErrorKind::Unsupported`] for what a later
    /// version may mean; [`ErrorKind::Corrupt`].
    pub fn decode(bytes: &[u8; HEADER_SIZE as usize]) -> Result<Self> {
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        if raw.magic != MAGIC {
            return Err(Error::new(ErrorKind::NotAnImage, "not a packed layer: no magic"));
        }
        checked("header", &[], bytes)?;
        let version = (raw.version.get(), raw.header_size.get(), raw.block_size_log2.get());
        if version != (VERSION, HEADER_SIZE as u32, BLOCK_SIZE.ilog2()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "header: version {} with a header of {} bytes and blocks of 2^{}, expected \
                     version {VERSION} with {HEADER_SIZE} and 2^12",
                    version.0, version.1, version.2
                ),
            ));
        }
        check_features(raw.incompatible.get())?;
        if !is_zero(&raw.reserved) {
            return corrupt("header: reserved bytes are set".into());
        }
        let header = Self {
            virtual_size: raw.virtual_size.get(),
            visible_parent_size: raw.visible_parent_size.get(),
            frame_blocks: raw.frame_blocks.get(),
            parent: decode_parent(
                raw.parent_kind.get(),
                raw.parent_identity,
                raw.hint_length.get(),
                &raw.hint,
            )?,
            compatible: raw.compatible.get(),
            extensions: decode_extensions(raw.extensions_length.get(), &raw.extensions)?,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<()> {
        check_sizes(self.virtual_size, self.visible_parent_size, self.parent.as_ref())?;
        if !(1..=MAX_FRAME_BLOCKS).contains(&self.frame_blocks) {
            return corrupt(format!(
                "header: {} blocks in a frame, expected 1 to {MAX_FRAME_BLOCKS}",
                self.frame_blocks
            ));
        }
        Ok(())
    }

    /// The root of a layer with this header and these groups in ascending order.
    pub fn root<'a>(&self, groups: impl IntoIterator<Item = &'a Entry>) -> Root {
        let parent = self.parent.as_ref();
        let (kind, identity) =
            parent.map_or((0, [0; 32]), |parent| encode_identity(parent.identity));
        let mut hasher = node("root");
        hasher.update(&self.virtual_size.to_le_bytes());
        hasher.update(&self.visible_parent_size.to_le_bytes());
        hasher.update(&self.frame_blocks.to_le_bytes());
        hasher.update(&kind.to_le_bytes());
        hasher.update(&identity);
        for entry in groups {
            hasher.update(&entry.group.0.to_le_bytes());
            hasher.update(&entry.hash);
        }
        Root(*hasher.finalize().as_bytes())
    }
}

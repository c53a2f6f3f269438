//! Header slots (`format-spec.md`, "Header slot").

use std::mem::size_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::{
    GROUP_SLOT_SIZE, GROUP_STRIDE, GROUPS_OFFSET, JOURNAL_OFFSET, JOURNAL_RECORDS,
};
pub use super::link::{MAX_HINT, ParentLink, check_hint};
use super::link::{
    check_features, check_sizes, corrupt, decode_extensions, decode_parent, encode_parent,
    unsupported,
};
use super::{Field, is_zero, layout};
use crate::error::Result;
use crate::types::{BLOCK_SIZE, FreezeId, GROUP_BLOCKS, Identity, Uuid};

/// First bytes of every live layer.
pub const MAGIC: [u8; 8] = *b"TPLYLIVE";
/// The version of the layout that this build reads and writes.
pub const VERSION: u32 = 1;
const EXTENSIONS_SIZE: usize = 3580;

/// The bytes of a header slot.
pub type SlotBytes = [u8; BLOCK_SIZE as usize];

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    header_size: U32,
    incompatible: U64,
    compatible: U64,
    read_only_compatible: U64,
    uuid: [u8; 16],
    generation: U64,
    state: U32,
    block_size_log2: U32,
    epoch: U64,
    journal_tail: U64,
    virtual_size: U64,
    visible_parent_size: U64,
    journal_offset: U64,
    journal_records: U32,
    record_size: U32,
    groups_offset: U64,
    group_stride: U64,
    group_slot_size: U32,
    group_blocks: U32,
    freeze_id: [u8; 16],
    parent_kind: U32,
    hint_length: U32,
    parent_identity: [u8; 32],
    hint: [u8; 256],
    extensions_length: U32,
    reserved: [u8; 52],
    extensions: [u8; EXTENSIONS_SIZE],
    crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == BLOCK_SIZE as usize);
const _: () = assert!(std::mem::offset_of!(RawHeader, extensions) == 512);

pub(super) fn raw_layout() -> Vec<Field> {
    layout!(RawHeader {
        magic,
        version,
        header_size,
        incompatible,
        compatible,
        read_only_compatible,
        uuid,
        generation,
        state,
        block_size_log2,
        epoch,
        journal_tail,
        virtual_size,
        visible_parent_size,
        journal_offset,
        journal_records,
        record_size,
        groups_offset,
        group_stride,
        group_slot_size,
        group_blocks,
        freeze_id,
        parent_kind,
        hint_length,
        parent_identity,
        hint,
        extensions_length,
        reserved,
        extensions,
        crc,
    })
}

/// What may be done with a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Closed cleanly; may be opened for writing.
    Writable,
    /// Opened for writing and not closed yet, or never.
    InUse,
    /// Never written again; may be a parent.
    Frozen(FreezeId),
}

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The layer's name.
    pub uuid: Uuid,
    /// The slot with the higher one counts.
    pub generation: u64,
    /// What may be done with the layer.
    pub state: State,
    /// Counts the times the layer was opened for writing; in every journal record.
    pub epoch: u64,
    /// Sequence number of the first record that recovery needs.
    pub journal_tail: u64,
    /// Size of the device in bytes.
    pub virtual_size: u64,
    /// How many bytes of the parent show; beyond them there are zeros.
    pub visible_parent_size: u64,
    /// The layer below.
    pub parent: Option<ParentLink>,
    /// Compatible features, kept as they are.
    pub compatible: u64,
    /// Features that a writer must know; any set bit makes this build open read-only.
    pub read_only_compatible: u64,
    /// Extensions that this build may ignore, as they stand on disk.
    pub extensions: Vec<u8>,
}

/// A checksum that also holds the slot's number.
fn checksum(slot: usize, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(slot as u32).to_le_bytes());
    hasher.update(bytes.get(..bytes.len() - size_of::<U32>()).unwrap_or_default());
    hasher.finalize()
}

impl Header {
    /// The identity that children of this layer link to; only a frozen layer has one.
    pub fn identity(&self) -> Option<Identity> {
        match self.state {
            State::Frozen(freeze) => Some(Identity::Frozen(self.uuid, freeze)),
            State::Writable | State::InUse => None,
        }
    }

    /// Whether the layer never changes again.
    pub fn is_frozen(&self) -> bool {
        matches!(self.state, State::Frozen(_))
    }

    /// The bytes for slot 0 or 1. The hint must have passed [`check_hint`].
    pub fn encode(&self, slot: usize) -> Box<SlotBytes> {
        let mut raw = RawHeader::new_zeroed();
        raw.magic = MAGIC;
        raw.version = U32::new(VERSION);
        raw.header_size = U32::new(BLOCK_SIZE as u32);
        raw.compatible = U64::new(self.compatible);
        raw.read_only_compatible = U64::new(self.read_only_compatible);
        raw.uuid = self.uuid.0;
        raw.generation = U64::new(self.generation);
        let (state, freeze_id) = match self.state {
            State::Writable => (1, [0; 16]),
            State::InUse => (2, [0; 16]),
            State::Frozen(id) => (3, id.0),
        };
        raw.state = U32::new(state);
        raw.freeze_id = freeze_id;
        raw.epoch = U64::new(self.epoch);
        raw.journal_tail = U64::new(self.journal_tail);
        raw.virtual_size = U64::new(self.virtual_size);
        raw.visible_parent_size = U64::new(self.visible_parent_size);
        raw.set_geometry();
        if let Some(parent) = &self.parent {
            (raw.parent_kind, raw.hint_length, raw.parent_identity, raw.hint) =
                encode_parent(parent);
        }
        raw.extensions_length = U32::new(self.extensions.len() as u32);
        raw.extensions.iter_mut().zip(&self.extensions).for_each(|(to, from)| *to = *from);
        raw.crc = U32::new(checksum(slot, raw.as_bytes()));
        Box::new(zerocopy::transmute!(raw))
    }

    /// Reads slot 0 or 1. `Ok(None)`: the checksum does not hold, so the slot doesn't count.
    ///
    /// # Errors
    /// [`Unsupported`](crate::error::ErrorKind::Unsupported) for what a later version may mean,
    /// [`Corrupt`](crate::error::ErrorKind::Corrupt) for a header whose checksum holds but whose numbers cannot be.
    pub fn decode(slot: usize, bytes: &SlotBytes) -> Result<Option<Self>> {
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        if raw.magic != MAGIC || raw.crc.get() != checksum(slot, bytes) {
            return Ok(None);
        }
        Self::without_checksum(bytes).map(Some)
    }

    /// Reads a slot whose checksum may not hold: what it says is a guess, though one that keeps the
    /// rules.
    ///
    /// # Errors
    /// As [`Header::decode`].
    pub fn without_checksum(bytes: &SlotBytes) -> Result<Self> {
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        raw.check_version()?;
        raw.check_geometry()?;
        let header = Self {
            uuid: Uuid(raw.uuid),
            generation: raw.generation.get(),
            state: raw.state()?,
            epoch: raw.epoch.get(),
            journal_tail: raw.journal_tail.get(),
            virtual_size: raw.virtual_size.get(),
            visible_parent_size: raw.visible_parent_size.get(),
            parent: raw.parent()?,
            compatible: raw.compatible.get(),
            read_only_compatible: raw.read_only_compatible.get(),
            extensions: raw.extensions()?,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<()> {
        check_sizes(self.virtual_size, self.visible_parent_size, self.parent.as_ref())?;
        if self.highest_counter() >= 1 << 63 {
            return corrupt("generation, epoch or journal tail of 2^63 or more".into());
        }
        Ok(())
    }

    /// The highest of generation, epoch and journal tail: what a writer counts up.
    pub fn highest_counter(&self) -> u64 {
        self.generation.max(self.epoch).max(self.journal_tail)
    }
}

/// Whether the bytes begin with the magic of a live layer, valid or not.
pub fn has_magic(bytes: &SlotBytes) -> bool {
    bytes.starts_with(&MAGIC)
}

impl RawHeader {
    fn set_geometry(&mut self) {
        self.block_size_log2 = U32::new(BLOCK_SIZE.ilog2());
        self.journal_offset = U64::new(JOURNAL_OFFSET.0);
        self.journal_records = U32::new(JOURNAL_RECORDS as u32);
        self.record_size = U32::new(BLOCK_SIZE as u32);
        self.groups_offset = U64::new(GROUPS_OFFSET.0);
        self.group_stride = U64::new(GROUP_STRIDE);
        self.group_slot_size = U32::new(GROUP_SLOT_SIZE as u32);
        self.group_blocks = U32::new(GROUP_BLOCKS as u32);
    }

    /// Version 1 has one geometry; the fields are there for later versions.
    fn check_geometry(&self) -> Result<()> {
        let mut expected = Self::new_zeroed();
        expected.set_geometry();
        let of = |raw: &Self| {
            [
                u64::from(raw.block_size_log2.get()),
                raw.journal_offset.get(),
                u64::from(raw.journal_records.get()),
                u64::from(raw.record_size.get()),
                raw.groups_offset.get(),
                raw.group_stride.get(),
                u64::from(raw.group_slot_size.get()),
                u64::from(raw.group_blocks.get()),
            ]
        };
        if of(self) != of(&expected) {
            return unsupported(format!("geometry {:?}, expected {:?}", of(self), of(&expected)));
        }
        Ok(())
    }

    fn check_version(&self) -> Result<()> {
        if self.version.get() != VERSION || self.header_size.get() != BLOCK_SIZE as u32 {
            return unsupported(format!(
                "version {} with a header of {} bytes, expected version {VERSION} with {BLOCK_SIZE}",
                self.version, self.header_size
            ));
        }
        check_features(self.incompatible.get())?;
        if !is_zero(&self.reserved) {
            return corrupt("reserved bytes are set".into());
        }
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let state = match self.state.get() {
            1 => State::Writable,
            2 => State::InUse,
            3 => return Ok(State::Frozen(FreezeId(self.freeze_id))),
            other => return corrupt(format!("state {other}, expected 1, 2 or 3")),
        };
        if self.freeze_id != [0; 16] {
            return corrupt("a freeze id in a layer that is not frozen".into());
        }
        Ok(state)
    }

    fn parent(&self) -> Result<Option<ParentLink>> {
        decode_parent(
            self.parent_kind.get(),
            self.parent_identity,
            self.hint_length.get(),
            &self.hint,
        )
    }

    fn extensions(&self) -> Result<Vec<u8>> {
        decode_extensions(self.extensions_length.get(), &self.extensions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};

    fn header() -> Header {
        Header {
            uuid: Uuid([1; 16]),
            generation: 9,
            state: State::Frozen(FreezeId([2; 16])),
            epoch: 4,
            journal_tail: 77,
            virtual_size: 1 << 40,
            visible_parent_size: 1 << 30,
            parent: Some(ParentLink {
                identity: Identity::Frozen(Uuid([3; 16]), FreezeId([4; 16])),
                hint: "base.tply".into(),
            }),
            compatible: 0,
            read_only_compatible: 0,
            extensions: Vec::new(),
        }
    }

    /// A slot with `change` made to its bytes under a checksum that holds.
    fn forged(change: impl FnOnce(&mut RawHeader)) -> Result<Option<Header>> {
        let mut raw: RawHeader = zerocopy::transmute!(*header().encode(0));
        change(&mut raw);
        raw.crc = U32::new(checksum(0, raw.as_bytes()));
        Header::decode(0, &zerocopy::transmute!(raw))
    }

    fn refused(change: impl FnOnce(&mut RawHeader)) -> Error {
        forged(change).expect_err("the forged header was accepted")
    }

    #[test]
    fn headers_come_back_and_every_flip_is_found() {
        let bytes = header().encode(1);
        assert_eq!(Header::decode(1, &bytes).unwrap(), Some(header()));
        assert_eq!(Header::decode(0, &bytes).unwrap(), None, "the slot number is in the checksum");
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(1, &bad).unwrap(), None);
        }
    }

    #[test]
    fn what_a_later_version_may_mean_is_unsupported_and_named() {
        let unsupported = |change: fn(&mut RawHeader), text: &str| {
            let error = refused(change);
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        };
        unsupported(|raw| raw.version = U32::new(2), "version 2");
        unsupported(|raw| raw.incompatible = U64::new(1), "encryption");
        unsupported(|raw| raw.incompatible = U64::new(1 << 40), "bit 40");
        unsupported(|raw| raw.block_size_log2 = U32::new(16), "geometry");
        unsupported(|raw| raw.group_stride = U64::new(u64::MAX), "geometry");
        unsupported(|raw| raw.parent_kind = U32::new(9), "parent kind 9");
        unsupported(
            |raw| {
                raw.extensions_length = U32::new(16);
                raw.extensions[..8].copy_from_slice(&[7, 0, 0, 0, 1, 0, 0, 0]);
            },
            "extension 0x7",
        );
    }

    #[test]
    fn impossible_numbers_under_a_right_checksum_are_corrupt() {
        let changes: [fn(&mut RawHeader); 12] = [
            |raw| raw.state = U32::new(4),
            |raw| raw.state = U32::new(1),
            |raw| raw.virtual_size = U64::new(0),
            |raw| raw.virtual_size = U64::new(513),
            |raw| raw.virtual_size = U64::new((1 << 56) + 512),
            |raw| raw.visible_parent_size = U64::new((1 << 40) + 1),
            |raw| raw.parent_kind = U32::new(0),
            |raw| raw.hint_length = U32::new(u32::MAX),
            |raw| raw.extensions_length = U32::new(u32::MAX),
            |raw| raw.extensions_length = U32::new(8),
            |raw| raw.reserved[0] = 1,
            |raw| raw.epoch = U64::new(u64::MAX),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            assert_eq!(refused(change).kind(), ErrorKind::Corrupt, "change {number}");
        }
    }

    #[test]
    fn a_hint_is_a_file_name_and_nothing_else() {
        for hint in
            ["", ".", "..", "../x", "/x", "a/b", "a\\b", "nbd://x", "json:x", "a\0b", "a\nb"]
        {
            let error = refused(|raw| {
                raw.hint = [0; 256];
                raw.hint[..hint.len()].copy_from_slice(hint.as_bytes());
                raw.hint_length = U32::new(hint.len() as u32);
            });
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{hint:?}: {error}");
        }
        assert!(check_hint("базовый слой-1.tply").is_ok());
    }

    #[test]
    fn extensions_that_may_be_ignored_are_kept() {
        let mut body = vec![9, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
        body.extend([1, 2, 3, 0, 0, 0, 0, 0]);
        let with = Header { extensions: body, ..header() };
        assert_eq!(Header::decode(0, &with.encode(0)).unwrap(), Some(with));
    }
}

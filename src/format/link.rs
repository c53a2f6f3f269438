//! What the headers of both layouts share: the parent link, feature masks, extensions
//! (`format-spec.md`, "Parents" and "Extensions").

use std::mem::size_of;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::is_virtual_size;
use super::{Field, is_zero, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{FreezeId, Identity, Root, Uuid};

/// Longest hint in bytes.
pub const MAX_HINT: usize = 255;

const MUST_UNDERSTAND: u32 = 1;
/// Names of the incompatible feature bits that are given out; none is in this version.
const FEATURE_NAMES: [&str; 2] = ["encryption", "external data file"];

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtension {
    kind: U32,
    flags: U32,
    length: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<RawExtension>() == 16);

pub(super) fn extension_layout() -> Vec<Field> {
    layout!(RawExtension { kind, flags, length, reserved })
}

/// A parent: who it is, and the file name where it was last seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentLink {
    /// The content that the child stands on.
    pub identity: Identity,
    /// A plain file name, at most [`MAX_HINT`] bytes.
    pub hint: String,
}

/// Checks that `hint` can only be a file name: one path component, no URL, no control character.
pub fn check_hint(hint: &str) -> Result<()> {
    let bad = hint.is_empty()
        || hint.len() > MAX_HINT
        || hint == "."
        || hint == ".."
        || hint.contains(['/', '\\', ':'])
        || hint.chars().any(char::is_control);
    if bad {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("parent hint {hint:?}, expected a plain file name of 1 to {MAX_HINT} bytes"),
        ));
    }
    Ok(())
}

/// Refuses incompatible features; this version has none.
pub(super) fn check_features(incompatible: u64) -> Result<()> {
    if incompatible == 0 {
        return Ok(());
    }
    let bit = incompatible.trailing_zeros() as usize;
    let name = FEATURE_NAMES.get(bit).copied().unwrap_or("unknown");
    unsupported(format!(
        "needs the incompatible feature in bit {bit} ({name}), which this build lacks"
    ))
}

/// Checks the sizes that both headers have.
pub(super) fn check_sizes(
    virtual_size: u64,
    visible_parent_size: u64,
    parent: Option<&ParentLink>,
) -> Result<()> {
    if !is_virtual_size(virtual_size) {
        return corrupt(format!(
            "virtual size {virtual_size}, expected a positive multiple of 512 up to 2^56"
        ));
    }
    let visible = if parent.is_some() { virtual_size } else { 0 };
    if visible_parent_size > visible {
        return corrupt(format!(
            "visible parent size {visible_parent_size}, expected at most {visible}"
        ));
    }
    Ok(())
}

/// A link as the fields of a header, in their order there: kind, length of the hint, identity, hint.
/// The hint must have passed [`check_hint`].
pub(super) fn encode_parent(link: &ParentLink) -> (U32, U32, [u8; 32], [u8; 256]) {
    let (kind, identity) = encode_identity(link.identity);
    let mut hint = [0; 256];
    hint.iter_mut().zip(link.hint.bytes()).for_each(|(to, from)| *to = from);
    (U32::new(kind), U32::new(link.hint.len() as u32), identity, hint)
}

/// The kind and the 32 bytes by which a link names a parent.
pub(super) fn encode_identity(identity: Identity) -> (u32, [u8; 32]) {
    match identity {
        Identity::Frozen(uuid, freeze) => (1, zerocopy::transmute!([uuid.0, freeze.0])),
        Identity::Packed(root) => (2, root.0),
    }
}

/// The link in these fields of a header.
pub(super) fn decode_parent(
    kind: u32,
    identity: [u8; 32],
    hint_length: u32,
    hint: &[u8],
) -> Result<Option<ParentLink>> {
    let length = hint_length as usize;
    let Some((hint, rest)) = hint.split_at_checked(length) else {
        return corrupt(format!("parent hint of {length} bytes, expected at most {MAX_HINT}"));
    };
    if !is_zero(rest) {
        return corrupt("bytes behind the parent hint".into());
    }
    let identity = match kind {
        0 if length == 0 && identity == [0; 32] => return Ok(None),
        0 => return corrupt("a parent identity or hint without a parent".into()),
        1 => {
            let [uuid, freeze]: [[u8; 16]; 2] = zerocopy::transmute!(identity);
            Identity::Frozen(Uuid(uuid), FreezeId(freeze))
        }
        2 => Identity::Packed(Root(identity)),
        other => return unsupported(format!("parent kind {other}, expected 0, 1 or 2")),
    };
    let Ok(hint) = std::str::from_utf8(hint) else {
        return corrupt("parent hint is not UTF-8".into());
    };
    check_hint(hint)?;
    Ok(Some(ParentLink { identity, hint: hint.to_owned() }))
}

/// Extensions that may be ignored, kept byte for byte. This version defines none.
pub(super) fn decode_extensions(length: u32, room: &[u8]) -> Result<Vec<u8>> {
    let length = length as usize;
    let Some((used, unused)) = room.split_at_checked(length) else {
        return corrupt(format!("extensions of {length} bytes, expected at most {}", room.len()));
    };
    if !is_zero(unused) {
        return corrupt("bytes behind the extensions".into());
    }
    let mut rest = used;
    while !rest.is_empty() {
        let Ok((extension, body)) = RawExtension::ref_from_prefix(rest) else {
            return corrupt("an extension is cut short".into());
        };
        if extension.flags.get() & MUST_UNDERSTAND != 0 {
            return unsupported(format!(
                "needs header extension {:#x}, which this build lacks",
                extension.kind
            ));
        }
        let padded = u64::from(extension.length.get()).next_multiple_of(8) as usize;
        let Some((_, after)) = body.split_at_checked(padded) else {
            return corrupt(format!("extension {:#x} reaches too far", extension.kind));
        };
        rest = after;
    }
    Ok(used.to_vec())
}

pub(super) fn corrupt<T>(detail: String) -> Result<T> {
    Err(Error::new(ErrorKind::Corrupt, format!("header: {detail}")))
}

pub(super) fn unsupported<T>(detail: String) -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, format!("header: {detail}")))
}

//! Bytes ↔ checked values of both layouts; no I/O. `format-spec.md` is normative.
//!
//! Raw structs mirror the bytes and are private to their modules; the validated types are the only
//! way out of them, so unchecked numbers can't be used.
#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

pub mod bitmap;
pub mod geometry;
pub mod header;
pub mod journal;
mod link;
pub mod packed;

/// A field of an on-disk struct: name, byte offset, size in bytes.
pub type Field = (&'static str, usize, usize);

/// Every on-disk struct with its fields, for the test that compares them with `format-spec.md`.
pub fn layouts() -> [(&'static str, Vec<Field>); 11] {
    let [header, frame, map, word, entry, footer] = packed::layouts();
    [
        ("Header slot", header::raw_layout()),
        ("Extension", link::extension_layout()),
        ("Journal record", journal::record_layout()),
        ("Journal entry", journal::entry_layout()),
        ("Bitmap sector", bitmap::sector_layout()),
        header,
        frame,
        map,
        word,
        entry,
        footer,
    ]
}

/// Whether all bytes are zero. Looks at all of them, which is faster than stopping early.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |all, byte| all | byte) == 0
}

/// Lists the fields of a raw struct as [`Field`]s.
macro_rules! layout {
    ($name:ident { $($field:ident),* $(,)? }) => {{
        fn size<T, F>(_: fn(&T) -> &F) -> usize { size_of::<F>() }
        vec![$((
            stringify!($field),
            std::mem::offset_of!($name, $field),
            size(|raw: &$name| &raw.$field),
        )),*]
    }};
}
use layout;

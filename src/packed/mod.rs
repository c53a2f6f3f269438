//! One layer of the packed layout: sealed, content-addressed, written in one pass.
//!
//! [`Writer`] makes one, block by block; [`Packed`] reads it, from a file or from
//! afar. Invariants (`format-spec.md`, "Packed layout"):
//! - the root commits to all that a reader can see, and not to how it is compressed;
//! - no byte reaches a caller before a checksum or a hash of it held once since the open.
#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

mod cache;
mod far;
mod opening;
mod origin;
mod part;
mod press;
mod reader;
mod verify;
mod writer;

#[doc(hidden)]
pub use cache::forget_frames;
pub use far::{ByteSource, FileSource};
pub use reader::Packed;
pub use verify::{Damage, Watch};
pub use writer::{Compression, Summary, Writer};

#[cfg(test)]
mod tests;

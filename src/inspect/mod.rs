//! Looking at a layer's file without opening the layer: [`dump`] shows what stands where (of a packed
//! layer, [`dump_packed`]), [`check`] judges it, [`repair`] saves what can be read into another file.
//! All work on files that every open refuses, change nothing in them and take no lock.
//!
//! Their time and memory follow what the file holds, not what its header claims: holes are skipped
//! with the file system's help.
#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

mod check;
mod dump;
mod dump_packed;
mod packed;
mod parts;
mod repair;
#[cfg(test)]
mod tests;
mod torn;

pub use check::{Finding, MAX_FINDINGS, Report, check};
pub use dump::{Part, dump};
pub use dump_packed::{ChunkPart, FramePlace, MapPart, PackedPart, RawPart, dump_packed};
pub use packed::{check_packed, verify};
pub use parts::{BitmapPage, FieldValue, RingPlace, RingRecord, Slot, Standing, Value, Verdict};
pub use repair::{Fate, Loss, Reason, Repaired, repair};

//! Looking at a layer's file without opening the layer: [`dump`] shows what stands where, [`check`]
//! judges it. Both work on files that every open refuses, change nothing and take no lock.
//!
//! Their time and memory follow what the file holds, not what its header claims: holes are skipped
//! with the file system's help.
#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

mod check;
mod dump;
mod parts;

pub use check::{Finding, MAX_FINDINGS, Report, check};
pub use dump::{Part, dump};
pub use parts::{BitmapPage, FieldValue, RingPlace, RingRecord, Slot, Standing, Value, Verdict};

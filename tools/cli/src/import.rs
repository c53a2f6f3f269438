//! Disks that other programs made, read once from beginning to end: raw files and devices, foreign
//! images, and what an NBD server shows.

mod foreign;
mod format;
mod nbd;
mod open;
mod qcow2;
mod raw;
mod reference;
mod sink;
mod source;
mod vmdk;

pub use open::{SourceArgs, open_raw};
pub use source::Source;

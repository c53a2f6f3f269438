//! Disks that other programs made, read once from beginning to end: raw files and devices, foreign
//! images, and what an NBD server shows.

mod file;
mod foreign;
mod format;
mod image;
mod library;
mod nbd;
mod open;
mod qcow2;
mod qemu;
mod raw;
mod reference;
mod sink;
mod source;
mod vhd;
mod vmdk;

pub use foreign::Opener;
pub use format::{Format, TELLING, compressed};
pub use open::{SourceArgs, open_raw};
pub use source::Source;

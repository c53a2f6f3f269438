//! A load: what clients like to do to a disk, and what the disk may show while they do it, and after
//! a crash.

pub mod client;
pub mod history;
pub mod taste;

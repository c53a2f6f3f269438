//! File systems on disks, as mounts and block devices of the host: a server shows the disks as files
//! (`docs/files.md`), a loop device makes a block device of one, and the kernel mounts that
//! (`docs/mounting.md`).
//!
//! What is where is asked of the kernel each time. The folder of this room holds only what the kernel
//! doesn't know, and what it says decides nothing but what is shown.

pub mod content;
pub mod filesystem;
pub mod loops;
pub mod partitions;
pub mod room;
pub mod served;
pub mod target;
pub mod uses;

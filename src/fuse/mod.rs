//! Disks as regular files, over FUSE: a front end of [`serve`](crate::serve) beside NBD.
//!
//! Each disk that the desk lists is a file of its virtual size, in folders as its name has slashes.
//! Opened for writing it is leased, so a second writer gets `EBUSY`; whoever opens it for reading reads
//! beside the writer and keeps nobody out. Nothing passes through the client's page cache
//! (`FOPEN_DIRECT_IO`): a loop device, QEMU or `dd` on the file reach the engine, whose own reads the
//! host's page cache serves. Files come and go as disks do; nobody makes or removes them here. To cut a
//! file makes what is behind the cut read as zeros, and its size stays.
//!
//! Threads: some read requests, each from a descriptor of its own, and answer at once what needs no
//! wait. What does goes to the disk's own threads ([`Lease::submit`](crate::serve::Lease::submit)), and
//! what is about names to a few of the server's. An answer goes to the descriptor that its request came
//! from.
//!
//! Invariants: every request is answered once; a disk that hangs holds up nobody but its own users; a
//! FSYNC covers every write that was answered before it.

mod handles;
mod mount;
mod names;
mod proto;
mod server;
#[cfg(test)]
mod tests;
mod tree;
mod tries;
mod work;

use rustix::io::Errno;

use crate::error::{Error, ErrorKind};

pub use mount::{KEPT, KIND, Mount, abort, mount_id};
pub use server::{Handle, Server, ServerConfig};

/// How an error of a disk is told to whoever called.
fn errno(error: &Error) -> Errno {
    match error.kind() {
        ErrorKind::NoSpace => Errno::NOSPC,
        ErrorKind::NotFound => Errno::NOENT,
        ErrorKind::PermissionDenied => Errno::ACCESS,
        ErrorKind::InUse => Errno::BUSY,
        ErrorKind::ReadOnly => Errno::ROFS,
        ErrorKind::OutOfRange | ErrorKind::InvalidInput => Errno::INVAL,
        ErrorKind::Unsupported => Errno::OPNOTSUPP,
        ErrorKind::Limit => Errno::NOMEM,
        _ => Errno::IO,
    }
}

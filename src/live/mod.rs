//! One layer of the live layout: a file whose blocks stand at fixed places, owned or not.
//!
//! [`Writable`] is the top of a chain, open for writing by one process; [`Sealed`] is a layer that
//! is only read. Neither knows its parent: what lies below comes in as [`Under`].
//!
//! Invariants (`format-spec.md`, "Durability"):
//! - a bit never turns off, in memory or on disk;
//! - a bitmap page on disk names only blocks whose data was synced before;
//! - blocks named by the last journal record stay as they are until a later commit is durable;
//! - after a failed sync nothing more is written.

mod commit;
mod create;
mod journal;
mod pages;
mod pending;
mod recover;
mod sealed;
mod slots;
mod turn;
mod writable;
mod write;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Lock, Storage, failed, holders, read_exact_at, read_exact_cached_at};
use crate::types::{FileOffset, Word};

pub use create::{NewLayer, create, random};
pub use journal::{RingSlot, read_ring};
pub use pages::next_group;
pub use sealed::Sealed;
pub use slots::{durable_header, newest_header, read_slots};
pub use writable::Writable;
pub use write::{ZeroKind, words};

/// Whether an operation may wait for a disk or for a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Do all that it takes.
    Yes,
    /// Answer `false` instead.
    No,
}

/// What a layer's reader sees where the layer owns nothing.
pub trait Under {
    /// The blocks of a word that somebody below owns and that show at least one byte.
    fn owned(&self, word: Word) -> Result<u64>;

    /// Fills `buf` with what shows at the guest offset; zeros where nobody owns anything. False
    /// where `wait` is [`Wait::No`] and the bytes are not in the page cache.
    fn read(&self, offset: u64, buf: &mut [u8], wait: Wait) -> Result<bool>;
}

/// Reads owned bytes from a layer's file; as [`Under::read`] with `wait`.
fn read_owned(file: &dyn Storage, offset: FileOffset, buf: &mut [u8], wait: Wait) -> Result<bool> {
    let result = match wait {
        Wait::Yes => read_exact_at(file, buf, offset.0).map(|()| true),
        Wait::No => read_exact_cached_at(file, buf, offset.0),
    };
    result.map_err(failed(file, "reading blocks", offset.0))
}

/// Takes a lock, or names who stands against it.
pub fn take_lock(file: &dyn Storage, lock: Lock) -> Result<()> {
    file.lock(lock).map_err(|error| {
        if error.kind() != std::io::ErrorKind::WouldBlock {
            return failed(file, "locking the file", 0)(error);
        }
        let who = match holders(file.path()) {
            names if names.is_empty() => "another open file".into(),
            names => names.join(", "),
        };
        let wanted = match lock {
            Lock::Shared => "to be read, but is being written",
            Lock::Exclusive => "to be written, but is in use",
        };
        Error::new(ErrorKind::InUse, format!("wanted {wanted} by {who}")).in_file(file.path())
    })
}

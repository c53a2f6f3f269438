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
mod keeper;
mod pages;
mod pending;
mod recover;
mod sealed;
#[cfg(not(simulation))]
mod shared;
mod slots;
mod turn;
mod writable;
mod write;

use crate::memory::Scatter;
use crate::types::Word;
use crate::wait::{Attempt, Wait};

pub use create::{NewLayer, create, is_untouched, random};
pub use journal::{RingSlot, read_ring};
pub use keeper::{FreshMap, Keeper, Keepers, Kept, survivors};
pub use pages::next_group;
pub use sealed::Sealed;
#[cfg(not(simulation))]
pub use shared::SharedMap;
pub use slots::{durable_header, newest_header, read_slots};
pub use writable::Writable;
pub use write::{ZeroKind, words};

/// What a layer's reader sees where the layer owns nothing.
pub trait Under {
    /// The blocks of a word that somebody below owns and that show at least one byte.
    fn owned(&self, word: Word, wait: Wait) -> Attempt<u64>;

    /// Fills `into` with what shows at the guest offset; zeros where nobody owns anything.
    fn read(&self, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt;
}

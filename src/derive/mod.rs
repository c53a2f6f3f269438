//! Making layers of what chains show: flattened, rebased, compacted, packed, or the difference of two
//! disks; and comparing disks.
//!
//! Two disks side by side are a pair: what their maps say the same of is never read. A fold takes
//! from a pair the blocks that a new layer has to hold, a [`Plan`] says which those are.

mod compare;
mod fold;
mod pack;
mod pair;
mod plan;

pub use compare::{Mismatch, Rule, compare};
pub use fold::Sink;
pub use pack::PackOptions;
pub use pair::{Content, Raw};
pub use plan::Plan;

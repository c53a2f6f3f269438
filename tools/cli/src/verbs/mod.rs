//! The verbs, a file or folder each.

pub mod check;
pub mod compact;
pub mod compare;
pub mod completions;
pub mod container;
pub mod create;
pub mod demo;
pub mod diff;
mod disks;
pub mod dump;
pub mod export;
pub mod flatten;
pub mod image;
pub mod import;
pub mod info;
pub mod man;
pub mod map;
pub mod pack;
pub mod rebase;
pub mod repair;
pub mod resize;
pub mod serve;
pub mod snapshot;
pub mod store;
pub mod verify;
pub mod volume;

/// What a verb that did its work has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done, or yes.
    Yes,
    /// The answer is no: `check` found something, `repair` lost something.
    No,
}

/// Result of a verb.
pub type Outcome = thinply::error::Result<Answer>;

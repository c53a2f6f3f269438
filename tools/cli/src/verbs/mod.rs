//! The verbs, a file or folder each.

pub mod attach;
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
pub mod mount;
pub mod mounts;
pub mod pack;
pub mod rebase;
pub mod repair;
pub mod resize;
pub mod serve;
pub mod snapshot;
pub mod store;
pub mod verify;
pub mod volume;

use thinply::error::{Error, Result};
use thinply::store::Finding;

use crate::io::output::say;

/// What a verb that did its work has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done, or yes.
    Yes,
    /// The answer is no: `check` found something, `repair` lost something, a part of the store is
    /// damaged.
    No,
}

/// Result of a verb.
pub type Outcome = Result<Answer>;

/// Says what of the store is bad, beside what was done or shown.
fn tell(bad: &[Finding]) -> Answer {
    bad.iter().for_each(say);
    if bad.is_empty() { Answer::Yes } else { Answer::No }
}

/// Does something with each of the names that were given, whatever becomes of the others; every
/// failure is said, the last one by whoever called.
fn each(names: &[String], mut act: impl FnMut(&str) -> Outcome) -> Outcome {
    let mut failed: Option<Error> = None;
    let mut answer = Answer::Yes;
    for name in names {
        match act(name) {
            Ok(Answer::Yes) => {}
            Ok(Answer::No) => answer = Answer::No,
            Err(error) => failed.replace(error).iter().for_each(say),
        }
    }
    failed.map_or(Ok(answer), Err)
}

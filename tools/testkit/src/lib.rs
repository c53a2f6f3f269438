//! What the tests of thinply and of its command share. Nothing here decides whether thinply is
//! right, except the oracles: [`bench::Disk`], [`crash::oracle`] and [`load::history`].
//!
//! - [`mod@bench`]: a folder of layers in memory, and a byte array to compare a disk with;
//! - [`hooked`]: a folder whose calls a test can fail, cut short or watch;
//! - [`device`]: a device whose calls can be held, failed and counted;
//! - [`crash`]: the crash simulator: power losses and faults at any call;
//! - [`fixtures`]: files that earlier versions made;
//! - [`load`]: clients that do anything at random to a disk, and what it may show afterwards;
//! - [`nbd`]: a server in this process, and an NBD client that can misbehave;
//! - [`plain`]: the least NBD client;
//! - [`program`]: the command as a process of its own, to be killed.
//!
//! Integration tests only: to the unit tests in `src/`, the types here are another crate's.
#![allow(missing_docs, reason = "tests read better by names; what needs a word has one")]

pub mod bench;
pub mod crash;
pub mod device;
pub mod fixtures;
pub mod hooked;
pub mod load;
#[cfg(not(simulation))]
pub mod nbd;
pub mod plain;
pub mod program;

/// The number in an environment variable, if it is set: how long a test runs, or with which seed.
///
/// # Panics
/// Where it holds something else.
pub fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is no number: {value:?}")))
}

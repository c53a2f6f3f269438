//! What outlives the process that serves: descriptors, in the hands of another process.
//!
//! A *holder* starts a server and keeps what the server gives it: each writable layer's open file (and so
//! its lock) with the memory of what is fresh in it, the store's desk, the devices of mounts. When the
//! server dies the holder waits for its real end and starts another one, which is given all of that
//! and goes on (`format-spec.md`, "Going on after the death of a process"). When the holder dies the
//! server goes on as if there had been none.
//!
//! They talk over a `SOCK_SEQPACKET` socket, version 1. A message is a word and, behind a space, a key;
//! descriptors come beside it:
//!
//! | message | from | descriptors | |
//! | --- | --- | --- | --- |
//! | `holder 1` | holder | | first, with the version |
//! | `kept KEY` | holder | those of the key | once for each key |
//! | `begin` | holder | | that was all |
//! | `keep KEY` | server | 1 to 64 | in place of those that the key had |
//! | `drop KEY` | server | | |
//! | `ready` | server | | it serves now |
//! | `done` | holder | | answers each of the three before |
//!
//! A key has at most 8,000 bytes, and means something to servers alone.

mod client;
mod vault;
mod wire;

pub use client::Holder;
pub use vault::{Came, Vault};

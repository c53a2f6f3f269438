//! Disks in use: what every front end needs of a disk besides its content, and no protocol.
//!
//! - [`Served`] is a disk in use under a name: a [`Device`](crate::device::Device) whose changes pass
//!   by the moments that somebody looks at ([`Moment`]), and that is changed as a whole by one at a
//!   time ([`Served::change`]).
//! - A [`Desk`] leads from names to disks in use. A front end asks it for a [`Lease`]; whoever looks
//!   at a disk or changes it as a whole comes for a visit. A [`Broker`] opens what the names stand for.
//!   Where all disks are open from the start, a [`Table`] will do.
//! - A lease takes requests that may have to wait ([`Lease::submit`], [`Lease::flush`]); each ends in a
//!   [`Completion`].
//!
//! Invariants:
//! - a disk is open under one name once at most: it is opened after the one before is closed, and
//!   nobody uses or changes it before it is open or while it is being closed;
//! - a disk that is not shared has one lease at most, from its opening or the end of the lease before,
//!   with all its requests, to its own end;
//! - a moment shows each block as it was when it began; a change is before it or after it, as a whole;
//! - a flush covers every request of the disk that was completed before it was asked for;
//! - every completion is called once or dropped, while no lock of this room is held.
//!
//! Threads: a desk has none. A disk in use has up to [`Opened::workers`] workers and one flusher, each
//! only while there is work for it and some seconds longer; they hold the disk only through the requests
//! that they carry out. Whoever drops the last lease or visit closes the disk, on its own thread.
//!
//! Lock order: the turn to change a disk as a whole, then its moments (each change of content holds
//! them for reading), then the kept blocks of one moment, then the device's own locks. The desk's book,
//! the queue's state and the list of flushes are each held alone, and for no longer than a look.

use std::sync::Arc;

mod desk;
mod moment;
mod queue;
mod served;
#[cfg(all(test, not(simulation)))]
mod tests;

pub use crate::device::Disk;
pub use crate::storage::Buffer;
// What a front end of this crate needs for its own threads.
#[cfg(not(simulation))]
pub(crate) use crate::sync::{guard, spawn};
pub use desk::{Broker, Desk, InUse, Lease, Leases, Table};
pub use moment::Moment;
pub use queue::{Completion, Op, Payload};
pub use served::{AnyServed, Change, Opened, Served};

/// Hears of what went wrong where nobody waits for an answer, a line each.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// Longest name or description in bytes.
pub const MAX_NAME: usize = 4096;

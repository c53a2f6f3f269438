//! Disks in use: what every front end needs of a disk besides its content, and no protocol.
//!
//! - [`Served`] is a disk in use under a name: a [`Device`](crate::device::Device) whose changes pass
//!   by the moments that somebody looks at ([`Moment`]), and that is changed as a whole by one at a
//!   time ([`Served::change`]).
//! - A [`Desk`] leads from names to disks in use. A front end asks it for a [`Lease`]; whoever looks
//!   at a disk or changes it as a whole comes for a visit. A [`Broker`] opens what the names stand for.
//!   Where all disks are open from the start, a [`Table`] will do.
//! - A lease takes requests that may have to wait ([`Lease::submit`], [`Lease::flush`]), each of which ends
//!   in a [`Completion`], and whatever else a front end must do off its own thread ([`Lease::run`]). One
//!   that finds no space on the host may wait for some ([`Completion::waits`]).
//!
//! Invariants:
//! - a disk is open under one name once at most: it is opened after the one before is closed, and
//!   nobody uses or changes it before it is open or while it is being closed;
//! - a disk of a desk that is not shared has one lease at most, from its opening or the end of the lease before,
//!   with all its requests, to its own end;
//! - a moment shows each block as it was when it began; a change is before it or after it, as a whole;
//! - a flush covers every request of the disk that was completed before it was asked for;
//! - every completion is called once or dropped, while no lock of this room is held.
//!
//! Threads: a desk has none. A disk in use has up to [`Opened::workers`] workers, one flusher, and one
//! for all that waits for space, each only while there is work for it and some seconds longer; they hold
//! the disk only through the requests that they carry out. Whoever drops the last lease or visit closes the disk, on its own thread.
//!
//! Lock order: the turn to change a disk as a whole, then its moments (each change of content holds
//! them for reading), then the kept blocks of one moment, then the device's own locks. The desk's book,
//! the queue's state, the list of flushes and that of who waits for space are each held alone, and for no
//! longer than a look.
//!
//! # A front end
//!
//! All that a door takes, for a toy protocol over a socket: lines `open NAME`, `read OFFSET LENGTH`,
//! `write OFFSET LENGTH` with that many bytes behind it, and `flush`, each answered by `ok LENGTH` with
//! that many bytes behind it, or `error KIND`. Who says anything else is hung up on.
//!
//! ```
//! use std::io::{self, BufRead, BufReader, Read, Write};
//! use std::os::unix::net::UnixStream;
//! use std::sync::mpsc::{Sender, channel};
//!
//! use thinply::device::{Device, NotDone, Wait};
//! use thinply::error::{Error, ErrorKind, Result};
//! use thinply::serve::{Lease, Leases, Op, Payload};
//!
//! fn serve(mut stream: UnixStream, disks: &dyn Leases) -> io::Result<()> {
//!     let mut input = BufReader::new(stream.try_clone()?);
//!     let (mut disk, mut line): (Option<Lease>, _) = (None, String::new());
//!     while input.by_ref().take(4096).read_line(&mut line)? > 0 {
//!         let words: Vec<_> = line.split_whitespace().collect();
//!         let answer = match (&words[..], &disk) {
//!             (["open", name], None) => disks.lease(name).map(|lease| {
//!                 disk = Some(lease);
//!                 Vec::new()
//!             }),
//!             (["read", offset, length], Some(disk)) => {
//!                 read(disk, number(offset, u64::MAX)?, number(length, 1 << 20)? as usize)
//!             }
//!             (["write", offset, length], Some(disk)) => {
//!                 let mut data = vec![0; number(length, 1 << 20)? as usize];
//!                 input.read_exact(&mut data)?;
//!                 write(disk, number(offset, u64::MAX)?, data)
//!             }
//!             (["flush"], Some(disk)) => wait(|tell| disk.flush(move |r| drop(tell.send(r)))),
//!             _ => return Err(io::ErrorKind::InvalidData.into()),
//!         };
//!         match answer {
//!             Ok(bytes) => {
//!                 writeln!(stream, "ok {}", bytes.len())?;
//!                 stream.write_all(&bytes)?;
//!             }
//!             // Not the whole error: it names files of this machine.
//!             Err(error) => writeln!(stream, "error {}", error.kind().name())?,
//!         }
//!         line.clear();
//!     }
//!     Ok(())
//! }
//!
//! fn number(word: &str, most: u64) -> io::Result<u64> {
//!     let number = word.parse().ok().filter(|number| *number <= most);
//!     number.ok_or(io::ErrorKind::InvalidData.into())
//! }
//!
//! /// At once what the page cache holds, and by the disk's own threads what has to wait.
//! fn read(disk: &Lease, offset: u64, length: usize) -> Result<Vec<u8>> {
//!     let mut bytes = vec![0; length];
//!     match disk.try_read(offset, (&mut bytes).into(), Wait::Never) {
//!         Ok(()) => Ok(bytes),
//!         Err(NotDone::Failed(error)) => Err(error),
//!         Err(NotDone::WouldWait) => wait(|tell| {
//!             disk.submit(Op::Read { offset, length }, false, move |r| drop(tell.send(r)));
//!         }),
//!     }
//! }
//!
//! fn write(disk: &Lease, offset: u64, mut data: Vec<u8>) -> Result<Vec<u8>> {
//!     let written = disk.try_write(offset, (&data).into(), Wait::Never)?;
//!     let rest = data.split_off(written as usize);
//!     if rest.is_empty() {
//!         return Ok(rest);
//!     }
//!     let op = Op::Write { offset: offset + written, data: Payload::Bytes(rest) };
//!     wait(|tell| disk.submit(op, false, move |r| drop(tell.send(r))))
//! }
//!
//! /// A better front end goes on with the next request, and answers this one from its completion.
//! fn wait(begin: impl FnOnce(Sender<Result<Vec<u8>>>)) -> Result<Vec<u8>> {
//!     let (tell, done) = channel();
//!     begin(tell);
//!     done.recv().unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "the request was given up")))
//! }
//!
//! // A disk, and a client.
//! # use std::sync::Arc;
//! # use thinply::chain::{Chain, Gate, create};
//! # use thinply::serve::{Opened, Served, Table};
//! # use thinply::storage::{Access, Folder, MemoryFolder};
//! # let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("memory"));
//! # let layers = Arc::new(Gate::default());
//! # create(&folder, "disk.tply", Some(1 << 30), None, &layers)?;
//! let chain = Chain::open(folder, "disk.tply", Access::Write, layers)?;
//! let disks = Table::new();
//! disks.insert(Arc::new(Served::new("disk", Opened::new(chain))?))?;
//! let (client, server) = UnixStream::pair()?;
//! let serving = std::thread::spawn(move || serve(server, &disks));
//! let requests = "open disk\nwrite 4096 5\nhelloflush\nread 4094 9\nread 1073741824 1\nbye\n";
//! (&client).write_all(requests.as_bytes())?;
//! let mut answers = String::new();
//! (&client).read_to_string(&mut answers)?;
//! assert_eq!(answers, "ok 0\nok 0\nok 0\nok 9\n\0\0hello\0\0error out-of-range\n");
//! assert!(serving.join().unwrap().is_err(), "said goodbye, which is no request");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::error::Result;

mod desk;
mod moment;
mod queue;
mod served;
mod space;
#[cfg(all(test, not(simulation)))]
mod tests;
mod used;

pub use crate::device::{Disk, Facts};
pub use crate::storage::Buffer;
// What a front end of this crate needs for its own threads and sockets.
pub(crate) use crate::socket;
#[cfg(not(simulation))]
pub(crate) use crate::sync::{guard, spawn};
pub use desk::{Broker, Desk, InUse, Lease, Leases, Listed, Table};
pub use moment::Moment;
#[cfg(not(simulation))]
pub(crate) use queue::Crew;
pub use queue::{Completion, Op, Payload};
pub use served::{AnyServed, Change, Opened, Served};
pub use used::Used;

/// Keeps descriptors beyond the end of this process, for one that goes on where it ended.
pub trait Keep: Send + Sync {
    /// Keeps these under a key, in place of those that it had.
    ///
    /// # Errors
    /// Host errors; then they are not kept.
    fn keep(&self, key: &str, descriptors: &[BorrowedFd<'_>]) -> Result<()>;

    /// Nobody needs what the key has any more.
    fn release(&self, key: &str);
}

/// Hears of what went wrong where nobody waits for an answer, a line each.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// Longest name or description in bytes.
pub const MAX_NAME: usize = 4096;

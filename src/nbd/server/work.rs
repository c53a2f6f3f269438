//! Carries out requests on a disk, inline or where they may wait.

use super::buffer::Replies;
use super::link::Ticket;
use crate::device::{BLOCK_SIZE, Detail, Device, Extent, NotDone, Prefetch, Wait};
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::proto::{self, Errno};
use crate::serve::{AnyServed, Completion, Lease, Log};

/// A read is split at no more places than this; beyond, zeros are sent as data.
const MAX_READ_EXTENTS: usize = 64;

/// How a device error is told to a client: without host paths, which go to the log only.
/// `out_of_range` is the errno of the command for a range that ended up beyond the end.
pub(super) fn device_failure(error: &Error, out_of_range: Errno) -> (Errno, &'static str) {
    match error.kind() {
        ErrorKind::NoSpace => (Errno::NoSpace, "no space left on the host"),
        ErrorKind::Unsupported => (Errno::NotSupported, "not supported by this export"),
        ErrorKind::ReadOnly => (Errno::Perm, "the device is read-only"),
        ErrorKind::OutOfRange => (out_of_range, "beyond the end of the device"),
        ErrorKind::InvalidInput => (Errno::Invalid, "invalid argument"),
        ErrorKind::Limit => (Errno::NoMem, "a limit of the host or the server is reached"),
        ErrorKind::Poisoned => (Errno::Io, "an earlier sync failed; reopen the image"),
        _ => (Errno::Io, "input/output error on the host"),
    }
}

/// A read, with what its reply depends on.
#[derive(Clone, Copy)]
pub(super) struct Read {
    pub(super) cookie: u64,
    pub(super) structured: bool,
    /// The reply may not be split.
    pub(super) whole: bool,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Read {
    /// Appends the whole reply to `out`, an error reply if the device fails. Answers `false`, with
    /// `out` as it was, if it would have to wait and may not. `failed` hears of a device error.
    pub(super) fn reply(
        &self,
        disk: &AnyServed,
        wait: Wait,
        out: &mut Replies,
        extents: &mut Vec<Extent>,
        failed: impl FnOnce(&Error),
    ) -> bool {
        let start = out.len();
        let result = if self.structured {
            self.structured(disk, wait, out, extents)
        } else {
            let header = proto::simple_reply(self.cookie, None);
            self.data(disk, wait, out, &header, (self.offset, self.length))
        };
        match result {
            Ok(true) => return true,
            Ok(false) => out.truncate(start),
            Err((error, at)) => {
                out.truncate(start);
                failed(&error);
                let (errno, message) = device_failure(&error, Errno::Invalid);
                if self.structured {
                    out.push(&proto::error_offset_chunk(self.cookie, errno, message, at));
                } else {
                    out.push(&proto::simple_reply(self.cookie, Some(errno)));
                }
                return true;
            }
        }
        false
    }

    /// Appends what comes before the data of a whole reply.
    pub(super) fn header(&self, out: &mut Replies) {
        if self.structured {
            out.push(&proto::data_header(self.cookie, true, self.offset, self.length));
        } else {
            out.push(&proto::simple_reply(self.cookie, None));
        }
    }

    fn structured(
        &self,
        disk: &AnyServed,
        wait: Wait,
        out: &mut Replies,
        extents: &mut Vec<Extent>,
    ) -> std::result::Result<bool, (Error, u64)> {
        let Self { cookie, offset, length, .. } = *self;
        if length == 0 {
            out.push(&proto::empty_chunk(cookie));
            return Ok(true);
        }
        extents.clear();
        // To ask about a single block costs more than to send its zeros.
        if !self.whole && u64::from(length) > BLOCK_SIZE {
            let (range, limit) = (u64::from(length), MAX_READ_EXTENTS);
            match disk.try_extents(offset, range, Detail::Bitmaps, limit, extents, wait) {
                Ok(()) => {}
                Err(NotDone::WouldWait) => return Ok(false),
                Err(NotDone::Failed(error)) => return Err((error, offset)),
            }
        }
        let mut at = 0u32;
        for (i, extent) in extents.iter().enumerate() {
            // The last place to split takes all that is left, as data.
            if i + 1 == MAX_READ_EXTENTS {
                break;
            }
            let part = u32::try_from(extent.length).unwrap_or(u32::MAX).min(length - at);
            let done = at + part == length;
            let from = offset + u64::from(at);
            if extent.hole {
                out.push(&proto::hole_chunk(cookie, done, from, part));
            } else {
                let header = proto::data_header(cookie, done, from, part);
                if !self.data(disk, wait, out, &header, (from, part))? {
                    return Ok(false);
                }
            }
            at += part;
            if done {
                return Ok(true);
            }
        }
        let (from, rest) = (offset + u64::from(at), length - at);
        let header = proto::data_header(cookie, true, from, rest);
        self.data(disk, wait, out, &header, (from, rest))
    }

    /// Appends `header` and the data of a range, read in place behind it.
    fn data(
        &self,
        disk: &AnyServed,
        wait: Wait,
        out: &mut Replies,
        header: &[u8],
        (offset, length): (u64, u32),
    ) -> std::result::Result<bool, (Error, u64)> {
        let total = header.len() + length as usize;
        let (head, data) = out.spare(total).split_at_mut(header.len());
        head.copy_from_slice(header);
        let done = match length {
            0 => Ok(()),
            _ => disk.try_read(offset, data.into(), wait),
        };
        match done {
            Ok(()) => {
                out.built(total);
                Ok(true)
            }
            Err(NotDone::WouldWait) => Ok(false),
            Err(NotDone::Failed(error)) => Err((error, offset)),
        }
    }
}

/// What answers a request without data.
pub(super) struct Answer {
    pub(super) ticket: Ticket,
    /// The request, for the log.
    pub(super) what: &'static str,
    /// The errno for a range that ended up beyond the end.
    pub(super) out_of_range: Errno,
}

impl Completion for Answer {
    fn complete(self, result: Result<Vec<u8>>) {
        match result {
            Ok(_) => self.ticket.succeed(),
            Err(error) => fail(self.ticket, self.what, &error, self.out_of_range),
        }
    }

    fn waits(&self) -> Option<Log> {
        self.ticket.waits()
    }
}

fn fail(ticket: Ticket, what: &str, error: &Error, out_of_range: Errno) {
    let (errno, message) = device_failure(error, out_of_range);
    ticket.log(&format!("{what} failed: {error}"));
    ticket.fail(errno, message);
}

/// Has a range described.
pub(super) fn describe(lease: &Lease, ticket: Ticket, (offset, length): (u64, u32), limit: usize) {
    let disk = lease.clone();
    lease.run(move |thread| {
        let mut extents = Vec::new();
        let described = thread
            .and_then(|()| disk.extents(offset, length.into(), Detail::Files, limit, &mut extents));
        drop(disk);
        match described {
            Ok(()) => {
                let reply = proto::status_chunk(ticket.cookie, &extents);
                ticket.answer(reply);
            }
            Err(error) => fail(ticket, "describing a range", &error, Errno::Invalid),
        }
    });
}

/// Has reads of one connection answered. All but a single one are small.
pub(super) fn hand_on(lease: &Lease, reads: Vec<(Ticket, Read)>) {
    let disk = lease.clone();
    lease.run(move |thread| match thread {
        Ok(()) if reads.len() > 1 => answer(prefetch(reads, &disk), disk),
        Ok(()) => answer(reads, disk),
        Err(error) => {
            reads.into_iter().for_each(|(ticket, _)| fail(ticket, "read", &error, Errno::Io));
        }
    });
}

/// Has the disk bring all of the data at once. Reads that it can't be told of in advance go to
/// threads of their own; those that are left are the caller's.
fn prefetch(mut reads: Vec<(Ticket, Read)>, disk: &Lease) -> Vec<(Ticket, Read)> {
    let told = |(_, read): &mut (Ticket, Read)| {
        // An error shows again in the read.
        let begun = disk.prefetch(read.offset, read.length.into());
        begun.unwrap_or(Prefetch::All) == Prefetch::All
    };
    for read in reads.extract_if(.., |read| !told(read)) {
        hand_on(disk, vec![read]);
    }
    reads
}

/// Answers reads, those together for which the later ones need no wait.
fn answer(reads: Vec<(Ticket, Read)>, disk: Lease) {
    let (mut answered, mut out, mut extents) = (Vec::new(), Replies::default(), Vec::new());
    for (ticket, read) in reads {
        let mut reply = |wait, out: &mut Replies| {
            read.reply(&disk, wait, out, &mut extents, |error| {
                ticket.log(&format!("read failed: {error}"));
            })
        };
        if answered.is_empty() || !reply(Wait::Never, &mut out) {
            Ticket::answer_all(
                std::mem::take(&mut answered),
                std::mem::take(&mut out).into_bytes(),
            );
            reply(Wait::Allowed, &mut out);
        }
        answered.push(ticket);
    }
    // Before the last answer: whoever waits for it may then be the last and see to the close.
    drop(disk);
    Ticket::answer_all(answered, out.into_bytes());
}

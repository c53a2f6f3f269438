//! Requests about the content of open files.

use std::sync::Arc;

use rustix::io::Errno;

use super::handles::Open;
use super::server::Ticket;
use super::{names, proto};
use crate::device::{Detail, Device, Extent, NotDone, Wait, ZeroMode};
use crate::error::Result;
use crate::serve::{Buffer, Completion, Lease, Log, Op, Payload};

/// Reads up to this length may be decompressed on the thread that read the request.
const SMALL_READ: usize = 64 << 10;

/// Flags of `fallocate`.
const KEEP_SIZE: u32 = 1;
const PUNCH_HOLE: u32 = 2;
const ZERO_RANGE: u32 = 16;

/// The open file of a handle: none is a number that was never given out, or leads nowhere any more.
fn find(ticket: Ticket, handle: u64) -> Option<(Ticket, Arc<Open>)> {
    match ticket.shared.handles.get(handle) {
        Some(open) => Some((ticket, open)),
        None => {
            let known = ticket.shared.handles.knows(handle);
            ticket.fail(if known { Errno::IO } else { Errno::BADF });
            None
        }
    }
}

fn find_writable(ticket: Ticket, handle: u64) -> Option<(Ticket, Lease)> {
    let (ticket, open) = find(ticket, handle)?;
    if !open.writes {
        ticket.fail(Errno::BADF);
        return None;
    }
    Some((ticket, open.disk.clone()))
}

/// How much of a range lies within the disk.
fn within(disk: &Lease, offset: u64, length: u64) -> u64 {
    length.min(disk.size().saturating_sub(offset))
}

pub(super) fn read(ticket: Ticket, buffer: &mut Buffer, handle: u64, offset: u64, length: usize) {
    let Some((ticket, open)) = find(ticket, handle) else { return };
    let length = within(&open.disk, offset, length as u64) as usize;
    if length == 0 {
        return ticket.succeed(&[]);
    }
    let wait = if length <= SMALL_READ { Wait::Decode } else { Wait::Never };
    // The whole buffer begins at a page, and the request isn't needed any more.
    let Some(room) = buffer.get_mut(..length) else { return ticket.fail(Errno::INVAL) };
    match open.disk.try_read(offset, (&mut *room).into(), wait) {
        Ok(()) => ticket.succeed(room),
        Err(NotDone::WouldWait) => {
            let answer = Answer { ticket, what: "read", of: Of::Data };
            open.disk.submit(Op::Read { offset, length }, false, answer);
        }
        Err(NotDone::Failed(error)) => ticket.fail_with("read", &error),
    }
}

pub(super) fn write(ticket: Ticket, handle: u64, offset: u64, data: &[u8], durable: bool) {
    let Some((ticket, disk)) = find_writable(ticket, handle) else { return };
    let fits = within(&disk, offset, data.len() as u64) as usize;
    let Some(data) = data.get(..fits).filter(|data| !data.is_empty()) else {
        // As at the end of a block device.
        return ticket.fail(Errno::NOSPC);
    };
    let answer = |ticket| Answer { ticket, what: "write", of: Of::Count(data.len()) };
    let tried = match disk.try_write(offset, data.into(), Wait::Never) {
        // To wait for some takes another thread, as all waits do.
        Err(error) if error.wants_space() && ticket.waits().is_some() => Ok(0),
        tried => tried,
    };
    match tried {
        Ok(count) if count == data.len() as u64 => match durable {
            true => disk.flush(answer(ticket)),
            false => ticket.succeed(&proto::written(data.len())),
        },
        // What is left has to wait. All of it is written then, as one piece of memory is handed on.
        Ok(_) => {
            let op = Op::Write { offset, data: Payload::Bytes(data.to_vec()) };
            disk.submit(op, durable, answer(ticket));
        }
        Err(error) => ticket.fail_with("write", &error),
    }
}

pub(super) fn sync(ticket: Ticket, handle: u64) {
    let Some((ticket, open)) = find(ticket, handle) else { return };
    open.disk.flush(Answer { ticket, what: "flush", of: Of::Nothing });
}

pub(super) fn allocate(ticket: Ticket, handle: u64, (offset, length): (u64, u64), mode: u32) {
    let Some((ticket, disk)) = find_writable(ticket, handle) else { return };
    let allocate = match mode & !KEEP_SIZE {
        PUNCH_HOLE => false,
        ZERO_RANGE => true,
        _ => return ticket.fail(Errno::OPNOTSUPP),
    };
    let inside = within(&disk, offset, length);
    if inside < length && mode & KEEP_SIZE == 0 {
        // The file would have to grow.
        return ticket.fail(Errno::NOSPC);
    }
    let answer = Answer { ticket, what: "fallocate", of: Of::Nothing };
    let mode = ZeroMode { allocate, fast_only: false };
    disk.submit(Op::Zero { offset, length: inside, mode }, false, answer);
}

/// Makes the disk of a node read as zeros from `size` on.
pub(super) fn cut(ticket: Ticket, node: u64, disk: &Lease, size: u64) {
    let length = disk.size().saturating_sub(size);
    let op = Op::Zero { offset: size, length, mode: ZeroMode::default() };
    disk.submit(op, false, Answer { ticket, what: "cutting", of: Of::Attributes(node) });
}

pub(super) fn seek(ticket: Ticket, handle: u64, offset: u64, hole: bool) {
    let Some((ticket, open)) = find(ticket, handle) else { return };
    let disk = open.disk.clone();
    disk.clone().run(move |thread| {
        let found = thread.and_then(|()| first(&disk, offset));
        let size = disk.size();
        drop((disk, open));
        match found {
            Ok(first) => ticket.give(sought(offset, size, first, hole)),
            Err(error) => ticket.fail_with("seek", &error),
        }
    });
}

/// How a disk reads from `offset` on.
fn first(disk: &Lease, offset: u64) -> Result<Option<Extent>> {
    let (length, mut extents) = (within(disk, offset, u64::MAX), Vec::new());
    if length > 0 {
        disk.extents(offset, length, Detail::Files, 1, &mut extents)?;
    }
    Ok(extents.pop())
}

/// Where data, or a hole, begins at `offset` or behind it, on a disk that reads so there. The end is a
/// hole.
fn sought(
    offset: u64,
    size: u64,
    first: Option<Extent>,
    hole: bool,
) -> std::result::Result<Vec<u8>, Errno> {
    let first = first.ok_or(Errno::NXIO)?;
    let found = if first.hole == hole { offset } else { offset + first.length };
    if found >= size && !hole {
        return Err(Errno::NXIO);
    }
    Ok(proto::sought(found))
}

/// What answers a request that had to wait.
struct Answer {
    ticket: Ticket,
    /// The request, for the log.
    what: &'static str,
    of: Of,
}

/// What an answer holds.
enum Of {
    Nothing,
    /// What was read.
    Data,
    /// How many bytes were written.
    Count(usize),
    /// What a node shows of itself.
    Attributes(u64),
}

impl Completion for Answer {
    fn complete(self, result: Result<Vec<u8>>) {
        match (result, self.of) {
            (Ok(_), Of::Nothing) => self.ticket.succeed(&[]),
            (Ok(data), Of::Data) => self.ticket.succeed(&data),
            (Ok(_), Of::Count(count)) => self.ticket.succeed(&proto::written(count)),
            (Ok(_), Of::Attributes(node)) => names::attributes(self.ticket, node),
            (Err(error), _) => self.ticket.fail_with(self.what, &error),
        }
    }

    fn waits(&self) -> Option<Log> {
        self.ticket.waits()
    }
}

//! Requests about the content of open files.

use std::sync::Arc;

use rustix::io::Errno;

use super::handles::Open;
use super::names;
use super::proto::{self, MAX_IO, Place};
use super::server::Ticket;
use crate::device::{Detail, Device, Extent, NotDone, Wait, ZeroMode};
use crate::error::Result;
use crate::serve::{Buffer, Completion, Lease, Log, Op, Payload};

/// Reads up to this length may be decompressed on the thread that read the request.
const SMALL_READ: usize = 64 << 10;
/// Most bytes of a hole that are copied at a time.
const MAX_HOLE: u64 = 1 << 30;

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

fn find_writable(ticket: Ticket, handle: u64) -> Option<(Ticket, Arc<Open>)> {
    let (ticket, open) = find(ticket, handle)?;
    if !open.writes {
        ticket.fail(Errno::BADF);
        return None;
    }
    Some((ticket, open))
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
    let Some((ticket, open)) = find_writable(ticket, handle) else { return };
    let disk = &open.disk;
    let fits = within(disk, offset, data.len() as u64) as usize;
    let Some(data) = data.get(..fits).filter(|data| !data.is_empty()) else {
        // As at the end of a block device.
        return ticket.fail(Errno::NOSPC);
    };
    let answer = |ticket| Answer { ticket, what: "write", of: Of::Count(data.len()) };
    match disk.write_at_once(offset, data.into(), || ticket.waits().is_some()) {
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
    let Some((ticket, open)) = find_writable(ticket, handle) else { return };
    let inside = within(&open.disk, offset, length);
    if inside < length && mode & KEEP_SIZE == 0 {
        // The file would have to grow.
        return ticket.fail(Errno::NOSPC);
    }
    let zero = |allocate| {
        let mode = ZeroMode { allocate, fast_only: false };
        Op::Zero { offset, length: inside, mode }
    };
    let op = match mode & !KEEP_SIZE {
        0 => Op::Allocate { offset, length: inside },
        PUNCH_HOLE => zero(false),
        ZERO_RANGE => zero(true),
        _ => return ticket.fail(Errno::OPNOTSUPP),
    };
    let answer = Answer { ticket, what: "fallocate", of: Of::Nothing };
    open.disk.submit(op, open.durable, answer);
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
        let found = thread.and_then(|()| first(&disk, offset, u64::MAX));
        let size = disk.size();
        drop((disk, open));
        match found {
            Ok(first) => ticket.give(sought(offset, size, first, hole)),
            Err(error) => ticket.fail_with("seek", &error),
        }
    });
}

/// How a disk reads from `offset` on, looked at `length` bytes ahead.
fn first(disk: &Lease, offset: u64, length: u64) -> Result<Option<Extent>> {
    let (length, mut extents) = (within(disk, offset, length), Vec::new());
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

/// Copies a part of a range, as long as it likes: the kernel tells its caller how much that was.
pub(super) fn copy(ticket: Ticket, from: Place, to: Place, length: u64) {
    let Some((ticket, source)) = find(ticket, from.handle) else { return };
    let Some((ticket, target)) = find_writable(ticket, to.handle) else { return };
    let length = within(&source.disk, from.offset, length);
    if length == 0 {
        // The end of what there is to copy.
        return ticket.succeed(&proto::written(0));
    }
    let length = within(&target.disk, to.offset, length);
    if length == 0 {
        return ticket.fail(Errno::NOSPC);
    }
    if from.node == to.node && from.offset.abs_diff(to.offset) < length {
        return ticket.fail(Errno::INVAL);
    }
    let disk = target.disk.clone();
    disk.run(move |thread| {
        let parts = (&source.disk, from.offset, &target.disk, to.offset);
        let done = thread.and_then(|()| copy_parts(parts, length));
        let of = Of::Count(*done.as_ref().unwrap_or(&0));
        let answer = Answer { ticket, what: "copy_file_range", of };
        if target.durable && done.is_ok() {
            return target.disk.flush(answer);
        }
        // Before the answer: whoever waits for it may then be the last and see to the close.
        drop((source, target));
        answer.complete(done.map(|_| Vec::new()));
    });
}

type Parts<'a> = (&'a Lease, u64, &'a Lease, u64);

/// Copies what is at hand with one buffer. An error behind the first part is for who asks for the rest.
fn copy_parts((source, from, target, to): Parts<'_>, length: u64) -> Result<usize> {
    let mut done = 0;
    while done < length.min(MAX_IO as u64) {
        match copy_part((source, from + done, target, to + done), length - done) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if done == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(done as usize)
}

/// Copies a stretch of data, or makes one of zeros where the source has a hole, so that it stays one.
fn copy_part((source, from, target, to): Parts<'_>, length: u64) -> Result<u64> {
    let mut part = first(source, from, length.min(MAX_IO as u64))?;
    if part.is_some_and(|part| part.hole) {
        // Zeros take no buffer. Looked at so far ahead, data would be looked at again and again.
        part = first(source, from, length.min(MAX_HOLE))?;
    }
    let Some(Extent { length, hole }) = part else { return Ok(0) };
    if hole {
        target.zero(to, length, ZeroMode::default())?;
        return Ok(length);
    }
    let mut data = vec![0; length.min(MAX_IO as u64) as usize];
    source.read(from, &mut data)?;
    target.write(to, &data)?;
    Ok(data.len() as u64)
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

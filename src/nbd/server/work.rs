//! Carries out requests on a device, inline or on the pool of worker threads.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::buffer::Replies;
use super::export::Export;
use super::link::Ticket;
use crate::device::{Detail, Device, Extent, Prefetch, ZeroMode};
use crate::error::{Error, ErrorKind};
use crate::nbd::proto::{self, Command, Errno};
use crate::sync::guard;
use crate::types::BLOCK_SIZE;
use crate::wait::{NotDone, Wait};

/// Stack of every thread of the server, in bytes; only what is touched costs memory.
pub(super) const STACK: usize = 512 << 10;

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
        ErrorKind::Poisoned => (Errno::Io, "an earlier sync failed; reopen the image"),
        _ => (Errno::Io, "input/output error on the host"),
    }
}

/// The errno of `command` for a range beyond the end.
pub(super) fn out_of_range(command: Command) -> Errno {
    match command {
        Command::Write { .. } | Command::WriteZeroes { .. } => Errno::NoSpace,
        _ => Errno::Invalid,
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
        device: &dyn Device,
        wait: Wait,
        out: &mut Replies,
        extents: &mut Vec<Extent>,
        failed: impl FnOnce(&Error),
    ) -> bool {
        let start = out.len();
        let result = if self.structured {
            self.structured(device, wait, out, extents)
        } else {
            let header = proto::simple_reply(self.cookie, None);
            self.data(device, wait, out, &header, (self.offset, self.length))
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
        device: &dyn Device,
        wait: Wait,
        out: &mut Replies,
        extents: &mut Vec<Extent>,
    ) -> Result<bool, (Error, u64)> {
        let Self { cookie, offset, length, .. } = *self;
        if length == 0 {
            out.push(&proto::empty_chunk(cookie));
            return Ok(true);
        }
        extents.clear();
        // To ask about a single block costs more than to send its zeros.
        if !self.whole && u64::from(length) > BLOCK_SIZE {
            let (range, limit) = (u64::from(length), MAX_READ_EXTENTS);
            match device.try_extents(offset, range, Detail::Bitmaps, limit, extents, wait) {
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
                if !self.data(device, wait, out, &header, (from, part))? {
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
        self.data(device, wait, out, &header, (from, rest))
    }

    /// Appends `header` and the data of a range, read in place behind it.
    fn data(
        &self,
        device: &dyn Device,
        wait: Wait,
        out: &mut Replies,
        header: &[u8],
        (offset, length): (u64, u32),
    ) -> Result<bool, (Error, u64)> {
        let total = header.len() + length as usize;
        let (head, data) = out.spare(total).split_at_mut(header.len());
        head.copy_from_slice(header);
        let done = match length {
            0 => Ok(()),
            _ => device.try_read(offset, data.into(), wait),
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

/// Data of a write, in whatever holds it.
pub(super) type Payload = Box<dyn AsRef<[u8]> + Send>;

/// What may have to wait, with the duty to answer it.
pub(super) struct Job {
    pub(super) export: Arc<Export>,
    pub(super) work: Work,
}

pub(super) enum Work {
    /// Reads of one connection. All but a single one are small.
    Reads(Vec<(Ticket, Read)>),
    /// Any other request.
    Other {
        ticket: Ticket,
        command: Command,
        /// The reply means that the change is durable.
        durable: bool,
        payload: Payload,
    },
}

impl Job {
    fn run(self, pool: &Arc<Pool>) {
        let Self { export, work } = self;
        match work {
            Work::Reads(mut reads) => {
                if reads.len() > 1 {
                    prefetch(&mut reads, &export, pool);
                }
                answer(reads, &**export.device());
            }
            Work::Other { ticket, command, durable, payload } => {
                carry_out(&export, ticket, command, durable, (*payload).as_ref());
            }
        }
    }

    /// Fails what there is no thread for.
    fn refuse(self) {
        let refuse = |ticket: Ticket| ticket.fail(Errno::NoMem, "no thread");
        match self.work {
            Work::Reads(reads) => reads.into_iter().for_each(|(ticket, _)| refuse(ticket)),
            Work::Other { ticket, .. } => refuse(ticket),
        }
    }
}

/// Has the disk bring all of the data at once. Reads that it can't be told of in advance go to
/// threads of their own.
fn prefetch(reads: &mut Vec<(Ticket, Read)>, export: &Arc<Export>, pool: &Arc<Pool>) {
    let told = |(_, read): &mut (Ticket, Read)| {
        // An error shows again in the read.
        let begun = export.device().prefetch(read.offset, read.length.into());
        begun.unwrap_or(Prefetch::All) == Prefetch::All
    };
    for read in reads.extract_if(.., |read| !told(read)) {
        pool.add(Job { export: Arc::clone(export), work: Work::Reads(vec![read]) });
    }
}

/// Answers reads, those together for which the later ones need no wait.
fn answer(reads: Vec<(Ticket, Read)>, device: &dyn Device) {
    let (mut answered, mut out, mut extents) = (Vec::new(), Replies::default(), Vec::new());
    for (ticket, read) in reads {
        let mut reply = |wait, out: &mut Replies| {
            read.reply(device, wait, out, &mut extents, |error| {
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
    Ticket::answer_all(answered, out.into_bytes());
}

/// Carries out a request that isn't a read, and answers it.
fn carry_out(
    export: &Arc<Export>,
    ticket: Ticket,
    command: Command,
    durable: bool,
    payload: &[u8],
) {
    let device = &**export.device();
    let result = match command {
        Command::BlockStatus { offset, length, one } => {
            let limit = if one { 1 } else { proto::MAX_EXTENTS };
            let mut extents = Vec::new();
            device
                .extents(offset, length.into(), Detail::Files, limit, &mut extents)
                .map(|()| Some(proto::status_chunk(ticket.cookie, &extents)))
        }
        command => change(device, command, payload).map(|()| None),
    };
    match result {
        Err(error) => {
            let (errno, message) = device_failure(&error, out_of_range(command));
            ticket.log(&format!("{command:?} failed: {error}"));
            ticket.fail(errno, message);
        }
        Ok(Some(reply)) => ticket.answer(reply),
        Ok(None) if durable => export.flush(ticket),
        Ok(None) => ticket.succeed(),
    }
}

fn change(device: &dyn Device, command: Command, payload: &[u8]) -> crate::error::Result<()> {
    match command {
        Command::Write { offset } => device.write(offset, payload),
        Command::WriteZeroes { offset, length, allocate, fast_only } if length > 0 => {
            device.zero(offset, length.into(), ZeroMode { allocate, fast_only })
        }
        Command::Trim { offset, length } if length > 0 => device.trim(offset, length.into()),
        Command::Cache { offset, length } if length > 0 => {
            device.prefetch(offset, length.into()).map(drop)
        }
        _ => Ok(()),
    }
}

/// Worker threads shared by the connections of an export; started when there is work for them, and
/// gone when there was none for a while.
pub(super) struct Pool {
    state: Mutex<Queue>,
    added: Condvar,
    max_threads: usize,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
    closed: bool,
}

impl Pool {
    const LINGER: Duration = Duration::from_secs(10);

    pub(super) fn new(max_threads: usize) -> Arc<Self> {
        let (state, added) = (Mutex::default(), Condvar::new());
        Arc::new(Self { state, added, max_threads: max_threads.max(1) })
    }

    /// Has `job` done soon. Never waits.
    pub(super) fn add(self: &Arc<Self>, job: Job) {
        let mut state = guard(&self.state);
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() || state.threads == self.max_threads {
            self.added.notify_one();
            return;
        }
        let this = Arc::clone(self);
        let thread = thread::Builder::new().name("nbd-work".into()).stack_size(STACK);
        if thread.spawn(move || this.run()).is_ok() {
            state.threads += 1;
        } else if state.threads == 0 {
            let jobs = std::mem::take(&mut state.jobs);
            drop(state);
            jobs.into_iter().for_each(Job::refuse);
        }
    }

    /// Lets the threads go once the jobs are done.
    pub(super) fn close(&self) {
        guard(&self.state).closed = true;
        self.added.notify_all();
    }

    fn run(self: Arc<Self>) {
        while let Some(job) = self.next() {
            // A panic drops the ticket, which answers with an error, and the worker lives on.
            let _ = catch_unwind(AssertUnwindSafe(|| job.run(&self)));
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = guard(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state.idle += 1;
            let wait = self.added.wait_timeout(state, Self::LINGER);
            let (held, timeout) = wait.unwrap_or_else(PoisonError::into_inner);
            state = held;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return None;
            }
        }
    }
}

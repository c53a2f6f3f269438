//! What has to wait for a disk, done by threads that are there for it: workers for requests, and a
//! flusher that all users of the disk share.
//!
//! A disk has its own threads, so that one that hangs takes none from others. They come when there is
//! work and go when there was none for a while, or when the disk is closed.
//!
//! The flusher runs one flush at a time; whoever asks meanwhile shares the next one. The engine below
//! joins flushes once more (`live/turn.rs`), and both are needed: the flusher exists so that no thread
//! of a front end, and no worker, waits for a sync, however many ask; in the engine those meet that
//! don't come through a front end (a write that waits for its own record, a change of the disk as a
//! whole), and the flusher is one of them.
//!
//! A request that finds no space on the host waits for some, if whoever asked for it wants that: without
//! a thread of its own, so that reads, and trims that give space back, go on (`space.rs`).

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::space::{Waiter, Waiters};
use super::{Lease, Log};
use crate::device::{Attempt, Device, NotDone, Wait, ZeroMode};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Gather;
use crate::planted::{Bug, planted};
use crate::storage::Buffer;
use crate::sync::{Condvar, Mutex, guard, spawn};
use crate::wait::waited;

/// How long a thread without work stays.
const LINGER: Duration = Duration::from_secs(10);

/// Data of a write, in whatever holds it.
#[derive(Debug)]
pub enum Payload {
    /// A few bytes.
    Bytes(Vec<u8>),
    /// Many.
    Buffer(Buffer),
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Buffer(buffer) => buffer,
        }
    }
}

/// A request to a disk. Offsets and lengths are bytes; one of no length does nothing.
#[derive(Debug)]
#[allow(missing_docs, reason = "as the device's calls have them")]
pub enum Op {
    /// [`Device::read`].
    Read { offset: u64, length: usize },
    /// [`Device::write`].
    Write { offset: u64, data: Payload },
    /// [`Device::zero`].
    Zero { offset: u64, length: u64, mode: ZeroMode },
    /// [`Device::trim`].
    Trim { offset: u64, length: u64 },
    /// [`Device::allocate`].
    Allocate { offset: u64, length: u64 },
    /// [`Device::prefetch`].
    Prefetch { offset: u64, length: u64 },
}

impl Op {
    fn carry_out(&self, device: &(impl Device + ?Sized)) -> Result<Vec<u8>> {
        match *self {
            Self::Read { offset, length } if length > 0 => {
                let mut data = vec![0; length];
                device.read(offset, &mut data)?;
                return Ok(data);
            }
            Self::Write { offset, ref data } if !data.as_ref().is_empty() => {
                device.write(offset, data.as_ref())?;
            }
            Self::Zero { offset, length, mode } if length > 0 => {
                device.zero(offset, length, mode)?;
            }
            Self::Trim { offset, length } if length > 0 => device.trim(offset, length)?,
            Self::Allocate { offset, length } if length > 0 => device.allocate(offset, length)?,
            Self::Prefetch { offset, length } if length > 0 => {
                device.prefetch(offset, length)?;
            }
            _ => {}
        }
        Ok(Vec::new())
    }

    /// Does it where that takes no wait. Of what is left undone a part may be done.
    fn at_once(&self, device: &(impl Device + ?Sized)) -> Attempt {
        let Self::Write { offset, data } = self else { return Err(NotDone::WouldWait) };
        let data = data.as_ref();
        if data.is_empty() {
            return Ok(());
        }
        let written = device.try_write(*offset, data.into(), Wait::Never)?;
        if written == data.len() as u64 { Ok(()) } else { Err(NotDone::WouldWait) }
    }
}

/// What a front end does once a request is done. Called once, by any thread, while no lock of this
/// room is held; a panic in it costs this request only. One that is dropped without being called (the
/// disk panicked) must answer its request with an error all the same.
pub trait Completion: Send + 'static {
    /// The request is done: what was read, nothing for all others.
    fn complete(self, result: Result<Vec<u8>>);

    /// Where there is no space on the host ([`Error::wants_space`]): whether the request shall wait until
    /// there is some, and who hears of that. Asked again after each try that fails. By default it fails.
    fn waits(&self) -> Option<Log> {
        None
    }
}

impl<F: FnOnce(Result<Vec<u8>>) + Send + 'static> Completion for F {
    fn complete(self, result: Result<Vec<u8>>) {
        self(result);
    }
}

/// Something to do on a thread, which is told if there is none for it.
pub type Task = Box<dyn FnOnce(Result<()>) + Send>;

/// The threads of one disk.
pub(super) struct Queue {
    workers: Arc<Crew>,
    flusher: Arc<Crew>,
    /// Who waits for the flush that has not begun yet.
    flushes: Mutex<Vec<Box<dyn Flush>>>,
    pub(super) waiters: Arc<Waiters>,
}

impl Queue {
    /// Of the disk of this name.
    pub fn new(disk: &str, workers: usize) -> Self {
        Self {
            workers: Crew::new("serve-work", workers),
            flusher: Crew::new("serve-flush", 1),
            flushes: Mutex::default(),
            waiters: Waiters::new(disk),
        }
    }

    /// Lets the threads go once all is done.
    pub fn close(&self) {
        self.workers.close();
        self.flusher.close();
        self.waiters.close();
    }

    fn take_flushes(&self) -> Vec<Box<dyn Flush>> {
        std::mem::take(&mut guard(&self.flushes))
    }
}

impl Lease {
    /// Has `task` done soon, on another thread. It is told with an error, on this thread, if there
    /// is none to be had.
    pub fn run(&self, task: impl FnOnce(Result<()>) + Send + 'static) {
        self.served.queue.workers.add(Box::new(task));
    }

    /// Has a request carried out soon; for a `durable` one all that was changed before is flushed
    /// too. Never waits. This lease does not end before.
    ///
    /// # Errors
    /// Those of the device are for `done`, and [`ErrorKind::Limit`] where there is no thread.
    pub fn submit(&self, op: Op, durable: bool, done: impl Completion) {
        self.submit_all(vec![(op, durable, done)]);
    }

    /// Writes what needs no wait, and answers how many bytes that was. Where there is no space on the host
    /// and the request `waits` for some, it needs a wait: that takes another thread, as all waits do.
    ///
    /// # Errors
    /// Those of [`Device::try_write`].
    pub fn write_at_once(
        &self,
        offset: u64,
        from: Gather<'_>,
        waits: impl FnOnce() -> bool,
    ) -> Result<u64> {
        match self.try_write(offset, from, Wait::Never) {
            Err(error) if error.wants_space() && waits() => Ok(0),
            tried => tried,
        }
    }

    /// [`Lease::submit`] of requests that may wait for the same: once the first has it, most of the
    /// others need no thread of their own.
    pub fn submit_all<C: Completion>(&self, requests: Vec<(Op, bool, C)>) {
        let request =
            |(op, durable, done)| Request { lease: self.clone(), op: Some(op), durable, done };
        let requests: Vec<_> = requests.into_iter().map(request).collect();
        self.run(move |thread| {
            let mut requests = requests.into_iter();
            if let Some(first) = requests.next() {
                caught(|| first.carry_out(thread.clone()));
            }
            for request in requests {
                caught(|| match thread.clone() {
                    Ok(()) => request.carry_out_now_or_later(),
                    failed => request.carry_out(failed),
                });
            }
        });
    }

    /// Has everything that was completed before now made durable. Never waits. This lease does not
    /// end before.
    ///
    /// # Errors
    /// As [`Lease::submit`].
    pub fn flush(&self, done: impl Completion) {
        let request = Request { lease: self.clone(), op: None, durable: false, done };
        let first = {
            let mut flushes = guard(&self.served.queue.flushes);
            flushes.push(Box::new(request));
            flushes.len() == 1
        };
        if first {
            let lease = self.clone();
            let flush = move |thread: Result<()>| lease.flush_now(thread);
            self.served.queue.flusher.add(Box::new(flush));
        }
    }

    /// Flushes for those who asked before now, and answers them.
    fn flush_now(self, thread: Result<()>) {
        let queue = &self.served.queue;
        // A flush covers what completed before it began, and so only those who asked before.
        let mut waiting = queue.take_flushes();
        let flush = || thread.and_then(|()| self.served.flush());
        let Some(result) = caught(flush) else { return };
        if planted(Bug::FlushJoinedTooLate) {
            waiting.extend(queue.take_flushes());
        }
        drop(self);
        for flush in waiting {
            let result = result.clone();
            caught(|| flush.flushed(result));
        }
    }
}

/// A request on its way to a thread.
struct Request<C> {
    lease: Lease,
    /// None is a flush.
    op: Option<Op>,
    durable: bool,
    done: C,
}

/// A request that is a flush.
trait Flush: Send {
    /// Answers it with the outcome.
    fn flushed(self: Box<Self>, result: Result<()>);
}

impl<C: Completion> Flush for Request<C> {
    fn flushed(self: Box<Self>, result: Result<()>) {
        self.answer_or_wait(result.map(|()| Vec::new()));
    }
}

impl<C: Completion> Waiter for Request<C> {
    fn try_again(self: Box<Self>, thread: Result<()>) -> Option<Box<dyn Waiter>> {
        let result = self.attempt(thread);
        let (request, ..) = self.answer(result)?;
        Some(Box::new(request))
    }
}

impl<C: Completion> Request<C> {
    fn carry_out(self, thread: Result<()>) {
        let result = self.attempt(thread);
        self.answer_or_wait(result);
    }

    /// Takes a thread of its own if there is something to wait for.
    fn carry_out_now_or_later(self) {
        let done = self.op.as_ref().map_or(Ok(()), |op| op.at_once(&*self.lease.served));
        match done {
            Err(NotDone::WouldWait) => {
                let lease = self.lease.clone();
                lease.run(move |thread| self.carry_out(thread));
            }
            done => self.answer_or_wait(waited(done).map(|()| Vec::new())),
        }
    }

    fn attempt(&self, thread: Result<()>) -> Result<Vec<u8>> {
        thread?;
        let served = &*self.lease.served;
        match &self.op {
            Some(op) => op.carry_out(served),
            None => served.flush().map(|()| Vec::new()),
        }
    }

    fn answer_or_wait(self, result: Result<Vec<u8>>) {
        if let Some((request, error, log)) = self.answer(result) {
            let waiters = request.lease.served.queue.waiters.clone();
            waiters.add(Box::new(request), &error, log);
        }
    }

    /// Answers the request, unless it waits for space: then it comes back.
    fn answer(self, result: Result<Vec<u8>>) -> Option<(Self, Error, Log)> {
        match result {
            Err(error)
                if error.wants_space()
                    && let Some(log) = self.done.waits() =>
            {
                return Some((self, error, log));
            }
            Ok(_) if self.durable => self.lease.flush(self.done),
            result => {
                // Before the answer: whoever waits for it may then be the last and see to the close.
                drop(self.lease);
                self.done.complete(result);
            }
        }
        None
    }
}

/// What `act` answers; nothing if it panics. Then it drops what answers the request, which says so,
/// and the thread lives on.
pub(super) fn caught<T>(act: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(act)).ok()
}

/// Threads for tasks: started when there is work for them, and gone when there was none for a while.
pub struct Crew {
    name: &'static str,
    most: usize,
    state: Mutex<State>,
    added: Condvar,
}

#[derive(Default)]
struct State {
    tasks: VecDeque<Task>,
    idle: usize,
    threads: usize,
    closed: bool,
}

impl Crew {
    /// At most so many threads of this name.
    pub fn new(name: &'static str, most: usize) -> Arc<Self> {
        let (state, added) = (Mutex::default(), Condvar::new());
        Arc::new(Self { name, most: most.max(1), state, added })
    }

    /// Has `task` done soon. Never waits. It is told with an error, on this thread, if there is no
    /// thread to be had.
    pub fn add(self: &Arc<Self>, task: Task) {
        let mut state = guard(&self.state);
        state.tasks.push_back(task);
        if state.idle >= state.tasks.len() || state.threads == self.most {
            self.added.notify_one();
            return;
        }
        let this = Arc::clone(self);
        match spawn(self.name, move || this.work()) {
            Ok(()) => state.threads += 1,
            Err(error) if state.threads == 0 => {
                let tasks = std::mem::take(&mut state.tasks);
                drop(state);
                let error = format!("there is no thread for the request: {error}");
                let error = Error::new(ErrorKind::Limit, error);
                tasks.into_iter().for_each(|task| task(Err(error.clone())));
            }
            // Those that are there come to it.
            Err(_) => {}
        }
    }

    /// Lets the threads go once all is done.
    pub fn close(&self) {
        guard(&self.state).closed = true;
        self.added.notify_all();
    }

    fn work(&self) {
        while let Some(task) = self.next() {
            caught(|| task(Ok(())));
        }
    }

    fn next(&self) -> Option<Task> {
        let mut state = guard(&self.state);
        loop {
            if let Some(task) = state.tasks.pop_front() {
                return Some(task);
            }
            if state.closed {
                state.threads -= 1;
                return None;
            }
            state.idle += 1;
            let wait = self.added.wait_timeout(state, LINGER);
            let (held, timeout) = wait.unwrap_or_else(PoisonError::into_inner);
            state = held;
            state.idle -= 1;
            if timeout.timed_out() && state.tasks.is_empty() {
                state.threads -= 1;
                return None;
            }
        }
    }
}

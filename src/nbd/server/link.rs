//! What a connection's thread shares with the threads that finish its requests.
//!
//! Invariants: whoever finishes a request never waits for the client: it sends without waiting or
//! queues. Everything queued is sent in order and by whoever holds the lock. The connection's own
//! thread may send and receive without the lock while nothing is running and nothing is queued,
//! since only it starts requests. Reading stops while the link is full, so queue and running
//! requests together are bounded.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::sendfile;
use rustix::io::Errno as Host;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::{Log, tell};
use crate::device::HostRange;
use crate::nbd::proto::{self, Errno};
use crate::serve::guard;

/// Requests of a connection that may be in flight before it stops reading.
const MAX_RUNNING: usize = 128;
/// Bytes of payload and unsent replies before a connection stops reading.
const MAX_BYTES: usize = 4 << 20;
/// How often a connection without a descriptor to be woken by looks at what has finished.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// The connection is gone or to be ended; there is nobody to tell.
#[derive(Debug)]
pub(super) struct Gone;

pub(super) struct Link {
    socket: OwnedFd,
    /// Wakes the connection's thread from [`Link::poll`]. Made with the first request that does not
    /// finish inline, so that idle connections have one descriptor. Where there is none to be had,
    /// the thread looks again every [`LOOK_AGAIN`].
    wake: OnceLock<OwnedFd>,
    outbox: Mutex<Outbox>,
    /// Who is at the other end, for the log.
    pub(super) peer: String,
    log: Log,
    /// Requests that find no space on the host wait until there is some.
    waits: AtomicBool,
}

#[derive(Default)]
struct Outbox {
    queue: VecDeque<Vec<u8>>,
    /// How much of the first in the queue is sent.
    sent: usize,
    queued_bytes: usize,
    running: usize,
    running_bytes: usize,
    /// The connection's thread waits for the next request to finish.
    waiting: bool,
    dead: bool,
}

/// What a connection's thread waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    /// Bytes to receive, and room to act on them.
    Bytes,
    /// Room for another request.
    Room,
    /// Everything finished and sent.
    Quiet,
}

impl Outbox {
    fn is_quiet(&self) -> bool {
        self.running == 0 && self.queue.is_empty()
    }

    fn has_room(&self) -> bool {
        self.running < MAX_RUNNING && self.queued_bytes + self.running_bytes < MAX_BYTES
    }

    fn kill(&mut self) {
        self.dead = true;
        self.queue = VecDeque::new();
        (self.sent, self.queued_bytes) = (0, 0);
    }
}

impl Link {
    pub(super) fn new(socket: OwnedFd, peer: String, log: Log, waits: bool) -> Self {
        let (wake, outbox, waits) = (OnceLock::new(), Mutex::default(), AtomicBool::new(waits));
        Self { socket, wake, outbox, peer, log, waits }
    }

    /// Who hears that a request waits for space on the host, if it may.
    pub(super) fn waits(&self) -> Option<Log> {
        self.waits.load(Ordering::Relaxed).then(|| self.log.clone())
    }

    /// Has those that wait for space fail, and no other one wait.
    pub(super) fn wait_no_more(&self) {
        self.waits.store(false, Ordering::Relaxed);
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub(super) fn log(&self, event: &str) {
        tell(&self.log, &format!("{}: {event}", self.peer));
    }

    /// Receives some bytes, 0 at the end of the stream.
    pub(super) fn receive(&self, buffer: &mut [u8], flags: RecvFlags) -> rustix::io::Result<usize> {
        recv(&self.socket, buffer, flags).map(|(_, length)| length)
    }

    /// Whether nothing is running and everything is sent.
    pub(super) fn is_quiet(&self) -> bool {
        guard(&self.outbox).is_quiet()
    }

    /// Whether another request may be started.
    pub(super) fn has_room(&self) -> bool {
        guard(&self.outbox).has_room()
    }

    /// Sends everything, waiting for the client. Only for the connection's own thread, and only
    /// while the link is quiet.
    pub(super) fn send_all(&self, mut bytes: &[u8], flags: SendFlags) -> Result<(), Gone> {
        while !bytes.is_empty() {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL | flags) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Host::INTR) => {}
                Err(_) => return Err(Gone),
            }
        }
        Ok(())
    }

    /// Sends bytes of a file, as [`Link::send_all`] does.
    pub(super) fn send_file(&self, range: &HostRange, length: u64) -> Result<(), Gone> {
        let (mut at, end) = (range.offset, range.offset + length);
        while at < end {
            let left = (end - at) as usize;
            match sendfile(&self.socket, &range.file, Some(&mut at), left) {
                // The reply has begun: it can't turn into an error any more.
                Ok(0) => {
                    self.log("hanging up, a file ended while it was being sent");
                    return Err(Gone);
                }
                Ok(_) | Err(Host::INTR) => {}
                Err(Host::PIPE | Host::CONNRESET) => return Err(Gone),
                Err(error) => {
                    self.log(&format!("hanging up, sending from a file failed: {error}"));
                    return Err(Gone);
                }
            }
        }
        Ok(())
    }

    /// Sends what can be sent without waiting and queues the rest.
    pub(super) fn send_or_queue(&self, bytes: &[u8]) {
        let mut outbox = guard(&self.outbox);
        let sent = if outbox.queue.is_empty() && !outbox.dead {
            self.send_now(&mut outbox, bytes)
        } else {
            0
        };
        Self::queue(&mut outbox, bytes[sent..].to_vec());
    }

    /// Counts a request as running, with the bytes that it holds or will answer.
    pub(super) fn start(self: &Arc<Self>, cookie: u64, structured: bool, bytes: usize) -> Ticket {
        if self.wake.get().is_none()
            && let Ok(wake) = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        {
            let _ = self.wake.set(wake);
        }
        let mut outbox = guard(&self.outbox);
        outbox.running += 1;
        outbox.running_bytes += bytes;
        drop(outbox);
        Ticket { link: Arc::clone(self), cookie, structured, bytes, answered: false }
    }

    /// Ends `count` requests that were counted with `bytes` in all.
    fn finish(&self, count: usize, bytes: usize, reply: Vec<u8>) {
        let mut outbox = guard(&self.outbox);
        outbox.running -= count;
        outbox.running_bytes -= bytes;
        Self::queue(&mut outbox, reply);
        self.flush(&mut outbox);
        if outbox.waiting || outbox.dead || !outbox.queue.is_empty() {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(wake) = self.wake.get() {
            // Fails only if the counter is full, and then the thread is woken already.
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
    }

    fn queue(outbox: &mut Outbox, bytes: Vec<u8>) {
        if outbox.dead || bytes.is_empty() {
            return;
        }
        outbox.queued_bytes += bytes.len();
        outbox.queue.push_back(bytes);
    }

    /// Sends from the queue what can be sent without waiting.
    fn flush(&self, outbox: &mut Outbox) {
        while let Some(first) = outbox.queue.pop_front() {
            let sent = self.send_now(outbox, &first[outbox.sent..]);
            if outbox.dead {
                return;
            }
            outbox.sent += sent;
            if outbox.sent < first.len() {
                outbox.queue.push_front(first);
                return;
            }
            outbox.queued_bytes -= first.len();
            outbox.sent = 0;
        }
    }

    /// How much of `bytes` the socket takes now.
    fn send_now(&self, outbox: &mut Outbox, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while sent < bytes.len() {
            match send(&self.socket, &bytes[sent..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(length) => sent += length,
                Err(Host::INTR) => {}
                Err(Host::AGAIN) => break,
                Err(_) => {
                    outbox.kill();
                    break;
                }
            }
        }
        sent
    }

    /// Waits for `want`, sending what is queued meanwhile. Answers whether the link is quiet, so
    /// that the caller may wait in a plain receive or send; otherwise what was wanted is there.
    pub(super) fn wait(&self, want: Want) -> Result<bool, Gone> {
        loop {
            let (read, write) = {
                let mut outbox = guard(&self.outbox);
                if outbox.dead {
                    return Err(Gone);
                }
                if outbox.is_quiet() {
                    return Ok(true);
                }
                let room = outbox.has_room();
                if room && want == Want::Room {
                    return Ok(false);
                }
                outbox.waiting = !room || want == Want::Quiet;
                (room && want == Want::Bytes, !outbox.queue.is_empty())
            };
            if self.poll(read, write)? {
                return Ok(false);
            }
        }
    }

    /// Waits once for the socket or a finished request; answers whether there is something to
    /// receive.
    fn poll(&self, read: bool, write: bool) -> Result<bool, Gone> {
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, read);
        events.set(PollFlags::OUT, write);
        let socket = self.sleep(Some(events))?;
        let broken = socket.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
        if broken && !read {
            guard(&self.outbox).kill();
            return Err(Gone);
        }
        if socket.contains(PollFlags::OUT) {
            self.flush(&mut guard(&self.outbox));
        }
        Ok(read && (broken || socket.contains(PollFlags::IN)))
    }

    /// Waits until no request is running any more; what they answer is dropped if the client is
    /// gone. Keeps a client that reconnects again and again from piling up work.
    pub(super) fn finish_running(&self) {
        self.wait_no_more();
        loop {
            {
                let mut outbox = guard(&self.outbox);
                outbox.kill();
                if outbox.running == 0 {
                    return;
                }
            }
            // Without the socket, which would report again and again that the client is gone.
            let _ = self.sleep(None);
        }
    }

    /// Sleeps until a request finishes or, where asked for, something happens to the socket.
    fn sleep(&self, events: Option<PollFlags>) -> Result<PollFlags, Gone> {
        let wake = self.wake.get();
        let mut fds = [
            PollFd::new(wake.unwrap_or(&self.socket), PollFlags::IN),
            PollFd::new(&self.socket, events.unwrap_or(PollFlags::empty())),
        ];
        let watched = usize::from(wake.is_none())..1 + usize::from(events.is_some());
        let limit = if wake.is_none() { Some(&LOOK_AGAIN) } else { None };
        match poll(&mut fds[watched], limit) {
            Err(Host::INTR) => return Ok(PollFlags::empty()),
            Err(_) => return Err(Gone),
            Ok(_) => {}
        }
        if let Some(wake) = wake
            && !fds[0].revents().is_empty()
        {
            let _ = rustix::io::read(wake, &mut [0; 8]);
        }
        Ok(fds[1].revents())
    }

    /// Ends the stream of requests; what has arrived is still answered.
    pub(super) fn stop_reading(&self) {
        self.wait_no_more();
        let _ = shutdown(&self.socket, Shutdown::Read);
    }

    /// Ends the connection: its thread finds out wherever it waits.
    pub(super) fn hang_up(&self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

/// The duty to answer one running request. Dropped without an answer (a panic, say) it answers
/// with an I/O error.
pub(super) struct Ticket {
    link: Arc<Link>,
    pub(super) cookie: u64,
    pub(super) structured: bool,
    bytes: usize,
    answered: bool,
}

impl Ticket {
    pub(super) fn answer(mut self, reply: Vec<u8>) {
        self.answered = true;
        self.link.finish(1, self.bytes, reply);
    }

    /// Answers requests of one connection with the replies to all of them.
    pub(super) fn answer_all(mut tickets: Vec<Self>, replies: Vec<u8>) {
        tickets.iter_mut().for_each(|ticket| ticket.answered = true);
        if let Some(first) = tickets.first() {
            let bytes = tickets.iter().map(|ticket| ticket.bytes).sum();
            first.link.finish(tickets.len(), bytes, replies);
        }
    }

    pub(super) fn succeed(self) {
        let reply = proto::simple_reply(self.cookie, None).to_vec();
        self.answer(reply);
    }

    pub(super) fn fail(self, errno: Errno, message: &str) {
        let reply = failure(self.cookie, self.structured, errno, message);
        self.answer(reply);
    }

    pub(super) fn log(&self, event: &str) {
        self.link.log(event);
    }

    pub(super) fn waits(&self) -> Option<Log> {
        self.link.waits()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.answered {
            let reply = failure(self.cookie, self.structured, Errno::Io, "internal error");
            self.link.finish(1, self.bytes, reply);
        }
    }
}

/// The reply that fails a request; with a message where the client understands it.
pub(super) fn failure(cookie: u64, structured: bool, errno: Errno, message: &str) -> Vec<u8> {
    if structured {
        proto::error_chunk(cookie, errno, message)
    } else {
        proto::simple_reply(cookie, Some(errno)).to_vec()
    }
}

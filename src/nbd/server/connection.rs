//! The thread of one connection: receives requests, answers inline what needs no wait, hands the
//! rest on.
//!
//! Invariants: replies are sent before the thread waits for anything; while nothing of the
//! connection is running (`busy` is false) it waits in a plain blocking receive, and memory is
//! taken for bytes that have arrived, not for those announced.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use rustix::io::Errno as Host;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags};

use super::Shared;
use super::buffer::{Received, Replies};
use super::handshake;
use super::link::{Gone, Link, Ticket, Want, failure};
use super::work::{Answer, Read, describe, device_failure, hand_on};
use crate::device::{Device, Extent, Wait, ZeroMode};
use crate::nbd::proto::{self, Command, Errno, Refusal, Request, Terms};
use crate::serve::{Buffer, Lease, Op, Payload};

/// Replies are sent once this much has come together, even if more requests wait.
const SEND_AT: usize = 256 << 10;
/// Data of at least this length is sent from the page cache where it can be, without a copy.
/// Shorter ones don't gain by it.
const SEND_IN_PLACE: u32 = 128 << 10;
/// Payloads up to this length pass through the receive buffer; longer ones go straight into their
/// own.
const SMALL_PAYLOAD: usize = 32 << 10;
/// Bytes received at a time where more may belong to a payload's own buffer.
const FEW: usize = 4 << 10;
/// Reads up to this length may be decompressed on the thread of the connection.
const SMALL_READ: usize = 64 << 10;
/// A longer payload buffer is given back after use.
const KEEP_PAYLOAD: usize = 4 << 20;
/// How long a connection looks for the next request before it sleeps, if the last ones came as
/// soon. To be woken costs both sides more than that.
const EAGER: Duration = Duration::from_micros(50);
/// A connection silent for so long gives its buffers back.
const IDLE: Duration = Duration::from_secs(10);

/// Where received bytes go.
enum Target {
    Buffer,
    Payload(Range<usize>),
}

struct Connection<'a> {
    shared: &'a Shared,
    link: &'a Arc<Link>,
    disk: Lease,
    structured: bool,
    allocation: bool,
    received: Received,
    payload: Buffer,
    /// The last request had a payload of its own buffer. So may have the next: few bytes are received
    /// beyond its head, for they would have to be copied there.
    bulk: bool,
    replies: Replies,
    /// Small reads that have to wait. They are handed on together, before the thread waits itself.
    waiting: Vec<(Ticket, Read)>,
    /// Writes that have to wait, likewise: often for the same.
    waiting_writes: Vec<(Op, bool, Answer)>,
    extents: Vec<Extent>,
    /// Requests may be running or replies queued: the socket is shared with other threads.
    busy: bool,
    /// The client answers a reply with its next request within [`EAGER`].
    eager: bool,
    /// The buffers were given back and there is no time limit on receiving.
    idle: bool,
}

/// Serves one client from its handshake until it is gone and nothing of it runs any more.
pub(super) fn serve(shared: &Shared, link: &Arc<Link>) {
    // Unlike a send, sendfile can't be told that a client that is gone is no reason for a signal.
    let _ = SigSet::from(Signal::SIGPIPE).thread_block();
    let mut received = Received::default();
    if let Ok(Some(session)) = handshake::negotiate(shared, link, &mut received) {
        shared.used.note(&session.export);
        let mut connection = Connection {
            shared,
            link,
            disk: session.export,
            structured: session.structured,
            allocation: session.allocation,
            received,
            payload: Buffer::default(),
            bulk: false,
            replies: Replies::default(),
            waiting: Vec::new(),
            waiting_writes: Vec::new(),
            extents: Vec::new(),
            busy: false,
            eager: false,
            idle: true,
        };
        // A client that is gone is no event: it may leave at any time.
        let _ = connection.transmission();
        link.finish_running();
    }
}

impl Connection<'_> {
    fn transmission(&mut self) -> Result<(), Gone> {
        self.wake_up()?;
        loop {
            let terms = Terms {
                size: self.disk.size(),
                read_only: self.disk.read_only(),
                structured: self.structured,
                allocation: self.allocation,
            };
            match Request::parse(self.received.bytes(), &terms) {
                Ok(Some(request)) => {
                    self.received.take(proto::REQUEST_LENGTH);
                    if !self.handle(request)? {
                        break;
                    }
                }
                Ok(None) => {
                    if self.receive(Target::Buffer)? == 0 {
                        break;
                    }
                }
                Err(violation) => {
                    self.link.log(&format!("hanging up, not a request: {violation:?}"));
                    break;
                }
            }
        }
        self.link.wait_no_more();
        self.send()?;
        self.wait(Want::Quiet)
    }

    /// Carries a request out or hands it on; answers whether there may be more.
    fn handle(&mut self, request: Request) -> Result<bool, Gone> {
        self.bulk = request.payload as usize > SMALL_PAYLOAD;
        if self.busy && !self.link.has_room() {
            self.wait(Want::Room)?;
        }
        let stopping = self.shared.stopping.load(Ordering::Relaxed);
        match request.command {
            Ok(Command::Disconnect) => return Ok(false),
            Ok(_) if stopping => {
                let message = "the server is shutting down";
                self.refuse(&request, Refusal { errno: Errno::Shutdown, message })?;
            }
            Err(refusal) => self.refuse(&request, refusal)?,
            Ok(Command::Read { offset, length, whole }) => {
                let (cookie, structured) = (request.cookie, self.structured);
                self.read(request, Read { cookie, structured, whole, offset, length })?;
            }
            Ok(Command::Write { offset }) => self.write(request, offset)?,
            Ok(Command::Flush) => self.flush(request),
            Ok(Command::Trim { offset, length }) => {
                self.submit(&request, Op::Trim { offset, length: length.into() });
            }
            Ok(Command::Cache { offset, length }) => {
                self.submit(&request, Op::Prefetch { offset, length: length.into() });
            }
            Ok(Command::WriteZeroes { offset, length, allocate, fast_only }) => {
                let mode = ZeroMode { allocate, fast_only };
                self.submit(&request, Op::Zero { offset, length: length.into(), mode });
            }
            Ok(Command::BlockStatus { offset, length, one }) => {
                let ticket = self.start(request.cookie, status_estimate(length));
                let limit = if one { 1 } else { proto::MAX_EXTENTS };
                describe(&self.disk, ticket, (offset, length), limit);
            }
        }
        if self.replies.len() >= SEND_AT {
            self.send()?;
        }
        Ok(true)
    }

    fn refuse(&mut self, request: &Request, refusal: Refusal) -> Result<(), Gone> {
        let mut left = request.payload as usize;
        loop {
            let taken = left.min(self.received.bytes().len());
            self.received.take(taken);
            left -= taken;
            if left == 0 {
                break;
            }
            if self.receive(Target::Buffer)? == 0 {
                return Err(Gone);
            }
        }
        self.fail(request.cookie, refusal.errno, refusal.message);
        Ok(())
    }

    fn fail(&mut self, cookie: u64, errno: Errno, message: &str) {
        self.replies.push(&failure(cookie, self.structured, errno, message));
    }

    fn read(&mut self, request: Request, read: Read) -> Result<(), Gone> {
        let length = read.length as usize;
        if self.replies.len() > 0 && self.replies.len() + length > SEND_AT {
            self.send()?;
        }
        if read.length >= SEND_IN_PLACE && self.send_in_place(&read)? {
            return Ok(());
        }
        let link = self.link;
        // Nobody waits for this thread then, and to hand the read on would cost as much.
        let alone = !self.busy && self.received.bytes().is_empty();
        let small = length <= SMALL_READ;
        let wait = if alone && small { Wait::Decode } else { Wait::Never };
        let done = read.reply(&self.disk, wait, &mut self.replies, &mut self.extents, |error| {
            link.log(&format!("read failed: {error}"));
        });
        if done {
            return Ok(());
        }
        let ticket = self.start(request.cookie, length);
        if small {
            self.waiting.push((ticket, read));
        } else {
            hand_on(&self.disk, vec![(ticket, read)]);
        }
        Ok(())
    }

    /// Sends the whole reply to a read from the file that holds its data; false if it can't. Where
    /// only the ends of the data are cached, this waits for the disk.
    fn send_in_place(&mut self, read: &Read) -> Result<bool, Gone> {
        if self.is_busy() {
            return Ok(false);
        }
        // An error shows again in the read.
        let range = self.disk.host_range(read.offset, read.length.into());
        let Ok(Some(range)) = range else { return Ok(false) };
        read.header(&mut self.replies);
        self.link.send_all(self.replies.bytes(), SendFlags::MORE)?;
        self.replies.clear();
        self.link.send_file(&range, read.length.into())?;
        Ok(true)
    }

    fn write(&mut self, request: Request, offset: u64) -> Result<(), Gone> {
        let length = request.payload as usize;
        while length <= SMALL_PAYLOAD && self.received.bytes().len() < length {
            if self.receive(Target::Buffer)? == 0 {
                return Err(Gone);
            }
        }
        let buffered = self.received.bytes().len() >= length;
        if !buffered {
            self.receive_payload(length)?;
        }
        let data = if buffered { &self.received.bytes()[..length] } else { &self.payload[..] };
        let result = match length {
            0 => Ok(0),
            _ => self.disk.write_at_once(offset, data.into(), || self.link.waits().is_some()),
        };
        // What is left has to wait. All of it is written then, as one piece of memory is handed on.
        let moved = match result {
            Ok(written) if written == length as u64 => None,
            Ok(_) if buffered => Some(Payload::Bytes(data.to_vec())),
            Ok(_) => Some(Payload::Buffer(std::mem::take(&mut self.payload))),
            Err(_) => None,
        };
        if buffered {
            self.received.take(length);
        } else if self.payload.capacity() > KEEP_PAYLOAD {
            self.payload = Buffer::default();
        }
        match (result, moved) {
            (Err(error), _) => {
                self.link.log(&format!("write failed: {error}"));
                let (errno, message) = device_failure(&error, Errno::NoSpace);
                self.fail(request.cookie, errno, message);
            }
            (Ok(_), Some(data)) => {
                let ticket = self.start(request.cookie, length);
                let answer = Answer { ticket, what: "write", out_of_range: Errno::NoSpace };
                self.waiting_writes.push((Op::Write { offset, data }, request.fua, answer));
            }
            (Ok(_), None) if request.fua => self.flush(request),
            (Ok(_), None) => self.replies.push(&proto::simple_reply(request.cookie, None)),
        }
        Ok(())
    }

    /// Receives a payload into its own buffer, which then starts with it.
    fn receive_payload(&mut self, length: usize) -> Result<(), Gone> {
        self.payload.set_length(length);
        let mut filled = self.received.bytes().len();
        self.payload[..filled].copy_from_slice(self.received.bytes());
        self.received.take(filled);
        while filled < length {
            match self.receive(Target::Payload(filled..length))? {
                0 => return Err(Gone),
                more => filled += more,
            }
        }
        Ok(())
    }

    fn flush(&mut self, request: Request) {
        let ticket = self.start(request.cookie, 0);
        self.disk.flush(Answer { ticket, what: "flush", out_of_range: Errno::Io });
    }

    /// Has a request without data carried out by another thread.
    fn submit(&mut self, request: &Request, op: Op) {
        let (what, out_of_range, durable) = match op {
            Op::Zero { .. } => ("zero", Errno::NoSpace, request.fua),
            Op::Trim { .. } => ("trim", Errno::Invalid, request.fua),
            _ => ("prefetch", Errno::Invalid, false),
        };
        let ticket = self.start(request.cookie, 0);
        self.disk.submit(op, durable, Answer { ticket, what, out_of_range });
    }

    fn start(&mut self, cookie: u64, bytes: usize) -> Ticket {
        self.busy = true;
        self.link.start(cookie, self.structured, bytes)
    }

    /// Looks whether what was running is still.
    fn is_busy(&mut self) -> bool {
        self.busy = self.busy && !self.link.is_quiet();
        self.busy
    }

    /// Sends the replies built so far.
    fn send(&mut self) -> Result<(), Gone> {
        if self.replies.len() == 0 {
            return Ok(());
        }
        if self.is_busy() {
            self.link.send_or_queue(self.replies.bytes());
        } else {
            self.link.send_all(self.replies.bytes(), SendFlags::empty())?;
        }
        self.replies.clear();
        Ok(())
    }

    fn wait(&mut self, want: Want) -> Result<(), Gone> {
        if !self.waiting.is_empty() {
            hand_on(&self.disk, std::mem::take(&mut self.waiting));
        }
        if !self.waiting_writes.is_empty() {
            self.disk.submit_all(std::mem::take(&mut self.waiting_writes));
        }
        self.send()?;
        if self.busy && self.link.wait(want)? {
            self.busy = false;
        }
        Ok(())
    }

    /// Receives some bytes, 0 at the end of the stream.
    fn receive(&mut self, target: Target) -> Result<usize, Gone> {
        loop {
            self.wait(Want::Bytes)?;
            let space = match &target {
                Target::Buffer if self.bulk => {
                    let spare = self.received.spare();
                    let few = spare.len().min(FEW);
                    &mut spare[..few]
                }
                Target::Buffer => self.received.spare(),
                Target::Payload(range) => &mut self.payload[range.clone()],
            };
            let received = if self.busy {
                self.link.receive(space, RecvFlags::DONTWAIT)
            } else {
                receive_soon(self.link, space, &mut self.eager, &self.shared.lookouts)
            };
            match received {
                Ok(length) => {
                    if matches!(target, Target::Buffer) {
                        self.received.received(length);
                    }
                    if self.idle {
                        self.wake_up()?;
                    }
                    return Ok(length);
                }
                Err(Host::AGAIN) if !self.busy => self.fall_idle(&target)?,
                Err(Host::AGAIN | Host::INTR) => {}
                Err(_) => return Err(Gone),
            }
        }
    }

    /// Gives memory back after a long silence, and from then on waits without a time limit.
    fn fall_idle(&mut self, target: &Target) -> Result<(), Gone> {
        self.idle = true;
        self.received.release();
        self.replies.release();
        self.extents = Vec::new();
        if matches!(target, Target::Buffer) {
            self.payload = Buffer::default();
        }
        self.limit_receive(None)
    }

    fn wake_up(&mut self) -> Result<(), Gone> {
        self.idle = false;
        self.limit_receive(Some(IDLE))
    }

    fn limit_receive(&self, limit: Option<Duration>) -> Result<(), Gone> {
        set_socket_timeout(self.link.socket(), Timeout::Recv, limit).map_err(|_| Gone)
    }
}

/// How many connections of a server look for requests without sleeping: at most half as many as
/// there are processors, or they would take them from those that have work.
pub(super) struct Lookouts {
    now: AtomicUsize,
    most: usize,
}

impl Default for Lookouts {
    fn default() -> Self {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Self { now: AtomicUsize::new(0), most: (processors / 2).max(1) }
    }
}

impl Lookouts {
    /// Looks for bytes for as long as [`EAGER`]; `None` if none came or too many look.
    fn look(&self, link: &Link, space: &mut [u8]) -> Option<rustix::io::Result<usize>> {
        let mut found = None;
        if self.now.fetch_add(1, Ordering::Relaxed) < self.most {
            let begun = Instant::now();
            while found.is_none() && begun.elapsed() < EAGER {
                match link.receive(space, RecvFlags::DONTWAIT) {
                    Err(Host::AGAIN) => thread::yield_now(),
                    other => found = Some(other),
                }
            }
        }
        self.now.fetch_sub(1, Ordering::Relaxed);
        found
    }
}

/// Waits for bytes: awake for a while if the client is `eager`, then asleep.
fn receive_soon(
    link: &Link,
    space: &mut [u8],
    eager: &mut bool,
    lookouts: &Lookouts,
) -> rustix::io::Result<usize> {
    if *eager && let Some(received) = lookouts.look(link, space) {
        return received;
    }
    let begun = Instant::now();
    let received = link.receive(space, RecvFlags::empty());
    *eager = begun.elapsed() < EAGER;
    received
}

/// Bytes that a BLOCK_STATUS may answer: it describes each sector at worst.
fn status_estimate(length: u32) -> usize {
    (length as usize / 512).min(proto::MAX_EXTENTS * 8)
}

//! The real server over a real socket: requests of every kind, with any numbers, over a device that
//! may be slow, broken or read-only, and plain bytes where requests should be. Every request gets one
//! reply that the protocol allows; what is read is what was written.
#![no_main]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use testkit::device::{Op, TestDevice};
use testkit::nbd::{
    self, BLOCK_STATUS, CACHE, Client, DF, DISC, EINVAL, ENOSPC, EPERM, FAST_ZERO, FLUSH, FUA,
    NO_HOLE, READ, REQ_ONE, Served, TRIM, WRITE, WRITE_ZEROES,
};
use thinply::error::ErrorKind;
use thinply::nbd::server::ServerConfig;
use thinply::serve::{Opened, Table};
use thinply_fuzz::limits::within_limits;

const SIZE: u64 = (1 << 20) + 100;

fuzz_target!(|input: &[u8]| within_limits(|| run(input)));

static EXPORTS: LazyLock<Arc<Table>> = LazyLock::new(Arc::default);
static SERVED: LazyLock<Served> =
    LazyLock::new(|| Served::exports(EXPORTS.clone(), ServerConfig::default()));

fn run(input: &[u8]) {
    let Some((&[style, faults], rest)) = input.split_first_chunk::<2>() else { return };
    let mut device = TestDevice::new(SIZE);
    if style & 1 != 0 {
        device = device.read_only();
    }
    if style & 2 != 0 {
        device = device.cold();
    }
    if style & 4 != 0 {
        device = device.striped();
    }
    let kinds = [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Poisoned, ErrorKind::Unsupported];
    let ops = [Op::Read, Op::Write, Op::Zero, Op::Trim, Op::Flush, Op::Extents, Op::Prefetch];
    let faulty = faults & 8 != 0;
    let fault = ops[usize::from(faults >> 5) % ops.len()];
    if faulty {
        device.fail(fault, kinds[usize::from(faults & 3)]);
    }
    let served = &*SERVED;
    nbd::insert(&EXPORTS, "disk", Opened::new(device));
    let mut client = Client::open(&served.path(), "disk", style & 8 == 0);
    // The client has its export; the next input brings another.
    EXPORTS.remove("disk");
    if style & 16 != 0 {
        send_bytes(&client, rest);
    } else {
        let mut session = Session {
            structured: style & 8 == 0,
            read_only: style & 1 != 0,
            faulty,
            flush_fails: faulty && fault == Op::Flush,
            disk: vec![0; SIZE as usize],
        };
        let in_step = style & 32 == 0;
        session.requests(&mut client, rest, in_step);
        client.stream.shutdown(Shutdown::Write).unwrap();
        let mut left = Vec::new();
        let _ = client.stream.read_to_end(&mut left);
        assert!(left.is_empty(), "a reply that nobody asked for");
    }
    served.events.lock().unwrap().clear();
}

/// Anything at all: the server ends the connection, in its own time.
fn send_bytes(client: &Client, bytes: &[u8]) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = (&client.stream).write_all(bytes);
            let _ = client.stream.shutdown(Shutdown::Write);
        });
        let mut buffer = vec![0; 1 << 20];
        while (&client.stream).read(&mut buffer).is_ok_and(|length| length > 0) {}
    });
}

struct Request {
    kind: u16,
    flags: u16,
    offset: u64,
    length: u32,
    fill: u8,
}

/// The requests that an input describes, eight bytes each.
fn requests(input: &[u8]) -> impl Iterator<Item = Request> + '_ {
    input.chunks_exact(8).take(40).map(|bytes| {
        let [kind, flags, place, low, high, length, scale, fill] = *bytes else { unreachable!() };
        let delta = u64::from(u16::from_le_bytes([low, high]));
        let offset = match place % 8 {
            0 => SIZE.wrapping_sub(delta),
            1 => SIZE + delta,
            2 => u64::MAX - delta,
            3 => 1 << 63 | delta,
            4 => delta << 4,
            _ => delta * 7,
        };
        let flags = match flags {
            plain @ 0..32 => u16::from(plain),
            odd => u16::from(odd) << 4,
        };
        let length = match scale % 8 {
            0 => u32::from(length) << 8,
            1 => u32::MAX - u32::from(length),
            2 => SIZE as u32 - u32::from(length),
            _ => u32::from(length),
        };
        Request { kind: u16::from(kind % 10), flags, offset, length, fill }
    })
}

struct Session {
    structured: bool,
    read_only: bool,
    faulty: bool,
    flush_fails: bool,
    disk: Vec<u8>,
}

impl Session {
    /// Sends requests, one after the other or all at once; takes their replies.
    fn requests(&mut self, client: &mut Client, input: &[u8], in_step: bool) {
        let mut waiting = HashMap::new();
        for request in requests(input) {
            let payload = match request.kind {
                WRITE if request.length > 64 << 10 => continue,
                WRITE => vec![request.fill; request.length as usize],
                _ => Vec::new(),
            };
            let Request { kind, flags, offset, length, .. } = request;
            if kind == DISC {
                break;
            }
            let (cookie, mut packet) = client.encode(flags, kind, offset, length);
            packet.extend_from_slice(&payload);
            client.send(&packet);
            waiting.insert(cookie, request);
            if in_step {
                self.reply(client, &mut waiting, true);
            } else if waiting.len() == 4 {
                self.reply(client, &mut waiting, false);
            }
        }
        while !waiting.is_empty() {
            self.reply(client, &mut waiting, false);
        }
    }

    fn reply(&mut self, client: &mut Client, waiting: &mut HashMap<u64, Request>, exact: bool) {
        let reply = client.reply();
        let request = waiting.remove(&reply.cookie).expect("a reply to a request");
        let refused = self.refusal(&request);
        if let Some(errno) = refused {
            assert_eq!(reply.error, errno, "kind {} flags {}", request.kind, request.flags);
            return;
        }
        let allowed_to_fail = self.faulty || request.flags & FAST_ZERO != 0;
        assert!(reply.error == 0 || allowed_to_fail, "{}: {}", request.kind, reply.message);
        // A change that shall be durable is made before its flush fails.
        let made = self.flush_fails && request.flags & (FUA | FAST_ZERO) == FUA;
        let changes = [WRITE, WRITE_ZEROES, TRIM].contains(&request.kind);
        if reply.error != 0 && !(made && changes) {
            return;
        }
        let range = request.offset as usize..(request.offset + u64::from(request.length)) as usize;
        match request.kind {
            READ if exact => assert!(reply.data() == self.disk[range], "other data"),
            READ => assert_eq!(reply.data().len(), range.len()),
            WRITE => self.disk[range].fill(request.fill),
            WRITE_ZEROES => self.disk[range].fill(0),
            TRIM => {
                let (first, end) = (range.start.next_multiple_of(4096), range.end / 4096 * 4096);
                if first < end {
                    self.disk[first..end].fill(0);
                }
            }
            BLOCK_STATUS => {
                let described: u64 =
                    reply.status.iter().map(|&(length, _)| u64::from(length)).sum();
                assert!(described > 0 && described <= u64::from(request.length));
                assert!(request.flags & REQ_ONE == 0 || reply.status.len() == 1);
            }
            _ => {}
        }
    }

    /// The error that a request gets by the rules alone.
    fn refusal(&self, request: &Request) -> Option<u32> {
        let Request { kind, flags, offset, length, .. } = *request;
        let allowed = FUA
            | match kind {
                READ if self.structured => DF,
                WRITE_ZEROES => NO_HOLE | FAST_ZERO,
                BLOCK_STATUS => REQ_ONE,
                _ => 0,
            };
        if kind > BLOCK_STATUS || flags & !allowed != 0 {
            return Some(EINVAL);
        }
        if kind == FLUSH {
            return ((offset, length) != (0, 0)).then_some(EINVAL);
        }
        let changes = [WRITE, WRITE_ZEROES, TRIM].contains(&kind);
        if changes && self.read_only {
            return Some(EPERM);
        }
        if offset > SIZE || u64::from(length) > SIZE - offset {
            return Some(if [WRITE, WRITE_ZEROES].contains(&kind) { ENOSPC } else { EINVAL });
        }
        let _ = CACHE;
        (kind == BLOCK_STATUS && (length == 0 || !self.structured)).then_some(EINVAL)
    }
}

//! The client and the baselines of `tests/bench/run` and `tests/bench/tools.py`.
//!
//! `load` is a closed-loop NBD client over a Unix socket: each connection keeps its queue full,
//! sends what came free in one call and drops the data it reads unseen. `serve` puts a raw file, or
//! nothing at all, behind thinply's own server: the limit of the transport. `open` opens a layer
//! again and again.

use std::fs::OpenOptions;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use thinply::chain::Chain;
use thinply::device::{Detail, Device, Extent, HostRange, Prefetch, ZeroMode, push_extent};
use thinply::memory::{Gather, Scatter};
use thinply::nbd::proto::numbers::{
    CMD_FLUSH as FLUSH, CMD_READ as READ, CMD_WRITE as WRITE, OPT_EXPORT_NAME,
    OPT_STRUCTURED_REPLY, OPTION_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use thinply::nbd::proto::request_header;
use thinply::nbd::server::{Listener, Server, ServerConfig};
use thinply::serve::{Disk, Opened, Served, Table};
use thinply::storage::{self, Access, FileFolder, Folder, Storage, read_blocks, write_all_at};
use thinply::wait::{Attempt, Wait, unless_waiting};

const USAGE: &str = "usage: load SOCKET RW[/fresh|/same] BLOCK DEPTH CONNECTIONS SECONDS OPS SEED
       serve SOCKET SIZE [FILE]
       open FILE TIMES
RW: read, randread, write, randwrite, mixed, durable";

/// Part of a mixed load that reads, in percent.
const MIXED_READS: u64 = 70;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["load", socket, rw, block, depth, connections, seconds, ops, seed] => {
            let (rw, places) = rw.split_once('/').unwrap_or((rw, ""));
            let load = Load {
                rw: rw.to_owned(),
                places: places.to_owned(),
                block: number(block)?,
                depth: number(depth)?,
                connections: number(connections)?,
                limit: Duration::from_secs_f64(seconds.parse().map_err(Error::other)?),
                ops: number(ops)?,
                seed: number(seed)?,
            };
            run(socket, &load)
        }
        ["serve", socket, size] => serve(socket, Null(number(size)?)),
        ["serve", socket, size, file] => {
            let opened = OpenOptions::new().read(true).write(true).open(file)?;
            let file = storage::opened(file.into(), opened)?;
            serve(socket, Raw { file, size: number(size)? })
        }
        ["open", file, times] => open(Path::new(file), number(times)?),
        _ => Err(Error::new(ErrorKind::InvalidInput, USAGE)),
    }
}

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::new(ErrorKind::InvalidInput, format!("{text}: {USAGE}")))
}

/// Prints how many microseconds each opening of a layer and its ancestors takes.
fn open(path: &Path, times: u64) -> Result<()> {
    let parts = path.parent().zip(path.file_name().and_then(|name| name.to_str()));
    let (directory, name) = parts.ok_or(ErrorKind::InvalidInput)?;
    let folder: Arc<dyn Folder> = Arc::new(FileFolder::new(directory));
    for _ in 0..times {
        let begin = Instant::now();
        let chain = Chain::open(folder.clone(), name, Access::Read, Arc::default());
        let took = begin.elapsed();
        drop(chain.map_err(Error::other)?);
        println!("{:.1}", took.as_secs_f64() * 1e6);
    }
    Ok(())
}

/// What every connection of a run does.
struct Load {
    rw: String,
    /// `fresh`: no place twice; `same`: the last block alone; otherwise random or in order.
    places: String,
    block: u64,
    depth: u64,
    connections: u64,
    limit: Duration,
    ops: u64,
    seed: u64,
}

/// Runs the load and prints operations and seconds.
fn run(socket: &str, load: &Load) -> Result<()> {
    let clients = (0..load.connections).map(|_| Client::connect(socket));
    let clients: Vec<Client> = clients.collect::<Result<_>>()?;
    let begun = Instant::now();
    let done: Result<Vec<u64>> = thread::scope(|scope| {
        let threads: Vec<_> = clients
            .into_iter()
            .zip(0..)
            .map(|(client, place)| scope.spawn(move || client.run(load, place, begun)))
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<u64>>| thread.join();
        threads.into_iter().map(|t| join(t).expect("no client thread panics")).collect()
    });
    println!("{} {}", done?.iter().sum::<u64>(), begun.elapsed().as_secs_f64());
    Ok(())
}

struct Client {
    stream: UnixStream,
    size: u64,
}

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("the server sent {what}"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

impl Client {
    /// Takes the default export, with structured replies where the server has them, as libnbd and
    /// qemu do.
    fn connect(socket: &str) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let mut hello = 3u32.to_be_bytes().to_vec();
        for option in [OPT_STRUCTURED_REPLY, OPT_EXPORT_NAME] {
            hello.extend(OPTION_MAGIC.to_be_bytes());
            hello.extend(option.to_be_bytes());
            hello.extend(0u32.to_be_bytes());
        }
        stream.write_all(&hello)?;
        let mut answer = [0; 20];
        stream.read_exact(&mut answer)?;
        let mut rest = vec![0; u32_at(&answer, 16) as usize];
        stream.read_exact(&mut rest)?;
        let mut export = [0; 10];
        stream.read_exact(&mut export)?;
        Ok(Self { stream, size: u64_at(&export, 0) })
    }

    /// Keeps `depth` requests in flight until the time is over or all places are used; how many
    /// were completed.
    fn run(mut self, load: &Load, place: u64, begun: Instant) -> Result<u64> {
        let mut plan = Plan::new(load, place, self.size / load.block);
        let payload = vec![load.seed as u8 | 1; load.block as usize];
        let mut replies = Replies::new(load.block);
        let (mut out, mut done, mut flying) = (Vec::new(), 0, 0);
        let mut free = load.depth;
        loop {
            while free > 0 && begun.elapsed() < load.limit {
                let Some((command, index)) = plan.next() else { break };
                request(&mut out, command, index * load.block, &payload);
                (free, flying) = (free - 1, flying + 1);
            }
            if flying == 0 {
                return Ok(done);
            }
            self.stream.write_all(&out)?;
            out.clear();
            for cookie in replies.receive(&mut self.stream)? {
                if load.rw == "durable" && cookie == u64::from(WRITE) {
                    request(&mut out, FLUSH, 0, &[]);
                } else {
                    (free, flying, done) = (free + 1, flying - 1, done + 1);
                }
            }
        }
    }
}

/// Appends a request; its cookie is its command, all that a reply has to tell.
fn request(out: &mut Vec<u8>, command: u16, offset: u64, payload: &[u8]) {
    out.extend(request_header(0, command, command.into(), offset, payload.len() as u32));
    if command == WRITE {
        out.extend(payload);
    }
}

/// Takes replies off a stream and drops their data.
struct Replies {
    block: u64,
    buffer: Vec<u8>,
    filled: usize,
    /// Bytes of data that are still to come.
    skip: usize,
}

impl Replies {
    fn new(block: u64) -> Self {
        Self { block, buffer: vec![0; 1 << 20], filled: 0, skip: 0 }
    }

    /// Waits for some bytes; the cookies of the requests that they complete.
    fn receive(&mut self, stream: &mut UnixStream) -> Result<Vec<u64>> {
        let mut done = Vec::new();
        let length = stream.read(&mut self.buffer[self.filled..])?;
        if length == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.filled += length;
        let mut at = 0;
        loop {
            let skipped = self.skip.min(self.filled - at);
            at += skipped;
            self.skip -= skipped;
            let rest = &self.buffer[at..self.filled];
            if rest.len() < 20 && (rest.len() < 16 || u32_at(rest, 0) != SIMPLE_REPLY_MAGIC) {
                break;
            }
            let simple = u32_at(rest, 0) == SIMPLE_REPLY_MAGIC;
            let flags_and_kind = u32_at(rest, 4);
            if simple {
                if flags_and_kind != 0 {
                    return Err(wrong("an error"));
                }
                let cookie = u64_at(rest, 8);
                at += 16;
                self.skip = if cookie == u64::from(READ) { self.block as usize } else { 0 };
                done.push(cookie);
            } else {
                if u32_at(rest, 0) != STRUCTURED_REPLY_MAGIC || flags_and_kind & 0x8000 != 0 {
                    return Err(wrong("an error or no reply"));
                }
                at += 20;
                self.skip = u32_at(rest, 16) as usize;
                if flags_and_kind >> 16 & 1 == 1 {
                    done.push(u64_at(rest, 8));
                }
            }
        }
        self.buffer.copy_within(at..self.filled, 0);
        self.filled -= at;
        Ok(done)
    }
}

/// The order in which a connection goes through its places.
struct Plan<'a> {
    load: &'a Load,
    count: u64,
    next: u64,
    random: u64,
}

impl<'a> Plan<'a> {
    fn new(load: &'a Load, place: u64, count: u64) -> Self {
        let random = (load.seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ place << 32;
        Self { load, count, next: place, random }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 8
    }

    fn next(&mut self) -> Option<(u16, u64)> {
        let number = self.next;
        if number >= self.load.ops {
            return None;
        }
        self.next += self.load.connections;
        let command = match &*self.load.rw {
            "read" | "randread" => READ,
            "mixed" if self.random() % 100 < MIXED_READS => READ,
            _ => WRITE,
        };
        let index = match (&*self.load.places, &*self.load.rw) {
            ("same", _) => self.count - 1,
            ("fresh", _) if number >= self.count => return None,
            ("fresh", "write") => number,
            ("fresh", _) => shuffled(number, self.count, self.load.seed),
            (_, "read" | "write") => number % self.count,
            _ => self.random() % self.count,
        };
        Some((command, index))
    }
}

/// A random order of `0..count` in which nothing comes twice.
fn shuffled(number: u64, count: u64, seed: u64) -> u64 {
    let bits = 64 - count.leading_zeros();
    let mask = (1 << bits) - 1;
    let mut value = number;
    loop {
        for round in 1..4 {
            value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed * round) & mask;
            value ^= value >> (bits / 2).max(1);
        }
        if value < count {
            return value;
        }
    }
}

fn serve(socket: &str, device: impl Disk + 'static) -> Result<()> {
    let table = Table::new();
    let served = Served::new("", Opened::new(device)).map_err(Error::other)?;
    table.insert(Arc::new(served)).map_err(Error::other)?;
    let listener = Listener::unix(socket).map_err(Error::other)?;
    let server = Server::new(vec![listener], Arc::new(table), ServerConfig::default());
    let server = server.map_err(Error::other)?;
    println!("ready");
    server.run().map_err(Error::other)
}

type Answer<T> = thinply::error::Result<T>;

fn host<T>(result: Result<T>) -> Answer<T> {
    result.map_err(|error| thinply::error::Error::io(error, "using the raw file"))
}

/// A raw file, without any layout, through the same calls as a layer's.
struct Raw {
    file: Arc<dyn Storage>,
    size: u64,
}

impl Disk for Raw {}

impl Device for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn try_read(&self, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        read_blocks(&*self.file, offset, into, wait)
    }

    fn host_range(&self, offset: u64, length: u64) -> Answer<Option<HostRange>> {
        for end in [offset, offset + length - 1] {
            let there = read_blocks(&*self.file, end, (&mut [0]).into(), Wait::Never);
            if unless_waiting(there)?.is_none() {
                return Ok(None);
            }
        }
        let file = self.file.descriptor().map(|file| file.try_clone_to_owned());
        Ok(host(file.transpose())?.map(|file| HostRange { file, offset }))
    }

    fn try_write(&self, offset: u64, from: Gather<'_>, _: Wait) -> Answer<u64> {
        host(write_all_at(&*self.file, from, offset)).map(|()| from.len() as u64)
    }

    fn zero(&self, offset: u64, length: u64, _: ZeroMode) -> Answer<()> {
        self.write(offset, &vec![0; length as usize])
    }

    fn trim(&self, _: u64, _: u64) -> Answer<()> {
        Ok(())
    }

    fn flush(&self) -> Answer<()> {
        host(self.file.sync_data())
    }

    fn try_extents(
        &self,
        _: u64,
        length: u64,
        _: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
        _: Wait,
    ) -> Attempt {
        push_extent(out, limit, Extent { length, hole: false });
        Ok(())
    }

    fn prefetch(&self, offset: u64, length: u64) -> Answer<Prefetch> {
        host(self.file.prefetch(offset, length)).map(|()| Prefetch::All)
    }
}

/// A device of a size that does nothing.
struct Null(u64);

impl Disk for Null {}

impl Device for Null {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_only(&self) -> bool {
        false
    }

    fn try_read(&self, _: u64, mut into: Scatter<'_>, _: Wait) -> Attempt {
        into.clear();
        Ok(())
    }

    fn try_write(&self, _: u64, from: Gather<'_>, _: Wait) -> Answer<u64> {
        Ok(from.len() as u64)
    }

    fn zero(&self, _: u64, _: u64, _: ZeroMode) -> Answer<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> Answer<()> {
        Ok(())
    }

    fn flush(&self) -> Answer<()> {
        Ok(())
    }

    fn try_extents(
        &self,
        _: u64,
        length: u64,
        _: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
        _: Wait,
    ) -> Attempt {
        push_extent(out, limit, Extent { length, hole: false });
        Ok(())
    }

    fn prefetch(&self, _: u64, _: u64) -> Answer<Prefetch> {
        Ok(Prefetch::All)
    }
}

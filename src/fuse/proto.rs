//! The FUSE wire format of Linux, as far as files that nobody makes or removes need it: bytes to
//! requests, answers to bytes. Pure functions, no I/O.
//!
//! Numbers and layouts are those of the kernel's `include/uapi/linux/fuse.h`, protocol 7.12 to 7.45, in
//! the machine's own byte order. Later members of a structure are left out of an answer where the kernel
//! is older ([`init`] alone has to mind that).

#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::serve::Facts;

type U16 = zerocopy::byteorder::U16<zerocopy::byteorder::NativeEndian>;
type U32 = zerocopy::byteorder::U32<zerocopy::byteorder::NativeEndian>;
type I32 = zerocopy::byteorder::I32<zerocopy::byteorder::NativeEndian>;
type U64 = zerocopy::byteorder::U64<zerocopy::byteorder::NativeEndian>;

/// The only major version there is since 2006.
pub const MAJOR: u32 = 7;
/// The version that this module speaks at most.
const MINOR: u32 = 38;
/// The oldest that has all that is needed: writes of more than a page, a whole `init`.
const OLDEST: u32 = 12;

/// Bytes before a request's arguments.
pub const HEADER: usize = size_of::<RawHeader>();
/// Bytes before the data of a write.
pub const WRITE_HEADER: usize = HEADER + size_of::<RawIo>();
/// Bytes before what an answer holds.
pub const ANSWER_HEADER: usize = size_of::<RawAnswer>();
/// Most bytes of one read or write, and the pages that takes.
pub const MAX_IO: usize = 1 << 20;
const MAX_PAGES: u16 = 256;
/// Node of the folder that is mounted.
pub const ROOT: u64 = 1;
/// Bit of the number of a request that was sent again, which its answer has too.
pub const SENT_AGAIN: u64 = 1 << 63;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    length: U32,
    opcode: U32,
    unique: U64,
    node: U64,
    uid: U32,
    gid: U32,
    pid: U32,
    extensions: U16,
    padding: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAnswer {
    length: U32,
    error: I32,
    unique: U64,
}

/// Beginning of a read and of a write.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawIo {
    handle: U64,
    offset: U64,
    size: U32,
    flags: U32,
    lock_owner: U64,
    open_flags: U32,
    padding: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawInit {
    major: U32,
    minor: U32,
    max_readahead: U32,
    flags: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawInitAnswer {
    major: U32,
    minor: U32,
    max_readahead: U32,
    flags: U32,
    max_background: U16,
    congestion_threshold: U16,
    max_write: U32,
    time_granularity: U32,
    max_pages: U16,
    map_alignment: U16,
    flags2: U32,
    unused: [U32; 7],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawOpen {
    flags: U32,
    open_flags: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawOpenAnswer {
    handle: U64,
    open_flags: U32,
    padding: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRelease {
    handle: U64,
    flags: U32,
    release_flags: U32,
    lock_owner: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSync {
    handle: U64,
    flags: U32,
    padding: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAllocate {
    handle: U64,
    offset: U64,
    length: U64,
    mode: U32,
    padding: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSeek {
    handle: U64,
    offset: U64,
    whence: U32,
    padding: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawCopy {
    handle: U64,
    offset: U64,
    to_node: U64,
    to_handle: U64,
    to_offset: U64,
    length: U64,
    flags: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSetAttributes {
    valid: U32,
    padding: U32,
    handle: U64,
    size: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAttributes {
    inode: U64,
    size: U64,
    blocks: U64,
    seconds: [U64; 3],
    nanoseconds: [U32; 3],
    mode: U32,
    links: U32,
    uid: U32,
    gid: U32,
    device: U32,
    block_size: U32,
    flags: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAttributesAnswer {
    /// For how long the kernel may believe it: not at all, since others change what there is.
    valid: U64,
    valid_nanoseconds: U32,
    padding: U32,
    attributes: RawAttributes,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    node: U64,
    generation: U64,
    valid: [U64; 2],
    valid_nanoseconds: [U32; 2],
    attributes: RawAttributes,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawListed {
    inode: U64,
    next: U64,
    length: U32,
    kind: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSpace {
    blocks: U64,
    free: U64,
    available: U64,
    files: U64,
    free_files: U64,
    block_size: U32,
    name_length: U32,
    fragment_size: U32,
    padding: U32,
    spare: [U32; 6],
}

/// A request of the kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Its number, which the answer has too.
    pub unique: u64,
    /// The file or folder that it is about.
    pub node: u64,
    /// What is asked for.
    pub command: Command<'a>,
}

/// What is asked for. Offsets and lengths are bytes.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "as the calls of POSIX have them")]
pub enum Command<'a> {
    /// The first request: the kernel's version and what it can do.
    Init(Kernel),
    Lookup {
        name: &'a [u8],
    },
    GetAttributes,
    /// A change of attributes, of which only the size means anything here.
    SetAttributes {
        handle: Option<u64>,
        size: Option<u64>,
        others: bool,
    },
    Open(Access),
    Read {
        handle: u64,
        offset: u64,
        length: usize,
    },
    /// `durable` where the file was opened for that.
    Write {
        handle: u64,
        offset: u64,
        data: &'a [u8],
        durable: bool,
    },
    Release {
        handle: u64,
    },
    Sync {
        handle: u64,
    },
    OpenFolder,
    ReadFolder {
        handle: u64,
        offset: u64,
        length: usize,
    },
    ReleaseFolder {
        handle: u64,
    },
    /// `fallocate`, with the flags of its mode.
    Allocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    /// `lseek` to data, or to a hole.
    Seek {
        handle: u64,
        offset: u64,
        hole: bool,
    },
    /// `copy_file_range` from an offset of a file.
    Copy {
        handle: u64,
        offset: u64,
        to: Place,
        length: u64,
    },
    Space,
    /// Whoever waits for the answer of a request had a signal. Has no answer.
    Interrupt {
        unique: u64,
    },
    /// One that has no answer: what was forgotten.
    Silent,
    /// The mount has gone.
    Destroy,
    /// What would make, remove or rename something.
    Change,
    /// What this file system does not have.
    Unknown,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// It is to be written.
    pub writes: bool,
    /// Each change is to be durable at once.
    pub durable: bool,
    /// What it holds is to go first.
    pub cut: bool,
}

/// Where in an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub node: u64,
    /// The number it is open under.
    pub handle: u64,
    /// The byte.
    pub offset: u64,
}

/// What the kernel says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u64,
}

impl Kernel {
    /// Whether requests that a dead server had can be had again (Linux 6.9).
    pub fn sends_again(&self) -> bool {
        self.flags & flags::HAS_RESEND != 0
    }
}

mod opcodes {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const TMPFILE: u32 = 51;
}

mod flags {
    pub const ASYNC_READ: u64 = 1 << 0;
    /// What a file is to lose is said when it is opened. Otherwise a request without its handle follows,
    /// which meets the lease that the handle has.
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const HAS_RESEND: u64 = 1 << 39;

    /// What is asked for where the kernel has it.
    pub const WANTED: u64 = ASYNC_READ
        | ATOMIC_O_TRUNC
        | BIG_WRITES
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | MAX_PAGES
        | INIT_EXT
        | HAS_RESEND;
}

/// Of an open file: nothing passes through the client's page cache, so there is nothing to be said when
/// it is closed, and writes go side by side.
const DIRECT_IO: u32 = 1 << 0;
const NO_FLUSH: u32 = 1 << 5;
const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

const SET_SIZE: u32 = 1 << 3;
const SET_HANDLE: u32 = 1 << 6;
/// Mode, user, group: what says who may use a file.
const SET_RIGHTS: u32 = 0b111;

const ACCESS_MODE: u32 = 0b11;
const TRUNCATE: u32 = 0o1_000;
/// Part of `O_SYNC` too.
const DSYNC: u32 = 0o10_000;
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;

/// The kernel's bytes are no request: which part is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

/// A structure at the beginning of `bytes`, and what follows.
fn head<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    bytes: &[u8],
) -> Result<(&T, &[u8]), Violation> {
    T::ref_from_prefix(bytes).map_err(|_| Violation("arguments that end too early"))
}

/// Reads what one `read` of the device brought.
///
/// # Errors
/// Where a length contradicts another. Then who asked can't be answered.
pub fn parse(bytes: &[u8]) -> Result<Request<'_>, Violation> {
    let (header, rest) = head::<RawHeader>(bytes)?;
    if header.length.get() as usize != bytes.len() {
        return Err(Violation("a length that is not that of the request"));
    }
    let arguments = rest
        .get(..rest.len().saturating_sub(usize::from(header.extensions.get()) * 8))
        .ok_or(Violation("more extensions than bytes"))?;
    let command = command(header.opcode.get(), arguments)?;
    Ok(Request { unique: header.unique.get(), node: header.node.get(), command })
}

/// The number of what [`parse`] refused, if it has one.
pub fn number(bytes: &[u8]) -> Option<u64> {
    head::<RawHeader>(bytes).ok().map(|(header, _)| header.unique.get())
}

fn command(opcode: u32, bytes: &[u8]) -> Result<Command<'_>, Violation> {
    Ok(match opcode {
        opcodes::INIT => Command::Init(kernel(bytes)?),
        opcodes::LOOKUP => {
            let name = bytes.strip_suffix(b"\0").ok_or(Violation("a name without an end"))?;
            Command::Lookup { name }
        }
        opcodes::GETATTR => Command::GetAttributes,
        opcodes::SETATTR => {
            let (raw, _) = head::<RawSetAttributes>(bytes)?;
            let valid = raw.valid.get();
            let has = |flag| valid & flag != 0;
            Command::SetAttributes {
                handle: has(SET_HANDLE).then(|| raw.handle.get()),
                size: has(SET_SIZE).then(|| raw.size.get()),
                others: has(SET_RIGHTS),
            }
        }
        opcodes::OPEN => {
            let (raw, _) = head::<RawOpen>(bytes)?;
            let has = |flags| raw.flags.get() & flags != 0;
            let cut = has(TRUNCATE);
            let writes = cut || has(ACCESS_MODE);
            Command::Open(Access { writes, durable: has(DSYNC), cut })
        }
        opcodes::READ | opcodes::READDIR => {
            let (raw, _) = head::<RawIo>(bytes)?;
            let (handle, offset) = (raw.handle.get(), raw.offset.get());
            let length = (raw.size.get() as usize).min(MAX_IO);
            match opcode {
                opcodes::READ => Command::Read { handle, offset, length },
                _ => Command::ReadFolder { handle, offset, length },
            }
        }
        opcodes::WRITE => {
            let (raw, data) = head::<RawIo>(bytes)?;
            if data.len() != raw.size.get() as usize {
                return Err(Violation("a write of another length than its data"));
            }
            let durable = raw.open_flags.get() & DSYNC != 0;
            Command::Write { handle: raw.handle.get(), offset: raw.offset.get(), data, durable }
        }
        opcodes::RELEASE => Command::Release { handle: head::<RawRelease>(bytes)?.0.handle.get() },
        opcodes::RELEASEDIR => {
            Command::ReleaseFolder { handle: head::<RawRelease>(bytes)?.0.handle.get() }
        }
        opcodes::FSYNC => Command::Sync { handle: head::<RawSync>(bytes)?.0.handle.get() },
        opcodes::OPENDIR => Command::OpenFolder,
        opcodes::FALLOCATE => {
            let (raw, _) = head::<RawAllocate>(bytes)?;
            Command::Allocate {
                handle: raw.handle.get(),
                offset: raw.offset.get(),
                length: raw.length.get(),
                mode: raw.mode.get(),
            }
        }
        opcodes::LSEEK => {
            let (raw, _) = head::<RawSeek>(bytes)?;
            let hole = match raw.whence.get() {
                SEEK_DATA => false,
                SEEK_HOLE => true,
                _ => return Err(Violation("a seek that is the kernel's own")),
            };
            Command::Seek { handle: raw.handle.get(), offset: raw.offset.get(), hole }
        }
        opcodes::COPY_FILE_RANGE => {
            let (raw, _) = head::<RawCopy>(bytes)?;
            let (node, handle) = (raw.to_node.get(), raw.to_handle.get());
            Command::Copy {
                handle: raw.handle.get(),
                offset: raw.offset.get(),
                to: Place { node, handle, offset: raw.to_offset.get() },
                length: raw.length.get(),
            }
        }
        opcodes::STATFS => Command::Space,
        opcodes::FORGET | opcodes::BATCH_FORGET => Command::Silent,
        opcodes::INTERRUPT => Command::Interrupt { unique: head::<U64>(bytes)?.0.get() },
        opcodes::DESTROY => Command::Destroy,
        opcodes::SYMLINK
        | opcodes::MKNOD..=opcodes::LINK
        | opcodes::SETXATTR
        | opcodes::REMOVEXATTR
        | opcodes::CREATE
        | opcodes::RENAME2
        | opcodes::TMPFILE => Command::Change,
        _ => Command::Unknown,
    })
}

fn kernel(bytes: &[u8]) -> Result<Kernel, Violation> {
    let (raw, rest) = head::<RawInit>(bytes)?;
    let low = u64::from(raw.flags.get());
    let high = match head::<U32>(rest) {
        Ok((flags2, _)) if low & flags::INIT_EXT != 0 => u64::from(flags2.get()) << 32,
        _ => 0,
    };
    Ok(Kernel {
        major: raw.major.get(),
        minor: raw.minor.get(),
        max_readahead: raw.max_readahead.get(),
        flags: low | high,
    })
}

/// The answer to [`Command::Init`].
///
/// # Errors
/// `EPROTO` for a kernel that is too old.
pub fn init(kernel: &Kernel, max_background: u16) -> Result<Vec<u8>, Errno> {
    if kernel.major < MAJOR || kernel.major == MAJOR && kernel.minor < OLDEST {
        return Err(Errno::PROTO);
    }
    let flags = kernel.flags & flags::WANTED;
    let many_pages = flags & flags::MAX_PAGES != 0;
    let raw = RawInitAnswer {
        major: MAJOR.into(),
        minor: kernel.minor.min(MINOR).into(),
        max_readahead: kernel.max_readahead.into(),
        flags: (flags as u32).into(),
        max_background: max_background.into(),
        congestion_threshold: (max_background / 4 * 3).into(),
        max_write: (MAX_IO as u32).into(),
        time_granularity: 1.into(),
        max_pages: if many_pages { MAX_PAGES.into() } else { 0.into() },
        map_alignment: 0.into(),
        flags2: ((flags >> 32) as u32).into(),
        unused: [0.into(); 7],
    };
    // Before 7.23 the kernel takes the first members only.
    let length = if kernel.minor < 23 { 24 } else { size_of::<RawInitAnswer>() };
    Ok(raw.as_bytes().iter().take(length).copied().collect())
}

/// Bytes before an answer's content: its number, and the error in place of content.
pub fn answer_header(unique: u64, result: Result<usize, Errno>) -> [u8; ANSWER_HEADER] {
    let (content, error) = match result {
        Ok(length) => (length, 0),
        Err(errno) => (0, -errno.raw_os_error()),
    };
    let raw = RawAnswer {
        length: ((ANSWER_HEADER + content) as u32).into(),
        error: error.into(),
        unique: unique.into(),
    };
    zerocopy::transmute!(raw)
}

/// What the kernel is told to have all requests sent again that were read and not answered.
pub fn send_again() -> [u8; ANSWER_HEADER] {
    const RESEND: i32 = 7;
    let raw =
        RawAnswer { length: (ANSWER_HEADER as u32).into(), error: RESEND.into(), unique: 0.into() };
    zerocopy::transmute!(raw)
}

/// A file or folder as its attributes show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Its node.
    pub node: u64,
    /// Whether it is a folder.
    pub folder: bool,
    /// All else.
    pub facts: Facts,
}

impl Attributes {
    fn raw(&self) -> RawAttributes {
        let Self { node, folder, facts } = self;
        let (seconds, nanoseconds) = facts.modified;
        RawAttributes {
            inode: (*node).into(),
            size: facts.size.into(),
            blocks: facts.space.div_ceil(512).into(),
            seconds: [(seconds as u64).into(); 3],
            nanoseconds: [nanoseconds.into(); 3],
            mode: (facts.mode | if *folder { FOLDER } else { FILE }).into(),
            links: if *folder { 2.into() } else { 1.into() },
            uid: facts.owner.0.into(),
            gid: facts.owner.1.into(),
            device: 0.into(),
            block_size: 4096.into(),
            flags: 0.into(),
        }
    }
}

/// The answer to [`Command::GetAttributes`] and [`Command::SetAttributes`].
pub fn attributes(of: &Attributes) -> Vec<u8> {
    let attributes = of.raw();
    let (valid, valid_nanoseconds, padding) = (0.into(), 0.into(), 0.into());
    let raw = RawAttributesAnswer { valid, valid_nanoseconds, padding, attributes };
    raw.as_bytes().to_vec()
}

/// The answer to [`Command::Lookup`].
pub fn entry(of: &Attributes) -> Vec<u8> {
    let raw = RawEntry {
        node: of.node.into(),
        generation: 0.into(),
        valid: [0.into(); 2],
        valid_nanoseconds: [0.into(); 2],
        attributes: of.raw(),
    };
    raw.as_bytes().to_vec()
}

/// The answer to [`Command::Open`].
pub fn opened(handle: u64) -> Vec<u8> {
    let open_flags = (DIRECT_IO | NO_FLUSH | PARALLEL_DIRECT_WRITES).into();
    RawOpenAnswer { handle: handle.into(), open_flags, padding: 0.into() }.as_bytes().to_vec()
}

/// The answer to [`Command::OpenFolder`].
pub fn opened_folder(handle: u64) -> Vec<u8> {
    let (open_flags, padding) = (0.into(), 0.into());
    RawOpenAnswer { handle: handle.into(), open_flags, padding }.as_bytes().to_vec()
}

/// The answer to [`Command::Write`] and [`Command::Copy`]: how many bytes it took.
pub fn written(count: usize) -> Vec<u8> {
    U64::new(count as u64).as_bytes().to_vec()
}

/// The answer to [`Command::Seek`].
pub fn sought(offset: u64) -> Vec<u8> {
    U64::new(offset).as_bytes().to_vec()
}

/// The space of a file system, in blocks of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "as `statvfs` has them")]
pub struct Space {
    pub blocks: u64,
    pub free: u64,
    pub available: u64,
}

/// The answer to [`Command::Space`].
pub fn space(space: &Space) -> Vec<u8> {
    let raw = RawSpace {
        blocks: space.blocks.into(),
        free: space.free.into(),
        available: space.available.into(),
        files: 0.into(),
        free_files: 0.into(),
        block_size: 4096.into(),
        name_length: 255.into(),
        fragment_size: 4096.into(),
        padding: 0.into(),
        spare: [0.into(); 6],
    };
    raw.as_bytes().to_vec()
}

/// Appends an entry of a folder to `out`, unless it would be longer than `limit` then. `next` is the
/// offset to go on at behind it.
pub fn list(
    out: &mut Vec<u8>,
    limit: usize,
    node: u64,
    next: u64,
    folder: bool,
    name: &str,
) -> bool {
    let length = (size_of::<RawListed>() + name.len()).next_multiple_of(8);
    if out.len() + length > limit {
        return false;
    }
    let kind = if folder { FOLDER } else { FILE } >> 12;
    let raw = RawListed {
        inode: node.into(),
        next: next.into(),
        length: (name.len() as u32).into(),
        kind: kind.into(),
    };
    let end = out.len() + length;
    out.extend_from_slice(raw.as_bytes());
    out.extend_from_slice(name.as_bytes());
    out.resize(end, 0);
    true
}

#[cfg(test)]
mod tests;

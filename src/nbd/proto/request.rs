//! Decodes requests of the transmission phase and checks them against what the session allows.

use byteorder::{BigEndian, ByteOrder};

use super::numbers::*;
use super::{Errno, MAX_DRAIN, MAX_PAYLOAD, Reader};

/// Length of a request without its payload.
pub const REQUEST_LENGTH: usize = 28;

/// What a request is checked against: the export as it is now and what was negotiated.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Size of the export in bytes.
    pub size: u64,
    /// Whether writes, zeros and trims are refused.
    pub read_only: bool,
    /// Whether structured replies were negotiated.
    pub structured: bool,
    /// Whether the `base:allocation` context was chosen.
    pub allocation: bool,
}

/// A command whose range lies inside the export and which the session allows. Offsets and lengths
/// are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read at most [`MAX_PAYLOAD`] bytes; `whole` asks for one chunk (`NBD_CMD_FLAG_DF`).
    Read {
        /// Where it starts.
        offset: u64,
        /// How much, possibly nothing.
        length: u32,
        /// Whether the reply may not be split.
        whole: bool,
    },
    /// Write the payload, as long as [`Request::payload`] says.
    Write {
        /// Where it starts.
        offset: u64,
    },
    /// Hang up once everything is answered; has no reply itself.
    Disconnect,
    /// Make every write that was replied to durable.
    Flush,
    /// Give a range back.
    Trim {
        /// Where it starts.
        offset: u64,
        /// How much, possibly nothing.
        length: u32,
    },
    /// Bring a range into the page cache.
    Cache {
        /// Where it starts.
        offset: u64,
        /// How much, possibly nothing.
        length: u32,
    },
    /// Make a range read as zeros.
    WriteZeroes {
        /// Where it starts.
        offset: u64,
        /// How much, possibly nothing.
        length: u32,
        /// Keep space allocated (`NBD_CMD_FLAG_NO_HOLE`).
        allocate: bool,
        /// Rather fail than be slow (`NBD_CMD_FLAG_FAST_ZERO`).
        fast_only: bool,
    },
    /// Describe a range.
    BlockStatus {
        /// Where it starts.
        offset: u64,
        /// How much, never nothing.
        length: u32,
        /// Whether one extent is asked for (`NBD_CMD_FLAG_REQ_ONE`).
        one: bool,
    },
}

/// Why a request is answered with an error and not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The error of the reply.
    pub errno: Errno,
    /// What people read.
    pub message: &'static str,
}

/// Bytes after which the stream cannot be trusted any more: the connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The request does not start with the magic number.
    Magic,
    /// The payload is longer than [`MAX_DRAIN`].
    Payload,
}

/// One request, taken off the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's name for it, sent back in the reply.
    pub cookie: u64,
    /// How many payload bytes follow, whether or not the command is refused.
    pub payload: u32,
    /// Whether the reply means that the change is durable (`NBD_CMD_FLAG_FUA`).
    pub fua: bool,
    /// What to do.
    pub command: Result<Command, Refusal>,
}

impl Request {
    /// The request at the start of `input`, which takes [`REQUEST_LENGTH`] bytes; `None` if there
    /// are fewer. A [`Violation`] leaves no way to go on.
    pub fn parse(input: &[u8], terms: &Terms) -> Result<Option<Self>, Violation> {
        let Some(raw) = Raw::parse(input) else { return Ok(None) };
        if raw.magic != REQUEST_MAGIC {
            return Err(Violation::Magic);
        }
        let payload = if raw.kind == CMD_WRITE { raw.length } else { 0 };
        if payload > MAX_DRAIN {
            return Err(Violation::Payload);
        }
        Ok(Some(Self {
            cookie: raw.cookie,
            payload,
            fua: raw.flags & CMD_FLAG_FUA != 0,
            command: raw.check(terms),
        }))
    }
}

/// A request as a client sends it, without its payload.
pub fn request_header(
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
) -> [u8; REQUEST_LENGTH] {
    let mut bytes = [0; REQUEST_LENGTH];
    BigEndian::write_u32(&mut bytes[..4], REQUEST_MAGIC);
    BigEndian::write_u16(&mut bytes[4..6], flags);
    BigEndian::write_u16(&mut bytes[6..8], command);
    BigEndian::write_u64(&mut bytes[8..16], cookie);
    BigEndian::write_u64(&mut bytes[16..24], offset);
    BigEndian::write_u32(&mut bytes[24..], length);
    bytes
}

/// The fields as sent.
struct Raw {
    magic: u32,
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl Raw {
    fn parse(input: &[u8]) -> Option<Self> {
        let mut reader = Reader(input);
        Some(Self {
            magic: reader.u32()?,
            flags: reader.u16()?,
            kind: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            length: reader.u32()?,
        })
    }

    fn check(&self, terms: &Terms) -> Result<Command, Refusal> {
        let df = if terms.structured { CMD_FLAG_DF } else { 0 };
        let allowed = match self.kind {
            CMD_READ => df,
            CMD_WRITE | CMD_DISC | CMD_FLUSH | CMD_TRIM | CMD_CACHE => 0,
            CMD_WRITE_ZEROES => CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
            CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
            _ => return refuse(Errno::Invalid, "unknown command"),
        };
        // A client that hangs up has no reply to read: its flags do not matter.
        if self.kind == CMD_DISC {
            return Ok(Command::Disconnect);
        }
        if self.flags & !(allowed | CMD_FLAG_FUA) != 0 {
            return refuse(Errno::Invalid, "unknown flag");
        }
        if self.kind == CMD_FLUSH {
            return match (self.offset, self.length) {
                (0, 0) => Ok(Command::Flush),
                _ => refuse(Errno::Invalid, "flush takes no range"),
            };
        }
        self.check_range(terms)?;
        self.command(terms)
    }

    fn check_range(&self, terms: &Terms) -> Result<(), Refusal> {
        let changes = matches!(self.kind, CMD_WRITE | CMD_WRITE_ZEROES | CMD_TRIM);
        if changes && terms.read_only {
            return refuse(Errno::Perm, "the export is read-only");
        }
        if matches!(self.kind, CMD_READ | CMD_WRITE) && self.length > MAX_PAYLOAD {
            return refuse(Errno::Invalid, "more than 32 MiB in one request");
        }
        if self.offset > terms.size || u64::from(self.length) > terms.size - self.offset {
            let fills = matches!(self.kind, CMD_WRITE | CMD_WRITE_ZEROES);
            let errno = if fills { Errno::NoSpace } else { Errno::Invalid };
            return refuse(errno, "beyond the end of the export");
        }
        Ok(())
    }

    fn command(&self, terms: &Terms) -> Result<Command, Refusal> {
        let Self { offset, length, .. } = *self;
        let flag = |flag| self.flags & flag != 0;
        Ok(match self.kind {
            CMD_READ => Command::Read { offset, length, whole: flag(CMD_FLAG_DF) },
            CMD_WRITE => Command::Write { offset },
            CMD_TRIM => Command::Trim { offset, length },
            CMD_CACHE => Command::Cache { offset, length },
            CMD_WRITE_ZEROES => Command::WriteZeroes {
                offset,
                length,
                allocate: flag(CMD_FLAG_NO_HOLE),
                fast_only: flag(CMD_FLAG_FAST_ZERO),
            },
            _ if !terms.allocation => {
                return refuse(Errno::Invalid, "no metadata context was negotiated");
            }
            _ if length == 0 => return refuse(Errno::Invalid, "status of no bytes"),
            _ => Command::BlockStatus { offset, length, one: flag(CMD_FLAG_REQ_ONE) },
        })
    }
}

fn refuse<T>(errno: Errno, message: &'static str) -> Result<T, Refusal> {
    Err(Refusal { errno, message })
}

#[cfg(test)]
mod tests {
    use super::super::{put_u16, put_u32, put_u64};
    use super::*;
    use proptest::prelude::*;

    const TERMS: Terms =
        Terms { size: 1 << 20, read_only: false, structured: true, allocation: true };

    fn bytes(flags: u16, kind: u16, offset: u64, length: u32) -> Vec<u8> {
        let mut out = Vec::new();
        put_u32(&mut out, REQUEST_MAGIC);
        put_u16(&mut out, flags);
        put_u16(&mut out, kind);
        put_u64(&mut out, 77);
        put_u64(&mut out, offset);
        put_u32(&mut out, length);
        out
    }

    fn command(
        terms: Terms,
        flags: u16,
        kind: u16,
        offset: u64,
        length: u32,
    ) -> Result<Command, Errno> {
        let bytes = bytes(flags, kind, offset, length);
        assert_eq!(request_header(flags, kind, 77, offset, length)[..], bytes);
        let request = Request::parse(&bytes, &terms);
        let request = request.unwrap().unwrap();
        assert_eq!(request.cookie, 77);
        assert_eq!(request.payload, if kind == CMD_WRITE { length } else { 0 });
        request.command.map_err(|refusal| refusal.errno)
    }

    #[test]
    fn ranges_fail_with_the_error_of_their_command() {
        for (offset, length) in [(1 << 20, 1), ((1 << 20) + 1, 0), (u64::MAX, 512), (1 << 63, 1)] {
            for kind in [CMD_WRITE, CMD_WRITE_ZEROES] {
                assert_eq!(command(TERMS, 0, kind, offset, length), Err(Errno::NoSpace));
            }
            for kind in [CMD_READ, CMD_TRIM, CMD_CACHE, CMD_BLOCK_STATUS] {
                assert_eq!(command(TERMS, 0, kind, offset, length), Err(Errno::Invalid));
            }
        }
        let endless = Terms { size: u64::MAX, ..TERMS };
        assert_eq!(command(endless, 0, CMD_READ, u64::MAX - 1, 512), Err(Errno::Invalid));
        assert!(command(TERMS, 0, CMD_READ, 0, 1 << 20).is_ok());
        assert!(command(TERMS, 0, CMD_READ, 1 << 20, 0).is_ok());
    }

    #[test]
    fn read_only_is_told_before_the_range() {
        let terms = Terms { read_only: true, ..TERMS };
        for kind in [CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM] {
            assert_eq!(command(terms, 0, kind, u64::MAX, 512), Err(Errno::Perm));
        }
        assert!(command(terms, 0, CMD_READ, 0, 512).is_ok());
        assert_eq!(command(terms, 0, CMD_FLUSH, 0, 0), Ok(Command::Flush));
    }

    #[test]
    fn flags_belong_to_their_commands_and_fua_to_all() {
        for kind in [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS] {
            assert!(command(TERMS, CMD_FLAG_FUA, kind, 0, 512).is_ok());
            assert_eq!(command(TERMS, 1 << 5, kind, 0, 512), Err(Errno::Invalid));
            assert_eq!(command(TERMS, 1 << 15, kind, 0, 512), Err(Errno::Invalid));
        }
        assert!(command(TERMS, CMD_FLAG_DF, CMD_READ, 0, 512).is_ok());
        let simple = Terms { structured: false, ..TERMS };
        assert_eq!(command(simple, CMD_FLAG_DF, CMD_READ, 0, 512), Err(Errno::Invalid));
        assert_eq!(command(TERMS, CMD_FLAG_DF, CMD_WRITE, 0, 512), Err(Errno::Invalid));
        assert_eq!(command(TERMS, 0, 99, 0, 0), Err(Errno::Invalid));
        assert_eq!(command(TERMS, 0, CMD_FLUSH, 1, 0), Err(Errno::Invalid));
        assert_eq!(command(TERMS, 0xffff, CMD_DISC, 1, 1), Ok(Command::Disconnect));
    }

    #[test]
    fn status_needs_a_context_and_a_length() {
        let terms = Terms { allocation: false, ..TERMS };
        assert_eq!(command(terms, 0, CMD_BLOCK_STATUS, 0, 512), Err(Errno::Invalid));
        assert_eq!(command(TERMS, 0, CMD_BLOCK_STATUS, 0, 0), Err(Errno::Invalid));
    }

    #[test]
    fn long_payloads_are_refused_and_endless_ones_end_the_connection() {
        let terms = Terms { size: u64::MAX, ..TERMS };
        assert!(command(terms, 0, CMD_WRITE, 0, MAX_PAYLOAD).is_ok());
        assert_eq!(command(terms, 0, CMD_WRITE, 0, MAX_PAYLOAD + 1), Err(Errno::Invalid));
        assert_eq!(command(terms, 0, CMD_READ, 0, MAX_PAYLOAD + 1), Err(Errno::Invalid));
        assert!(command(terms, 0, CMD_TRIM, 0, u32::MAX).is_ok());
        let endless = Request::parse(&bytes(0, CMD_WRITE, 0, MAX_DRAIN + 1), &terms);
        assert_eq!(endless, Err(Violation::Payload));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_value_or_an_error(
            input in prop::collection::vec(any::<u8>(), 0..64),
            size: u64, read_only: bool, structured: bool, allocation: bool,
        ) {
            let terms = Terms { size, read_only, structured, allocation };
            let parsed = Request::parse(&input, &terms);
            prop_assert_eq!(parsed == Ok(None), input.len() < REQUEST_LENGTH);
        }

        #[test]
        fn what_passes_lies_inside_the_export(
            flags in 0u16..64, kind in 0u16..9, offset: u64, length: u32, size: u64,
        ) {
            let terms = Terms { size, ..TERMS };
            let bytes = bytes(flags, kind, offset, length);
        assert_eq!(request_header(flags, kind, 77, offset, length)[..], bytes);
        let request = Request::parse(&bytes, &terms);
            let Ok(Some(Request { command: Ok(command), payload, .. })) = request else {
                return Ok(());
            };
            let (offset, length) = match command {
                Command::Disconnect | Command::Flush => (0, 0),
                Command::Write { offset } => (offset, payload),
                Command::Read { offset, length, .. }
                | Command::Trim { offset, length }
                | Command::Cache { offset, length }
                | Command::WriteZeroes { offset, length, .. }
                | Command::BlockStatus { offset, length, .. } => (offset, length),
            };
            prop_assert!(u128::from(offset) + u128::from(length) <= u128::from(size));
        }
    }
}

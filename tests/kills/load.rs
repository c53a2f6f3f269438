//! A client that keeps a queue of requests full, over any stream, and keeps the history of what it
//! sent and what was replied to.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;

use thinply::nbd::proto::numbers::{OPT_EXPORT_NAME, OPTION_MAGIC, SIMPLE_REPLY_MAGIC};
use thinply::nbd::proto::request_header;

use crate::history::{History, SECTOR};
use crate::taste::{FLUSH, FUA, READ, Request, SIZE, Taste, WRITE};

const ESHUTDOWN: u32 = 108;

/// A stream to a server. It ends when the server does.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A connection in the transmission phase, with simple replies.
pub struct Client {
    stream: Box<dyn Stream>,
    next: u64,
}

/// How a conversation came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The server is gone, or said that it was going.
    Gone,
    /// All that was planned is done.
    Done,
}

/// Whether the server has hung up or died.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}

impl Client {
    /// Takes the export `name`.
    pub fn connect(mut stream: Box<dyn Stream>, name: &str) -> io::Result<Self> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "{greeting:x?}");
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(OPT_EXPORT_NAME.to_be_bytes());
        hello.extend((name.len() as u32).to_be_bytes());
        hello.extend(name.as_bytes());
        stream.write_all(&hello)?;
        let mut export = [0; 10];
        stream.read_exact(&mut export)?;
        assert_eq!(export[..8], (SIZE * SECTOR).to_be_bytes());
        Ok(Self { stream, next: 0 })
    }

    /// Appends a request to `out`; its cookie.
    fn request(&mut self, out: &mut Vec<u8>, flags: u16, command: u16, range: &Range<u64>) -> u64 {
        self.next += 1;
        let length = ((range.end - range.start) * SECTOR) as u32;
        out.extend(request_header(flags, command, self.next, range.start * SECTOR, length));
        self.next
    }

    /// The next reply: its error and cookie.
    fn reply(&mut self) -> io::Result<(u32, u64)> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| reply[at + i]));
        Ok((word(4), u64::from(word(8)) << 32 | u64::from(word(12))))
    }

    /// Reads a range; nothing else is under way.
    pub fn read(&mut self, range: &Range<u64>) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        self.request(&mut out, 0, READ, range);
        self.stream.write_all(&out)?;
        let (error, _) = self.reply()?;
        assert_eq!(error, 0, "reading sectors {range:?}");
        self.data(range)
    }

    fn data(&mut self, range: &Range<u64>) -> io::Result<Vec<u8>> {
        let mut data = vec![0; ((range.end - range.start) * SECTOR) as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Compares all that was ever touched with what `history` allows, and settles it.
    pub fn settle(&mut self, history: &History) -> Result<(), String> {
        history.touched(2048).iter().try_for_each(|range| {
            let data = self.read(range).map_err(|error| format!("after a crash: {error}"))?;
            history.settle(range, &data)
        })
    }

    /// Sends what `taste` likes until the server is gone or `requests` are answered. Fails with
    /// what a read showed that it may not, or with an error of the server.
    pub fn load(
        &mut self,
        history: &History,
        taste: &mut Taste,
        requests: u64,
    ) -> Result<End, String> {
        let mut flying: HashMap<u64, Flying> = HashMap::new();
        let mut out = Vec::new();
        let (mut sent, mut answered) = (0, 0);
        while answered < requests {
            // All that is chosen is in the history before a byte of it leaves.
            while flying.len() < taste.depth && sent < requests {
                let request = taste.choose();
                let Some(begun) = self.begin(history, &request, &mut out) else { break };
                flying.insert(begun.0, begun.1);
                sent += 1;
            }
            let talk = self
                .stream
                .write_all(&out)
                .and_then(|()| if flying.is_empty() { Ok(None) } else { self.reply().map(Some) });
            out.clear();
            match talk {
                Err(error) if is_gone(&error) => return Ok(End::Gone),
                Err(error) => return Err(format!("after {answered} replies: {error}")),
                // Others are using all that this one would.
                Ok(None) => std::thread::yield_now(),
                Ok(Some((ESHUTDOWN, _))) => return Ok(End::Gone),
                Ok(Some((error, cookie))) => {
                    let request = flying.remove(&cookie).ok_or("a reply to nothing")?;
                    if error != 0 {
                        return Err(format!("error {error} as the reply to {request:?}"));
                    }
                    if !self.end(history, request)? {
                        return Ok(End::Gone);
                    }
                    answered += 1;
                }
            }
            taste.rest();
        }
        Ok(End::Done)
    }

    fn begin(
        &mut self,
        history: &History,
        request: &Request,
        out: &mut Vec<u8>,
    ) -> Option<(u64, Flying)> {
        let Request { command, flags, range } = request;
        let flush = match *command {
            FLUSH => Some(history.begin_flush()),
            READ => history.begin_read(range).then_some(0),
            _ => {
                let version = history.begin(range, *command != WRITE)?;
                let cookie = self.request(out, *flags, *command, range);
                if *command == WRITE {
                    History::content(range, version, out);
                }
                return Some((cookie, Flying { request: request.clone(), flush: 0 }));
            }
        }?;
        let cookie = self.request(out, 0, *command, range);
        Some((cookie, Flying { request: request.clone(), flush }))
    }

    /// A request was answered without an error. False if the server is gone.
    fn end(&mut self, history: &History, flying: Flying) -> Result<bool, String> {
        let Request { command, flags, range } = flying.request;
        match command {
            FLUSH => history.end_flush(flying.flush),
            READ => match self.data(&range) {
                Ok(data) => history.end_read(&range, &data)?,
                Err(error) if is_gone(&error) => return Ok(false),
                Err(error) => return Err(error.to_string()),
            },
            _ => history.end(&range, flags & FUA != 0),
        }
        Ok(true)
    }
}

/// A request that was sent.
#[derive(Debug)]
struct Flying {
    request: Request,
    /// For a flush: when it was sent.
    flush: u64,
}

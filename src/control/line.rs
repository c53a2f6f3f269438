//! The transport: one request and one answer a connection, a JSON line each, over a Unix socket in
//! the store that is its owner's alone.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use super::request::{reply_from_json, reply_to_json};
use super::{Answer, Control, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::socket::{bind, connect};
use crate::store::Store;
use crate::sync::spawn;

/// Longest request that is read: as long as what the store may keep of it.
const MAX_REQUEST: u64 = 4 << 20;
/// Longest answer that is read: a list of millions of changes.
const MAX_ANSWER: u64 = 1 << 30;
/// How long a client may take to say what it wants, and to hear what came of it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the process that serves may be silent before it is asked whether it still answers.
const SILENCE: Duration = Duration::from_secs(5);
/// Bytes that the kernel is handed at a time.
const WRITTEN_AT_A_TIME: usize = 4 << 10;
/// Requests that are carried out at a time; further clients are hung up on.
const MOST: usize = 64;
/// How long a server without descriptors waits before it accepts again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

fn socket(store: &Store) -> PathBuf {
    store.path().join("control")
}

/// Has the process that serves `store` carry a request out; `None` where nobody does.
///
/// # Errors
/// The error that the process answers, with its kind; [`ErrorKind::Io`] for a process that answers
/// nothing, or nonsense, or hangs.
pub fn ask(store: &Store, request: &Request) -> Option<Result<Answer>> {
    let stream = connect(&socket(store)).ok()?;
    Some(converse(&stream, request, &|| is_answering(store)))
}

/// Whether the process that serves a store answers at all; one that hangs, or that somebody stopped,
/// doesn't. Takes ten seconds at most.
pub fn is_answering(store: &Store) -> bool {
    connect(&socket(store)).is_ok_and(|stream| {
        let limited = stream.set_write_timeout(Some(SILENCE));
        limited.is_ok() && converse(&stream, &Request::Status {}, &|| false).is_ok()
    })
}

fn converse(
    mut stream: &UnixStream,
    request: &Request,
    is_alive: &dyn Fn() -> bool,
) -> Result<Answer> {
    let failed = |error| Error::io(error, "asking the process that serves the store");
    let mut line = request.to_json()?;
    line.push(b'\n');
    stream.write_all(&line).map_err(failed)?;
    stream.set_read_timeout(Some(SILENCE)).map_err(failed)?;
    let line = read_line(&mut WhileAlive { stream, is_alive }, MAX_ANSWER).map_err(failed)?;
    reply_from_json(request, &line)
}

/// A stream that is waited for as long as whoever writes it does something else in the meantime.
struct WhileAlive<'a> {
    stream: &'a UnixStream,
    is_alive: &'a dyn Fn() -> bool,
}

impl Read for WhileAlive<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !(self.is_alive)() {
                        return Err(io::Error::other("it does not answer"));
                    }
                }
                done => return done,
            }
        }
    }
}

/// Reads a line of at most `most` bytes.
fn read_line(stream: &mut dyn Read, most: u64) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    BufReader::new(stream.take(most)).read_until(b'\n', &mut line)?;
    match line.pop() {
        Some(b'\n') => Ok(line),
        Some(_) if line.len() as u64 + 1 == most => {
            Err(io::Error::other(format!("a line of more than {most} bytes")))
        }
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Answers requests until it is dropped; those under way go on. Its socket file goes with it.
pub struct Server {
    listener: Arc<UnixListener>,
    path: PathBuf,
}

impl Server {
    /// Listens in the store of `control`, for its owner alone, and answers in threads of its own.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a store on a file system without sockets; other host errors;
    /// [`ErrorKind::InvalidInput`] for a desk that is not the store's.
    pub fn start(control: Control) -> Result<Self> {
        if control.lock.is_none() {
            let detail = "only the process that serves a store answers for it";
            return Err(Error::new(ErrorKind::InvalidInput, detail));
        }
        let path = socket(control.store());
        let fail = |error| Error::io(error, "listening for control requests").in_file(&path);
        // Made under a name that nobody connects to, until only the owner may. What a killed process
        // left under either name is in nobody's use: this one has the store's desk.
        let draft = path.with_file_name(format!(".draft-control-{}", std::process::id()));
        let _ = fs::remove_file(&draft);
        let listener = bind(&draft).map_err(|error| {
            // Some make a plain file of it before they fail (exFAT through FUSE).
            let _ = fs::remove_file(&draft);
            if !has_no_sockets(&error) {
                return fail(error);
            }
            let detail = "no control socket can be made on this file system";
            Error::new(ErrorKind::Unsupported, detail).in_file(&path)
        })?;
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o600)).map_err(fail)?;
        fs::rename(&draft, &path).map_err(fail)?;
        let listener = Arc::new(listener);
        let accepting = listener.clone();
        let accept = move || accept(&accepting, &control);
        spawn("control", accept).map_err(fail)?;
        Ok(Self { listener, path })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        // Ends the accept under way, and all that come.
        let _ = shutdown(&self.listener, Shutdown::Both);
    }
}

/// Whether an attempt to make a socket failed in a way in which file systems say that they have none.
fn has_no_sockets(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::IO | Errno::PERM | Errno::NOSYS | Errno::OPNOTSUPP))
}

fn accept(listener: &UnixListener, control: &Control) {
    let places = Arc::new(());
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let (control, place) = (control.clone(), places.clone());
                if Arc::strong_count(&places) <= MOST + 1 {
                    // Where there is no thread, the client is hung up on.
                    let _ = spawn("control", move || {
                        answer(&stream, &control);
                        drop(place);
                    });
                }
            }
            // The end.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            // Gone again, or no descriptors: the client would be reported again at once.
            Err(_) => thread::sleep(ACCEPT_PAUSE),
        }
    }
}

/// Reads the request of one client, has it carried out, and answers.
fn answer(stream: &UnixStream, control: &Control) {
    let mut reply = reply_to_json(hear(stream).and_then(|request| control.carry_out(&request)));
    reply.push(b'\n');
    // Whoever asked may be gone; what was done stays done.
    let _ = Until { stream, end: Instant::now() + PATIENCE }.write_all(&reply);
}

fn hear(stream: &UnixStream) -> Result<Request> {
    let failed = |error| Error::io(error, "reading a request");
    let mut stream = Until { stream, end: Instant::now() + PATIENCE };
    Request::from_json(&read_line(&mut stream, MAX_REQUEST).map_err(failed)?)
}

/// A stream that is read and written until some time, however its bytes trickle.
struct Until<'a> {
    stream: &'a UnixStream,
    end: Instant,
}

impl Until<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for Until<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buf)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        // Of more, the kernel begins the time anew with each part that it takes.
        self.stream.write(&buf[..buf.len().min(WRITTEN_AT_A_TIME)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_waited_for_as_long_as_whoever_gives_it_is_alive() {
        let (client, server) = UnixStream::pair().unwrap();
        client.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        let asked = std::cell::Cell::new(0);
        let answers_late = || {
            asked.set(asked.get() + 1);
            (&server).write_all(if asked.get() < 3 { b"x" } else { b"\n" }).is_ok()
        };
        let line = read_line(&mut WhileAlive { stream: &client, is_alive: &answers_late }, 9);
        assert_eq!((line.unwrap(), asked.get()), (b"xx".to_vec(), 3));
        let mut hanging = WhileAlive { stream: &client, is_alive: &|| false };
        let error = read_line(&mut hanging, 9).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
    }

    #[test]
    fn who_says_a_request_byte_by_byte_has_no_more_time_than_others() {
        let (client, server) = UnixStream::pair().unwrap();
        let dripping = thread::spawn(move || {
            while (&client).write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let mut stream =
            Until { stream: &server, end: Instant::now() + Duration::from_millis(100) };
        let error = read_line(&mut stream, MAX_REQUEST).unwrap_err();
        let kinds = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        assert!(kinds.contains(&error.kind()), "{error:?}");
        drop(server);
        dripping.join().unwrap();
    }

    #[test]
    fn who_hears_an_answer_byte_by_byte_has_no_more_time_than_others() {
        let (client, server) = UnixStream::pair().unwrap();
        let dripping = thread::spawn(move || {
            while (&client).read(&mut [0; 4096]).is_ok_and(|count| count > 0) {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let end = Instant::now() + Duration::from_millis(100);
        let error = Until { stream: &server, end }.write_all(&vec![0; 8 << 20]).unwrap_err();
        let kinds = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        assert!(kinds.contains(&error.kind()), "{error:?}");
        drop(server);
        dripping.join().unwrap();
    }
}

//! A `qemu-nbd` that can do nothing but decode: as nobody, without a network, with two kinds of
//! sockets and no file, for as long as thinply lives.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use rustix::fs::Access;
use rustix::pipe::{PipeFlags, pipe_with};
use thinply::error::{Error, ErrorKind, Result};

/// The user and group that own nothing.
const NOBODY: libc::uid_t = 65534;
/// The descriptor on which a program finds a socket that listens already (`SD_LISTEN_FDS_START`).
const LISTENING: RawFd = 3;
/// Descriptors handed on are from here, so that none is in the way of [`LISTENING`].
const FIRST_FREE: RawFd = 10;
/// Address space: the largest table that QEMU makes, of a VHDX of 64 TiB, has 512 MiB.
const MEMORY: libc::rlim_t = 2 << 30;
/// Descriptors that it may have.
const DESCRIPTORS: libc::rlim_t = 64;
/// Bytes of standard error that are kept.
const HEARD: u64 = 64 << 10;

/// Tells the program that a socket is for it: it has that number only once it runs.
const START: &str = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\" \"$@\"";

/// Where the program is.
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|folder| folder.join("qemu-nbd"));
    places.find(|place| place.is_absolute() && rustix::fs::access(place, Access::EXEC_OK).is_ok())
}

/// A running program. It ends with this.
pub struct Process {
    /// Hung up to have it killed.
    alive: Option<Sender<()>>,
    waiting: Option<JoinHandle<io::Result<ExitStatus>>>,
    heard: File,
}

impl Process {
    /// Starts the program with these arguments, to listen on `socket`. `handed` are its connections;
    /// it finds them under the numbers that `arguments` gets.
    pub fn start(
        program: PathBuf,
        socket: UnixListener,
        handed: &[OwnedFd],
        arguments: impl FnOnce(&[RawFd]) -> Vec<String>,
    ) -> Result<Self> {
        let failed = |error: io::Error| Error::io(error, format!("starting {}", program.display()));
        let handed: io::Result<Vec<_>> =
            handed.iter().map(|fd| Ok(rustix::io::fcntl_dupfd_cloexec(fd, FIRST_FREE)?)).collect();
        let handed = handed.map_err(failed)?;
        let numbers: Vec<_> = handed.iter().map(AsRawFd::as_raw_fd).collect();
        // Who writes more than anybody reads must not wait for that.
        let pipe = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK);
        let (heard, told) = pipe.map_err(|error| failed(error.into()))?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c".as_ref(), OsStr::new(START), program.as_os_str()]);
        command.args(arguments(&numbers)).env_clear().env("LC_ALL", "C").current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(told));
        let parent = rustix::process::getpid().as_raw_nonzero().get();
        let listening = socket.as_raw_fd();
        // SAFETY: only system calls, which is what may be done between fork and exec.
        unsafe { command.pre_exec(move || confine(parent, listening, &numbers)) };
        // The kernel ends the child with the thread that has started it: that one waits here.
        let (alive, end) = channel::<()>();
        let (tell, told) = channel();
        let wait = move || {
            let mut child: Child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    let _ = tell.send(Err(error));
                    return Err(io::ErrorKind::NotFound.into());
                }
            };
            // Its ends of what connects it are its own from now on.
            drop((command, socket, handed));
            let _ = tell.send(Ok(()));
            let _ = end.recv();
            let _ = child.kill();
            child.wait()
        };
        let waiting = std::thread::Builder::new().name("qemu-nbd".into()).spawn(wait);
        let waiting = waiting.map_err(failed)?;
        told.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into())).map_err(failed)?;
        Ok(Self { alive: Some(alive), waiting: Some(waiting), heard: heard.into() })
    }

    /// Ends it; the last lines of its standard error.
    pub fn last_words(mut self) -> Vec<String> {
        self.end();
        let mut bytes = Vec::new();
        // The end of what was written, or nothing more to read of a pipe that somebody still has.
        let _ = (&self.heard).take(HEARD).read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(LINES)..].iter().map(|line| plain(line)).collect()
    }

    fn end(&mut self) {
        self.alive = None;
        if let Some(waiting) = self.waiting.take() {
            let _ = waiting.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Lines that are shown, and characters of each.
const LINES: usize = 3;
const COLUMNS: usize = 300;

/// A line without what could act on a terminal, and without the descriptions of nodes that thinply
/// itself made.
fn plain(line: &str) -> String {
    let mut rest = line;
    let mut out = String::new();
    while let Some((before, after)) = rest.split_once("'json:{") {
        out.push_str(before);
        out.push_str("the image");
        rest = after.split_once("}'").map_or("", |(_, after)| after);
    }
    out.push_str(rest);
    out.chars().take(COLUMNS).flat_map(char::escape_debug).collect()
}

/// What the child does before it becomes the program. Where it must not run as who it is, or the kernel
/// can't promise to end it, it doesn't run.
fn confine(parent: libc::pid_t, listening: RawFd, handed: &[RawFd]) -> io::Result<()> {
    let done = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    let limit = |what, most| {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: the limit is alive for the call.
        done(unsafe { libc::setrlimit(what, &raw const limit) })
    };
    // SAFETY: numbers alone go into these calls. `LISTENING` is free for it: had nothing been open under
    // that number, the socket, or what was opened before it, would have got it.
    unsafe {
        if listening == LISTENING {
            done(libc::fcntl(listening, libc::F_SETFD, 0))?;
        } else {
            done(libc::dup2(listening, LISTENING))?;
        }
        for fd in handed {
            done(libc::fcntl(*fd, libc::F_SETFD, 0))?;
        }
        let root = libc::geteuid() == 0;
        // Where the kernel lets one: containers often don't, and it has nobody to call anyway.
        let user = if root { 0 } else { libc::CLONE_NEWUSER };
        let _ = libc::unshare(user | libc::CLONE_NEWNET | libc::CLONE_NEWIPC);
        if root {
            done(libc::setgroups(0, std::ptr::null()))?;
            done(libc::setresgid(NOBODY, NOBODY, NOBODY))?;
            done(libc::setresuid(NOBODY, NOBODY, NOBODY))?;
        }
        done(libc::setpgid(0, 0))?;
        done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        done(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        if libc::getppid() != parent {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
    limit(libc::RLIMIT_AS, MEMORY)?;
    limit(libc::RLIMIT_NOFILE, DESCRIPTORS)?;
    limit(libc::RLIMIT_FSIZE, 0)?;
    limit(libc::RLIMIT_CORE, 0)
}

/// Why an image can't be read without the program.
pub fn missing(format: &str) -> Error {
    let detail = format!(
        "a {format} image, which thinply reads through qemu-nbd, and that is not installed (Debian, \
         Ubuntu: qemu-utils; Fedora: qemu-img)"
    );
    Error::new(ErrorKind::Unsupported, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_plain_text() {
        let line = "x: 'json:{\"a\": \"b\"}': Could not open 'json:{}': bad \x1b[2J name";
        assert_eq!(plain(line), "x: the image: Could not open the image: bad \\u{1b}[2J name");
        assert_eq!(plain("'json:{"), "the image");
        assert_eq!(plain(&"é".repeat(1000)).chars().count(), COLUMNS);
    }
}

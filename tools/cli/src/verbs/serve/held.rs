//! A server and its holder: the process that the user starts holds, and starts the one that serves.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{
    Pid, PidfdFlags, Signal, configure_io_flusher_behavior, getppid, pidfd_open, pidfd_send_signal,
    setsid,
};
use rustix::stdio::dup2_stdin;
use thinply::error::{Error, Result};
use thinply::fuse;
use thinply::holder::{Came, Holder, Vault};

use super::say;
use crate::io::{output, signals};
use crate::mounting::served::DETACHED;

/// Says to a server that standard input leads to its holder, which has this process id.
const HOLDER: &str = "THINPLY_HOLDER";
/// How long nobody serves before all is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long after a server that never served another one is started.
const PAUSE: Duration = Duration::from_secs(1);
/// Exit status of a process that panicked.
const PANICKED: i32 = 101;

/// The process that holds this one, and that the user knows.
pub fn pid() -> u32 {
    getppid().map_or(0, |parent| parent.as_raw_nonzero().get().cast_unsigned())
}

/// The holder that started this process, if one did.
pub fn holder() -> Result<Option<Arc<Holder>>> {
    // Inherited by a process that somebody else started it means nothing.
    if std::env::var(HOLDER).ok() != Some(pid().to_string()) {
        return Ok(None);
    }
    let socket = std::io::stdin().as_fd().try_clone_to_owned();
    let socket = socket.map_err(|error| Error::io(error, "talking to the holder"))?;
    Holder::connect(socket, say()).map(Some)
}

/// Whether `mount` or `attach` started it, in a folder that nobody else looks into.
pub fn is_for_mounts() -> bool {
    std::env::var_os(DETACHED).is_some()
}

/// Has the kernel treat this thread, and those that it starts, as one that what is dirty in memory passes
/// through on its way out: it must not wait for that itself.
pub fn stand_in_the_way_out() {
    // Whoever may not (CAP_SYS_RESOURCE) does without.
    let _ = configure_io_flusher_behavior(true);
}

/// The servers of a holder, one after the other.
#[derive(Default)]
struct Servers {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The one that serves, or soon will.
    now: Option<OwnedFd>,
    /// It serves.
    ready: bool,
    /// The last one has been told to end.
    ending: bool,
    /// The next one is what the program's file holds by then.
    renewed: bool,
}

/// Starts servers with the arguments of this process, each where the one before died, until one ends by
/// itself. Answers how that one ended.
pub fn hold() -> Result<i32> {
    let fail = |error| Error::io(error, "holding a server");
    let program = std::env::current_exe().map_err(fail)?;
    if let Some(pid_file) = std::env::var_os(DETACHED) {
        // Fails where it leads a session already.
        let _ = setsid();
        std::fs::write(pid_file, std::process::id().to_string()).map_err(fail)?;
    }
    let servers = Arc::new(Servers::default());
    let (to_end, to_renew) = (servers.clone(), servers.clone());
    signals::on_end(move || to_end.end()).map_err(fail)?;
    signals::on_renewal(move || to_renew.renew()).map_err(fail)?;
    let mut vault = Vault::default();
    let mut served = None;
    loop {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|error| fail(error.into()))?;
        // One that died is followed by the same program, whatever has become of its file.
        let renewed = std::mem::take(&mut servers.state().renewed);
        let file = if renewed { &program } else { Path::new("/proc/self/exe") };
        let child = match start(file, theirs) {
            Err(error) if renewed => {
                output::say(format!("starting {}: {error}", program.display()));
                continue;
            }
            started => started.map_err(fail)?,
        };
        let (came, status) = servers.attend(child, &mut vault, ours)?;
        let failed = renewed && came == Came::Nowhere;
        if let Some(code) = status.code().filter(|code| *code != PANICKED && !failed) {
            // One that could not go on has left them.
            give_up(&vault);
            return Ok(code);
        }
        if came == Came::Served {
            served = Some(Instant::now());
        }
        let given_up = served.is_none_or(|served| served.elapsed() >= PATIENCE);
        if given_up || servers.state().ending {
            give_up(&vault);
            output::say(format!("the server died ({status})"));
            return Ok(status.signal().map_or(PANICKED, |signal| 128 + signal));
        }
        if !servers.state().renewed {
            output::say(format!("the server died ({status}): another one goes on"));
        }
        if came == Came::Nowhere {
            thread::sleep(PAUSE);
        }
    }
}

fn start(program: &Path, socket: OwnedFd) -> std::io::Result<Child> {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| OsString::from("thinply"));
    let mut command = Command::new(program);
    command.arg0(name).args(arguments).env(HOLDER, std::process::id().to_string());
    command.stdin(Stdio::from(socket)).spawn()
}

impl Servers {
    /// Keeps for a server until its real end.
    fn attend(
        &self,
        mut child: Child,
        vault: &mut Vault,
        socket: OwnedFd,
    ) -> Result<(Came, ExitStatus)> {
        let fail = |error| Error::io(error, "holding a server");
        let server = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let server = server.map_err(|error| fail(error.into()))?;
        {
            let mut state = self.state();
            (state.now, state.ready) = (Some(server), false);
        }
        let came = vault.attend(&socket, || self.is_ready()).unwrap_or_else(|error| {
            output::say(format!("holding a server: {error}"));
            Came::Nowhere
        });
        // One that has closed its end may go on for a while.
        drop(socket);
        Ok((came, child.wait().map_err(fail)?))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_ready(&self) {
        let mut state = self.state();
        state.ready = true;
        if is_for_mounts()
            && let Ok(nothing) = File::open("/dev/null")
        {
            // It is a lock that keeps others from starting a server too.
            let _ = dup2_stdin(nothing);
        }
        if state.ending {
            state.signal(Signal::TERM);
        }
    }

    /// Has the server end. One that has just begun takes over first, or what was answered by the one
    /// before would be lost; unless somebody insists.
    fn end(&self) {
        let mut state = self.state();
        if std::mem::replace(&mut state.ending, true) || state.ready {
            state.signal(Signal::TERM);
        }
    }

    /// Has another server go on, of the program as its file is now. To end the one that serves takes no
    /// more than a death: what it had not answered is asked for again.
    fn renew(&self) {
        let mut state = self.state();
        state.renewed = true;
        state.signal(Signal::KILL);
    }
}

impl State {
    fn signal(&self, signal: Signal) {
        if let Some(server) = &self.now {
            // Fails where it has ended.
            let _ = pidfd_send_signal(server, signal);
        }
    }
}

/// Nobody goes on with the mounts: who has files in them open gets errors from then on.
fn give_up(vault: &Vault) {
    for mount in vault.keys().filter_map(fuse::Mount::of_key) {
        if let Err(error) = mount.remove() {
            output::say(error);
        }
    }
}

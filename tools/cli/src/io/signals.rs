//! Signals: those that end a process by request, and those that must not end it by surprise.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::{io, mem, ptr, thread};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::iterator::Signals;

/// Makes a file that has reached the limit of `ulimit -f` an error of the one who writes it, where it
/// would end the process with all that others have in it.
pub fn survive_file_limits() {
    // Nobody looks at the flag. A handler, unlike ignoring it, isn't handed down to other programs.
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
}

/// Runs `act`, on a thread of its own, at each SIGTERM, SIGINT and SIGHUP. One that the process was
/// started to ignore, as by nohup, stays ignored.
pub fn on_end(act: impl FnMut() + Send + 'static) -> io::Result<()> {
    on(&[SIGTERM, SIGINT, SIGHUP], act)
}

/// The same at each SIGUSR1.
pub fn on_renewal(act: impl FnMut() + Send + 'static) -> io::Result<()> {
    on(&[SIGUSR1], act)
}

fn on(signals: &[i32], mut act: impl FnMut() + Send + 'static) -> io::Result<()> {
    let heard = signals.iter().filter(|&&signal| !is_ignored(signal));
    let mut signals = Signals::new(heard)?;
    let listen = move || signals.forever().for_each(|_| act());
    thread::Builder::new().name("signals".into()).spawn(listen).map(drop)
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: all zeros is a sigaction.
    let mut now: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: without a new action nothing is changed, and the present one is written to `now`,
    // which lives as long as the call.
    let told = unsafe { libc::sigaction(signal, ptr::null(), &raw mut now) };
    told == 0 && now.sa_sigaction == libc::SIG_IGN
}

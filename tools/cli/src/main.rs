//! The `thinply` command: reads the arguments, runs one verb, turns its answer into an exit code.

mod cli;
mod derive;
mod helper;
mod import;
mod io;
mod mounting;
mod options;
mod verbs;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::io::{log, output, signals};
use crate::mounting::freezer;
use crate::verbs::Answer;

/// How long the end waits for standard error to take what there was to say.
const LAST_WORDS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    if freezer::is_one() {
        // Whoever started it hears what came of it.
        return if freezer::hold_still().is_ok() { ExitCode::SUCCESS } else { ExitCode::from(2) };
    }
    let cli = cli::Cli::from_arguments();
    raise_file_limit();
    signals::survive_file_limits();
    log_panics();
    let code = match cli.run() {
        Ok(Answer::Yes) => ExitCode::SUCCESS,
        Ok(Answer::No) => ExitCode::from(1),
        Err(error) => {
            output::say(error);
            ExitCode::from(2)
        }
    };
    log::stderr().settle(LAST_WORDS);
    code
}

/// Has panics logged like all else: a thread of a server must not wait for standard error either.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let trace = Backtrace::capture();
        log::stderr().line(match trace.status() {
            BacktraceStatus::Captured => format!("thinply: {panic}\n{trace}"),
            _ => format!("thinply: {panic}"),
        });
        // What follows may be the end of the process.
        if std::thread::current().name() == Some("main") {
            log::stderr().settle(LAST_WORDS);
        }
    }));
}

/// A chain holds a descriptor a layer, and may be deeper than the usual soft limit.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // A refusal shows when a file can't be opened, with its name.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

//! The one place that logs. Whoever has a line to say never waits for the sink, never fails by it and
//! decides nothing by it: a thread of its own writes. What the sink does not take is dropped and
//! counted, and the count is said before the next line that it takes.

use std::collections::VecDeque;
use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use thinply::error::shown;

/// Lines that wait at most, and the bytes of one: what a sink that is stuck costs.
const LINES: usize = 512;
const LINE: usize = 4 << 10;
/// How soon a sink that refuses to make its writer wait is asked again.
const AGAIN: Duration = Duration::from_millis(50);

/// Lines on their way to a sink.
#[derive(Clone, Default)]
pub struct Log(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: VecDeque<String>,
    /// Lines that were dropped and not told of yet.
    lost: u64,
    /// The writer has lines that are not all written.
    writing: bool,
    has_writer: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log {
    /// A log into `sink`. Where there can be no thread for it, every line is lost.
    pub fn new(sink: impl Write + Send + 'static) -> Self {
        let log = Self::default();
        let shared = log.0.clone();
        let writer = thread::Builder::new().name("log".into());
        log.0.state().has_writer = writer.spawn(move || shared.write(sink)).is_ok();
        log
    }

    /// Says a line. Takes no time.
    pub fn line(&self, text: impl Display) {
        let lines = text.to_string();
        let lines: Vec<_> = lines.split('\n').map(|line| shown(line).to_string()).collect();
        let mut text = lines.join("\n");
        let most = (0..=LINE.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
        text.truncate(most.unwrap_or(0));
        let mut state = self.0.state();
        if !state.has_writer || state.lines.len() >= LINES {
            state.lost += 1;
            return;
        }
        state.lines.push_back(text);
        self.0.changed.notify_all();
    }

    /// Waits until the sink has taken all lines, but not longer than `limit`.
    pub fn settle(&self, limit: Duration) {
        let unsettled =
            |state: &mut State| state.has_writer && (state.writing || !state.lines.is_empty());
        // After the limit the process ends with what could not be said.
        let _ = self.0.changed.wait_timeout_while(self.0.state(), limit, unsettled);
    }
}

impl Shared {
    fn write(&self, mut sink: impl Write) {
        // Whether a line was cut short.
        let mut torn = false;
        loop {
            let (line, lost) = self.next();
            let mut text = if torn { "\n".to_owned() } else { String::new() };
            if lost > 0 {
                text += &format!("thinply: {lost} lines of this log were lost\n");
            }
            text += &line;
            text.push('\n');
            let (written, result) = write_all(&mut sink, text.as_bytes());
            torn = result.is_err() && (torn || written > 0);
            let mut state = self.state();
            match result {
                Ok(()) => state.lost -= lost,
                Err(_) => state.lost += 1,
            }
            state.writing = false;
            self.changed.notify_all();
        }
    }

    /// The next line, and how many were lost before it.
    fn next(&self) -> (String, u64) {
        let mut state = self.state();
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.writing = true;
                return (line, state.lost);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Writes as much as goes; how much that was.
fn write_all(sink: &mut impl Write, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match sink.write(&bytes[written..]) {
            Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(AGAIN),
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}

/// One of the process's own streams, past the locks of the standard library, which others would wait
/// for. It takes no descriptor: a server may have none left when it has most to say.
struct Stream<T>(T);

impl<T: AsFd> Write for Stream<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.0, bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The log on standard error.
pub fn stderr() -> &'static Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| Log::new(Stream(io::stderr())))
}

/// Standard output, for a line that nobody may wait for.
pub fn stdout() -> Log {
    Log::new(Stream(io::stdout()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    const SOON: Duration = Duration::from_secs(20);

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(Vec<u8>, bool)>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut sink = self.0.lock().unwrap();
            if sink.1 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            sink.0.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_full_sink_refuses_is_counted_and_told_once_it_takes_lines_again() {
        let sink = Sink::default();
        let log = Log::new(sink.clone());
        log.line("one");
        log.settle(SOON);
        sink.0.lock().unwrap().1 = true;
        (0..3).for_each(|_| log.line("lost"));
        log.settle(SOON);
        sink.0.lock().unwrap().1 = false;
        log.line("two");
        log.line("three");
        log.settle(SOON);
        let text = String::from_utf8(sink.0.lock().unwrap().0.clone()).unwrap();
        assert_eq!(text, "one\nthinply: 3 lines of this log were lost\ntwo\nthree\n");
    }

    #[test]
    fn nobody_waits_for_a_sink_that_is_stuck() {
        use std::io::{BufRead, BufReader};
        let (sink, reader) = UnixStream::pair().unwrap();
        let log = Log::new(sink);
        let long = "x".repeat(2 * LINE);
        (0..4 * LINES).for_each(|_| log.line(&long));
        log.settle(Duration::from_millis(10));
        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        assert_eq!(lines.next().unwrap().len(), LINE);
        let told = lines.find(|line| !line.starts_with('x')).unwrap();
        assert!(told.starts_with("thinply: ") && told.ends_with(" lines of this log were lost"));
    }
}

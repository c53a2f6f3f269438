//! Requests that found no space on the host, and wait until there is some.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Log;
use super::queue::{Crew, caught};
use crate::error::{Error, Result};
use crate::sync::{Mutex, guard};

/// How long after a try comes the next one.
const PAUSE: Duration = Duration::from_millis(250);

/// A request that found no space.
pub(super) trait Waiter: Send {
    /// Tries it once more and answers it, unless it is to wait on: then it comes back.
    fn try_again(self: Box<Self>, thread: Result<()>) -> Option<Box<dyn Waiter>>;
}

/// Those of one disk. None of them has a thread: one tries them all, in the order in which they came. It
/// holds the disk only through them.
pub(super) struct Waiters {
    disk: String,
    thread: Arc<Crew>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: Vec<Box<dyn Waiter>>,
    /// How many wait, those among them that are just tried.
    count: usize,
    /// There is somebody who tries them.
    running: bool,
}

impl Waiters {
    /// Of the disk of this name.
    pub fn new(disk: &str) -> Arc<Self> {
        let disk = if disk.is_empty() { "the disk" } else { disk }.to_owned();
        Arc::new(Self { disk, thread: Crew::new("serve-space", 1), state: Mutex::default() })
    }

    /// How many wait.
    pub fn count(&self) -> usize {
        guard(&self.state).count
    }

    /// Has a request that failed with `error` wait. `log` hears of the first one, and of the last one's
    /// end.
    pub fn add(self: &Arc<Self>, waiter: Box<dyn Waiter>, error: &Error, log: Log) {
        let begins = {
            let mut state = guard(&self.state);
            state.waiting.push(waiter);
            state.count += 1;
            !std::mem::replace(&mut state.running, true)
        };
        if begins {
            let (this, begin) =
                (self.clone(), format!("{} waits for space on the host: {error}", self.disk));
            // On that thread, so that it comes behind what was said of the time before.
            self.thread.add(Box::new(move |thread| {
                caught(|| log(&begin));
                this.run(thread);
                log(&format!("{} waits for space no more", this.disk));
            }));
        }
    }

    /// Tries them again and again, until none waits any more.
    fn run(&self, thread: Result<()>) {
        loop {
            if thread.is_ok() {
                thread::sleep(PAUSE);
            }
            let Some(round) = self.next_round() else { break };
            let mut left = Vec::new();
            for waiter in round {
                match caught(|| waiter.try_again(thread.clone())).flatten() {
                    Some(waiter) => left.push(waiter),
                    None => guard(&self.state).count -= 1,
                }
            }
            let mut state = guard(&self.state);
            left.append(&mut state.waiting);
            state.waiting = left;
        }
    }

    fn next_round(&self) -> Option<Vec<Box<dyn Waiter>>> {
        let mut state = guard(&self.state);
        state.running = !state.waiting.is_empty();
        state.running.then(|| std::mem::take(&mut state.waiting))
    }

    /// Lets the thread go once none waits.
    pub fn close(&self) {
        self.thread.close();
    }
}

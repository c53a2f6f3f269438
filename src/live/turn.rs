//! Group commit: one commit at a time; whoever asks meanwhile joins the next one and shares its
//! result.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};

use crate::error::Result;
use crate::planted::{Bug, planted};
use crate::sync::{Condvar, Mutex, guard};

/// What one commit will answer to all who joined it.
#[derive(Debug, Default)]
struct Ticket {
    /// Somebody waits for the last record's blocks to be confirmed.
    confirm: AtomicBool,
    result: OnceLock<Result<()>>,
}

#[derive(Debug, Default)]
struct Queue {
    running: bool,
    /// The commit that has not begun yet.
    next: Arc<Ticket>,
}

/// The queue for commits of one layer.
#[derive(Debug, Default)]
pub(super) struct Turn {
    queue: Mutex<Queue>,
    done: Condvar,
}

impl Turn {
    /// Returns the result of a commit that began after this call. The caller may find itself
    /// running it: `commit` is told whether anybody wants a confirmation.
    pub fn join(&self, confirm: bool, commit: impl FnOnce(bool) -> Result<()>) -> Result<()> {
        let mut queue = guard(&self.queue);
        let ticket = queue.next.clone();
        if confirm {
            ticket.confirm.store(true, Ordering::Relaxed);
        }
        loop {
            if let Some(result) = ticket.result.get() {
                if planted(Bug::JoinedFlushAlwaysSucceeds) {
                    return Ok(());
                }
                return result.clone();
            }
            if !queue.running {
                break;
            }
            queue = self.done.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.running = true;
        if !planted(Bug::FlushJoinsTheRunningOne) {
            queue.next = Arc::default();
        }
        drop(queue);
        let result = commit(ticket.confirm.load(Ordering::Relaxed));
        let mut queue = guard(&self.queue);
        queue.running = false;
        if planted(Bug::FlushJoinsTheRunningOne) {
            queue.next = Arc::default();
        }
        // Nobody else runs this ticket, so it has no result yet.
        let result = ticket.result.get_or_init(|| result).clone();
        self.done.notify_all();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    #[test]
    fn those_who_ask_during_a_commit_share_the_next_one_and_its_result() {
        let turn = Turn::default();
        let commits = AtomicUsize::new(0);
        let (entered, begun) = mpsc::channel();
        let (leave, left) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                let left = left;
                turn.join(false, |confirm| {
                    assert!(!confirm);
                    entered.send(()).unwrap();
                    left.recv().unwrap();
                    Ok(())
                })
            });
            begun.recv().unwrap();
            let joined: Vec<_> = (0..3)
                .map(|n| {
                    let (turn, commits) = (&turn, &commits);
                    scope.spawn(move || {
                        turn.join(n == 1, |_| {
                            commits.fetch_add(1, Ordering::Relaxed);
                            Err(Error::new(ErrorKind::NoSpace, "full"))
                        })
                    })
                })
                .collect();
            while Arc::strong_count(&guard(&turn.queue).next) < 4 {
                std::thread::yield_now();
            }
            assert!(guard(&turn.queue).next.confirm.load(Ordering::Relaxed));
            leave.send(()).unwrap();
            assert!(first.join().unwrap().is_ok());
            for thread in joined {
                assert_eq!(thread.join().unwrap().unwrap_err().kind(), ErrorKind::NoSpace);
            }
        });
        assert_eq!(commits.load(Ordering::Relaxed), 1);
    }
}

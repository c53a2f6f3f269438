//! Work spread over all processors: one thread says what there is to do, the others do it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

use thinply::error::{Error, ErrorKind, Result};

/// Tasks that wait, for each thread.
const AHEAD: usize = 2;

/// Whose turn it is to do what has to be done in the order of the tasks.
#[derive(Debug, Default)]
pub struct Turns {
    next: Mutex<u64>,
    changed: Condvar,
    stopped: AtomicBool,
}

impl Turns {
    /// Waits until everything before task `number` is done, does this, and passes the turn on. Not
    /// done where another task has failed.
    pub fn take(&self, number: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let waits = |next: &mut u64| *next != number && !self.stopped.load(Ordering::Relaxed);
        let next = self.changed.wait_while(self.next(), waits);
        let mut next = next.unwrap_or_else(PoisonError::into_inner);
        if self.stopped.load(Ordering::Relaxed) {
            return Ok(());
        }
        work()?;
        *next += 1;
        self.changed.notify_all();
        Ok(())
    }

    fn next(&self) -> MutexGuard<'_, u64> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Under the lock, so that nobody misses it between a look and a wait.
    fn stop(&self) {
        let _next = self.next();
        self.stopped.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }
}

/// Stops the others where a thread panics.
struct Alarm<'a>(&'a Turns);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// Runs `list` here, which hands tasks to its argument for as long as that answers true, and `work`
/// on each of them with its number, on as many threads as there are processors. The first error ends
/// everything.
pub fn spread<T: Send>(
    turns: &Turns,
    list: impl FnOnce(&mut dyn FnMut(T) -> bool) -> Result<()>,
    work: impl Fn(u64, T) -> Result<()> + Sync,
) -> Result<()> {
    let threads = available_parallelism().map_or(1, usize::from);
    let (give, tasks) = sync_channel(threads * AHEAD);
    let tasks = Arc::new(Mutex::new(tasks));
    std::thread::scope(|scope| {
        let run = || {
            let (tasks, work) = (Arc::clone(&tasks), &work);
            scope.spawn(move || {
                let _alarm = Alarm(turns);
                // The lock is held while this thread waits, and the others wait for the lock.
                let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
                while let Ok((number, task)) = next() {
                    if turns.stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    work(number, task).inspect_err(|_| turns.stop())?;
                }
                Ok(())
            })
        };
        let running: Vec<_> = (0..threads).map(|_| run()).collect();
        // With the last thread that has it, it is gone, and giving fails.
        drop(tasks);
        let mut number = 0;
        let listed = list(&mut |task| {
            let given = give.send((number, task)).is_ok();
            number += 1;
            given
        });
        drop(give);
        let panicked = |_| Err(Error::new(ErrorKind::Io, "a working thread panicked"));
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(panicked))
            .fold(Ok(()), Result::and)
            .and(listed)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(give: &mut dyn FnMut(u64) -> bool) -> Result<()> {
        (0..1000).all(give);
        Ok(())
    }

    #[test]
    fn turns_come_in_order_whatever_takes_long() {
        let (turns, done) = (Turns::default(), Mutex::new(Vec::new()));
        let work = |number, task: u64| {
            if task.is_multiple_of(7) {
                std::thread::yield_now();
            }
            turns.take(number, || {
                done.lock().unwrap().push(task);
                Ok(())
            })
        };
        spread(&turns, numbers, work).unwrap();
        assert!(done.into_inner().unwrap().into_iter().eq(0..1000));
    }

    #[test]
    fn an_error_anywhere_ends_everything() {
        let full = || Error::new(ErrorKind::NoSpace, "full");
        for at in [0, 1, 500, 999] {
            let turns = Turns::default();
            let work =
                |number, task| turns.take(number, || if task == at { Err(full()) } else { Ok(()) });
            let result = spread(&turns, numbers, work);
            assert_eq!(result.unwrap_err().kind(), ErrorKind::NoSpace);
        }
        let list = |give: &mut dyn FnMut(u64) -> bool| numbers(give).and(Err(full()));
        let turns = Turns::default();
        assert!(spread(&turns, list, |number, _| turns.take(number, || Ok(()))).is_err());
    }
}

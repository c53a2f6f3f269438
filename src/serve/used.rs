//! The disks that a front end's clients have had, for the flush at its end.

use std::sync::Weak;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::{AnyServed, Lease};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, guard, spawn};

/// Disks that were used, as far as they are open still.
#[derive(Default)]
pub struct Used(Mutex<Vec<Weak<AnyServed>>>);

impl Used {
    /// Remembers a disk.
    pub fn note(&self, lease: &Lease) {
        let mut used = guard(&self.0);
        used.retain(|other| other.strong_count() > 0);
        let disk = lease.watch();
        if !used.iter().any(|other| other.ptr_eq(&disk)) {
            used.push(disk);
        }
    }

    /// Flushes them all at the same time, so that each has all of the time there is.
    ///
    /// # Errors
    /// The first flush's error; [`ErrorKind::Io`] where one is still running after `limit`.
    pub fn flush(&self, limit: Duration) -> Result<()> {
        let used: Vec<_> = guard(&self.0).iter().filter_map(Weak::upgrade).collect();
        let deadline = Instant::now() + limit;
        let (done, results) = mpsc::channel();
        for disk in used.into_iter().filter(|disk| !disk.read_only()) {
            let done = done.clone();
            let flush = move || {
                let result = disk.flush();
                // Before the answer: whoever waits for it may then be the last and see to the close.
                drop(disk);
                let _ = done.send(result);
            };
            spawn("last-flush", flush)
                .map_err(|error| Error::io(error, "starting the last flush"))?;
        }
        drop(done);
        let mut outcome = Ok(());
        loop {
            match results.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(result) => outcome = outcome.and(result),
                Err(RecvTimeoutError::Disconnected) => return outcome,
                Err(RecvTimeoutError::Timeout) => {
                    let detail = "a flush was still running at shutdown";
                    return outcome.and(Err(Error::new(ErrorKind::Io, detail)));
                }
            }
        }
    }
}

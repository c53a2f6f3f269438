//! Dirty pages are handed to the disk while writes go on, so that a flush never finds much to wait
//! for. That costs the processor as much as the writes themselves and waits where the disk's queue
//! is full, so it has a thread of its own, for as long as it takes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::Storage;
use crate::sync::{Mutex, guard};

/// Writeback starts after this many bytes: what a flush waits for at most, or nearly. With an eighth of
/// it, a copy with its flush takes as long and writes that nobody flushes take up to 1.5 times as long.
const EVERY: u64 = 256 << 20;

/// Starts writeback of one file now and then.
#[derive(Debug, Default)]
pub struct Writeback {
    /// Bytes written since it was last started.
    unwritten: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writeback {
    /// Counts bytes as written, and starts writeback if they have become many. It promises nothing:
    /// whatever goes wrong shows in the next sync.
    pub fn count(&self, file: &Arc<dyn Storage>, bytes: u64) {
        if self.unwritten.fetch_add(bytes, Ordering::Relaxed) + bytes < EVERY {
            return;
        }
        let mut thread = guard(&self.thread);
        if thread.as_ref().is_none_or(JoinHandle::is_finished) {
            self.unwritten.store(0, Ordering::Relaxed);
            let file = Arc::clone(file);
            let start = move || drop(file.start_writeback());
            *thread = Builder::new().name("writeback".into()).spawn(start).ok();
        }
    }
}

impl Drop for Writeback {
    /// The thread holds the file, and with it the layer's lock.
    fn drop(&mut self) {
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            // A panic there was reported there, and nothing depends on it.
            let _ = thread.join();
        }
    }
}

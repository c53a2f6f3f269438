//! File systems on disks, as mounts and block devices of the host: a server shows the disks as files
//! (`docs/files.md`), a loop device makes a block device of one, and the kernel mounts that
//! (`docs/mounting.md`).
//!
//! What is where is asked of the kernel each time. The folder of this room holds only what the kernel
//! doesn't know, and what it says decides nothing but what is shown.

pub mod content;
pub mod filesystem;
pub mod freezer;
pub mod loops;
pub mod partitions;
pub mod room;
pub mod served;
pub mod target;
pub mod trust;
pub mod uses;

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

/// What `act` answers, unless that takes longer than `limit`: then it is left to itself.
pub fn within<T: Send + 'static>(
    limit: Duration,
    act: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    while_alive(limit, || false, act)
}

/// The same, where `is_alive` tells after each `limit` whether it is worth to go on waiting.
pub fn while_alive<T: Send + 'static>(
    limit: Duration,
    is_alive: impl Fn() -> bool,
    act: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (tell, told) = sync_channel(1);
    thread::spawn(move || tell.send(act()));
    loop {
        match told.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) if is_alive() => {}
            told => return told.ok(),
        }
    }
}

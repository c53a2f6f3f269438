//! Files that other programs may be using just now.

use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use clap::Args;
use rustix::fs::{Mode, OFlags, major, minor, open};
use rustix::io::Errno;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::{holders, is_used, is_written};

use crate::io::mountinfo;

/// Whether a path is that of a block device which a file system that may be written is mounted from, or
/// which the kernel uses otherwise.
fn is_written_device(path: &Path) -> bool {
    let Ok(meta) = fs::metadata(path) else { return false };
    if !meta.file_type().is_block_device() {
        return false;
    }
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    if open(path, flags, Mode::empty()).err() != Some(Errno::BUSY) {
        return false;
    }
    let device = format!("{}:{}", major(meta.rdev()), minor(meta.rdev()));
    let mounts = mountinfo::all().unwrap_or_default();
    let mut mounts = mounts.iter().filter(|mounted| mounted.device == device).peekable();
    mounts.peek().is_none() || mounts.any(|mounted| !mounted.all_read_only)
}

/// Whether to take a file that another program is using.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct ShareArg {
    /// Read or replace files all the same that another program, such as a running VM, has locked
    #[arg(short = 'U', long)]
    force_share: bool,
}

impl ShareArg {
    /// Refuses a file that another program is writing: what is read of it was never there at one
    /// moment, or isn't in the file yet.
    pub fn check_source(self, file: BorrowedFd<'_>, path: &Path) -> Result<()> {
        self.check(path, "being written", || is_written(file) || is_written_device(path))
    }

    /// Refuses to replace or overwrite a file that another program is using.
    pub fn check_target(self, file: BorrowedFd<'_>, path: &Path) -> Result<()> {
        self.check(path, "in use", || is_used(file))
    }

    fn check(self, path: &Path, what: &str, locked: impl FnOnce() -> bool) -> Result<()> {
        if self.force_share || !locked() {
            return Ok(());
        }
        let who = match holders(path) {
            names if names.is_empty() => "another program".into(),
            names => names.join(", "),
        };
        let detail = format!("is {what} by {who}; --force-share takes it all the same");
        Err(Error::new(ErrorKind::InUse, detail).in_file(path))
    }
}

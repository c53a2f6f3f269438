//! ext4 images of file trees, made by mke2fs.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use thinply::error::{Error, Result};

/// An ext4 image of a tree; false where mke2fs is missing or can't read all of it.
pub fn make_ext4(raw: &Path, tree: &Path) -> Result<bool> {
    let room = 3 * tree_size(tree) / 2 + (64 << 20);
    let length = room.next_multiple_of(1 << 20);
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-d"]).arg(tree).arg(raw);
    command.arg(format!("{}k", length >> 10)).stdout(Stdio::null()).stderr(Stdio::null());
    // Debian keeps it where ordinary users don't look.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    match command.env("PATH", path).status() {
        Ok(status) => Ok(status.success()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(error, "starting mke2fs")),
    }
}

fn tree_size(tree: &Path) -> u64 {
    let entries = fs::read_dir(tree).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => 4096 + tree_size(&entry.path()),
            Ok(meta) => meta.len().next_multiple_of(4096),
            Err(_) => 0,
        })
        .sum()
}

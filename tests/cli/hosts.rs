//! Host file systems that answer otherwise than the kernel's own do.

use std::fs;
use std::io::ErrorKind;
use std::process::Command;

use thinply::storage::{Access, FileFolder, Folder as _, Lock, read_exact_at, write_all_at};

use crate::support::{Folder, skip};

/// Something mounted at `mount` in a folder.
struct Mounted(Folder);

impl Mounted {
    /// Mounts the folder `below`, as the command wants it named.
    fn over(program: &str, args: &[&str], below: &str) -> Option<Self> {
        let folder = Folder::new();
        fs::create_dir(folder.join("below")).unwrap();
        Self::new(folder, program, &[args, &[below, "mount"]].concat())
    }

    fn new(folder: Folder, program: &str, args: &[&str]) -> Option<Self> {
        fs::create_dir(folder.join("mount")).unwrap();
        let mut mount = Command::new(program);
        mount.args(args).current_dir(folder.path());
        let found = mount.output().is_ok_and(|output| output.status.success());
        if !found {
            skip(&format!("needs {program}, and the right to mount"));
        }
        found.then_some(Self(folder))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.join("mount")).status();
    }
}

#[test]
fn a_closed_file_gives_its_lock_back_where_the_file_system_is_not_told() {
    let options = ["--enable-lock-forwarding", "--multithreaded"];
    let Some(Mounted(folder)) = &Mounted::over("bindfs", &options, "below") else { return };
    let folder = FileFolder::new(folder.join("mount"));
    let first = folder.create("file").unwrap();
    let second = folder.open("file", Access::Write).unwrap();
    first.lock(Lock::Exclusive).unwrap();
    for lock in [Lock::Exclusive, Lock::Shared] {
        assert_eq!(second.lock(lock).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
    first.lock(Lock::Shared).unwrap();
    second.lock(Lock::Shared).unwrap();
    drop(first);
    second.lock(Lock::Exclusive).unwrap();
}

#[test]
fn ranges_are_zeroed_where_the_file_system_calls_the_attempt_invalid() {
    let folder = Folder::new();
    fs::File::create(folder.join("ext4")).unwrap().set_len(16 << 20).unwrap();
    let mut mkfs = Command::new("/usr/sbin/mkfs.ext4");
    mkfs.args(["-q", "-F", "ext4"]).current_dir(folder.path());
    if !mkfs.output().is_ok_and(|output| output.status.success()) {
        return skip("needs mkfs.ext4");
    }
    let options = ["-o", "fakeroot", "ext4", "mount"];
    let Some(Mounted(folder)) = &Mounted::new(folder, "fuse2fs", &options) else { return };
    let file = FileFolder::new(folder.join("mount")).create("file").unwrap();
    file.set_length(1 << 20).unwrap();
    write_all_at(&*file, &[7; 4 * 4096], 0).unwrap();
    file.allocate(0, 1 << 20).unwrap();
    file.zero(4096, 4096).unwrap();
    file.punch(3 * 4096, 4096).unwrap();
    let mut bytes = [1; 4 * 4096];
    read_exact_at(&*file, &mut bytes, 0).unwrap();
    for (number, block) in bytes.chunks(4096).enumerate() {
        assert!(block.iter().all(|&byte| byte == [7, 0, 7, 0][number]), "{number}");
    }
    // What is wrong with the range itself is still said.
    assert!(file.zero(0, 0).is_err() && file.zero(u64::MAX / 2, 4096).is_err());
}

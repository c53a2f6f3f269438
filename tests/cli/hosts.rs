//! Host file systems that answer otherwise than the kernel's own do.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::process::getuid;

use thinply::storage::{Access, FileFolder, Folder as _, Lock, read_exact_at, write_all_at};

use crate::kill::have_strace;
use crate::support::{Folder, KIB, Run, noise, output, skip};

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

/// Runs the command where the host answers some calls as strace is told.
fn run_where(folder: &Folder, answers: &[&str], args: &[&str]) -> Run {
    let plain = folder.command(args);
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null"]).args(answers);
    command.arg("--").arg(plain.get_program()).args(args).current_dir(folder.path());
    command.env("THINPLY_ROOT", folder.join("store"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    output(&mut command).into()
}

/// As on exFAT through FUSE.
const ONE_NAME: [&str; 4] =
    ["-e", "inject=renameat2:error=EINVAL", "-e", "inject=link,linkat:error=EPERM"];

#[test]
fn every_verb_names_what_it_makes_where_a_file_has_one_name() {
    if !have_strace() {
        return skip("needs strace, and leave to trace");
    }
    let folder = Folder::new();
    let content = noise(1, 64 * KIB as usize);
    folder.write("raw", &content);
    folder.write("taken", b"precious");
    let ok = |args: &[&str]| {
        let run = run_where(&folder, &ONE_NAME, args);
        assert_eq!(run.code, 0, "{args:?}: {run:?}");
    };
    let verbs: [&[&str]; 11] = [
        &["create", "--size", "1M"],
        &["import", "raw"],
        &["snapshot", "disk"],
        &["create", "--parent", "snap"],
        &["pack", "snap"],
        &["flatten", "disk"],
        &["rebase", "--parent", "snap", "disk"],
        &["compact", "disk"],
        &["repair", "disk"],
        &["export", "disk"],
        &["image", "save", "one", "-o"],
    ];
    folder.ok(&["image", "import", "raw", "one"]);
    folder.ok(&["import", "raw", "base"]);
    folder.ok(&["create", "--parent", "base", "disk"]);
    folder.change("disk", 0, &noise(2, 8 * KIB as usize));
    ok(&["snapshot", "disk", "snap"]);
    let before = folder.names();
    for (number, args) in verbs.iter().enumerate() {
        let out = format!("out-{number}");
        ok(&[*args, &[out.as_str()]].concat());
        assert!(!folder.read(&out).is_empty(), "{args:?}");
        let taken = [*args, &["taken"]].concat();
        assert_eq!(run_where(&folder, &ONE_NAME, &taken).code, 2, "{taken:?}");
    }
    assert_eq!(folder.read("taken"), b"precious");
    assert_eq!(folder.names().len(), before.len() + verbs.len(), "something else was left");
    ok(&["container", "create", "one", "--name", "web"]);
    ok(&["container", "snapshot", "web", "monday"]);
    ok(&["container", "commit", "web", "two"]);
    folder.ok(&["store", "check"]);
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n");
}

#[test]
fn a_snapshot_that_copies_holds_what_was_there_and_the_disk_goes_on() {
    if !have_strace() {
        return skip("needs strace, and leave to trace");
    }
    let folder = Folder::new();
    folder.write("raw", &noise(1, 64 * KIB as usize));
    folder.ok(&["import", "raw", "base"]);
    folder.ok(&["create", "--parent", "base", "disk"]);
    for name in ["one", "two", "three"] {
        folder.change("disk", 4096, name.as_bytes());
        // Left by one that was killed, in the middle of its copy.
        folder.write(".disk.copy", b"half");
        let run = run_where(&folder, &ONE_NAME, &["snapshot", "disk", name]);
        assert_eq!(run.code, 0, "{run:?}");
    }
    folder.change("disk", 4096, b"later");
    for (name, held) in [("one", "one"), ("two", "two"), ("three", "three"), ("disk", "later")] {
        folder.ok(&["check", name]);
        folder.ok(&["export", name, "out"]);
        assert!(folder.read("out")[4096..].starts_with(held.as_bytes()), "{name}");
        fs::remove_file(folder.join("out")).unwrap();
    }
    let names = folder.names();
    assert_eq!(names, ["base", "disk", "one", "raw", "three", "two"]);
}

#[test]
fn a_folder_that_cannot_be_synced_is_no_reason_to_fail() {
    if !have_strace() {
        return skip("needs strace, and leave to trace");
    }
    let folder = Folder::new();
    let path = folder.path().canonicalize().unwrap().display().to_string();
    for error in ["EINVAL", "EBADF", "ENOSYS", "EOPNOTSUPP", "EIO"] {
        let inject = format!("inject=fsync:error={error}");
        let args = ["create", "--size", "1M", error];
        let run = run_where(&folder, &["-P", &path, "-e", &inject], &args);
        let expected = if error == "EIO" { 2 } else { 0 };
        assert_eq!(run.code, expected, "{error}: {run:?}");
    }
}

#[test]
fn a_folder_that_cannot_be_listed_is_no_reason_to_fail() {
    const STRANGER: u32 = 64999;
    if !getuid().is_root() {
        return skip("needs root, to be somebody else");
    }
    let folder = Folder::new();
    let program = folder.join("thinply");
    fs::copy(env!("CARGO_BIN_EXE_thinply"), &program).unwrap();
    let set_mode = |name: &str, mode| {
        fs::set_permissions(folder.join(name), Permissions::from_mode(mode)).unwrap();
    };
    set_mode(".", 0o711);
    for (name, mode) in [("drop", 0o1733), ("theirs", 0o711)] {
        fs::create_dir(folder.join(name)).unwrap();
        set_mode(name, mode);
    }
    // One of another's in a folder where nothing new can be made.
    folder.ok(&["create", "--size", "1M", "theirs/disk"]);
    chown(folder.join("theirs/disk"), Some(STRANGER), Some(STRANGER)).unwrap();
    let verbs: [&[&str]; 6] = [
        &["create", "--size", "1M", "drop/disk"],
        &["snapshot", "drop/disk", "drop/snap"],
        &["create", "--parent", "drop/snap", "drop/child"],
        &["pack", "drop/snap", "drop/packed"],
        &["export", "drop/disk", "drop/raw"],
        &["resize", "theirs/disk", "2M"],
    ];
    for args in verbs {
        let mut command = Command::new(&program);
        command.args(args).current_dir(folder.path()).uid(STRANGER).gid(STRANGER);
        let run = Run::from(output(&mut command));
        assert_eq!(run.code, 0, "{args:?}: {run:?}");
    }
}

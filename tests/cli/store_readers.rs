//! A store that may only be read: on a read-only file system, or of another user.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::process::{Signal, getuid};

use crate::store::{Served, cost, stocked};
use crate::support::{Folder, Run, output, skip};

const STRANGER: u32 = 64999;

/// A store with one of each, and a blob that nothing needs.
fn filled() -> Folder {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.ok(&["container", "snapshot", "c", "s"]);
    folder.ok(&["volume", "create", "--size", "1M", "v"]);
    folder.ok(&["image", "tag", "base", "more"]);
    let unneeded = format!("store/blobs/sha256/{}", "0".repeat(64));
    folder.write(&unneeded, &[7; 4096]);
    folder
}

/// Every verb that only looks does its work, every other one says why it can't.
fn reads_alone(folder: &Folder, run: &dyn Fn(&[&str]) -> Run, serve: &mut Command) {
    let before = cost(&folder.join("store"));
    for verb in [
        &["image", "ls"][..],
        &["image", "history", "base"],
        &["image", "inspect", "base"],
        &["container", "ls", "-s"],
        &["container", "inspect", "c"],
        &["container", "diff", "c"],
        &["volume", "ls"],
        &["volume", "inspect", "v"],
        &["df"],
        &["gc", "--dry-run"],
    ] {
        let done = run(verb);
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{verb:?}: {done:?}");
    }
    assert!(run(&["gc", "--dry-run"]).stdout.contains("Deleted: blobs/sha256/000000"));
    let usage = run(&["df"]).stdout;
    assert!(usage.contains("Containers   1       0 "), "{usage}");
    let checked = run(&["store", "check"]);
    assert!(checked.code == 1 && checked.stdout.contains("blob 000000"), "{checked:?}");
    for verb in [
        &["gc"][..],
        &["image", "rm", "base"],
        &["image", "tag", "base", "new"],
        &["container", "rm", "c"],
        &["container", "create", "base"],
        &["volume", "create", "--size", "1M", "w"],
    ] {
        let told = run(verb).refused().to_owned();
        assert!(told.contains("Read-only") || told.contains("Permission"), "{verb:?}: {told}");
    }
    let served = Served::start(folder, serve);
    for export in ["image/base:latest", "container/c@s", "volume/v:ro"] {
        let mut client = served.client(export).unwrap();
        client.read(0, 4096).unwrap();
        client.disconnect().unwrap();
    }
    assert!(served.client("container/c").is_err());
    assert!(served.client("volume/v").is_err());
    // Who reads is seen.
    let mut reader = served.client("volume/v:ro").unwrap();
    reader.read(0, 4096).unwrap();
    let usage = run(&["df"]).stdout;
    assert!(usage.contains("Volumes      1       1 "), "{usage}");
    reader.disconnect().unwrap();
    served.signal(Signal::TERM);
    assert_eq!(served.end(), Some(0));
    assert_eq!(cost(&folder.join("store")), before);
}

struct ReadOnly<'a>(&'a Folder);

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.join("store")).status();
    }
}

#[test]
fn a_store_on_a_read_only_file_system_is_read() {
    let folder = filled();
    let mount = |args: &[&str]| {
        let done = output(Command::new("mount").args(args).current_dir(folder.path()));
        done.status.success()
    };
    if !mount(&["--bind", "store", "store"]) {
        return skip("no right to mount");
    }
    let _mounted = ReadOnly(&folder);
    assert!(mount(&["-o", "remount,bind,ro", "store"]));
    let mut serve = folder.command(&["serve", "--all", "--socket", "nbd.sock"]);
    reads_alone(&folder, &|args| folder.run(args), &mut serve);
}

#[test]
fn the_store_of_another_user_is_read() {
    if !getuid().is_root() {
        return skip("needs root, to be somebody else");
    }
    let folder = filled();
    // Whoever may read the store may ask for its socket's folder; the socket is the stranger's.
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    let program = folder.join("thinply");
    fs::copy(folder.command(&[]).get_program(), &program).unwrap();
    let command = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args).current_dir(folder.path()).env("THINPLY_ROOT", folder.join("store"));
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.uid(STRANGER).gid(STRANGER);
        command
    };
    let mut serve = command(&["serve", "--all", "--socket", "nbd.sock"]);
    reads_alone(&folder, &|args| output(&mut command(args)).into(), &mut serve);

    // A disk that it may not even read hides no other.
    folder.ok(&["volume", "create", "--size", "1M", "private"]);
    fs::set_permissions(folder.join("store/volumes/private.tply"), Permissions::from_mode(0o600))
        .unwrap();
    for verb in [&["df"][..], &["volume", "ls"]] {
        let run: Run = output(&mut command(verb)).into();
        assert!(run.code == 1 && run.stderr.contains("volume private: "), "{verb:?}: {run:?}");
        assert!(run.stdout.contains("Volumes      1 ") || run.stdout.contains("\nv "), "{run:?}");
    }
}

#[test]
fn a_folder_that_only_others_could_make_is_empty() {
    if !getuid().is_root() {
        return skip("needs root, to be somebody else");
    }
    // As skopeo makes a layout.
    let folder = stocked();
    for name in ["containers", "volumes", "lock", "reserve"] {
        let path = folder.join("store").join(name);
        fs::remove_dir(&path).or_else(|_| fs::remove_file(&path)).unwrap();
    }
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let program = folder.join("thinply");
    fs::copy(folder.command(&[]).get_program(), &program).unwrap();
    for verb in [&["image", "ls"][..], &["container", "ls"], &["volume", "ls"], &["df"]] {
        let mut command = Command::new(&program);
        command.args(verb).env("THINPLY_ROOT", folder.join("store")).uid(STRANGER).gid(STRANGER);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let run: Run = output(&mut command).into();
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{verb:?}: {run:?}");
    }
    assert!(!folder.join("store/containers").exists());
}

#[test]
fn a_disk_whose_layer_its_owner_may_not_open_is_removed() {
    if !getuid().is_root() {
        return skip("needs root, to be somebody else");
    }
    let folder = Folder::new();
    for (name, mode) in [("closed", 0), ("protected", 0o400)] {
        folder.ok(&["volume", "create", "--size", "1M", name]);
        let layer = folder.join("store/volumes").join(format!("{name}.tply"));
        fs::set_permissions(layer, Permissions::from_mode(mode)).unwrap();
    }
    let owner = STRANGER.to_string();
    let mut chown = Command::new("chown");
    assert!(
        chown.args(["-R", &owner, "store"]).current_dir(folder.path()).status().unwrap().success()
    );
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let program = folder.join("thinply");
    fs::copy(folder.command(&[]).get_program(), &program).unwrap();
    let remove = |name: &str| {
        let mut command = Command::new(&program);
        command.args(["volume", "rm", name]).env("THINPLY_ROOT", folder.join("store"));
        command.uid(STRANGER).gid(STRANGER).stdout(Stdio::piped()).stderr(Stdio::piped());
        Run::from(output(&mut command))
    };
    let served = Served::all(&folder);
    let reader = served.client("volume/protected:ro").unwrap();
    assert!(remove("protected").refused().contains("is in use"));
    reader.disconnect().unwrap();
    drop(served);
    for name in ["closed", "protected"] {
        assert_eq!(remove(name).code, 0, "{name}");
    }
    assert_eq!(fs::read_dir(folder.join("store/volumes")).unwrap().count(), 0);
}

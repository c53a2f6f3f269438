//! `kill -9` between any two steps of every verb that makes a file: what was there stays as it is, and
//! nothing half-made stays that the next run doesn't clear.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use crate::support::{Folder, KIB, noise, output};

/// The calls that change anything that others see.
const CALLS: [&str; 11] = [
    "write",
    "pwrite64",
    "fdatasync",
    "fsync",
    "ftruncate",
    "fallocate",
    "rename",
    "renameat2",
    "link",
    "linkat",
    "unlink",
];

pub fn have_strace() -> bool {
    let probe = ["-qq", "-o", "/dev/null", "-e", "inject=fsync:signal=KILL:when=1", "--", "true"];
    Command::new("strace").args(probe).output().is_ok_and(|output| output.status.success())
}

/// Runs a command once for each of its calls, and kills it as it begins that call. `judge` looks at
/// what each of these runs leaves. `follow` is strace's option for other threads and processes.
pub fn kill_at_every_call(
    folder: &Folder,
    args: &[&str],
    follow: &[&str],
    mut judge: impl FnMut(&str),
) -> u32 {
    let mut killed = 0;
    for call in CALLS {
        for number in 1.. {
            let plain = folder.command(args);
            let mut command = Command::new("strace");
            let inject = format!("inject={call}:signal=KILL:when={number}");
            command.args(follow).args(["-qq", "-o", "/dev/null", "-e", &format!("trace={call}")]);
            command.args(["-e", &inject, "--"]).arg(plain.get_program()).args(args);
            for (key, value) in plain.get_envs() {
                match value {
                    Some(value) => command.env(key, value),
                    None => command.env_remove(key),
                };
            }
            command.current_dir(folder.path()).stdin(Stdio::null());
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            let run = output(&mut command);
            let was_killed = run.status.signal() == Some(9) || run.status.code() == Some(137);
            assert!(was_killed || run.status.success(), "{args:?}: {run:?}");
            judge(&format!("{args:?} at {call} {number}"));
            if !was_killed {
                break;
            }
            killed += 1;
        }
    }
    killed
}

/// A small disk of three layers, a damaged copy of it, and a raw disk.
fn disks() -> Folder {
    let folder = Folder::new();
    folder.write("raw", &noise(1, 128 * KIB as usize));
    folder.ok(&["import", "raw", "base.tply"]);
    folder.ok(&["create", "--parent", "base.tply", "middle.tply"]);
    folder.change("middle.tply", 5000, &noise(2, 9000));
    folder.ok(&["create", "--parent", "middle.tply", "top.tply"]);
    folder.change("top.tply", 8192, &[0; 4096]);
    folder.change("top.tply", 100_000, &noise(3, 5000));
    folder
}

fn contents(folder: &Folder) -> BTreeMap<String, Vec<u8>> {
    folder.names().into_iter().map(|name| (name.clone(), folder.read(&name))).collect()
}

#[test]
fn files_stay_and_nothing_half_made_stays() {
    if !have_strace() {
        println!("skipped: needs strace, and leave to trace");
        return;
    }
    let folder = disks();
    let old = contents(&folder);
    let verbs: [&[&str]; 10] = [
        &["create", "--size", "1M", "out"],
        &["create", "--parent", "middle.tply", "out"],
        &["import", "raw", "out"],
        &["import", "--parent", "base.tply", "raw", "out"],
        &["export", "top.tply", "out"],
        &["pack", "middle.tply", "out"],
        &["flatten", "--onto", "base.tply", "top.tply", "out"],
        &["rebase", "--parent", "base.tply", "top.tply", "out"],
        &["compact", "top.tply", "out"],
        &["repair", "top.tply", "out"],
    ];
    let diff: &[&str] = &["diff", "-o", "out", "base.tply", "middle.tply"];
    for args in verbs.into_iter().chain([diff]) {
        folder.ok(args);
        let shown = |folder: &Folder| match args[0] {
            "export" => folder.read("out"),
            _ => {
                folder.ok(&["check", "out"]);
                let elsewhere = Folder::new();
                folder.ok(&["export", "out", elsewhere.join("raw").to_str().unwrap()]);
                elsewhere.read("raw")
            }
        };
        let expected = shown(&folder);
        fs::remove_file(folder.join("out")).unwrap();
        let killed = kill_at_every_call(&folder, args, &["-f"], |what| {
            let mut left = contents(&folder);
            if left.remove("out").is_some() {
                assert!(shown(&folder) == expected, "{what}: OUT is there, but not whole");
                fs::remove_file(folder.join("out")).unwrap();
            }
            left.retain(|name, _| !name.starts_with(".thinply-"));
            assert!(left == old, "{what}: an old file has changed, or there is a stray one");
            folder.ok(args);
            fs::remove_file(folder.join("out")).unwrap();
            let expected: Vec<_> = old.keys().cloned().collect();
            assert_eq!(folder.names(), expected, "{what}: the next run did not clear this");
        });
        assert!(killed >= 4, "{args:?}: killed {killed} times only");
    }
}

#[test]
fn a_snapshot_is_made_or_not_and_the_next_run_finishes_or_clears_it() {
    if !have_strace() {
        println!("skipped: needs strace, and leave to trace");
        return;
    }
    let folder = disks();
    let old = contents(&folder);
    let shown = |name: &str| {
        folder.ok(&["export", name, "out"]);
        let bytes = folder.read("out");
        fs::remove_file(folder.join("out")).unwrap();
        bytes
    };
    let expected = shown("top.tply");
    let args = ["snapshot", "top.tply", "snap.tply"];
    let killed = kill_at_every_call(&folder, &args, &["-f"], |what| {
        for (name, bytes) in old.iter().filter(|(name, _)| **name != "top.tply") {
            assert!(folder.read(name) == *bytes, "{what}: {name} has changed");
        }
        assert!(shown("top.tply") == expected, "{what}");
        // What was finished already is there by now, and so is refused.
        folder.run(&args);
        let names = ["base.tply", "middle.tply", "raw", "snap.tply", "top.tply"];
        assert_eq!(folder.names(), names, "{what}: the next run did not clear this");
        assert!(shown("top.tply") == expected && shown("snap.tply") == expected, "{what}");
        assert_ne!(folder.json(&["info", "--json", "top.tply"])["state"], "frozen", "{what}");
        for name in ["top.tply", "snap.tply"] {
            fs::remove_file(folder.join(name)).unwrap();
        }
        folder.write("top.tply", &old["top.tply"]);
    });
    assert!(killed > 5, "killed {killed} times only");
}

//! What every subcommand does with arguments that are wrong in the same ways.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use crate::support::{Folder, Run, VERBS, output};

/// A run of each subcommand that takes an existing layer, on the file `x.tply`.
const ON_A_LAYER: [&[&str]; 16] = [
    &["snapshot", "x.tply", "s.tply"],
    &["info", "x.tply"],
    &["info", "--chain", "x.tply"],
    &["map", "x.tply"],
    &["dump", "x.tply"],
    &["check", "x.tply"],
    &["export", "x.tply", "out"],
    &["pack", "x.tply", "packed.tply"],
    &["flatten", "x.tply", "y.tply"],
    &["rebase", "--parent", "x.tply", "x.tply", "y.tply"],
    &["compact", "x.tply", "y.tply"],
    &["diff", "x.tply", "x.tply"],
    &["compare", "x.tply", "x.tply"],
    &["resize", "x.tply", "1G"],
    &["create", "--parent", "x.tply", "child.tply"],
    &["serve", "x.tply", "--socket", "x.sock"],
];

/// Each of those runs, each with the answer and the folder's names before and after.
fn each(folder: &Folder, judge: impl Fn(&[&str], Run)) {
    let before = folder.names();
    for args in ON_A_LAYER {
        judge(args, folder.run(args));
        assert_eq!(folder.names(), before, "{args:?} left something behind");
    }
}

#[test]
fn a_missing_file_is_named() {
    let folder = Folder::new();
    each(&folder, |args, run| {
        let message = run.refused();
        assert!(message.contains("x.tply: "), "{args:?}: {message}");
        assert!(message.contains("No such file"), "{args:?}: {message}");
    });
    folder.write("raw", &[0; 512]);
    assert!(folder.run(&["import", "nothing", "y.tply"]).refused().contains("nothing: "));
    let message = folder.run(&["import", "raw", "no/y.tply"]);
    assert!(message.refused().contains("no: looking at the folder"), "{message:?}");
}

#[test]
fn what_is_no_image_is_refused_and_untouched() {
    let folder = Folder::new();
    for content in [&b""[..], b"short", &[0; 1 << 17], &[0xff; 5 << 20]] {
        folder.write("x.tply", content);
        each(&folder, |args, run| {
            assert!(run.refused().contains("not a thinply layer"), "{args:?}: {run:?}");
        });
        assert!(folder.read("x.tply") == content, "changed");
    }
}

#[test]
fn a_truncated_image_is_refused_or_shown_as_such() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "10M", "x.tply"]);
    let file = fs::OpenOptions::new().write(true).open(folder.join("x.tply")).unwrap();
    for length in [(12 << 20) + 511, 2 << 20, 4096] {
        file.set_len(length).unwrap();
        each(&folder, |args, run| match args[0] {
            "dump" => assert_eq!(run.code, 0, "{run:?}"),
            "check" => {
                assert_eq!(run.code, 1, "{run:?}");
                assert!(run.stdout.contains("finding"), "{run:?}");
            }
            _ => {
                let expected = format!("file of {length} bytes");
                assert!(run.refused().contains(&expected), "{args:?}: {run:?}");
            }
        });
    }
}

#[test]
fn a_folder_is_no_image() {
    let folder = Folder::new();
    fs::create_dir(folder.join("x.tply")).unwrap();
    each(&folder, |args, run| {
        let message = run.refused();
        assert!(
            message.contains("not a regular file") || message.contains("Is a directory"),
            "{args:?}: {message}"
        );
    });
    assert!(folder.run(&["import", "x.tply", "y.tply"]).refused().contains("is a folder"));
}

#[test]
fn a_pipe_does_not_hold_anything_up() {
    let folder = Folder::new();
    let made = output(Command::new("mkfifo").arg(folder.join("x.tply")));
    assert!(made.status.success());
    each(&folder, |args, run| {
        assert!(run.code == 2, "{args:?}: {run:?}");
    });
}

#[test]
fn without_arguments_the_help_comes_and_the_code_is_that_of_an_error() {
    let folder = Folder::new();
    let run = folder.run(&[]);
    assert_eq!(run.code, 2);
    assert!(run.stderr.contains("Usage: thinply [OPTIONS] <COMMAND>"), "{run:?}");
    for verb in VERBS.into_iter().filter(|verb| !["demo", "df", "gc", "mounts"].contains(verb)) {
        let run = folder.run(&[verb]);
        assert!(run.refused().contains("Usage: thinply"), "{run:?}");
        assert!(folder.run(&[verb, "--nonsense"]).refused().contains("--nonsense"));
    }
}

#[test]
fn names_of_layers_must_be_utf8_and_other_folders_need_not() {
    let folder = Folder::new();
    let odd = OsStr::from_bytes(b"od\xffd");
    let run: Run = output(folder.command(&["create", "--size", "1M"]).arg(odd)).into();
    assert!(run.refused().contains("must be UTF-8"), "{run:?}");
    let inside = folder.path().join(odd);
    fs::create_dir(&inside).unwrap();
    let run: Run =
        output(folder.command(&["create", "--size", "1M"]).arg(inside.join("a.tply"))).into();
    assert_eq!(run.code, 0, "{run:?}");
    for verb in ["info", "map", "dump", "check"] {
        let run: Run = output(folder.command(&[verb, "--json"]).arg(inside.join("a.tply"))).into();
        assert_eq!(run.code, 0, "{verb}: {run:?}");
        serde_json::from_str::<serde_json::Value>(&run.stdout).unwrap();
    }
    let mut export = folder.command(&["export"]);
    let run: Run = output(export.arg(inside.join("a.tply")).arg(odd)).into();
    assert!(run.refused().contains("is there already"), "{run:?}");
    fs::remove_dir_all(&inside).unwrap();
    folder.ok(&["create", "--size", "1M", "a.tply"]);
    let run: Run = output(folder.command(&["export", "a.tply"]).arg(odd)).into();
    assert_eq!(run.code, 0, "raw files may have any name: {run:?}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "64M", "x.tply"]);
    for args in [&["info", "x.tply"][..], &["dump", "x.tply"], &["completions", "zsh"]] {
        let run = without_a_reader(&folder, args);
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{args:?}");
    }
}

#[test]
fn a_reader_that_leaves_a_disk_or_an_archive_is_an_error() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "64M", "x.tply"]);
    folder.ok(&["image", "import", "x.tply", "--format", "raw", "a"]);
    let runs: [&[&str]; 3] =
        [&["export", "x.tply", "-"], &["pack", "x.tply", "-"], &["image", "save", "-o", "-", "a"]];
    for args in runs {
        let run = without_a_reader(&folder, args);
        assert!(run.refused().contains("Broken pipe"), "{args:?}: {run:?}");
    }
}

/// A run whose standard output is a pipe that nobody reads.
fn without_a_reader(folder: &Folder, args: &[&str]) -> Run {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    output(folder.command(args).stdout(writer)).into()
}

#[test]
fn an_output_that_fails_is_an_error() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "x.tply"]);
    for args in [&["info", "x.tply"][..], &["export", "x.tply", "-"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let run: Run = output(folder.command(args).stdout(full)).into();
        assert_eq!(run.code, 2, "{args:?}: {run:?}");
        assert!(run.stderr.contains("No space left"), "{args:?}: {run:?}");
    }
}

#[test]
fn what_is_in_use_is_refused_with_the_holder_or_shown_with_a_note() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "x.tply"]);
    let held = folder.open("x.tply", thinply::storage::Access::Write);
    let holder = format!("({})", std::process::id());
    each(&folder, |args, run| {
        if matches!(args[0], "info" | "dump") {
            assert_eq!(run.code, 0, "{args:?}: {run:?}");
            assert!(run.stdout.contains("read without a lock"), "{args:?}: {run:?}");
            assert!(run.stdout.contains(&holder), "{args:?}: {run:?}");
        } else {
            let message = run.refused();
            assert!(message.contains(&holder), "{args:?}: {message}");
        }
    });
    let shown = folder.json(&["info", "--json", "x.tply"]);
    assert_eq!(shown["state"], "in use");
    assert!(shown["note"].as_str().unwrap().contains(&holder));
    assert!(folder.json(&["dump", "--json", "x.tply"])["note"].is_string());
    held.close();
    assert_eq!(folder.json(&["info", "--json", "x.tply"])["note"], serde_json::Value::Null);
}

#[test]
fn a_name_that_is_taken_stays_as_it_is() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "x.tply"]);
    folder.write("taken", b"mine");
    let runs: [&[&str]; 7] = [
        &["flatten", "x.tply", "taken"],
        &["rebase", "--parent", "x.tply", "x.tply", "taken"],
        &["compact", "x.tply", "taken"],
        &["create", "--size", "1M", "taken"],
        &["snapshot", "x.tply", "taken"],
        &["import", "x.tply", "taken"],
        &["export", "x.tply", "taken"],
    ];
    for args in runs {
        assert!(folder.run(args).refused().contains("is there already"), "{args:?}");
        assert_eq!(folder.read("taken"), b"mine");
        assert_eq!(folder.names(), ["taken", "x.tply"], "{args:?}");
    }
    folder.ok(&["export", "--force", "x.tply", "taken"]);
    assert_eq!(folder.read("taken").len(), 1 << 20);
    let run = folder.run(&["export", "--force", "x.tply", "x.tply"]);
    assert!(run.refused().contains("is a layer of the disk"), "{run:?}");
    // A refused change leaves the layer closed.
    assert!(folder.run(&["resize", "x.tply", "512"]).refused().contains("--shrink"));
    assert_eq!(folder.json(&["info", "--json", "x.tply"])["state"], "writable");
}

//! `kill -9` between any two steps of the store's verbs that read or write files beside it. What
//! happens within the store alone is in `tests/crash/store_crash.rs`.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::kill::{have_strace, kill_at_every_call};
use crate::races::view;
use crate::support::{Folder, KIB, noise, output, skip};

/// The names of all files below a folder, sorted.
fn files(path: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            names.extend(files(&path));
        } else {
            names.push(path.display().to_string());
        }
    }
    names.sort();
    names
}

/// A store with the images `base` and `second`, and `lone` in an archive and a layout.
fn stocked() -> Folder {
    let folder = Folder::in_memory();
    for (seed, name) in ["base", "second", "lone"].into_iter().enumerate() {
        folder.write("raw", &noise(seed as u64, 64 * KIB as usize));
        folder.ok(&["image", "import", "raw", name]);
    }
    folder.ok(&["image", "save", "-o", "images.tar", "lone"]);
    folder.ok(&["image", "rm", "lone"]);
    for name in ["layout", "tree"] {
        fs::create_dir(folder.join(name)).unwrap();
    }
    folder.write("tree/file", b"text");
    let mut tar = Command::new("tar");
    tar.args(["-xf", "images.tar", "-C", "layout"]).current_dir(folder.path());
    assert!(output(&mut tar).status.success());
    folder
}

#[test]
fn an_image_comes_whole_or_not_at_all() {
    if !have_strace() {
        return skip("needs strace, and leave to trace");
    }
    let folder = stocked();
    let (before, old) = (view(&folder), files(&folder.join("store")));
    // mke2fs, which is another process, is not followed.
    let verbs: [(&[&str], &[&str], &str); 4] = [
        (&["image", "import", "--parent", "base", "raw", "new"], &["-f"], "new"),
        (&["image", "build-from", "tree", "new"], &[], "new"),
        (&["image", "load", "images.tar"], &["-f"], "lone"),
        (&["image", "load", "layout"], &["-f"], "lone"),
    ];
    for (args, follow, name) in verbs {
        folder.ok(args);
        let after = view(&folder);
        folder.ok(&["image", "rm", name]);
        let killed = kill_at_every_call(&folder, args, follow, |what| {
            assert_eq!(folder.ok(&["store", "check"]), "clean\n", "{what}");
            let seen = view(&folder);
            assert!(seen == before || seen == after, "{what}: {seen:?}");
            folder.ok(&["gc"]);
            assert_eq!(view(&folder), seen, "{what}: gc took something");
            if seen == after {
                folder.ok(&["image", "rm", name]);
            }
            assert_eq!(files(&folder.join("store")), old, "{what}: this is left");
            assert_eq!(folder.ok(&["store", "check"]), "clean\n", "{what}: after gc");
        });
        assert!(killed > 15, "{args:?}: killed {killed} times only");
    }
}

#[test]
fn an_archive_comes_whole_or_not_at_all() {
    if !have_strace() {
        return skip("needs strace, and leave to trace");
    }
    let folder = stocked();
    let args = ["image", "save", "-o", "saved.tar", "base", "second"];
    folder.ok(&args);
    let expected = folder.read("saved.tar");
    fs::remove_file(folder.join("saved.tar")).unwrap();
    let (before, old, names) = (view(&folder), files(&folder.join("store")), folder.names());
    let killed = kill_at_every_call(&folder, &args, &["-f"], |what| {
        assert!(view(&folder) == before && files(&folder.join("store")) == old, "{what}");
        if folder.join("saved.tar").exists() {
            assert!(folder.read("saved.tar") == expected, "{what}: there, but not whole");
            fs::remove_file(folder.join("saved.tar")).unwrap();
        }
        folder.ok(&args);
        fs::remove_file(folder.join("saved.tar")).unwrap();
        assert_eq!(folder.names(), names, "{what}: the next run did not clear this");
    });
    assert!(killed > 4, "killed {killed} times only");
}

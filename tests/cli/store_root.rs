//! Where there is no store: who only looks makes none, and none is made among other things.

use std::fs;

use crate::store::Served;
use crate::support::{Folder, MIB, Run, noise, output};

const LOOKING: [&[&str]; 11] = [
    &["image", "ls"],
    &["image", "history", "base"],
    &["container", "ls", "-s"],
    &["container", "rm", "c"],
    &["container", "create", "base"],
    &["volume", "ls"],
    &["volume", "rm", "v"],
    &["df"],
    &["gc"],
    &["gc", "--dry-run"],
    &["store", "check"],
];

#[test]
fn who_only_looks_makes_no_store() {
    for is_there in [false, true] {
        let folder = Folder::new();
        let root = folder.join("some/store");
        if is_there {
            fs::create_dir_all(&root).unwrap();
        }
        for verb in LOOKING {
            let run = Run::from(output(folder.command(verb).env("THINPLY_ROOT", &root)));
            let told = run.refused();
            assert!(told.contains("some/store: there is no store"), "{verb:?}: {told}");
            assert_eq!(root.exists(), is_there, "{verb:?}");
            assert_eq!(folder.join("some").exists(), is_there, "{verb:?}");
        }
        assert!(!is_there || fs::read_dir(&root).unwrap().next().is_none());
    }
}

#[test]
fn a_store_is_made_in_a_missing_or_empty_folder_and_among_nothing_else() {
    let folder = Folder::new();
    folder.write("raw", &noise(1, MIB as usize));
    fs::create_dir(folder.join("store")).unwrap();
    folder.write("store/lock", b"text");
    for verb in [
        &["volume", "create", "--size", "1M", "v"][..],
        &["image", "import", "raw", "base"],
        &["serve", "--all", "--socket", "nbd.sock"],
    ] {
        let run = folder.run(verb);
        assert!(run.refused().contains("it is not empty, and no store"), "{verb:?}: {run:?}");
        assert_eq!(fs::read_dir(folder.join("store")).unwrap().count(), 1);
    }
    fs::remove_file(folder.join("store/lock")).unwrap();
    // A beginning that was cut off is no other thing, nor is what a new file system has.
    fs::create_dir(folder.join("store/lost+found")).unwrap();
    fs::create_dir_all(folder.join("store/blobs/sha256")).unwrap();
    folder.ok(&["volume", "create", "--size", "1M", "v"]);
    fs::remove_dir_all(folder.join("store")).unwrap();
    folder.ok(&["image", "import", "raw", "base"]);
    // What somebody puts into a store hurts nobody.
    folder.write("store/notes", b"text");
    folder.ok(&["volume", "create", "--size", "1M", "v"]);
    fs::remove_dir_all(folder.join("store")).unwrap();
    drop(Served::all(&folder));
    folder.ok(&["image", "ls"]);
}

//! Something of a store is damaged: all else is shown, served and removed as before, what is bad is
//! named and can be removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;

use crate::store::{Served, blobs, stocked, tidy};
use crate::support::{Folder, MIB, Run, noise, output};

/// Runs a verb that must end soon, with 0 or 1 and no panic.
fn soon(folder: &Folder, args: &[&str]) -> Run {
    let command = folder.command(args);
    let mut timed = Command::new("timeout");
    timed.arg("20").arg(command.get_program()).args(command.get_args());
    timed.current_dir(folder.path()).env("THINPLY_ROOT", folder.join("store"));
    timed.stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = Run::from(output(&mut timed));
    assert!(matches!(run.code, 0 | 1), "{args:?}: {run:?}");
    assert!(!run.stderr.contains("panicked"), "{args:?}: {run:?}");
    assert_eq!(run.code == 1, !run.stderr.is_empty() || args == ["store", "check"], "{run:?}");
    run
}

fn rows(run: &Run, key: &str) -> BTreeSet<String> {
    let rows: Value = serde_json::from_str(&run.stdout).unwrap();
    rows.as_array().unwrap().iter().map(|row| row[key].as_str().unwrap().to_owned()).collect()
}

/// What a process that serves the store offers.
fn exports(folder: &Folder) -> String {
    let mut stream = UnixStream::connect(folder.join("store/control")).unwrap();
    stream.write_all(b"{\"version\":1,\"verb\":\"list\"}\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

/// Serves the store with its log in a file.
fn served(folder: &Folder) -> Served {
    let mut command = folder.command(&["serve", "--all", "--socket", "nbd.sock"]);
    command.stderr(fs::File::create(folder.join("log")).unwrap());
    Served::start(folder, &mut command)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    Flipped,
    Cut,
    Emptied,
    Removed,
    Folder,
    Fifo,
    Symlink,
}

const DAMAGES: [Damage; 7] = [
    Damage::Flipped,
    Damage::Cut,
    Damage::Emptied,
    Damage::Removed,
    Damage::Folder,
    Damage::Fifo,
    Damage::Symlink,
];

fn damage(path: &Path, how: Damage) {
    let bytes = fs::read(path).unwrap();
    match how {
        Damage::Flipped => {
            let mut bytes = bytes;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x40;
            return fs::write(path, bytes).unwrap();
        }
        Damage::Cut => return fs::write(path, &bytes[..bytes.len() / 2]).unwrap(),
        Damage::Emptied => return fs::write(path, b"").unwrap(),
        _ => fs::remove_file(path).unwrap(),
    }
    match how {
        Damage::Folder => fs::create_dir(path).unwrap(),
        Damage::Fifo => mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap(),
        Damage::Symlink => symlink("/dev/zero", path).unwrap(),
        _ => {}
    }
}

/// What the images of a store are made of, by their names, and what each shows.
type Images = BTreeMap<String, (BTreeSet<String>, u64)>;

/// A store of three images, one of them over another, with two containers and a volume.
fn world() -> (Folder, Images) {
    let folder = Folder::new();
    let mut images = Images::new();
    let sources = [("base", 1, None), ("app", 2, Some("base")), ("other", 3, None)];
    for (name, seed, parent) in sources {
        folder.write("raw", &noise(seed, 256 << 10));
        let parent = parent.map(|parent| ["--parent", parent]);
        let args = [&["image", "import", "raw", name][..], parent.as_ref().map_or(&[], |p| p)];
        folder.ok(&args.concat());
        let shown = &folder.json(&["image", "inspect", name])[0];
        let manifest = &shown["manifest"];
        let digests = manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]);
        let hex = |blob: &Value| blob["digest"].as_str().unwrap()["sha256:".len()..].to_owned();
        let mut parts: BTreeSet<_> = digests.map(hex).collect();
        parts.insert(shown["id"].as_str().unwrap().to_owned());
        images.insert(name.to_owned(), (parts, seed));
    }
    folder.ok(&["container", "create", "app", "--name", "web"]);
    folder.ok(&["container", "snapshot", "web", "s"]);
    folder.ok(&["container", "create", "other", "--name", "x"]);
    folder.ok(&["volume", "create", "--size", "1M", "data"]);
    (folder, images)
}

fn copy(of: &Folder) -> Folder {
    let folder = Folder::in_memory();
    let copied = output(
        Command::new("cp").args(["-r", "--sparse=always"]).arg(of.join("store")).arg(folder.path()),
    );
    assert!(copied.status.success());
    folder
}

#[test]
fn a_damaged_blob_hides_nothing_else_and_can_be_removed() {
    let (whole, images) = world();
    let full = std::env::var("THINPLY_DAMAGE").as_deref() == Ok("full");
    for (number, blob) in blobs(&whole).iter().enumerate() {
        for (kind, how) in DAMAGES.into_iter().enumerate() {
            if full || (number + kind).is_multiple_of(4) {
                judge(&copy(&whole), &images, blob, how);
            }
        }
    }
}

/// Damages a blob and has every verb look at the store.
fn judge(folder: &Folder, images: &Images, blob: &str, how: Damage) {
    damage(&folder.join("store/blobs/sha256").join(blob), how);
    let what = format!("{how:?} {blob}");
    let (bad, good): (Vec<_>, Vec<_>) =
        images.iter().partition(|(_, (parts, _))| parts.contains(blob));
    // A layer that is as long as it should be is judged by `store check` alone.
    let is_layer = fs::metadata(folder.join("store/blobs/sha256").join(blob))
        .is_ok_and(|meta| meta.len() > 64 << 10);
    let hidden = how == Damage::Flipped && is_layer;

    let checked = soon(folder, &["store", "check"]);
    assert!(checked.code == 1 && checked.stdout.contains(blob), "{what}: {checked:?}");
    let listed = soon(folder, &["image", "ls", "--json"]);
    let usage = soon(folder, &["df"]);
    assert_eq!((listed.code, usage.code), (i32::from(!hidden), i32::from(!hidden)), "{what}");
    for (name, _) in &good {
        assert!(rows(&listed, "repository").contains(*name), "{what}: {listed:?}");
    }
    for (name, _) in &bad {
        let named = |run: &Run| run.stderr.contains(&format!("image {name}:latest: "));
        assert!(hidden || named(&listed) && named(&usage), "{what}: {listed:?} {usage:?}");
        assert_eq!(rows(&listed, "repository").contains(*name), hidden, "{what}: {listed:?}");
    }
    let containers = soon(folder, &["container", "ls", "--json"]);
    assert_eq!(rows(&containers, "name"), ["web", "x"].map(str::to_owned).into(), "{what}");
    assert_eq!(rows(&soon(folder, &["volume", "ls", "--json"]), "name"), ["data".into()].into());
    judge_served(folder, &good, &bad, hidden, &what);

    soon(folder, &["gc", "--dry-run"]);
    let collected = soon(folder, &["gc"]);
    assert!(!collected.stdout.contains("Deleted"), "{what}: {collected:?}");
    assert_eq!(
        rows(&soon(folder, &["image", "ls", "--json"]), "repository"),
        rows(&listed, "repository")
    );

    assert_eq!(soon(folder, &["container", "rm", "web", "x"]).code, 0, "{what}");
    for (name, _) in bad.iter().chain(&good) {
        let removed = soon(folder, &["image", "rm", name]);
        assert!(
            removed.stdout.contains(&format!("Untagged: {name}:latest")),
            "{what}: {removed:?}"
        );
    }
    let rest = soon(folder, &["gc"]);
    let left = blobs(folder);
    if how == Damage::Folder {
        // Whoever put it there may take it away.
        assert!(rest.code == 1 && rest.stderr.contains(blob), "{what}: {rest:?}");
        assert_eq!(left, [blob], "{what}");
    } else {
        assert_eq!((rest.code, left), (0, vec![]), "{what}: {rest:?}");
        tidy(folder);
    }
}

/// `serve --all` logs what is bad and serves all else.
fn judge_served(
    folder: &Folder,
    good: &[(&String, &(BTreeSet<String>, u64))],
    bad: &[(&String, &(BTreeSet<String>, u64))],
    hidden: bool,
    what: &str,
) {
    let served = served(folder);
    let offered = exports(folder);
    for (name, (_, seed)) in good {
        let export = format!("image/{name}:latest");
        assert!(offered.contains(&export), "{what}: {offered}");
        let mut client = served.client(&export).unwrap();
        assert!(client.read(0, 256 << 10).unwrap() == noise(*seed, 256 << 10), "{what}: {name}");
        client.disconnect().unwrap();
    }
    served.client("volume/data").unwrap().disconnect().unwrap();
    for (name, _) in bad {
        let export = format!("image/{name}:latest");
        assert_eq!(offered.contains(&export), hidden, "{what}: {offered}");
        // It may open, but what it can't read must be an error.
        if let Ok(mut client) = served.client(&export) {
            let _ = client.read(0, 4096);
        }
    }
    exports(folder);
    served.signal(rustix::process::Signal::TERM);
    assert_eq!(served.end(), Some(0), "{what}");
    let log = String::from_utf8(folder.read("log")).unwrap();
    assert!(!log.contains("panicked"), "{what}: {log}");
    for (name, _) in bad {
        let line = format!("thinply: image {name}:latest: ");
        // However often somebody lists the disks.
        assert_eq!(log.matches(&line).count(), usize::from(!hidden), "{what}: {log}");
    }
}

#[test]
fn a_bad_record_hides_nothing_else_and_its_container_can_be_removed() {
    for (case, text) in ["", "{", "[]", "nonsense", "{\"created\":7}"].into_iter().enumerate() {
        let folder = stocked();
        folder.write("other.raw", &noise(2, MIB as usize));
        folder.ok(&["image", "import", "other.raw", "other"]);
        for (name, image) in [("c", "base"), ("d", "other")] {
            folder.ok(&["container", "create", image, "--name", name]);
            folder.ok(&["container", "snapshot", name, "s"]);
        }
        folder.ok(&["volume", "create", "--size", "1M", "c"]);
        folder.write("store/containers/c.json", text.as_bytes());
        for verb in [&["container", "ls", "--json"][..], &["container", "ls", "-s", "--json"]] {
            let listed = soon(&folder, verb);
            assert!(listed.code == 1 && listed.stderr.contains("container c: "), "{listed:?}");
            assert_eq!(rows(&listed, "name"), ["d".to_owned()].into());
        }
        for verb in [&["df"][..], &["gc"], &["gc", "--dry-run"]] {
            let run = soon(&folder, verb);
            assert!(run.code == 1 && run.stderr.contains("container c: "), "{verb:?}: {run:?}");
            assert!(!run.stdout.contains("Deleted"), "{verb:?}: {run:?}");
        }
        assert_eq!(soon(&folder, &["image", "ls"]).code, 0);
        assert_eq!(soon(&folder, &["volume", "ls"]).code, 0);
        let served = served(&folder);
        let offered = exports(&folder);
        assert!(offered.contains("container/d@s") && !offered.contains("container/c"), "{offered}");
        served.client("container/d").unwrap().disconnect().unwrap();
        drop(served);
        // Its layer says what it stands on, and that stays.
        let run = folder.run(&["image", "rm", "base"]);
        assert!(run.refused().contains("used by container c"), "{run:?}");
        // Of another image the name goes, and its blobs once all can be read again.
        folder.ok(&["container", "rm", "d"]);
        let removed = soon(&folder, &["image", "rm", "other"]);
        assert!(removed.stdout.starts_with("Untagged: other:latest"), "{removed:?}");
        assert!(removed.code == 1 && !removed.stdout.contains("Deleted"), "{removed:?}");
        if case == 0 {
            // A volume's record alike.
            folder.write("store/volumes/c.json", text.as_bytes());
            let listed = soon(&folder, &["volume", "ls"]);
            assert!(listed.code == 1 && listed.stderr.contains("volume c: "), "{listed:?}");
            folder.ok(&["volume", "rm", "c"]);
        }
        folder.ok(&["container", "rm", "c"]);
        let left = fs::read_dir(folder.join("store/containers")).unwrap();
        assert_eq!(left.count(), 0, "its snapshot went too");
        assert!(folder.ok(&["gc"]).contains("Deleted: blobs/sha256/"));
        folder.ok(&["image", "rm", "base"]);
        assert_eq!(blobs(&folder), [""; 0]);
        tidy(&folder);
    }
}

#[test]
fn a_container_whose_layer_is_damaged_is_shown_told_of_and_removed() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.ok(&["container", "create", "base", "--name", "d"]);
    folder.write("store/containers/c.tply", b"");
    for verb in [&["container", "ls", "--json"][..], &["container", "ls", "-s", "--json"]] {
        let listed = soon(&folder, verb);
        assert!(listed.code == 1 && listed.stderr.contains("container c: "), "{listed:?}");
        assert_eq!(rows(&listed, "name"), ["c", "d"].map(str::to_owned).into());
    }
    let served = served(&folder);
    let offered = exports(&folder);
    assert!(offered.contains("container/d") && !offered.contains("container/c"), "{offered}");
    drop(served);
    let run = folder.run(&["image", "rm", "base"]);
    assert!(run.refused().contains("used by container c, d"), "{run:?}");
    folder.ok(&["container", "rm", "c"]);
    tidy(&folder);
}

#[test]
fn a_disk_goes_whatever_stands_in_its_layers_place() {
    for how in [Damage::Folder, Damage::Fifo, Damage::Symlink, Damage::Removed] {
        let folder = stocked();
        folder.ok(&["container", "create", "base", "--name", "c"]);
        folder.ok(&["container", "snapshot", "c", "s"]);
        folder.ok(&["volume", "create", "--size", "1M", "v"]);
        for file in ["containers/c.tply", "containers/c@1.tply", "volumes/v.tply"] {
            damage(&folder.join("store").join(file), how);
        }
        assert_eq!(soon(&folder, &["store", "check"]).code, 1, "{how:?}");
        folder.ok(&["container", "rm", "c"]);
        folder.ok(&["volume", "rm", "v"]);
        for kind in ["containers", "volumes"] {
            let left = fs::read_dir(folder.join("store").join(kind)).unwrap();
            assert_eq!(left.count(), 0, "{how:?}");
        }
        folder.ok(&["image", "rm", "base"]);
        assert_eq!(blobs(&folder), [""; 0]);
        tidy(&folder);
    }
    let folder = Folder::new();
    folder.ok(&["volume", "create", "--size", "1M", "v"]);
    let path = folder.join("store/volumes/v.tply");
    fs::remove_file(&path).unwrap();
    let _listener = UnixListener::bind(&path).unwrap();
    folder.ok(&["volume", "rm", "v"]);
    tidy(&folder);
}

/// A folder with something in it is for whoever made it: the disk stays until it is out of the way.
#[test]
fn a_folder_in_the_way_of_a_removal_is_named_and_nothing_else_goes() {
    for file in ["c.tply", "c@1.tply", "c.json", ".c.tply.top"] {
        let folder = stocked();
        folder.ok(&["container", "create", "base", "--name", "c"]);
        folder.ok(&["container", "snapshot", "c", "s"]);
        let path = folder.join("store/containers").join(file);
        let _ = fs::remove_file(&path);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("notes"), b"text").unwrap();
        let names = || {
            let entries = fs::read_dir(folder.join("store/containers")).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect::<BTreeSet<_>>()
        };
        let before = names();
        let run = folder.run(&["container", "rm", "c"]);
        assert!(run.refused().contains(&format!("{file}: ")), "{file}: {run:?}");
        assert_eq!(names(), before, "{file}");
        assert_eq!(soon(&folder, &["gc"]).code, 1, "{file}");
        assert_eq!(soon(&folder, &["store", "check"]).code, 1, "{file}");
        fs::remove_file(path.join("notes")).unwrap();
        folder.ok(&["container", "rm", "c"]);
        assert_eq!(names().len(), 0, "{file}");
        tidy(&folder);
    }
}

/// Earlier versions left such a mark.
#[test]
fn a_removal_that_a_folder_keeps_from_its_end_is_told_of_by_all_and_ends_without_it() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    fs::remove_file(folder.join("store/containers/c.json")).unwrap();
    fs::create_dir_all(folder.join("store/containers/c.gone/inside")).unwrap();
    for verb in [&["gc", "--dry-run"][..], &["gc"]] {
        let run = soon(&folder, verb);
        assert!(run.code == 1 && run.stderr.contains("c.gone: "), "{run:?}");
    }
    let checked = soon(&folder, &["store", "check"]);
    assert!(checked.code == 1 && checked.stdout.contains("c.gone: "), "{checked:?}");
    fs::remove_dir(folder.join("store/containers/c.gone/inside")).unwrap();
    folder.ok(&["gc"]);
    tidy(&folder);
    assert_eq!(fs::read_dir(folder.join("store/containers")).unwrap().count(), 0);
}

#[test]
fn a_damaged_layout_file_is_named() {
    let folder = stocked();
    for text in ["x", "", "{}"] {
        folder.write("store/oci-layout", text.as_bytes());
        let run = folder.run(&["image", "ls"]);
        assert!(run.refused().contains("store/oci-layout: "), "{run:?}");
    }
}

#[test]
fn an_index_that_contradicts_itself_or_its_manifests_is_told_of() {
    let folder = stocked();
    folder.write("other.raw", &noise(2, MIB as usize));
    folder.ok(&["image", "import", "other.raw", "other"]);
    let whole = folder.read("store/index.json");
    let check = |change: &dyn Fn(&mut Value), told: &str| {
        let mut index: Value = serde_json::from_slice(&whole).unwrap();
        change(&mut index["manifests"]);
        folder.write("store/index.json", index.to_string().as_bytes());
        let checked = soon(&folder, &["store", "check"]);
        assert!(checked.code == 1 && checked.stdout.contains(told), "{told}: {checked:?}");
    };
    let twice = |entries: &mut Value| {
        entries[1]["annotations"] = entries[0]["annotations"].clone();
    };
    check(&twice, "image base:latest: the index gives the name to ");
    check(&|entries| entries[1]["size"] = 7.into(), "image other:latest: the index has the size 7");
    folder.write("store/index.json", &whole);
    tidy(&folder);
}

#[test]
fn a_snapshot_that_is_no_file_hides_only_itself() {
    for how in [Damage::Folder, Damage::Fifo, Damage::Symlink] {
        let folder = stocked();
        folder.ok(&["container", "create", "base", "--name", "c"]);
        for name in ["s", "t"] {
            folder.ok(&["container", "snapshot", "c", name]);
            folder.ok(&["container", "reset", "c"]);
        }
        damage(&folder.join("store/containers/c@1.tply"), how);
        let checked = soon(&folder, &["store", "check"]);
        assert!(checked.code == 1 && checked.stdout.contains("c@1.tply: "), "{checked:?}");
        for verb in [
            &["container", "ls", "--json"][..],
            &["container", "ls", "-s", "--json"],
            &["container", "inspect", "c"],
        ] {
            let run = soon(&folder, verb);
            assert!(run.code == 1 && run.stderr.contains("c@1.tply: "), "{how:?}: {run:?}");
            assert_eq!(rows(&run, "name"), ["c".to_owned()].into());
            let rows: Value = serde_json::from_str(&run.stdout).unwrap();
            assert_eq!(rows[0]["snapshots"], serde_json::json!(["t"]));
        }
        let usage = soon(&folder, &["df", "--json"]);
        assert!(usage.code == 1 && usage.stderr.contains("c@1.tply: "), "{usage:?}");
        let usage: Value = serde_json::from_str(&usage.stdout).unwrap();
        assert_eq!(usage[1]["total"], 1);
        let served = served(&folder);
        let offered = exports(&folder);
        assert!(offered.contains("container/c@t") && !offered.contains("container/c@s"));
        served.client("container/c").unwrap().disconnect().unwrap();
        drop(served);
        assert!(String::from_utf8(folder.read("log")).unwrap().contains("c@1.tply: "));
        folder.ok(&["container", "rm", "c"]);
        tidy(&folder);
    }
}

#[test]
fn containers_are_listed_with_their_own_sizes_where_the_index_is_damaged() {
    for text in [Some("{"), Some("{}"), None] {
        let folder = stocked();
        folder.ok(&["container", "create", "base", "--name", "c"]);
        let path = folder.join("store/index.json");
        match text {
            Some(text) => fs::write(&path, text).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let listed = soon(&folder, &["container", "ls", "-s", "--json"]);
        assert!(listed.code == 1 && listed.stderr.contains("index.json: "), "{listed:?}");
        let listed: Value = serde_json::from_str(&listed.stdout).unwrap();
        assert_eq!(
            (&listed[0]["name"], &listed[0]["device_size"]),
            (&"c".into(), &(4 * MIB).into())
        );
        assert!(listed[0]["size"].is_u64() && listed[0]["virtual_size"].is_null(), "{listed}");
        let listed = soon(&folder, &["container", "ls", "-s"]);
        assert!(listed.stdout.contains("(virtual unknown)"), "{listed:?}");
    }
}

/// A manifest that is gone may be what keeps its layers: a backup may have it still.
#[test]
fn what_a_missing_manifest_kept_is_not_collected_until_its_image_is_removed() {
    let folder = stocked();
    folder.ok(&["image", "tag", "base", "more"]);
    let id = folder.json(&["image", "inspect", "base"])[0]["id"].as_str().unwrap().to_owned();
    let path = folder.join("store/blobs/sha256").join(&id);
    let manifest = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let collected = soon(&folder, &["gc"]);
    assert!(
        collected.code == 1 && collected.stderr.contains("image base:latest: "),
        "{collected:?}"
    );
    assert_eq!(blobs(&folder).len(), 2);
    fs::write(&path, manifest).unwrap();
    tidy(&folder);
    fs::remove_file(&path).unwrap();
    assert_eq!(folder.ok(&["image", "rm", "more"]), "Untagged: more:latest\n");
    folder.ok(&["image", "rm", &id[..12]]);
    assert!(folder.ok(&["gc"]).contains("Deleted: blobs/sha256/"));
    assert_eq!(blobs(&folder), [""; 0]);
    tidy(&folder);
}

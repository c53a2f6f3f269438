//! `rebase`, `compact`, `diff` and `compare`.

use std::fs;

use crate::support::{Folder, MIB, noise};

/// `a.tply` and `b.tply`, both of 3 MiB and frozen, and `top.tply` over `a.tply`; what `top.tply`
/// shows.
fn disks(folder: &Folder) -> Vec<u8> {
    let mut disk = noise(1, 3 * MIB as usize);
    folder.write("raw", &disk);
    folder.ok(&["import", "raw", "a.tply"]);
    let other = [&disk[..MIB as usize], &noise(2, 4096), &disk[MIB as usize + 4096..]].concat();
    folder.write("raw", &other);
    folder.ok(&["import", "raw", "b.tply"]);
    fs::remove_file(folder.join("raw")).unwrap();
    for name in ["a.tply", "b.tply"] {
        folder.run(&["create", "--parent", name, "x.tply"]);
        fs::remove_file(folder.join("x.tply")).unwrap();
    }
    folder.ok(&["create", "--parent", "a.tply", "top.tply"]);
    let change = noise(3, 9000);
    folder.change("top.tply", 100, &change);
    disk[100..9100].copy_from_slice(&change);
    disk
}

/// The ranges that the newest layer of a disk owns.
fn own(folder: &Folder, name: &str) -> Vec<(u64, u64)> {
    let map = folder.json(&["map", "--json", name]);
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let extents = map["extents"].as_array().unwrap().iter();
    let own = extents.filter(|extent| extent["depth"] == 0);
    own.map(|extent| (number(&extent["offset"]), number(&extent["length"]))).collect()
}

#[test]
fn a_rebased_disk_shows_the_same_on_another_parent() {
    let folder = Folder::new();
    let disk = disks(&folder);
    let before = ["a.tply", "b.tply", "top.tply"].map(|name| folder.read(name));
    assert_eq!(folder.ok(&["rebase", "--parent", "b.tply", "top.tply", "new.tply"]), "");
    assert!(folder.export("new.tply") == disk);
    assert_eq!(own(&folder, "new.tply"), [(0, 3 * 4096), (MIB, 4096)]);
    folder.ok(&["check", "--chain", "new.tply"]);
    let info = folder.json(&["info", "--json", "--chain", "new.tply"]);
    assert_eq!(info["layers"].as_array().unwrap().len(), 2);
    assert_eq!(info["layers"][0]["state"], "writable", "as the old one is");
    folder.change("new.tply", 0, &[1; 10]);

    // A frozen layer gives a frozen one, a packed one a packed one.
    folder.ok(&["snapshot", "top.tply", "s.tply"]);
    let made = folder.json(&["rebase", "--json", "--parent", "b.tply", "s.tply", "t.tply"]);
    assert!(made["identity"].as_str().unwrap().starts_with("frozen layer"), "{made}");
    assert_eq!(made["parent"], "b.tply");
    folder.ok(&["pack", "s.tply", "p.tply"]);
    let made = folder.json(&["rebase", "--json", "--parent", "b.tply", "p.tply", "q.tply"]);
    assert!(made["identity"].as_str().unwrap().starts_with("packed layer"), "{made}");
    for name in ["t.tply", "q.tply"] {
        assert!(folder.export(name) == disk, "{name}");
    }
    let after = ["a.tply", "b.tply", "s.tply"].map(|name| folder.read(name));
    assert!(before[..2] == after[..2], "a parent has changed");
}

#[test]
fn an_unsafe_rebase_only_relinks() {
    let folder = Folder::new();
    let disk = disks(&folder);
    fs::rename(folder.join("a.tply"), folder.join("renamed.tply")).unwrap();
    let run = |flag: &[&str]| {
        let args = [&["rebase", "--parent", "renamed.tply", "top.tply", "new.tply"], flag].concat();
        folder.run(&args)
    };
    assert!(run(&[]).refused().contains("a.tply"), "the old parent is gone");
    assert_eq!(run(&["--unsafe"]).code, 0);
    assert!(folder.export("new.tply") == disk);
    folder.ok(&["rebase", "--unsafe", "--parent", "b.tply", "top.tply", "other.tply"]);
    let changed = folder.export("other.tply");
    assert!(changed != disk, "it shows what b.tply has");
    assert!(changed[..3 * 4096] == disk[..3 * 4096]);
    assert_eq!(own(&folder, "other.tply"), [(0, 3 * 4096)]);
}

#[test]
fn a_rebase_without_a_parent_or_onto_one_that_cannot_be_found_makes_nothing() {
    let folder = Folder::new();
    disks(&folder);
    let names = folder.names();
    let run = folder.run(&["rebase", "top.tply", "new.tply"]);
    assert!(run.refused().contains("--parent"), "{run:?}");
    let elsewhere = Folder::new();
    let out = elsewhere.join("x.tply");
    let run = folder.run(&["rebase", "--parent", "b.tply", "top.tply", out.to_str().unwrap()]);
    assert!(run.refused().contains("is not in"), "{run:?}");
    assert!(elsewhere.names().is_empty());
    assert_eq!(folder.names(), names);
}

#[test]
fn compacting_gives_back_what_is_not_needed() {
    let folder = Folder::new();
    let mut disk = disks(&folder);
    // Zeros, and bytes that the parent has too.
    folder.change("top.tply", 2 * MIB, &[0; 64 << 10]);
    folder.change("top.tply", MIB, &disk[MIB as usize..][..8192]);
    disk[2 * MIB as usize..][..64 << 10].fill(0);
    folder.ok(&["compact", "top.tply", "new.tply"]);
    assert!(folder.export("new.tply") == disk);
    assert_eq!(own(&folder, "new.tply"), [(0, 3 * 4096), (2 * MIB, 64 << 10)]);
    assert!(folder.cost("new.tply") + (64 << 10) < folder.cost("top.tply"));
    // Without a parent zeros are nothing at all.
    folder.write("raw", &disk);
    folder.ok(&["create", "--size", "3M", "full.tply"]);
    folder.change("full.tply", 0, &disk);
    folder.ok(&["compact", "full.tply", "less.tply"]);
    assert!(folder.export("less.tply") == disk);
    assert_eq!(own(&folder, "less.tply"), [(0, 2 * MIB), (2 * MIB + (64 << 10), MIB - (64 << 10))]);
}

#[test]
fn a_difference_is_listed_or_made_into_a_layer() {
    let folder = Folder::new();
    let disk = disks(&folder);
    folder.change("top.tply", 2 * MIB, &[0; 8192]);
    let mut expected = disk;
    expected[2 * MIB as usize..][..8192].fill(0);
    let listed = folder.json(&["diff", "--json", "b.tply", "top.tply"]);
    assert_eq!((&listed["a_size"], &listed["b_size"]), (&(3 * MIB).into(), &(3 * MIB).into()));
    let extent = |extent: &serde_json::Value| {
        let number = |key: &str| extent[key].as_u64().unwrap();
        (number("offset"), number("length"), extent["zero"].as_bool().unwrap())
    };
    let extents: Vec<_> = listed["extents"].as_array().unwrap().iter().map(extent).collect();
    let all = [(0, 12288, false), (MIB, 4096, false), (2 * MIB, 8192, true)];
    assert_eq!(extents, all);
    let text = folder.ok(&["diff", "b.tply", "top.tply"]);
    let numbers: Vec<_> = text.lines().skip(1).map(str::split_whitespace).collect();
    for (line, (offset, length, zero)) in numbers.into_iter().zip(all) {
        let zero = if zero { "yes" } else { "no" };
        assert!(line.eq([&*offset.to_string(), &*length.to_string(), zero]), "{text}");
    }
    assert_eq!(folder.ok(&["diff", "a.tply", "a.tply"]).lines().count(), 1, "no difference");

    folder.ok(&["diff", "-o", "delta.tply", "b.tply", "top.tply"]);
    assert!(folder.export("delta.tply") == expected);
    let info = folder.json(&["info", "--json", "--chain", "delta.tply"]);
    assert_eq!(info["layers"].as_array().unwrap().len(), 2);
    assert_eq!(own(&folder, "delta.tply").len(), 3);
    folder.ok(&["verify", "delta.tply"]);
    let run = folder.run(&["diff", "-o", "x.tply", "top.tply", "a.tply"]);
    assert!(run.refused().contains("is not frozen"), "{run:?}");
    assert!(
        folder.run(&["diff", "-o", "b.tply", "a.tply", "top.tply"]).refused().contains("there")
    );
}

#[test]
fn compare_answers_by_its_exit_code_and_names_the_first_difference() {
    let folder = Folder::new();
    let disk = disks(&folder);
    folder.write("raw", &disk);
    let compare = |args: &[&str]| {
        let run = folder.run(&[&["compare", "--json"], args].concat());
        assert!(run.stderr.is_empty(), "{run:?}");
        let verdict: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(verdict["same"], run.code == 0, "{run:?}");
        (run.code, verdict)
    };
    folder.ok(&["flatten", "top.tply", "flat.tply"]);
    assert_eq!(compare(&["top.tply", "flat.tply"]).0, 0);
    assert_eq!(compare(&["--strict", "top.tply", "flat.tply"]).0, 0);
    assert_eq!(compare(&["-F", "raw", "top.tply", "raw"]).0, 0);
    assert_eq!(compare(&["-f", "raw", "-F", "raw", "raw", "raw"]).0, 0);
    let (code, verdict) = compare(&["top.tply", "a.tply"]);
    assert_eq!(
        (code, &verdict["differs_in"], &verdict["offset"]),
        (1, &"content".into(), &100.into())
    );
    let mut other = disk.clone();
    other[2 * MIB as usize + 77] ^= 1;
    folder.write("raw", &other);
    let (code, verdict) = compare(&["-f", "raw", "raw", "top.tply"]);
    assert_eq!((code, &verdict["offset"]), (1, &(2 * MIB + 77).into()));

    // Zeros beyond the end of the shorter one are no difference, except to the strict.
    folder.write("raw", &[&disk[..], &[0; 5000]].concat());
    assert_eq!(compare(&["-F", "raw", "top.tply", "raw"]).0, 0);
    let (code, verdict) = compare(&["-s", "-F", "raw", "top.tply", "raw"]);
    assert_eq!((code, &verdict["differs_in"]), (1, &"size".into()));
    folder.write("raw", &[&disk[..], &[0; 4999], &[1]].concat());
    let (code, verdict) = compare(&["-F", "raw", "top.tply", "raw"]);
    assert_eq!((code, &verdict["offset"]), (1, &(3 * MIB + 4999).into()));

    // Owned zeros and zeros that nobody owns are the same, except to the strict.
    folder.ok(&["create", "--size", "1M", "empty.tply"]);
    folder.ok(&["create", "--size", "1M", "zeros.tply"]);
    folder.change("zeros.tply", 8192, &[0; 4096]);
    assert_eq!(compare(&["empty.tply", "zeros.tply"]).0, 0);
    let (code, verdict) = compare(&["-s", "empty.tply", "zeros.tply"]);
    let expected = (1, &"allocation".into(), &8192.into());
    assert_eq!((code, &verdict["differs_in"], &verdict["offset"]), expected);

    for args in [&["top.tply", "raw"][..], &["top.tply", "missing"], &["-f", "vmdk", "raw", "raw"]]
    {
        let run = folder.run(&[&["compare"], args].concat());
        assert!(!run.refused().is_empty());
    }
}

#[test]
fn layers_that_both_disks_stand_on_are_not_read() {
    let folder = Folder::new();
    disks(&folder);
    folder.ok(&["pack", "--uncompressed", "a.tply", "p.tply"]);
    folder.ok(&["create", "--parent", "p.tply", "one.tply"]);
    folder.ok(&["create", "--parent", "p.tply", "other.tply"]);
    folder.change("other.tply", 5 * 4096, &[1; 4096]);
    // Whoever reads this block is told that it is damaged.
    let mut bytes = folder.read("p.tply");
    bytes[4096 + 100] ^= 1;
    folder.write("p.tply", &bytes);
    assert_eq!(folder.run(&["export", "one.tply", "out"]).code, 2);
    let run = folder.run(&["compare", "one.tply", "other.tply"]);
    assert_eq!((run.code, &*run.stdout), (1, "different from byte 20480 on\n"));
    assert_eq!(folder.ok(&["diff", "one.tply", "other.tply"]).lines().count(), 2);
    folder.ok(&["rebase", "--parent", "p.tply", "other.tply", "new.tply"]);
    assert_eq!(own(&folder, "new.tply"), [(5 * 4096, 4096)]);
}

//! Chains: who may be a parent, where it is found, what is refused.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use crate::support::{Folder, KIB, noise, output};

/// A folder with a base, and another with a child over it that looks for it there.
fn apart() -> (Folder, Folder) {
    let (bases, folder) = (Folder::new(), Folder::new());
    bases.write("raw", &noise(1, 100 * KIB as usize));
    bases.ok(&["import", "raw", "base.tply"]);
    let base = bases.join("base.tply");
    folder.ok(&[
        "create",
        "--parent",
        base.to_str().unwrap(),
        "--layers",
        bases.path().to_str().unwrap(),
        "child.tply",
    ]);
    (bases, folder)
}

#[test]
fn a_fresh_overlay_costs_next_to_nothing() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1T", "base.tply"]);
    let run = folder.run(&["create", "--parent", "base.tply", "a.tply"]);
    assert_eq!((run.code, run.stdout.as_str()), (0, ""));
    assert!(run.stderr.contains("base.tply is frozen now"), "{run:?}");
    assert_eq!(folder.json(&["info", "--json", "base.tply"])["state"], "frozen");
    let run = folder.run(&["create", "--parent", "base.tply", "--size", "2T", "b.tply"]);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "it is frozen already");
    for (name, size) in [("a.tply", 1_u64 << 40), ("b.tply", 2 << 40)] {
        assert!(folder.cost(name) <= 12 * KIB, "{name}: {}", folder.cost(name));
        let info = folder.json(&["info", "--json", name]);
        assert_eq!(info["virtual_size"], size);
        assert_eq!(info["disk_size"], folder.cost(name));
        assert_eq!(info["parent"], "base.tply");
    }
}

#[test]
fn a_parent_is_found_through_the_option_or_the_environment_and_nowhere_else() {
    let (bases, folder) = apart();
    let layers = bases.path().to_str().unwrap();
    let missing = folder.run(&["map", "child.tply"]);
    let message = missing.refused();
    for part in ["base.tply", "is not in", "--layers DIR"] {
        assert!(message.contains(part), "{message}");
    }
    let empty = Folder::new();
    let empty = empty.path().to_str().unwrap();
    folder.ok(&["map", "--layers", layers, "child.tply"]);
    folder.ok(&["map", "--layers", empty, "--layers", layers, "child.tply"]);
    for value in [layers.to_owned(), format!("{empty}:{layers}"), format!(":{layers}:/nowhere")] {
        let mut command = folder.command(&["check", "--chain", "child.tply"]);
        let run = output(command.env("THINPLY_LAYERS", &value));
        assert!(run.status.success(), "{value}: {run:?}");
    }
    let run = folder.run(&["map", "--layers", "nowhere", "child.tply"]);
    assert!(run.refused().contains("nowhere: not a folder"), "{run:?}");
    // The folder of the working directory is not looked at for a child elsewhere.
    let child = folder.join("child.tply");
    bases.run(&["map", child.to_str().unwrap()]).refused();
    // Info shows the layer even so, and its chain not.
    assert_eq!(folder.json(&["info", "--json", "child.tply"])["parent"], "base.tply");
    folder.run(&["info", "--chain", "child.tply"]).refused();
    assert_eq!(folder.run(&["check", "child.tply"]).code, 0);
    assert_eq!(folder.run(&["check", "--chain", "child.tply"]).code, 1);
}

#[test]
fn a_parent_that_nobody_would_find_is_refused_and_not_frozen() {
    let (bases, folder) = (Folder::new(), Folder::new());
    bases.ok(&["create", "--size", "1M", "base.tply"]);
    let base = bases.join("base.tply");
    let args = ["create", "--parent", base.to_str().unwrap(), "child.tply"];
    assert!(folder.run(&args).refused().contains("--layers"));
    // Another file of that name in the child's folder is not the parent either.
    folder.ok(&["create", "--size", "1M", "base.tply"]);
    assert!(folder.run(&args).refused().contains("--layers"));
    assert_eq!(bases.json(&["info", "--json", "base.tply"])["state"], "writable");
    assert_eq!(folder.names(), ["base.tply"]);
    folder.write("raw", &[1; 512]);
    folder.run(&["import", "--parent", base.to_str().unwrap(), "raw", "child.tply"]).refused();
    assert_eq!(folder.names(), ["base.tply", "raw"]);
}

#[test]
fn the_wrong_parent_and_a_link_are_refused() {
    let (bases, folder) = apart();
    folder.ok(&["create", "--size", "1M", "base.tply"]);
    assert!(folder.run(&["map", "child.tply"]).refused().contains("is not frozen"));
    folder.ok(&["create", "--parent", "base.tply", "other.tply"]);
    assert!(folder.run(&["map", "child.tply"]).refused().contains("but the child stands on"));
    let check = folder.run(&["check", "--chain", "child.tply"]);
    assert_eq!(check.code, 1);
    assert!(check.stdout.contains("but the child stands on"), "{check:?}");
    fs::remove_file(folder.join("base.tply")).unwrap();
    symlink(bases.join("base.tply"), folder.join("base.tply")).unwrap();
    assert!(folder.run(&["map", "child.tply"]).refused().contains("not a link"));
    fs::remove_file(folder.join("base.tply")).unwrap();
    fs::copy(bases.join("base.tply"), folder.join("base.tply")).unwrap();
    folder.ok(&["map", "child.tply"]);
}

#[test]
fn a_hint_that_is_a_path_is_refused() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "base.tply"]);
    folder.ok(&["create", "--parent", "base.tply", "a.tply"]);
    // Forge the hint in both slots, under checksums that hold.
    let mut bytes = folder.read("a.tply");
    for (slot, at) in [(0_u32, 0), (1, 65536)] {
        bytes[at + 200..at + 209].copy_from_slice(b"../e.tply");
        let mut covered = slot.to_le_bytes().to_vec();
        covered.extend(&bytes[at..at + 4092]);
        bytes[at + 4092..at + 4096].copy_from_slice(&crc32(&covered).to_le_bytes());
    }
    folder.write("a.tply", &bytes);
    for verb in ["map", "info"] {
        let run = folder.run(&[verb, "a.tply"]);
        assert!(run.refused().contains("expected a plain file name"), "{run:?}");
    }
    assert!(folder.ok(&["dump", "a.tply"]).contains("../e.tply"));
    assert_eq!(folder.run(&["check", "a.tply"]).code, 1);
}

/// CRC-32 (IEEE), bit by bit: a second opinion.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), step))
}

#[test]
fn a_link_that_the_user_names_is_followed() {
    let folder = Folder::new();
    fs::create_dir(folder.join("sub")).unwrap();
    folder.ok(&["create", "--size", "1M", "sub/base.tply"]);
    folder.ok(&["create", "--parent", "sub/base.tply", "sub/a.tply"]);
    symlink("sub/a.tply", folder.join("link")).unwrap();
    for verb in ["info", "map", "dump", "check"] {
        folder.ok(&[verb, "link"]);
    }
    folder.ok(&["snapshot", "link", "sub/snap.tply"]);
    assert_eq!(folder.json(&["info", "--json", "link"])["parent"], "snap.tply");
}

#[test]
fn a_snapshot_keeps_the_path_and_freezes_the_content() {
    let folder = Folder::new();
    let data = noise(1, 64 * KIB as usize);
    folder.write("raw", &data);
    folder.ok(&["import", "--writable", "raw", "disk.tply"]);
    assert_eq!(folder.ok(&["snapshot", "disk.tply", "monday.tply"]), "");
    folder.change("disk.tply", 4096, &[9; 4096]);
    folder.ok(&["snapshot", "./disk.tply", "tuesday.tply"]);
    assert_eq!(folder.names(), ["disk.tply", "monday.tply", "raw", "tuesday.tply"]);
    let chain = folder.json(&["info", "--json", "--chain", "disk.tply"]);
    let states: Vec<_> = chain["layers"].as_array().unwrap().iter().map(|l| &l["state"]).collect();
    assert_eq!(states, ["writable", "frozen", "frozen"]);
    folder.ok(&["export", "monday.tply", "monday"]);
    assert!(folder.read("monday") == data);
    let mut changed = data;
    changed[4096..8192].fill(9);
    folder.ok(&["export", "disk.tply", "disk"]);
    assert!(folder.read("disk") == changed);

    let elsewhere = Folder::new();
    let path = elsewhere.join("s.tply");
    let run = folder.run(&["snapshot", "disk.tply", path.to_str().unwrap()]);
    assert!(run.refused().contains("stays in the folder of its disk"), "{run:?}");
    for name in ["disk.tply", "monday.tply"] {
        assert!(
            folder.run(&["snapshot", "disk.tply", name]).refused().contains("is there already")
        );
    }
    assert!(folder.run(&["snapshot", "disk.tply", "a:b"]).refused().contains("plain file name"));
    assert!(folder.run(&["snapshot", "monday.tply", "s.tply"]).refused().contains("frozen"));
    assert_eq!(folder.json(&["info", "--json", "disk.tply"])["state"], "writable");
}

#[test]
fn a_deep_chain_opens_under_a_low_soft_limit_of_files() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "0.tply"]);
    for depth in 1..80 {
        let parent = format!("{}.tply", depth - 1);
        folder.ok(&["create", "--parent", &parent, &format!("{depth}.tply")]);
    }
    let script = "ulimit -S -n 32; exec \"$0\" check --chain 79.tply";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_thinply")]).current_dir(folder.path());
    let run = output(shell.stdout(Stdio::piped()).stderr(Stdio::piped()));
    assert!(run.status.success(), "{run:?}");
}

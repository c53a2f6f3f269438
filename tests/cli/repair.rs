//! `repair`.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use crate::support::{Folder, KIB, noise};

const BITMAP: u64 = 2 << 20;

fn disk() -> (Folder, Vec<u8>) {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "256K", "a.tply"]);
    let data = noise(1, 8192);
    folder.change("a.tply", 64 * KIB, &data);
    let mut expected = vec![0; 256 << 10];
    expected[64 << 10..][..8192].copy_from_slice(&data);
    (folder, expected)
}

fn damage(folder: &Folder, offset: u64) {
    let file = OpenOptions::new().write(true).open(folder.join("a.tply")).unwrap();
    file.write_all_at(b"damage", offset).unwrap();
}

fn exported(folder: &Folder) -> Vec<u8> {
    folder.ok(&["export", "saved.tply", "raw"]);
    folder.read("raw")
}

#[test]
fn a_whole_layer_is_saved_whole() {
    let (folder, expected) = disk();
    let before = folder.read("a.tply");
    let text = folder.ok(&["repair", "a.tply", "saved.tply"]);
    assert!(text.contains("saved.tply: everything was saved: 2 blocks"), "{text}");
    assert!(before == folder.read("a.tply"));
    assert!(exported(&folder) == expected);
    assert_eq!(folder.ok(&["check", "saved.tply"]).lines().count(), 1);
}

#[test]
fn what_was_guessed_is_said_in_both_forms_and_with_exit_code_1() {
    let (folder, expected) = disk();
    damage(&folder, BITMAP);
    let before = folder.read("a.tply");
    let plain = folder.run(&["repair", "a.tply", "saved.tply"]);
    assert_eq!(plain.code, 1, "{plain:?}");
    assert!(before == folder.read("a.tply"), "the damaged file was changed");
    assert!(exported(&folder) == expected);
    let run = folder.run(&["repair", "--json", "a.tply", "again.tply"]);
    assert_eq!(run.code, 1, "{run:?}");
    let answer: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&answer["complete"], &answer["blocks"]), (&json!(false), &json!(2)));
    let losses = answer["losses"].as_array().unwrap();
    assert_eq!(losses.len(), 1);
    assert_eq!(losses[0]["offset"], 64 * KIB);
    assert_eq!(losses[0]["length"], 8192);
    let line = format!(
        "  {}: 8192 bytes at 65536: {}\n",
        losses[0]["fate"].as_str().unwrap(),
        losses[0]["reason"].as_str().unwrap()
    );
    assert!(plain.stdout.contains(&line), "{plain:?}");
}

#[test]
fn what_can_t_be_saved_leaves_nothing() {
    let (folder, _) = disk();
    damage(&folder, 90);
    damage(&folder, 65536 + 90);
    assert!(folder.run(&["repair", "a.tply", "saved.tply"]).refused().contains("no header slot"));
    folder.write("text", b"no image at all");
    assert!(folder.run(&["repair", "text", "saved.tply"]).refused().contains("not a thinply"));
    assert!(folder.run(&["repair", "a.tply", "text"]).refused().contains("is there already"));
    assert!(folder.run(&["repair", "a.tply", "a.tply"]).refused().contains("is there already"));
    assert_eq!(folder.names(), ["a.tply", "text"]);
}

#[test]
fn a_layer_that_is_being_written_is_refused() {
    let (folder, _) = disk();
    let held = folder.open("a.tply", thinply::storage::Access::Write);
    assert!(folder.run(&["repair", "a.tply", "saved.tply"]).refused().contains("being written"));
    held.close();
}

//! A record is lost or altered: what it named is no leftover of a crash, and stays until somebody who
//! knows removes it.

use std::fs;

use crate::store::{Served, blobs, stocked, tidy};
use crate::support::{Folder, MIB, noise};

fn write(folder: &Folder, export: &str, fill: u8) {
    let served = Served::all(folder);
    let mut client = served.client(export).unwrap();
    client.write(0, &[fill; 4096]).unwrap();
    client.disconnect().unwrap();
}

/// What tells of damage names all of `needles`, and nothing is collected.
fn assert_told(folder: &Folder, needles: &[&str]) {
    let checked = folder.run(&["store", "check"]);
    let told = needles.iter().all(|text| checked.stdout.contains(text));
    assert!(checked.code == 1 && told, "{checked:?}");
    for verb in [&["gc", "--dry-run"][..], &["gc"]] {
        let run = folder.run(verb);
        assert!(run.code == 1 && needles.iter().all(|text| run.stderr.contains(text)), "{run:?}");
        assert_eq!(run.stdout.lines().count(), 1, "nothing goes: {run:?}");
    }
}

#[test]
fn the_layers_of_a_record_that_is_lost_stay_and_are_told_of() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "used"]);
    write(&folder, "container/used", 1);
    folder.ok(&["container", "create", "base", "--name", "kept"]);
    folder.ok(&["container", "snapshot", "kept", "s"]);
    folder.ok(&["volume", "create", "--size", "1M", "data"]);
    write(&folder, "volume/data", 2);
    for (record, needles) in [
        ("containers/used.json", ["container used: ", "used.tply"]),
        ("containers/kept.json", ["container kept: ", "kept.tply, kept@1.tply"]),
        ("volumes/data.json", ["volume data: ", "data.tply"]),
    ] {
        let path = folder.join("store").join(record);
        let text = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_told(&folder, &needles);
        fs::write(&path, text).unwrap();
        tidy(&folder);
    }
    fs::remove_file(folder.join("store/containers/used.json")).unwrap();
    // Nobody takes its place, and its image stays for whoever finds the record.
    let run = folder.run(&["container", "create", "base", "--name", "used"]);
    assert!(run.refused().contains("the record of container used is lost"), "{run:?}");
    folder.ok(&["container", "rm", "kept"]);
    let run = folder.run(&["image", "rm", "base"]);
    assert!(run.refused().contains("used by container used"), "{run:?}");
    folder.ok(&["container", "rm", "used"]);
    folder.ok(&["image", "rm", "base"]);
    fs::remove_file(folder.join("store/volumes/data.json")).unwrap();
    folder.ok(&["volume", "rm", "data"]);
    assert_eq!(blobs(&folder), [""; 0]);
    tidy(&folder);
}

/// A new image of the name leaves the former one to the containers that stand on it.
#[test]
fn the_image_without_a_name_below_a_lost_container_stays() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    write(&folder, "container/c", 1);
    folder.write("other.raw", &noise(2, MIB as usize));
    folder.ok(&["image", "import", "other.raw", "base"]);
    let record = folder.read("store/containers/c.json");
    fs::remove_file(folder.join("store/containers/c.json")).unwrap();
    assert_told(&folder, &["container c: "]);
    folder.write("store/containers/c.json", &record);
    folder.ok(&["container", "commit", "c", "saved"]);
}

/// What a crash in the creation leaves owns nothing: an empty file, or a whole layer.
#[test]
fn a_layer_that_nobody_used_is_a_leftover() {
    let folder = stocked();
    for empty in [true, false] {
        folder.ok(&["container", "create", "base", "--name", "c"]);
        fs::remove_file(folder.join("store/containers/c.json")).unwrap();
        if empty {
            folder.write("store/containers/c.tply", b"");
        }
        assert_eq!(folder.ok(&["store", "check"]), "clean\n");
        assert!(folder.ok(&["gc"]).contains("Deleted: containers/c.tply"));
        tidy(&folder);
    }
    for foreign in [b"notes".to_vec(), noise(1, 8192), vec![7; MIB as usize]] {
        folder.write("store/containers/c.tply", &foreign);
        assert_told(&folder, &["container c: ", "c.tply"]);
    }
}

#[test]
fn a_frozen_layer_that_its_record_has_lost_stays_and_is_told_of() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    write(&folder, "container/c", 1);
    folder.ok(&["container", "snapshot", "c", "s"]);
    let path = folder.join("store/containers/c.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
    record.as_object_mut().unwrap().remove("frozen");
    fs::write(&path, record.to_string()).unwrap();
    assert_told(&folder, &["container c: ", "c@1.tply"]);
    // The container stands on it: the next snapshot must not take its name.
    folder.ok(&["container", "snapshot", "c", "t"]);
    assert_told(&folder, &["container c: ", "c@1.tply"]);
    let served = Served::all(&folder);
    assert_eq!(served.client("container/c").unwrap().read(0, 4096).unwrap(), [1; 4096]);
    drop(served);
    folder.ok(&["container", "rm", "c"]);
    assert_eq!(fs::read_dir(folder.join("store/containers")).unwrap().count(), 0);
    tidy(&folder);
}

/// Only a later version adds fields to a record, and it says so in the file of features.
#[test]
fn a_record_with_an_altered_key_is_damaged_unless_a_later_version_was_here() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.ok(&["container", "snapshot", "c", "s"]);
    let whole = String::from_utf8(folder.read("store/containers/c.json")).unwrap();
    for (key, other) in [("frozen", "frozem"), ("snapshot", "snapshod")] {
        let altered = whole.replace(&format!("\"{key}\":"), &format!("\"{other}\":"));
        folder.write("store/containers/c.json", altered.as_bytes());
        assert_told(&folder, &["container c: ", other, "c.json"]);
        let listed = folder.run(&["container", "ls"]);
        assert!(listed.code == 1 && listed.stderr.contains(other), "{listed:?}");
        folder.write("store/features", br#"{"read":[],"version":1,"write":["later"]}"#);
        assert!(folder.ok(&["container", "ls"]).contains("base"));
        fs::remove_file(folder.join("store/features")).unwrap();
    }
    folder.write("store/containers/c.json", whole.as_bytes());
    tidy(&folder);
}

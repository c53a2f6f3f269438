//! `flatten`.

use std::fs;

use crate::support::{Folder, MIB, noise};

/// `top.tply` over `middle.tply` over `base.tply`, and the bytes that it shows.
fn chain(folder: &Folder) -> Vec<u8> {
    let mut disk = noise(1, 3 * MIB as usize);
    folder.write("raw", &disk);
    folder.ok(&["import", "raw", "base.tply"]);
    fs::remove_file(folder.join("raw")).unwrap();
    for (number, (name, parent)) in
        [("middle.tply", "base.tply"), ("top.tply", "middle.tply")].into_iter().enumerate()
    {
        folder.run(&["create", "--parent", parent, name]);
        let change = noise(7 + number as u64, 9000);
        let at = MIB as usize + 5000 * number;
        folder.change(name, at as u64, &change);
        disk[at..at + change.len()].copy_from_slice(&change);
    }
    disk
}

#[test]
fn what_the_disk_shows_is_what_the_new_layer_shows() {
    let folder = Folder::new();
    let disk = chain(&folder);
    let before = ["base.tply", "middle.tply", "top.tply"].map(|name| folder.read(name));
    assert_eq!(folder.ok(&["flatten", "top.tply", "all.tply"]), "");
    let made = folder.json(&["flatten", "--json", "--onto", "base.tply", "top.tply", "part.tply"]);
    assert_eq!(made["virtual_size"], 3 * MIB);
    assert_eq!(made["parent"], "base.tply");
    assert!(made["file"].as_str().unwrap().ends_with("part.tply"), "{made}");
    for (name, layers) in [("all.tply", 1), ("part.tply", 2)] {
        assert!(folder.export(name) == disk, "{name}");
        let info = folder.json(&["info", "--chain", "--json", name]);
        assert_eq!(info["layers"].as_array().unwrap().len(), layers, "{info}");
        assert_eq!(info["layers"][0]["state"], "frozen");
        folder.ok(&["check", "--chain", name]);
    }
    let after = ["base.tply", "middle.tply", "top.tply"].map(|name| folder.read(name));
    assert!(before == after, "a source has changed");
    assert_eq!(
        folder.names(),
        ["all.tply", "base.tply", "middle.tply", "part.tply", "top.tply"],
        "something stayed behind"
    );
}

#[test]
fn an_ancestor_that_cannot_be_is_refused_and_nothing_is_left() {
    let folder = Folder::new();
    chain(&folder);
    let names = folder.names();
    let onto =
        |ancestor: &str, out: &str| folder.run(&["flatten", "--onto", ancestor, "top.tply", out]);
    folder.ok(&["create", "--size", "1M", "other.tply"]);
    assert!(onto("other.tply", "x.tply").refused().contains("not frozen"));
    assert!(onto("missing.tply", "x.tply").refused().contains("missing.tply"));
    fs::remove_file(folder.join("other.tply")).unwrap();
    folder.write("raw", &[1; 512]);
    folder.ok(&["import", "raw", "other.tply"]);
    fs::remove_file(folder.join("raw")).unwrap();
    assert!(onto("other.tply", "x.tply").refused().contains("does not stand on"));
    fs::remove_file(folder.join("other.tply")).unwrap();
    let elsewhere = Folder::new();
    let out = elsewhere.join("x.tply");
    let out = out.to_str().unwrap();
    assert!(onto("base.tply", out).refused().contains("is not in"));
    assert!(elsewhere.names().is_empty(), "{:?}", elsewhere.names());
    let layers = folder.path().to_str().unwrap();
    folder.ok(&["flatten", "--layers", layers, "--onto", "base.tply", "top.tply", out]);
    assert_eq!(folder.names(), names);
}

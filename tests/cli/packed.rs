//! Packed layers on the command line: packing, using as any other layer, verifying.

use std::fs;

use serde_json::Value;

use crate::support::Folder;

/// A base and a layer over it with a changed block.
fn chain() -> Folder {
    let folder = Folder::new();
    let mut disk = vec![0; 1 << 20];
    disk[..8192].fill(0x11);
    disk[300_000..310_000].fill(0x22);
    folder.write("raw", &disk);
    folder.ok(&["import", "raw", "base.tply"]);
    disk[4096..4100].fill(0x33);
    folder.write("changed", &disk);
    folder
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_packed_chain_shows_the_same_disk() {
    let folder = chain();
    for flags in [&[][..], &["--zstd", "19"], &["--uncompressed"]] {
        folder.ok(&[&["pack", "base.tply", "p.tply"], flags].concat());
        folder.ok(&["export", "p.tply", "out"]);
        assert!(folder.read("out") == folder.read("raw"), "{flags:?}");
        folder.ok(&["import", "--parent", "p.tply", "changed", "top.tply"]);
        folder.ok(&["pack", "top.tply", "q.tply"]);
        folder.ok(&["check", "--chain", "q.tply"]);
        fs::remove_file(folder.join("top.tply")).unwrap();
        folder.ok(&["export", "q.tply", "out2"]);
        assert!(folder.read("out2") == folder.read("changed"), "{flags:?}");
        let info = json(&folder.ok(&["info", "--json", "--chain", "q.tply"]));
        assert_eq!(info["layers"][0]["data_blocks"], 1);
        assert_eq!(info["layers"][0]["parent_root"], info["layers"][1]["root"]);
        for name in ["p.tply", "q.tply", "out", "out2"] {
            fs::remove_file(folder.join(name)).unwrap();
        }
    }
}

#[test]
fn the_root_is_the_same_for_every_compression_and_on_a_pipe() {
    let folder = chain();
    let root = |flags: &[&str], out: &str| {
        let facts = folder.ok(&[&["pack", "--json", "base.tply", out], flags].concat());
        json(&facts)["root"].as_str().unwrap().to_owned()
    };
    let plain = root(&["--uncompressed"], "a.tply");
    assert_eq!(root(&[], "b.tply"), plain);
    assert!(folder.ok(&["verify", "a.tply"]).contains(&format!("intact, root {plain}")));
    assert_eq!(folder.run(&["pack", "base.tply", "a.tply"]).code, 2, "the name is taken");
}

#[test]
fn verify_names_what_is_lost() {
    let folder = chain();
    folder.ok(&["pack", "--uncompressed", "base.tply", "p.tply"]);
    let mut bytes = folder.read("p.tply");
    bytes[4096 + 4096 + 5] ^= 1;
    folder.write("p.tply", &bytes);
    let run = folder.run(&["verify", "--json", "p.tply"]);
    assert_eq!(run.code, 1);
    let verdict = json(&run.stdout);
    assert_eq!(verdict["intact"], false);
    assert_eq!(verdict["damage"][0]["guest_offset"], 4096);
    assert_eq!(verdict["damage"][0]["guest_length"], 4096);
    assert_eq!(folder.run(&["check", "p.tply"]).code, 1);
    assert_eq!(folder.run(&["export", "p.tply", "out"]).code, 2);
    bytes[4] ^= 1;
    folder.write("p.tply", &bytes);
    assert_eq!(folder.run(&["verify", "p.tply"]).code, 2, "no packed layer at all");
}

#[test]
fn a_packed_layer_is_never_written() {
    let folder = chain();
    folder.ok(&["pack", "base.tply", "p.tply"]);
    let before = folder.read("p.tply");
    for args in [&["resize", "p.tply", "2M"][..], &["snapshot", "p.tply", "s.tply"]] {
        let run = folder.run(args);
        let message = run.refused();
        assert!(message.contains("a packed layer never changes"), "{message}");
    }
    assert!(folder.read("p.tply") == before);
}

#[test]
fn blocks_equal_to_those_below_are_left_out_on_request() {
    let folder = chain();
    folder.ok(&["pack", "base.tply", "p.tply"]);
    folder.ok(&["create", "--parent", "p.tply", "child.tply"]);
    folder.ok(&["snapshot", "child.tply", "s.tply"]);
    let facts = json(&folder.ok(&["pack", "--json", "--drop-equal", "s.tply", "t.tply"]));
    assert_eq!((&facts["data_size"], &facts["zero_size"]), (&Value::from(0), &Value::from(0)));
    folder.ok(&["export", "t.tply", "out"]);
    assert!(folder.read("out") == folder.read("raw"));
}

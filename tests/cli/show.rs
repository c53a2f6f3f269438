//! What `info`, `map`, `dump` and `check` print, for people and as JSON: the same facts.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use serde_json::Value;
use thinply::device::{Device, ZeroMode};
use thinply::storage::Access;

use crate::support::{Folder, MIB};

/// Three layers with something in each.
fn chain() -> Folder {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "base.tply"]);
    folder.change("base.tply", 0, &[1; 65536]);
    folder.ok(&["create", "--parent", "base.tply", "middle.tply"]);
    let middle = folder.open("middle.tply", Access::Write);
    middle.write(8192, &[2; 4096]).unwrap();
    middle.zero(16384, 8192, ZeroMode::default()).unwrap();
    middle.close();
    folder.ok(&["create", "--parent", "middle.tply", "--size", "2M", "top.tply"]);
    folder.change("top.tply", 2 * MIB - 512, &[3; 512]);
    folder
}

/// The lines of the plain output that is left after the folder's own path is cut out.
fn without_path(folder: &Folder, text: &str) -> String {
    let path = folder.path().canonicalize().unwrap();
    text.replace(&format!("{}/", path.display()), "")
}

#[test]
fn the_map_of_a_chain_is_pinned() {
    let folder = chain();
    let plain = without_path(&folder, &folder.ok(&["map", "top.tply"]));
    let expected = "          offset           length depth  zero  data  layer
               0             8192     2  no    yes   base.tply
            8192             4096     1  no    yes   middle.tply
           12288             4096     2  no    yes   base.tply
           16384             8192     1  yes   no    middle.tply
           24576            40960     2  no    yes   base.tply
           65536          2027520     -  yes   no    -
         2093056             4096     0  no    yes   top.tply
";
    assert_eq!(plain, expected);

    let map = folder.json(&["map", "--json", "top.tply"]);
    assert_eq!(map["virtual_size"], 2 * MIB);
    let word = |value: &Value| match value {
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        Value::Null => "-".to_owned(),
        Value::String(text) => without_path(&folder, text),
        other => other.to_string(),
    };
    let columns = ["offset", "length", "depth", "zero", "data", "layer"];
    let rows: Vec<Vec<String>> = map["extents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|extent| columns.iter().map(|column| word(&extent[column])).collect())
        .collect();
    let lines: Vec<Vec<&str>> =
        expected.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows, lines);
}

/// `key: value` lines against a JSON object.
fn same_facts(plain: &str, json: &Value) {
    let facts: Vec<_> = json.as_object().unwrap().iter().filter(|(_, v)| !v.is_null()).collect();
    assert_eq!(plain.lines().count(), facts.len(), "{plain}\n{json}");
    for (line, (key, value)) in plain.lines().zip(facts) {
        let (label, shown) = line.split_once(':').unwrap();
        assert_eq!(label, key.replace('_', " "));
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let shown = shown.trim();
        let same = shown == value
            || shown == format!("{value} bytes")
            || shown.ends_with(&format!("({value} bytes)"));
        assert!(same, "{line} against {value}");
    }
}

#[test]
fn info_says_the_same_in_both_forms() {
    let folder = chain();
    for name in ["base.tply", "middle.tply", "top.tply"] {
        same_facts(&folder.ok(&["info", name]), &folder.json(&["info", "--json", name]));
    }
    let plain = folder.ok(&["info", "--chain", "top.tply"]);
    let json = folder.json(&["info", "--json", "--chain", "top.tply"]);
    let layers = json["layers"].as_array().unwrap();
    let blocks: Vec<_> = plain.split("\n\n").collect();
    assert_eq!((blocks.len(), layers.len()), (3, 3));
    blocks.iter().zip(layers).for_each(|(block, layer)| same_facts(block, layer));
    // A child names its parent by what the parent says of itself.
    for pair in layers.windows(2) {
        assert_eq!(pair[0]["parent_uuid"], pair[1]["uuid"]);
        assert_eq!(pair[0]["parent_freeze_id"], pair[1]["freeze_id"]);
        assert!(pair[1]["file"].as_str().unwrap().ends_with(pair[0]["parent"].as_str().unwrap()));
    }
    assert!(plain.contains("virtual size:                  2 MiB (2097152 bytes)"), "{plain}");
}

/// All numbers and texts in a JSON value, but for booleans and the names of kinds.
fn leaves(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| leaves(item, found)),
        Value::Object(fields) => fields.values().for_each(|item| leaves(item, found)),
        Value::Number(number) => found.push(number.to_string()),
        Value::String(text) => found.push(text.clone()),
        Value::Bool(_) | Value::Null => {}
    }
}

/// Every fact of the structures is in the plain output too.
fn assert_same_facts(plain: &str, structures: &[Value]) {
    let sections: Vec<_> = plain.split("\n\n").skip(1).collect();
    assert_eq!(sections.len(), structures.len());
    for (section, part) in sections.iter().zip(structures) {
        let mut facts = Vec::new();
        leaves(part, &mut facts);
        for fact in facts {
            let hex = fact.parse().map_or(String::new(), |number: u32| format!("{number:#010x}"));
            // A run is shown by its first and last block and its bytes.
            let bytes =
                fact.parse().map_or(String::new(), |count: u64| format!("{} bytes", count * 4096));
            let shown = section.contains(&fact)
                || (!hex.is_empty() && section.contains(&hex))
                || (!bytes.is_empty() && section.contains(&bytes));
            assert!(shown, "{fact} is not in {section}");
        }
    }
}

#[test]
fn the_dump_has_every_structure_in_both_forms() {
    let folder = chain();
    folder.crash("top.tply", 4096, &[4; 8192]);
    let plain = folder.ok(&["dump", "top.tply"]);
    let json = folder.json(&["dump", "--json", "top.tply"]);
    let structures = json["structures"].as_array().unwrap();
    let kinds: Vec<_> = structures.iter().map(|part| part["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["header slot", "header slot", "journal record", "bitmap page"]);
    assert_same_facts(&plain, structures);
    let record = &structures[2];
    assert_eq!(record["state"], "live");
    let blocks: Vec<_> =
        record["entries"].as_array().unwrap().iter().map(|e| &e["block"]).collect();
    assert_eq!(blocks, [1, 2]);
    assert_eq!(structures[3]["runs"], serde_json::json!([{"block": 511, "count": 1}]));
    let counting: Vec<_> =
        structures[..2].iter().map(|slot| slot["counts"].as_bool().unwrap()).collect();
    assert_eq!(counting.iter().filter(|&&counts| counts).count(), 1);
}

/// Flips a bit in a file.
fn damage(folder: &Folder, name: &str, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(folder.join(name)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
}

#[test]
fn damage_is_found_where_it_is_and_said_in_both_forms() {
    for (offset, what) in [
        (100, "header slot 0 does not have its checksum"),
        (65536, "header slot 1 does not begin with the magic"),
        (20_000, "reserved area"),
        ((1 << 20) + 5000, "a damaged record"),
        ((2 << 20) + 700, "bitmap sector 1 of group 0"),
        ((2 << 20) + 9000, "reserved area"),
    ] {
        let folder = chain();
        damage(&folder, "middle.tply", offset);
        for (file, args) in [("middle.tply", vec!["check"]), ("top.tply", vec!["check", "--chain"])]
        {
            let plain = folder.run(&[&args[..], &[file]].concat());
            let json = folder.run(&[&args[..], &["--json", file]].concat());
            assert_eq!((plain.code, json.code), (1, 1), "{offset}: {plain:?}");
            assert!(plain.stdout.contains(what), "{offset}: {plain:?}");
            let json: Value = serde_json::from_str(&json.stdout).unwrap();
            assert_eq!(json["clean"], false);
            for layer in json["layers"].as_array().unwrap() {
                let bad = layer["file"].as_str().unwrap().ends_with("/middle.tply");
                assert_eq!(layer["clean"], !bad, "{offset}: {json}");
                for finding in layer["findings"].as_array().unwrap() {
                    let line = format!(
                        "  at byte {}: {}\n",
                        finding["offset"],
                        finding["what"].as_str().unwrap()
                    );
                    assert!(plain.stdout.contains(&line), "{line} is not in {plain:?}");
                }
            }
        }
    }
    let folder = chain();
    let plain = without_path(&folder, &folder.ok(&["check", "--chain", "top.tply"]));
    assert_eq!(plain, "top.tply: clean\nmiddle.tply: clean\nbase.tply: clean\n");
}

#[test]
fn a_file_that_no_open_accepts_is_dumped_all_the_same() {
    let folder = chain();
    damage(&folder, "top.tply", 100);
    damage(&folder, "top.tply", 65536 + 100);
    folder.run(&["info", "top.tply"]).refused();
    let dump = folder.json(&["dump", "--json", "top.tply"]);
    let slots = &dump["structures"].as_array().unwrap()[..2];
    assert!(slots.iter().all(|slot| slot["state"] == "bad checksum"), "{dump}");
    assert_eq!(slots[0]["fields"]["hint"], "middle.tply");
    assert_eq!(dump["structures"][2]["owned"], 1);
    assert_eq!(folder.run(&["check", "top.tply"]).code, 1);
}

#[test]
fn the_dump_of_a_packed_layer_has_every_structure_in_both_forms() {
    let folder = chain();
    folder.ok(&["pack", "middle.tply", "p.tply"]);
    let plain = folder.ok(&["dump", "p.tply"]);
    let json = folder.json(&["dump", "--json", "p.tply"]);
    let structures = json["structures"].as_array().unwrap();
    let kinds: Vec<_> = structures.iter().map(|part| part["kind"].as_str().unwrap()).collect();
    let expected = ["packed header", "chunk", "group map", "directory entry", "footer"];
    assert_eq!(kinds, expected);
    assert_same_facts(&plain, structures);
    let [header, chunk, map, entry, footer] = &structures[..] else { panic!("{json}") };
    let info = folder.json(&["info", "--json", "p.tply"]);
    assert_eq!(
        footer["fields"]["root"].as_str(),
        info["identity"].as_str().or(info["root"].as_str())
    );
    assert_eq!(header["fields"]["hint"], "base.tply");
    let frame = &chunk["frames"][0];
    assert_eq!((&frame["offset"], &frame["decoded"]), (&4096.into(), &4096.into()));
    assert_eq!(
        map["present"],
        serde_json::json!([{"block": 2, "count": 1}, {"block": 4, "count": 2}])
    );
    assert_eq!(map["data"], serde_json::json!([{"block": 2, "count": 1}]));
    assert_eq!(entry["map_offset"], map["offset"]);

    for (part, changed) in
        [(chunk, "chunk"), (map, "group map"), (entry, "directory"), (footer, "footer")]
    {
        folder.ok(&["pack", "middle.tply", "q.tply"]);
        damage(&folder, "q.tply", part["offset"].as_u64().unwrap() + 9);
        let json = folder.json(&["dump", "--json", "q.tply"]);
        let structures = json["structures"].as_array().unwrap();
        let bad: Vec<_> = structures
            .iter()
            .filter(|part| part["state"].as_str().is_some_and(|state| state != "valid"))
            .map(|part| part["kind"].as_str().unwrap())
            .collect();
        assert_eq!(bad, [changed]);
        std::fs::remove_file(folder.join("q.tply")).unwrap();
    }
}

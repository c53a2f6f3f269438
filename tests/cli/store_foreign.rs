//! What others keep in the store's index: it is left as it is, and keeps thinply from nothing.

use std::fs;

use serde_json::{Value, json};

use crate::store::{blobs, stocked};
use crate::support::{Folder, MIB, noise, sha256};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const NAME: &str = "org.opencontainers.image.ref.name";

fn put(folder: &Folder, bytes: &[u8]) -> Value {
    let hex = sha256(bytes);
    folder.write(&format!("store/blobs/sha256/{hex}"), bytes);
    json!({"digest": format!("sha256:{hex}"), "size": bytes.len()})
}

fn blob(folder: &Folder, media_type: &str, bytes: &[u8]) -> Value {
    let mut descriptor = put(folder, bytes);
    descriptor["mediaType"] = media_type.into();
    descriptor
}

fn document(folder: &Folder, media_type: &str, value: &Value) -> Value {
    blob(folder, media_type, value.to_string().as_bytes())
}

/// A manifest with this configuration and one layer.
fn manifest(folder: &Folder, config: (&str, &[u8]), layer: (&str, &[u8])) -> Value {
    let config = blob(folder, config.0, config.1);
    let layers = [blob(folder, layer.0, layer.1)];
    document(folder, MANIFEST, &json!({"schemaVersion": 2, "config": config, "layers": layers}))
}

/// What kinds of things others keep in an index, each with content of its own.
fn entry(folder: &Folder, kind: usize, number: usize) -> Value {
    let text = format!("content {number}");
    let bytes = text.as_bytes();
    let config = "application/vnd.oci.image.config.v1+json";
    let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
    let ordinary = || {
        let config = (
            config,
            &br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#[..],
        );
        manifest(folder, config, (tar, bytes))
    };
    match kind {
        // cosign's signature, and an SBOM as oras attaches it.
        0 => manifest(
            folder,
            (config, b"{}"),
            ("application/vnd.dev.cosign.simplesigning.v1+json", bytes),
        ),
        1 => manifest(
            folder,
            ("application/vnd.oci.empty.v1+json", b"{}"),
            ("text/spdx+json", bytes),
        ),
        // BuildKit's attestation: a manifest with a name for its platform only.
        2 => {
            let mut entry =
                manifest(folder, (config, b"{}"), ("application/vnd.in-toto+json", bytes));
            entry["platform"] = json!({"architecture": "unknown", "os": "unknown"});
            entry["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
            entry
        }
        // umoci new
        3 => {
            let config = blob(folder, config, bytes);
            document(folder, MANIFEST, &json!({"schemaVersion": 2, "config": config, "layers": []}))
        }
        4 => ordinary(),
        5 => {
            let index = json!({"schemaVersion": 2, "manifests": [ordinary()]});
            document(folder, "application/vnd.oci.image.index.v1+json", &index)
        }
        6 => blob(folder, "application/vnd.acme.thing", bytes),
        7 => {
            let mut entry = manifest(folder, (config, bytes), ("application/octet-stream", bytes));
            entry["artifactType"] = "application/vnd.acme.artifact".into();
            entry
        }
        // No JSON; and an artifact whose manifest is kept elsewhere.
        8 => blob(folder, MANIFEST, bytes),
        _ => {
            let digest = format!("sha256:{number:064x}");
            json!({"mediaType": MANIFEST, "digest": digest, "size": 7, "artifactType": "text/plain"})
        }
    }
}

fn entries(folder: &Folder) -> Vec<Value> {
    let index: Value = serde_json::from_slice(&folder.read("store/index.json")).unwrap();
    index["manifests"].as_array().unwrap().clone()
}

fn with_entries(folder: &Folder, entries: &[Value]) {
    let index = json!({"schemaVersion": 2, "manifests": entries});
    folder.write("store/index.json", index.to_string().as_bytes());
}

#[test]
fn entries_of_others_are_left_as_they_are_and_hinder_nothing() {
    let folder = stocked();
    let own = entries(&folder);
    let mut foreign: Vec<_> = (0..50).map(|number| entry(&folder, number % 10, number)).collect();
    // Named in every way, or not at all.
    for (number, entry) in foreign.iter_mut().enumerate().filter(|(number, _)| number % 3 != 0) {
        let name = if number % 3 == 1 {
            format!("foreign:{number}")
        } else {
            format!("Not Ours {number}")
        };
        let annotations = entry.as_object_mut().unwrap().entry("annotations").or_insert(json!({}));
        annotations[NAME] = name.into();
    }
    // No entries at all.
    let odd = [json!(7), json!("sha256"), json!({}), json!({"digest": "sha512:00"}), Value::Null];
    with_entries(&folder, &[&foreign[..25], &own, &odd, &foreign[25..]].concat());
    let kept = blobs(&folder).len();

    let untouched = |folder: &Folder| {
        let now = entries(folder);
        for entry in foreign.iter().chain(&odd) {
            assert!(now.contains(entry), "{entry} is gone or altered");
        }
        assert_eq!(
            now.iter().filter(|entry| !foreign.contains(entry) && !odd.contains(entry)).count(),
            now.len() - 55
        );
    };
    let names = |folder: &Folder| {
        let rows = folder.json(&["image", "ls", "--json"]);
        let names = rows
            .as_array()
            .unwrap()
            .iter()
            .map(|row| row["repository"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(&folder), ["base"]);
    assert_eq!(folder.ok(&["store", "check"]), "clean\n");
    assert!(folder.ok(&["df"]).contains("Images       1 "), "{}", folder.ok(&["df"]));
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n");
    untouched(&folder);

    // Work goes on beside them.
    folder.ok(&["image", "tag", "base", "second"]);
    folder.write("more.raw", &noise(5, MIB as usize));
    folder.ok(&["image", "import", "--parent", "base", "more.raw", "app"]);
    folder.ok(&["image", "import", "more.raw", "second"]);
    folder.ok(&["container", "create", "app", "--name", "c"]);
    folder.ok(&["container", "commit", "c", "app:2"]);
    folder.ok(&["image", "save", "-o", "saved.tar", "base", "app"]);
    untouched(&folder);
    for name in ["foreign:1", "foreign:4", "foreign:13"] {
        for verb in
            [&["image", "rm", name][..], &["image", "tag", name, "x"], &["image", "inspect", name]]
        {
            let run = folder.run(verb);
            let told = run.refused();
            assert!(told.contains("no image"), "{verb:?}: {run:?}");
        }
    }
    folder.ok(&["container", "rm", "c"]);
    folder.ok(&["image", "rm", "base", "app", "app:2", "second"]);
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n");
    assert_eq!(names(&folder), [""; 0]);
    untouched(&folder);
    assert_eq!(blobs(&folder).len(), kept - 3);
    folder.ok(&["image", "load", "saved.tar"]);
    assert_eq!(names(&folder), ["app", "base"]);
    untouched(&folder);
    // An image may take a name of theirs, as of another image: the entry stays.
    folder.ok(&["image", "tag", "base", "foreign:4"]);
    assert_eq!(entries(&folder).len(), 55 + 3);
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n");
    assert_eq!(entries(&folder).len(), 55 + 3);
}

/// A name that is none of thinply's is one all the same.
#[test]
fn an_image_under_a_name_of_others_is_not_collected() {
    let folder = stocked();
    let mut own = entries(&folder);
    own[0]["annotations"][NAME] = "Base Image".into();
    with_entries(&folder, &own);
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n");
    assert_eq!(entries(&folder), own);
    let id = folder.json(&["image", "ls", "--json"])[0]["id"].as_str().unwrap().to_owned();
    assert!(folder.ok(&["image", "rm", &id[..12]]).starts_with("Untagged: sha256:"));
    assert_eq!(fs::read_dir(folder.join("store/blobs/sha256")).unwrap().count(), 0);
}

/// Another program may name two things alike: one of them goes by its name, the other one stays.
#[test]
fn of_two_images_of_one_name_the_removal_takes_one() {
    let folder = stocked();
    folder.write("other.raw", &noise(5, MIB as usize));
    folder.ok(&["image", "import", "other.raw", "other"]);
    folder.ok(&["image", "tag", "base", "more"]);
    let mut own = entries(&folder);
    own.iter_mut().for_each(|entry| entry["annotations"][NAME] = "same:1".into());
    own[1]["annotations"]["note"] = "other".into();
    with_entries(&folder, &own);
    folder.ok(&["image", "rm", "same:1"]);
    let left = entries(&folder);
    assert!(left.iter().any(|entry| entry["annotations"]["note"] == "other"), "{left:?}");
}

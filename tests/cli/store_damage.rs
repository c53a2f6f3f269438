//! A store of which some is damaged, or somebody else's: what is good is shown and can be removed, what
//! is bad is named.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::store::{Served, blobs, stocked, tidy};
use crate::support::{Folder, MIB, Run, noise, output, skip};

const BLOBS: &str = "store/blobs/sha256";

/// Two images that share nothing, each with a container, and a volume.
fn world() -> Folder {
    let folder = stocked();
    folder.write("other.raw", &noise(2, MIB as usize));
    folder.ok(&["image", "import", "other.raw", "other"]);
    folder.ok(&["container", "create", "base", "--name", "of-base"]);
    folder.ok(&["container", "create", "other", "--name", "of-other"]);
    folder.ok(&["volume", "create", "--size", "1M", "data"]);
    folder
}

fn copy(from: &Path, to: &Path) {
    let mut command = Command::new("cp");
    assert!(output(command.args(["-a", "--reflink=auto"]).arg(from).arg(to)).status.success());
}

/// Ways to damage a file.
const WAYS: [&str; 6] = ["flipped", "cut", "emptied", "removed", "a folder", "a link"];

fn damage(path: &Path, way: &str) {
    let open = || fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let length = fs::metadata(path).unwrap().len();
    match way {
        "flipped" => {
            let (file, mut byte) = (open(), [0]);
            file.read_exact_at(&mut byte, length / 2).unwrap();
            file.write_all_at(&[byte[0] ^ 1], length / 2).unwrap();
        }
        "cut" => open().set_len(length / 2).unwrap(),
        "emptied" => open().set_len(0).unwrap(),
        _ => fs::remove_file(path).unwrap(),
    }
    match way {
        "a folder" => fs::create_dir(path).unwrap(),
        "a link" => std::os::unix::fs::symlink("/dev/null", path).unwrap(),
        _ => {}
    }
}

/// It did what can be done: said what is bad with code 1, or that it can't with code 2.
fn sane(run: &Run, what: &str) {
    assert!((0..=2).contains(&run.code), "{what}: {run:?}");
    assert!(!run.stderr.contains("panicked"), "{what}: {run:?}");
    assert_eq!(run.code == 0, run.stderr.is_empty(), "{what}: {run:?}");
}

#[test]
fn every_blob_damaged_in_turn_hides_nothing_else() {
    let good = world();
    let own = |name: &str| {
        let facts = &good.json(&["image", "inspect", name])[0];
        let text = facts.to_string();
        let mut own = blobs(&good);
        own.retain(|blob| text.contains(blob.as_str()));
        own
    };
    let of_base = own("base");
    assert_eq!(of_base.len(), 3, "manifest, configuration, layer");
    for blob in &of_base {
        for way in WAYS {
            let folder = Folder::new();
            copy(&good.join("store"), &folder.join("store"));
            damage(&folder.join(BLOBS).join(blob), way);
            let what = format!("{blob} {way}");

            let list = folder.run(&["image", "ls"]);
            sane(&list, &what);
            assert!(list.stdout.contains("other"), "{what}: {list:?}");
            for args in [&["df"][..], &["gc", "--dry-run"], &["container", "ls"], &["volume", "ls"]]
            {
                let run = folder.run(args);
                sane(&run, &what);
                assert_ne!(run.code, 2, "{what}: {args:?}: {run:?}");
            }
            let check = folder.run(&["store", "check"]);
            assert!(check.code == 1 && check.stdout.contains(&blob[..12]), "{what}: {check:?}");

            let served = Served::all(&folder);
            let mut client = served.client("image/other").unwrap();
            client.read(0, 512).unwrap();
            drop(client);
            drop(served);

            // What is good goes on to work, and what is bad can be removed.
            folder.ok(&["container", "rm", "of-other"]);
            let run = folder.run(&["image", "rm", "other"]);
            assert!(run.code < 2 && run.stdout.contains("Untagged: other"), "{what}: {run:?}");
            folder.ok(&["container", "rm", "of-base"]);
            let run = folder.run(&["image", "rm", "base"]);
            assert!(run.code < 2 && run.stdout.contains("Untagged: base"), "{what}: {run:?}");
            let _ = fs::remove_dir(folder.join(BLOBS).join(blob));
            folder.ok(&["gc"]);
            assert_eq!(folder.json(&["image", "ls", "--json"]), json!([]));
            tidy(&folder);
        }
    }
}

#[test]
fn a_bad_record_hides_no_other_container_and_can_be_removed() {
    for text in ["", "{", "[]", "{\"manifest\": 7}", "\u{1b}[31mred"] {
        let folder = world();
        folder.write("store/containers/of-base.json", text.as_bytes());
        let list = folder.run(&["container", "ls"]);
        assert_eq!(list.code, 1, "{text:?}: {list:?}");
        assert!(list.stdout.contains("of-other"), "{list:?}");
        assert!(list.stderr.contains("of-base") && !list.stderr.contains('\u{1b}'), "{list:?}");
        for args in [&["df"][..], &["gc"], &["container", "ls", "-s"], &["image", "rm", "other"]] {
            let run = folder.run(args);
            sane(&run, text);
            assert!(!run.stdout.contains("Deleted"), "{args:?}: {run:?}");
        }
        // Nobody knows what it stands on, but its layer does.
        assert!(folder.run(&["image", "rm", "base"]).code > 0);
        folder.ok(&["container", "rm", "of-base"]);
        folder.ok(&["image", "rm", "base"]);
        tidy(&folder);
    }
}

/// Stores bytes as a blob; its descriptor.
fn put(folder: &Folder, kind: &str, bytes: &[u8]) -> Value {
    let digest = hex(&Sha256::digest(bytes));
    folder.write(&format!("{BLOBS}/{digest}"), bytes);
    json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len()})
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Entries of ten kinds that others keep in the same layout.
fn foreign(folder: &Folder, number: usize) -> Vec<Value> {
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    let index = "application/vnd.oci.image.index.v1+json";
    let empty = put(folder, "application/vnd.oci.empty.v1+json", b"{}");
    let config = put(
        folder,
        "application/vnd.oci.image.config.v1+json",
        br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#,
    );
    let tar = put(
        folder,
        "application/vnd.oci.image.layer.v1.tar+gzip",
        format!("layer {number}").as_bytes(),
    );
    let text = |value: Value| value.to_string().into_bytes();
    let of = |value: Value| put(folder, manifest, &text(value));
    let note = json!({"number": number});
    let signature = of(
        json!({"schemaVersion": 2, "mediaType": manifest, "config": empty, "layers": [{"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": tar["digest"], "size": 7}], "annotations": note}),
    );
    let sbom = of(
        json!({"schemaVersion": 2, "artifactType": "application/spdx+json", "config": empty, "layers": [empty], "n": number}),
    );
    let attestation = of(
        json!({"schemaVersion": 2, "config": config, "layers": [{"mediaType": "application/vnd.in-toto+json", "digest": tar["digest"], "size": 7}], "n": number}),
    );
    let bare = of(json!({"schemaVersion": 2, "config": config, "layers": [], "n": number}));
    let ordinary = of(
        json!({"schemaVersion": 2, "mediaType": manifest, "config": config, "layers": [tar], "n": number}),
    );
    let nested = put(
        folder,
        index,
        &text(json!({"schemaVersion": 2, "manifests": [ordinary], "n": number})),
    );
    let unknown =
        put(folder, "application/vnd.example.thing", format!("thing {number}").as_bytes());
    let docker = put(
        folder,
        "application/vnd.docker.distribution.manifest.v2+json",
        &text(json!({"schemaVersion": 2, "n": number})),
    );
    let no_json = put(folder, manifest, format!("no JSON {number}").as_bytes());
    let referrer = of(
        json!({"schemaVersion": 2, "subject": ordinary, "config": empty, "layers": [], "n": number}),
    );
    let mut all = vec![
        signature,
        sbom,
        attestation,
        bare,
        ordinary,
        nested,
        unknown,
        docker,
        no_json,
        referrer,
    ];
    for (place, entry) in all.iter_mut().enumerate() {
        if number > 0 {
            entry["annotations"] =
                json!({"org.opencontainers.image.ref.name": format!("foreign-{number}-{place}")});
        }
    }
    all
}

fn index_path(folder: &Folder) -> PathBuf {
    folder.join("store/index.json")
}

fn index(folder: &Folder) -> Value {
    serde_json::from_slice(&fs::read(index_path(folder)).unwrap()).unwrap()
}

#[test]
fn what_others_keep_in_the_layout_is_left_alone() {
    let folder = world();
    let mut text = index(&folder);
    for number in 0..5 {
        text["manifests"].as_array_mut().unwrap().extend(foreign(&folder, number));
    }
    fs::write(index_path(&folder), text.to_string()).unwrap();
    let before = blobs(&folder).len();
    let entries = text["manifests"].as_array().unwrap().len();
    assert_eq!(entries, 52);

    let list = folder.json(&["image", "ls", "--json"]);
    assert_eq!(list.as_array().unwrap().len(), 2);
    assert_eq!(folder.json(&["df", "--json"])[0]["total"], 2);
    tidy(&folder);
    let run = folder.run(&["container", "create", "foreign-1-4", "--name", "x"]);
    assert!(run.refused().contains("no image of thinply"), "{run:?}");
    let served = Served::all(&folder);
    assert!(served.client("image/base").is_ok());
    drop(served);
    folder.ok(&["container", "rm", "of-other"]);
    assert!(folder.ok(&["image", "rm", "other"]).contains("Deleted"));
    assert_eq!(blobs(&folder).len(), before - 3);
    assert_eq!(index(&folder)["manifests"].as_array().unwrap().len(), entries - 1);

    // Such a layout is loaded as far as it is thinply's, and leaves nothing else behind.
    let mut target = folder.command(&["image", "load", "store"]);
    let run: Run = output(target.env("THINPLY_ROOT", folder.join("second"))).into();
    assert_eq!((run.code, run.stdout.as_str()), (0, "Loaded image: base:latest\n"), "{run:?}");
    assert_eq!(fs::read_dir(folder.join("second/blobs/sha256")).unwrap().count(), 3);
}

#[test]
fn an_id_with_several_names_goes_only_where_that_is_asked_for() {
    let folder = stocked();
    folder.ok(&["image", "tag", "base", "base:2"]);
    folder.ok(&["image", "tag", "base", "third"]);
    let id = folder.json(&["image", "inspect", "base"])[0]["id"].as_str().unwrap().to_owned();
    let run = folder.run(&["image", "rm", &id[..12]]);
    for name in ["base:latest", "base:2", "third:latest", "--force"] {
        assert!(run.refused().contains(name), "{run:?}");
    }
    assert_eq!(folder.ok(&["image", "rm", "base:2"]), "Untagged: base:2\n");
    let text = folder.ok(&["image", "rm", "--force", &id[..12]]);
    assert!(text.contains("Untagged: base:latest\nUntagged: third:latest\nDeleted"), "{text}");
    tidy(&folder);
    // One name needs no force.
    folder.ok(&["image", "import", "base.raw", "base"]);
    let id = folder.json(&["image", "inspect", "base"])[0]["id"].as_str().unwrap().to_owned();
    assert!(folder.ok(&["image", "rm", &id]).contains("Untagged: base:latest"));
    tidy(&folder);
}

#[test]
fn a_hundred_thousand_names_are_listed_and_removed() {
    let folder = stocked();
    let mut text = index(&folder);
    let entries = text["manifests"].as_array_mut().unwrap();
    let first = entries[0].clone();
    entries.extend((0..100_000).map(|number| {
        let mut entry = first.clone();
        let name = format!("many/names:{number}");
        entry["annotations"]["org.opencontainers.image.ref.name"] = name.into();
        entry
    }));
    fs::write(index_path(&folder), text.to_string()).unwrap();
    let list = folder.json(&["image", "ls", "--json"]);
    assert_eq!(list.as_array().unwrap().len(), 100_001);
    assert_eq!(folder.json(&["df", "--json"])[0]["total"], 1);
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n");
    assert_eq!(folder.ok(&["image", "rm", "many/names:777"]), "Untagged: many/names:777\n");
    folder.ok(&["image", "tag", "many/names:5", "one/more"]);
    let served = Served::all(&folder);
    assert!(served.client("image/one/more").is_ok());
    drop(served);
    let id = folder.json(&["image", "inspect", "base"])[0]["id"].as_str().unwrap().to_owned();
    assert!(folder.ok(&["image", "rm", "--force", &id]).contains("Untagged: one/more:latest"));
    tidy(&folder);
}

/// A store that this process may only read: on a file system that is, or of another user.
#[test]
fn a_store_that_can_only_be_read_is_read() {
    let folder = world();
    let look = |run: &dyn Fn(&[&str]) -> Run| {
        for args in [
            &["image", "ls"][..],
            &["df"],
            &["gc", "--dry-run"],
            &["store", "check"],
            &["container", "ls", "-s"],
            &["volume", "ls"],
            &["image", "history", "base"],
        ] {
            let run = run(args);
            assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{args:?}: {run:?}");
        }
        let diff = run(&["container", "diff", "of-base"]);
        // Its disk has no file system; but it was looked at.
        assert!(
            !diff.stderr.contains("ermission") && !diff.stderr.contains("ead-only"),
            "{diff:?}"
        );
        let refused = run(&["image", "rm", "other"]);
        assert_eq!(refused.code, 2, "{refused:?}");
    };
    let store = folder.join("store");
    let bound = folder.join("bound");
    fs::create_dir(&bound).unwrap();
    let mount = |args: &[&str]| output(Command::new("mount").args(args)).status.success();
    let (from, to) = (store.to_str().unwrap(), bound.to_str().unwrap());
    if mount(&["--bind", from, to]) {
        if mount(&["-o", "remount,ro,bind", to]) {
            look(&|args| output(folder.command(args).env("THINPLY_ROOT", &bound)).into());
            let mut command = folder.command(&["serve", "--all", "--socket", "nbd.sock"]);
            let served = Served::start(&folder, command.env("THINPLY_ROOT", &bound));
            assert!(served.client("image/base").is_ok());
            drop(served);
        }
        output(Command::new("umount").arg(to));
    } else {
        skip("no bind mount");
    }
    let may_read = |path: &Path| {
        output(Command::new("chmod").args(["-R", "a+rX"]).arg(path));
    };
    may_read(folder.path());
    let as_nobody = |args: &[&str]| -> Run {
        let thinply = folder.command(args);
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(thinply.get_program()).args(thinply.get_args());
        output(command.env("THINPLY_ROOT", &store).current_dir("/")).into()
    };
    let probe = as_nobody(&["--version"]);
    if probe.code == 0 {
        look(&as_nobody);
    } else {
        skip("no setpriv, or the program is out of another user's reach");
    }
}

//! `image save` and `image load`: what other tools write, pipes, what is refused and leaves nothing.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::store::{blobs, stocked, tidy};
use crate::support::{Folder, Run, noise, output, sha256, start};

/// A folder with a store that has the image `base`, and an archive of it.
fn saved() -> Folder {
    let folder = stocked();
    folder.ok(&["image", "save", "--output", "base.tar", "base"]);
    folder
}

/// Loads into a store of its own.
fn load(folder: &Folder, store: &str, file: &str) -> Run {
    let mut command = folder.command(&["image", "load", file]);
    output(command.env("THINPLY_ROOT", folder.join(store))).into()
}

fn empty(folder: &Folder, store: &str) -> bool {
    fs::read_dir(folder.join(store).join("blobs/sha256")).unwrap().count() == 0
}

fn change_index(folder: &Folder, layout: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(layout).join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut index);
    fs::write(path, index.to_string()).unwrap();
}

/// The store as a layout of somebody else's.
fn layout(folder: &Folder, name: &str) {
    let copied =
        output(Command::new("cp").arg("-a").arg(folder.join("store")).arg(folder.join(name)));
    assert!(copied.status.success());
}

#[test]
fn archives_go_through_pipes() {
    let folder = saved();
    let stdout = output(&mut folder.command(&["image", "save", "-o", "-", "base"])).stdout;
    assert_eq!(stdout, folder.read("base.tar"));
    let fifo = folder.join("fifo");
    assert!(output(Command::new("mkfifo").arg(&fifo)).status.success());
    let reader = std::thread::spawn(move || fs::read(fifo).unwrap());
    folder.ok(&["image", "save", "-o", "fifo", "base"]);
    assert_eq!(reader.join().unwrap(), stdout);
    assert!(!folder.join("-").exists());

    let mut command = folder.command(&["image", "load", "-"]);
    command.env("THINPLY_ROOT", folder.join("second")).stdin(Stdio::piped());
    let mut child = start(&mut command);
    let mut pipe = child.stdin.take().unwrap();
    pipe.write_all(&stdout).unwrap();
    // Writers fill their last record, of any size, and must not find the pipe closed.
    pipe.write_all(&vec![0; 1 << 20]).unwrap();
    drop(pipe);
    let run: Run = child.wait_with_output().unwrap().into();
    assert_eq!((run.code, run.stdout.as_str()), (0, "Loaded image: base:latest\n"), "{run:?}");
}

#[test]
fn an_image_without_a_name_is_loaded_by_its_id() {
    let folder = saved();
    layout(&folder, "layout");
    change_index(&folder, "layout", |index| {
        index["manifests"][0].as_object_mut().unwrap().remove("annotations");
    });
    let run = load(&folder, "second", "layout");
    let id = run.stdout.trim().strip_prefix("Loaded image ID: sha256:").unwrap().to_owned();
    let root = folder.join("second");
    let second =
        |args: &[&str]| -> Run { output(folder.command(args).env("THINPLY_ROOT", &root)).into() };
    assert_eq!(second(&["image", "tag", &id, "named"]).code, 0);
    assert_eq!(second(&["gc"]).stdout, "Reclaimed: 0 bytes\n");
    assert_eq!(second(&["store", "check"]).stdout, "clean\n");
    // The store's own folder, also after a name has moved on.
    folder.write("other.raw", &noise(3, 1 << 20));
    folder.ok(&["image", "import", "other.raw", "base"]);
    let run = load(&folder, "third", "store");
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.stdout.contains("Loaded image: base:latest"), "{run:?}");
    assert!(run.stdout.contains("Loaded image ID: "), "{run:?}");
}

#[test]
fn what_is_no_blob_is_left_out() {
    let folder = saved();
    layout(&folder, "layout");
    folder.write("layout/blobs/sha256/README", b"hello");
    fs::create_dir(folder.join("layout/blobs/sha256/folder")).unwrap();
    assert_eq!(load(&folder, "second", "layout").stdout, "Loaded image: base:latest\n");
}

#[test]
fn a_load_that_is_refused_leaves_nothing() {
    let folder = saved();
    let whole = folder.read("base.tar");
    for cut in [whole.len() / 2, whole.len() - 3000, 600] {
        folder.write("cut.tar", &whole[..cut]);
        let run = load(&folder, "second", "cut.tar");
        assert!(run.refused().contains("cut.tar") || run.stderr.contains("cut off"), "{run:?}");
        assert!(!run.stderr.contains("SHA-256"), "{run:?}");
        assert!(empty(&folder, "second"), "{cut}");
    }
    let mut altered = whole.clone();
    let middle = altered.len() / 2;
    altered[middle] ^= 1;
    folder.write("altered.tar", &altered);
    assert!(load(&folder, "second", "altered.tar").refused().contains("SHA-256"));
    assert!(empty(&folder, "second"));

    for (name, command) in [("gz", "gzip"), ("xz", "xz"), ("zst", "zstd"), ("bz2", "bzip2")] {
        let path = folder.join(&format!("base.tar.{name}"));
        let made = Command::new(command)
            .arg("-c")
            .arg(folder.join("base.tar"))
            .stdout(File::create(&path).unwrap())
            .stderr(Stdio::null())
            .status();
        if made.is_ok_and(|status| status.success()) {
            let run = load(&folder, "second", &format!("base.tar.{name}"));
            assert!(run.refused().contains("compressed with"), "{run:?}");
            assert!(empty(&folder, "second"));
        }
    }

    for junk in [&b"junk"[..], &noise(9, 20_000)] {
        folder.write("junk.tar", junk);
        let run = load(&folder, "second", "junk.tar");
        assert!(run.refused().contains("junk.tar: no tar archive: "), "{run:?}");
        assert!(empty(&folder, "second"));
    }

    layout(&folder, "platforms");
    let inner = json!({"schemaVersion": 2, "manifests": [
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:00", "size": 1,
         "platform": {"os": "linux", "architecture": "arm64"}},
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:01", "size": 1,
         "platform": {"os": "linux", "architecture": "\u{1b}[31mred"}},
    ]});
    let bytes = inner.to_string();
    let digest = sha256(bytes.as_bytes());
    folder.write(&format!("platforms/blobs/sha256/{digest}"), bytes.as_bytes());
    change_index(&folder, "platforms", |index| {
        index["manifests"] = json!([{"mediaType": "application/vnd.oci.image.index.v1+json",
            "digest": format!("sha256:{digest}"), "size": bytes.len()}]);
    });
    let run = load(&folder, "second", "platforms");
    assert!(run.refused().contains("linux/arm64") && !run.stderr.contains('\u{1b}'), "{run:?}");
    assert!(empty(&folder, "second"));
    // A blob that was there before stays.
    let before = blobs(&folder).len();
    assert!(folder.run(&["image", "load", "altered.tar"]).code == 2);
    assert_eq!(blobs(&folder).len(), before);
    tidy(&folder);
}

//! The store from outside: what `docs/store.md` promises, and each line of what a store must
//! survive.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use testkit::plain::Client;

use crate::support::{Folder, KIB, MIB, noise, skip, start};

/// A folder with a store that has the image `base`, of 4 MiB.
pub fn stocked() -> Folder {
    let folder = Folder::new();
    folder.write("base.raw", &noise(1, 4 * MIB as usize));
    folder.ok(&["image", "import", "base.raw", "base"]);
    folder
}

/// Bytes of disk below a folder.
pub fn cost(path: &Path) -> u64 {
    let meta = fs::symlink_metadata(path).unwrap();
    let inside = meta.is_dir().then(|| fs::read_dir(path).unwrap());
    let inside = inside.into_iter().flatten().map(|entry| cost(&entry.unwrap().path()));
    meta.blocks() * 512 + inside.sum::<u64>()
}

pub fn blobs(folder: &Folder) -> Vec<String> {
    let entries = fs::read_dir(folder.join("store/blobs/sha256")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The store's own check, and a collection that finds nothing.
pub fn tidy(folder: &Folder) {
    assert_eq!(folder.ok(&["store", "check"]), "clean\n");
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n");
}

pub struct Served {
    child: Child,
    socket: String,
}

impl Served {
    pub fn all(folder: &Folder) -> Self {
        Self::start(folder, &mut folder.command(&["serve", "--all", "--socket", "nbd.sock"]))
    }

    /// Starts a command that serves on `nbd.sock`.
    pub fn start(folder: &Folder, command: &mut Command) -> Self {
        use std::io::{BufRead, BufReader};
        let mut child = start(command.stdout(Stdio::piped()));
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("nbd+unix:"), "{line}");
        Self::over(folder, child)
    }

    /// One that serves on `nbd.sock`, or soon will.
    pub fn over(folder: &Folder, child: Child) -> Self {
        Self { child, socket: folder.join("nbd.sock").display().to_string() }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end; its exit code.
    pub fn end(mut self) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(20) {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the server doesn't end");
    }

    pub fn client(&self, export: &str) -> std::io::Result<Client> {
        Client::connect(Path::new(&self.socket), export)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn odd_names_are_refused_and_make_nothing() {
    let folder = stocked();
    let long = "a".repeat(300);
    for name in ["../x", "", ".", "..", "a/b", "a\nb", "ä", "名前", " a", "a@b", ".draft-1", &long]
    {
        let flag = format!("--name={name}");
        folder.run(&["container", "create", "base", &flag]).refused();
        folder.run(&["volume", "create", "--size", "1M", name]).refused();
        folder.run(&["image", "import", "base.raw", &format!("{name}:A!")]).refused();
        folder.run(&["container", "rm", name]).refused();
        folder.run(&["volume", "rm", name]).refused();
        folder.run(&["image", "rm", name]).refused();
        folder.run(&["container", "reset", name]).refused();
    }
    folder.ok(&["container", "create", "base", "--name", "c"]);
    for name in ["../x", "", "a@b", &long] {
        folder.run(&["container", "snapshot", "c", name]).refused();
        folder.run(&["container", "commit", "c", &format!("{name}:")]).refused();
    }
    assert_eq!(folder.json(&["container", "ls", "--json"]).as_array().unwrap().len(), 1);
    assert_eq!(folder.names(), ["base.raw", "store"]);
    tidy(&folder);
}

#[test]
fn a_name_that_is_taken_is_refused_or_moves_as_an_image_name_does() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    let run = folder.run(&["container", "create", "base", "--name", "c"]);
    assert!(run.refused().contains("there is a container \"c\" already"), "{run:?}");
    folder.ok(&["volume", "create", "--size", "1M", "v"]);
    assert!(folder.run(&["volume", "create", "--size", "1M", "v"]).refused().contains("already"));
    folder.write("other.raw", &noise(2, MIB as usize));
    let old = folder.json(&["image", "inspect", "base"])[0]["id"].clone();
    folder.ok(&["image", "import", "other.raw", "base"]);
    assert_ne!(folder.json(&["image", "inspect", "base"])[0]["id"], old);
    let listed = folder.ok(&["image", "ls"]);
    assert!(listed.contains("<none>"), "{listed}");
    // The container keeps its image, though that has no name any more.
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n");
    folder.ok(&["container", "rm", "c"]);
    assert!(folder.ok(&["gc"]).contains("Untagged: "));
    assert!(!folder.ok(&["image", "ls"]).contains("<none>"));
    tidy(&folder);
}

#[test]
fn a_container_is_never_smaller_than_its_image() {
    let folder = stocked();
    let create = |size| folder.run(&["container", "create", "base", "--name", "c", "--size", size]);
    let message = create("1M").refused().to_owned();
    assert!(message.contains("container c of 1048576 bytes"), "{message}");
    assert!(message.contains("the image's 4194304"), "{message}");
    assert_eq!(folder.json(&["container", "ls", "--json"]).as_array().unwrap().len(), 0);
    assert_eq!(create("4M").code, 0);
    tidy(&folder);
}

#[test]
fn what_is_said_of_a_size_names_the_disk() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.ok(&["volume", "create", "--size", "8M", "v"]);
    for (args, parts) in [
        (&["volume/v", "4M"][..], ["volume/v: 4194304 bytes", "--shrink"]),
        (&["container/c", "-1M"], ["container/c: 3145728 bytes", "--shrink"]),
        (&["volume/v", "1000"], ["volume/v: ", "multiple of 512"]),
        (&["container/c", "-9M"], ["container/c: ", "no change"]),
        (&["container/nosuch", "1M"], ["there is no container", "\"nosuch\""]),
        (&["volume/nosuch", "1M"], ["there is no volume", "\"nosuch\""]),
    ] {
        let run = folder.run(&[&["resize"], args].concat());
        let message = run.refused();
        assert!(parts.iter().all(|part| message.contains(part)), "{args:?}: {message}");
    }
    folder.ok(&["resize", "--shrink", "volume/v", "4M"]);
    folder.ok(&["resize", "container/c", "+1M"]);
}

#[test]
fn removing_what_is_in_use_is_refused_with_who_uses_it() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "web"]);
    folder.ok(&["volume", "create", "--size", "1M", "data"]);
    let run = folder.run(&["image", "rm", "base"]);
    assert!(run.refused().contains("is used by container web"), "{run:?}");
    let served = Served::all(&folder);
    let (web, data) =
        (served.client("container/web").unwrap(), served.client("volume/data").unwrap());
    for args in
        [&["container", "rm", "web"][..], &["container", "reset", "web"], &["volume", "rm", "data"]]
    {
        let run = folder.run(args);
        let holder = format!("thinply ({})", served.child.id());
        assert!(run.refused().contains(&holder), "{args:?}: {run:?}");
    }
    web.disconnect().unwrap();
    data.disconnect().unwrap();
    drop(served);
    folder.ok(&["container", "rm", "web"]);
    folder.ok(&["volume", "rm", "data"]);
    folder.ok(&["image", "rm", "base"]);
    assert_eq!(blobs(&folder), [""; 0]);
    tidy(&folder);
}

#[test]
fn a_blob_that_is_missing_short_or_altered_is_found_and_refused() {
    for damage in ["missing", "short", "altered"] {
        let folder = stocked();
        folder.ok(&["container", "create", "base", "--name", "c"]);
        let layer = folder.json(&["image", "history", "--json", "base"])[0]["id"].clone();
        let path = folder.join("store/blobs/sha256").join(layer.as_str().unwrap());
        match damage {
            "missing" => fs::remove_file(&path).unwrap(),
            "short" => {
                let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
                file.set_len(3 * MIB).unwrap();
            }
            _ => {
                use std::os::unix::fs::FileExt;
                let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(b"altered", 4 * MIB).unwrap();
            }
        }
        let run = folder.run(&["store", "check"]);
        assert_eq!(run.code, 1, "{damage}: {run:?}");
        assert!(run.stdout.contains(layer.as_str().unwrap()), "{damage}: {run:?}");
        if damage != "altered" {
            let run = folder.run(&["container", "create", "base", "--name", "d"]);
            assert!(run.refused().contains(layer.as_str().unwrap()), "{damage}: {run:?}");
        }
    }
    // A manifest that was altered ends every collection: it may be what keeps a layer.
    let folder = stocked();
    let id = folder.json(&["image", "inspect", "base"])[0]["id"].as_str().unwrap().to_owned();
    let path = folder.join("store/blobs/sha256").join(&id);
    let text = fs::read_to_string(&path).unwrap().replace("layers", "Gate");
    fs::write(&path, text).unwrap();
    let before = blobs(&folder).len();
    let run = folder.run(&["gc"]);
    assert_eq!(run.code, 1, "{run:?}");
    assert!(
        run.stderr.contains("image base:latest: ") && run.stderr.contains("altered"),
        "{run:?}"
    );
    assert_eq!(blobs(&folder).len(), before);
}

#[test]
fn a_served_container_is_committed_while_its_client_goes_on() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    let served = Served::all(&folder);
    let mut client = served.client("container/c").unwrap();
    client.write(0, &[1; 4096]).unwrap();
    folder.ok(&["container", "commit", "c", "base:2"]);
    client.write(4096, &[2; 4096]).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
    folder.ok(&["container", "snapshot", "c", "s"]);
    client.write(4096, &[3; 4096]).unwrap();
    let mut image = served.client("image/base:2").unwrap();
    assert_eq!(image.read(0, 4096).unwrap(), [1; 4096]);
    assert_ne!(image.read(4096, 4096).unwrap(), [2; 4096]);
    let mut saved = served.client("container/c@s").unwrap();
    assert_eq!(saved.read(4096, 4096).unwrap(), [2; 4096]);
    assert_eq!(client.read(4096, 4096).unwrap(), [3; 4096]);
    let mut second = served.client("image/base:2").unwrap();
    assert_eq!(second.read(0, 4096).unwrap(), [1; 4096], "an image has many readers");
    for client in [client, image, saved, second] {
        client.disconnect().unwrap();
    }
    drop(served);
    // What became of the first write is the image's, not the container's.
    let diff = folder.json(&["container", "diff", "--json", "c"]);
    assert_eq!(diff["extents"].as_array().unwrap().len(), 1, "{diff}");
    assert_eq!(diff["extents"][0]["offset"], 4096);
    assert!(diff["files"].is_null(), "no file system");
    tidy(&folder);
}

#[test]
fn a_volume_has_one_writer_or_many_readers() {
    let folder = Folder::new();
    folder.ok(&["volume", "create", "--size", "1M", "v"]);
    let served = Served::all(&folder);
    let mut writer = served.client("volume/v").unwrap();
    writer.write(0, &[1; 512]).unwrap();
    assert!(served.client("volume/v").is_err(), "a second writer");
    assert!(served.client("volume/v:ro").is_err(), "a reader beside a writer");
    writer.disconnect().unwrap();
    let mut readers =
        [served.client("volume/v:ro").unwrap(), served.client("volume/v:ro").unwrap()];
    for reader in &mut readers {
        assert_eq!(reader.read(0, 512).unwrap(), [1; 512]);
        assert!(reader.write(0, &[2; 512]).is_err(), "a reader must not write");
    }
    assert!(served.client("volume/v").is_err(), "a writer beside readers");
}

#[test]
fn exports_appear_and_go_as_the_store_changes() {
    let folder = stocked();
    let served = Served::all(&folder);
    assert!(served.client("container/c").is_err());
    folder.ok(&["container", "create", "base", "--name", "c"]);
    served.client("container/c").unwrap().disconnect().unwrap();
    while folder.run(&["container", "rm", "c"]).code != 0 {}
    assert!(served.client("container/c").is_err());
    for odd in ["", "container/../c", "image/../../x", "volume/", "nonsense", "blobs/sha256"] {
        assert!(served.client(odd).is_err(), "{odd}");
    }
}

#[test]
fn only_one_process_serves_a_store_and_its_control_socket_is_the_owners() {
    use std::os::unix::fs::PermissionsExt;
    let folder = stocked();
    let _served = Served::all(&folder);
    let mode = fs::metadata(folder.join("store/control")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let run = folder.run(&["serve", "--all", "--socket", "other.sock"]);
    assert!(run.refused().contains("another process serves this store"), "{run:?}");
}

#[test]
fn reset_goes_back_to_the_image_or_to_a_snapshot() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c", "--size", "8M"]);
    let write = |at: u64, byte: u8| {
        let served = Served::all(&folder);
        let mut client = served.client("container/c").unwrap();
        client.write(at, &[byte; 4096]).unwrap();
        client.disconnect().unwrap();
    };
    let read = |at: u64| {
        let served = Served::all(&folder);
        let mut client = served.client("container/c").unwrap();
        client.read(at, 4096).unwrap()
    };
    write(0, 1);
    folder.ok(&["container", "snapshot", "c", "one"]);
    write(0, 2);
    folder.ok(&["container", "reset", "c", "one"]);
    assert_eq!(read(0), [1; 4096]);
    folder.ok(&["container", "reset", "c"]);
    assert_eq!(read(0), noise(1, 4096));
    folder.ok(&["container", "reset", "c", "one"]);
    assert_eq!(read(0), [1; 4096]);
    assert!(folder.run(&["container", "reset", "c", "two"]).refused().contains("no snapshot"));
    assert_eq!(folder.json(&["container", "inspect", "c"])[0]["device_size"], 8 * MIB);
    tidy(&folder);
    folder.ok(&["container", "rm", "c"]);
    assert_eq!(fs::read_dir(folder.join("store/containers")).unwrap().count(), 0);
}

#[test]
fn images_go_through_an_archive_and_come_back_the_same() {
    let folder = stocked();
    folder.write("more.raw", &noise(3, 4 * MIB as usize + 4096));
    folder.ok(&["image", "import", "--parent", "base", "more.raw", "more:1"]);
    folder.ok(&["image", "save", "-o", "images.tar", "base", "more:1"]);
    let shown = || {
        let mut shown = folder.json(&["image", "inspect", "base", "more:1"]);
        let images = shown.as_array_mut().unwrap();
        // What a file takes on disk depends on how it was written.
        images.iter_mut().for_each(|image| drop(image.as_object_mut().unwrap().remove("size")));
        (shown, blobs(&folder).len())
    };
    let before = shown();
    fs::remove_dir_all(folder.join("store")).unwrap();
    let loaded = folder.ok(&["image", "load", "images.tar"]);
    assert_eq!(loaded, "Loaded image: base:latest\nLoaded image: more:1\n");
    assert_eq!(shown(), before);
    tidy(&folder);
    // A byte of a layer that changed on the way.
    let mut archive = folder.read("images.tar");
    let content = noise(1, 512);
    let at = archive.windows(512).position(|part| part == content).unwrap();
    archive[at] ^= 1;
    folder.write("bad.tar", &archive);
    fs::remove_dir_all(folder.join("store")).unwrap();
    folder.run(&["image", "load", "bad.tar"]).refused();
    assert_eq!(folder.ok(&["image", "ls"]).lines().count(), 1);
    assert_eq!(blobs(&folder), [""; 0], "what came before the bad blob");
    // What others refer to stays, whoever brought it.
    folder.ok(&["image", "import", "base.raw", "base"]);
    let kept = blobs(&folder).len();
    folder.run(&["image", "load", "bad.tar"]).refused();
    assert_eq!(blobs(&folder).len(), kept);
    tidy(&folder);
}

/// Docker refuses it too: the first name would go, and not be told of.
#[test]
fn by_its_id_an_image_of_several_names_goes_only_if_that_is_insisted_on() {
    let folder = stocked();
    let id = folder.json(&["image", "inspect", "base"])[0]["id"].as_str().unwrap().to_owned();
    let (short, full) = (&id[..12], format!("sha256:{id}"));
    folder.ok(&["image", "tag", "base", "other:1"]);
    folder.write("between.raw", &noise(2, MIB as usize));
    folder.ok(&["image", "import", "between.raw", "between"]);
    folder.ok(&["image", "tag", "base", "third"]);
    for word in [short, &full] {
        let run = folder.run(&["image", "rm", word]);
        assert!(run.refused().contains("has 3 names"), "{run:?}");
        assert!(run.stderr.contains("base:latest, other:1, third:latest"), "{run:?}");
    }
    assert_eq!(folder.ok(&["image", "rm", "third"]), "Untagged: third:latest\n");
    // With the others it goes, but for what a container stands on.
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.ok(&["image", "rm", "between"]);
    let run = folder.run(&["image", "rm", "-f", short]);
    assert!(run.refused().contains("used by container c"), "{run:?}");
    folder.ok(&["container", "rm", "c"]);
    let removed = folder.ok(&["image", "rm", "-f", short]);
    let lines: Vec<_> = removed.lines().collect();
    assert_eq!(lines[..2], ["Untagged: base:latest", "Untagged: other:1"]);
    assert!(lines[2..].iter().all(|line| line.starts_with("Deleted: sha256:")), "{removed}");
    assert_eq!(lines.len(), 5, "{removed}");
    assert_eq!(blobs(&folder), [""; 0]);
    // One name is no question.
    folder.ok(&["image", "import", "base.raw", "base"]);
    let id = folder.json(&["image", "inspect", "base"])[0]["id"].as_str().unwrap().to_owned();
    assert!(folder.ok(&["image", "rm", &id]).starts_with("Untagged: base:latest\nDeleted: "));
    tidy(&folder);
}

#[test]
fn a_removal_that_fails_keeps_no_other_from_being_done() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.ok(&["image", "tag", "base", "more"]);
    let run = folder.run(&["container", "rm", "a", "c", "b"]);
    assert_eq!((run.code, run.stdout.as_str()), (2, "c\n"));
    assert!(run.stderr.contains("\"a\"") && run.stderr.contains("\"b\""), "{run:?}");
    let run = folder.run(&["image", "rm", "none", "more", "gone"]);
    assert_eq!((run.code, run.stdout.as_str()), (2, "Untagged: more:latest\n"));
    assert!(run.stderr.contains("\"none\"") && run.stderr.contains("\"gone\""), "{run:?}");
}

/// Texts of images come from anywhere, and a terminal takes some of them for commands.
#[test]
fn control_characters_of_an_image_reach_no_terminal() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.ok(&["container", "commit", "-m", "red \u{1b}[31m\u{9b}0m", "c", "red"]);
    let shown = folder.ok(&["image", "history", "red"]);
    assert!(shown.contains(r"red \u{1b}[31m\u{9b}0m") && !shown.contains('\u{1b}'), "{shown:?}");
    let shown = folder.json(&["image", "history", "--json", "red"]);
    assert_eq!(shown[0]["comment"], "red \u{1b}[31m\u{9b}0m");
}

#[test]
fn commits_and_snapshots_of_a_served_container_at_once_lose_nothing() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    let served = Served::all(&folder);
    let mut client = served.client("container/c").unwrap();
    for round in 0..8u64 {
        let (image, snapshot) = (format!("base:{round}"), format!("s{round}"));
        let verbs: [&[&str]; 3] = [
            &["container", "commit", "c", &image],
            &["container", "snapshot", "c", &snapshot],
            &["container", "commit", "c", "base:again"],
        ];
        let children = verbs.map(|verb| start(&mut folder.command(verb)));
        for at in 0..8 {
            client.write((8 * round + at) * 4096, &[round as u8 + 1; 4096]).unwrap();
        }
        for child in children {
            assert!(child.wait_with_output().unwrap().status.success());
        }
    }
    for at in 0..64 {
        assert_eq!(client.read(at * 4096, 4096).unwrap(), [(at / 8) as u8 + 1; 4096], "{at}");
    }
    client.disconnect().unwrap();
    drop(served);
    // What lost its name to another commit goes.
    folder.ok(&["gc"]);
    tidy(&folder);
}

/// The server is closing the disk then: what the client wrote has to be made durable first.
#[test]
fn a_container_is_changed_right_after_a_client_has_left() {
    let folder = Folder::new();
    folder.write("base.raw", &noise(1, 64 * MIB as usize));
    folder.ok(&["image", "import", "base.raw", "base"]);
    folder.ok(&["container", "create", "base", "--name", "c"]);
    let served = Served::all(&folder);
    for (round, verb) in [
        &["container", "snapshot", "c", "s"][..],
        &["container", "commit", "c", "base:2"],
        &["container", "diff", "c"],
    ]
    .into_iter()
    .enumerate()
    {
        let mut client = served.client("container/c").unwrap();
        for at in 0..64 {
            client.write(at * MIB, &noise(round as u64 + 2, MIB as usize)).unwrap();
        }
        drop(client);
        folder.ok(verb);
    }
}

#[test]
fn diff_names_the_files_that_changed() {
    let folder = Folder::new();
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("etc/old")).unwrap();
    for (name, text) in [("etc/same", "same"), ("etc/changed", "before"), ("etc/old/file", "x")] {
        fs::write(tree.join(name), text).unwrap();
    }
    let Ok(_) = std::process::Command::new("/usr/sbin/debugfs").arg("-V").output() else {
        return skip("needs debugfs and mke2fs");
    };
    folder.ok(&["image", "build-from", "tree", "base"]);
    folder.ok(&["container", "create", "base", "--name", "c"]);
    assert_eq!(folder.json(&["container", "diff", "--json", "c"])["files"], serde_json::json!([]));
    // Changes a copy of the disk as root of it, and writes what differs into the container.
    folder.write("changed", b"after, and longer");
    folder.write("added", b"new");
    let served = Served::all(&folder);
    let mut client = served.client("container/c").unwrap();
    let size = folder.json(&["container", "inspect", "c"])[0]["device_size"].as_u64().unwrap();
    let disk: Vec<u8> = (0..size)
        .step_by(MIB as usize)
        .flat_map(|at| client.read(at, (size - at).min(MIB) as u32).unwrap())
        .collect();
    folder.write("disk.raw", &disk);
    let commands = "rm /etc/old/file\nrmdir /etc/old\nrm /etc/changed\n\
                    write changed /etc/changed\nmkdir /new\nwrite added /new/\u{1b}file\n";
    folder.write("commands", commands.as_bytes());
    let mut debugfs = std::process::Command::new("/usr/sbin/debugfs");
    debugfs.args(["-w", "-f", "commands", "disk.raw"]).current_dir(folder.path());
    assert!(crate::support::output(&mut debugfs).status.success());
    let changed = folder.read("disk.raw");
    for (at, (new, old)) in changed.chunks(4096).zip(disk.chunks(4096)).enumerate() {
        if new != old {
            client.write(at as u64 * 4096, new).unwrap();
        }
    }
    let while_served = folder.ok(&["container", "diff", "c"]);
    client.disconnect().unwrap();
    drop(served);
    let shown = folder.ok(&["container", "diff", "c"]);
    assert_eq!(shown, while_served);
    let files: Vec<_> = shown.lines().filter(|line| !line.starts_with(' ')).collect();
    let expected = ["C /etc/changed", "D /etc/old", "A /new", r"A /new/\u{1b}file"];
    assert_eq!(files, expected, "{shown}");
    let files = &folder.json(&["container", "diff", "--json", "c"])["files"];
    assert_eq!(files[3], serde_json::json!({"change": "added", "path": "/new/\u{1b}file"}));
    // A file system that isn't what its magic number says.
    let served = Served::all(&folder);
    let mut client = served.client("container/c").unwrap();
    client.write(1024, &[0xff; 48]).unwrap();
    client.disconnect().unwrap();
    drop(served);
    let run = folder.run(&["container", "diff", "c"]);
    assert!(run.refused().contains("ext4"), "{run:?}");
}

#[test]
fn a_container_costs_at_most_16_kib_and_gives_all_of_it_back() {
    let folder = stocked();
    let before = cost(&folder.join("store"));
    for name in ["a", "b", "c", "d", "e"] {
        folder.ok(&["container", "create", "base", "--name", name]);
    }
    let after = cost(&folder.join("store"));
    assert!(after - before <= 5 * 16 * KIB, "{}", after - before);
    folder.ok(&["container", "rm", "a", "b", "c", "d", "e"]);
    assert_eq!(cost(&folder.join("store")), before);
}

/// What only a later version may change is read as before by this one; what only that one can read is
/// left alone.
#[test]
fn a_store_of_a_later_version_is_read_and_never_changed() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.ok(&["container", "snapshot", "c", "s"]);
    folder.ok(&["volume", "create", "--size", "1M", "v"]);
    folder.ok(&["image", "save", "-o", "images.tar", "base"]);
    folder.write("store/features", br#"{"read":[],"version":1,"write":["lazy"]}"#);
    let cost = cost(&folder.join("store"));
    for verb in [
        &["image", "import", "base.raw", "new"][..],
        &["image", "load", "images.tar"],
        &["image", "tag", "base", "other"],
        &["image", "rm", "base"],
        &["container", "create", "base", "--name", "new"],
        &["container", "commit", "c", "new"],
        &["container", "snapshot", "c", "new"],
        &["container", "reset", "c"],
        &["container", "rm", "c"],
        &["volume", "create", "--size", "1M", "new"],
        &["volume", "rm", "v"],
        &["gc"],
        &["gc", "--dry-run"],
    ] {
        let run = folder.run(verb);
        assert!(run.refused().contains("the feature \"lazy\""), "{verb:?}: {run:?}");
    }
    for verb in [
        &["image", "ls"][..],
        &["image", "history", "base"],
        &["image", "inspect", "base"],
        &["image", "save", "-o", "saved.tar", "base"],
        &["container", "ls"],
        &["container", "inspect", "c"],
        &["container", "diff", "c"],
        &["volume", "ls"],
        &["volume", "inspect", "v"],
        &["df"],
        &["store", "check"],
    ] {
        folder.ok(verb);
    }
    let served = Served::all(&folder);
    for export in ["image/base:latest", "container/c@s", "volume/v:ro"] {
        served.client(export).unwrap().disconnect().unwrap();
    }
    assert!(served.client("container/c").is_err());
    assert!(served.client("volume/v").is_err());
    drop(served);
    assert_eq!(self::cost(&folder.join("store")), cost);

    folder.write("store/features", br#"{"read":["lazy"],"version":1,"write":[]}"#);
    for verb in [&["image", "ls"][..], &["df"], &["store", "check"], &["volume", "rm", "v"]] {
        assert!(folder.run(verb).refused().contains("the feature \"lazy\""), "{verb:?}");
    }
    folder.write("store/features", b"{");
    assert!(folder.run(&["image", "ls"]).refused().contains("features"));
}

#[test]
fn a_disk_of_the_store_is_resized_by_its_name_also_while_it_is_served() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.ok(&["volume", "create", "--size", "1M", "v"]);
    let size = |noun: &str, name: &str, field: &str| {
        folder.json(&[noun, "inspect", name])[0][field].as_u64().unwrap()
    };
    folder.ok(&["resize", "container/c", "8M"]);
    folder.ok(&["resize", "volume/v", "+1M"]);
    assert_eq!(size("volume", "v", "virtual_size"), 2 * MIB);
    assert!(folder.run(&["resize", "volume/v", "-1M"]).refused().contains("shrink"));
    folder.ok(&["resize", "--shrink", "volume/v", "-1M"]);
    assert_eq!(size("volume", "v", "virtual_size"), MIB);
    assert!(folder.run(&["resize", "container/none", "8M"]).code == 2);

    let served = Served::all(&folder);
    let mut client = served.client("container/c").unwrap();
    client.write(8 * MIB - 512, &[7; 512]).unwrap();
    folder.ok(&["resize", "container/c", "16M"]);
    client.write(0, &[8; 512]).unwrap();
    assert_eq!(client.read(8 * MIB - 512, 512).unwrap(), [7; 512]);
    client.disconnect().unwrap();
    let mut client = served.client("container/c").unwrap();
    client.write(16 * MIB - 512, &[9; 512]).unwrap();
    drop((client, served));
    assert_eq!(size("container", "c", "device_size"), 16 * MIB);
    // A file of that name is meant where there is one.
    fs::create_dir(folder.join("container")).unwrap();
    folder.ok(&["create", "--size", "1M", "container/c"]);
    folder.ok(&["resize", "container/c", "2M"]);
    assert_eq!(folder.json(&["info", "--json", "container/c"])["virtual_size"], 2 * MIB);
}

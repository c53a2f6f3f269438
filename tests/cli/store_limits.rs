//! The store where something has run out: a full disk, no descriptors left.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::store::{Served, blobs, stocked, tidy};
use crate::support::{Folder, MIB, noise, output, skip};

struct Mounted<'a>(&'a Folder);

impl<'a> Mounted<'a> {
    /// Mounts a file system as the store's folder.
    fn new(folder: &'a Folder, args: &[&str]) -> Option<Self> {
        fs::create_dir(folder.join("store")).unwrap();
        let mut mount = Command::new("mount");
        mount.args(args).arg("store").current_dir(folder.path());
        output(&mut mount).status.success().then_some(Self(folder))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.join("store")).status();
    }
}

/// Writes until nothing fits any more, down to the last block.
fn fill(folder: &Folder) {
    let filler = folder.join("store/filler");
    let mut file = fs::OpenOptions::new().append(true).create(true).open(filler).unwrap();
    // What is only promised to the file may turn out smaller once it is on the disk.
    for _ in 0..3 {
        while file.write_all(&[1; 4096]).is_ok() {}
        let _ = file.sync_all();
    }
}

/// Every removal works, though the disk is full before each.
fn removal_works(folder: &Folder) {
    folder.write("base.raw", &noise(1, 2 * MIB as usize));
    folder.write("other.raw", &noise(2, MIB as usize));
    folder.ok(&["image", "import", "base.raw", "base"]);
    // The first one loses its name: something for gc.
    folder.ok(&["image", "import", "other.raw", "moved"]);
    folder.ok(&["image", "import", "--parent", "base", "other.raw", "moved"]);
    for name in ["a", "b"] {
        folder.ok(&["container", "create", "base", "--name", name]);
    }
    folder.ok(&["volume", "create", "--size", "1M", "v"]);
    let removals: [&[&str]; 6] = [
        &["volume", "rm", "v"],
        &["container", "rm", "a"],
        &["gc"],
        &["container", "rm", "b"],
        &["image", "rm", "moved"],
        &["image", "rm", "base"],
    ];
    for removal in removals {
        fill(folder);
        let run = folder.run(&["volume", "create", "--size", "1M", "new"]);
        assert!(run.refused().contains("No space left"), "{run:?}");
        folder.ok(removal);
    }
    assert_eq!(blobs(folder), [""; 0]);
    fs::remove_file(folder.join("store/filler")).unwrap();
    tidy(folder);
}

#[test]
fn removal_works_on_a_full_disk() {
    let folder = Folder::new();
    let Some(_mounted) = Mounted::new(&folder, &["-t", "tmpfs", "-o", "size=12m", "tmpfs"]) else {
        return skip("no right to mount a tmpfs");
    };
    removal_works(&folder);
}

#[test]
fn removal_works_on_a_full_ext4() {
    let folder = Folder::new();
    fs::File::create(folder.join("ext4")).unwrap().set_len(24 * MIB).unwrap();
    let mut mkfs = Command::new("/usr/sbin/mkfs.ext4");
    mkfs.args(["-q", "-F", "-m", "0", "ext4"]).current_dir(folder.path());
    let made = mkfs.status().is_ok_and(|status| status.success());
    let Some(_mounted) = Mounted::new(&folder, &["-o", "loop", "ext4"]).filter(|_| made) else {
        return skip("needs mkfs.ext4, and the right to mount its file system");
    };
    removal_works(&folder);
}

/// Serves a folder's store with a limit on descriptors, as `ulimit` takes it.
fn served_with(folder: &Folder, ulimit: &str) -> Served {
    let program = folder.command(&[]).get_program().display().to_string();
    let line = format!("ulimit {ulimit}; exec '{program}' serve --all --socket nbd.sock 2> log");
    let mut command = Command::new("sh");
    command.arg("-c").arg(line).current_dir(folder.path());
    Served::start(folder, command.env("THINPLY_ROOT", "store"))
}

fn volumes(count: usize) -> Folder {
    let folder = Folder::in_memory();
    for number in 0..count {
        folder.ok(&["volume", "create", "--size", "1M", &format!("v{number}")]);
    }
    folder
}

#[test]
fn serving_raises_its_own_limit_of_descriptors() {
    let folder = volumes(40);
    let served = served_with(&folder, "-Sn 32");
    let mut clients: Vec<_> =
        (0..40).map(|n| served.client(&format!("volume/v{n}")).unwrap()).collect();
    for client in &mut clients {
        client.write(0, &[7; 512]).unwrap();
    }
    for client in &mut clients {
        assert_eq!(client.read(0, 512).unwrap(), [7; 512]);
    }
}

/// Whether the server takes one more connection.
fn is_greeted(folder: &Folder) -> bool {
    let mut stream = UnixStream::connect(folder.join("nbd.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    stream.read_exact(&mut [0; 18]).is_ok()
}

#[test]
fn without_descriptors_clients_that_are_there_go_on() {
    let folder = volumes(40);
    let served = served_with(&folder, "-n 48");
    let mut clients = Vec::new();
    // Each takes a descriptor for its connection and one for its disk at least: some get through.
    for number in 0..40 {
        let greeted = is_greeted(&folder);
        match served.client(&format!("volume/v{number}")) {
            Ok(client) if greeted => clients.push(client),
            _ => break,
        }
    }
    assert!((5..40).contains(&clients.len()), "{}", clients.len());
    // Nobody waits for the log, so it may come a little later.
    let log = || String::from_utf8(folder.read("log")).unwrap();
    for _ in 0..500 {
        if log().contains("Too many open files") {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(log().contains("Too many open files"), "{:?}", log());
    for client in &mut clients {
        client.write(0, &[7; 512]).unwrap();
        assert_eq!(client.read(0, 512).unwrap(), [7; 512]);
    }
    for client in clients.drain(..) {
        client.disconnect().unwrap();
    }
    let mut last = served.client("volume/v39").unwrap();
    last.write(0, &[8; 512]).unwrap();
    last.disconnect().unwrap();
    drop(served);
    tidy(&folder);
}

/// Gives the image `base` so many names more, behind the store's back.
fn add_names(folder: &Folder, count: usize) {
    let mut index: Value = serde_json::from_slice(&folder.read("store/index.json")).unwrap();
    let entries = index["manifests"].as_array_mut().unwrap();
    let entry = entries[0].clone();
    entries.extend((0..count).map(|number| {
        let mut entry = entry.clone();
        entry["annotations"]["org.opencontainers.image.ref.name"] = format!("n{number}").into();
        entry
    }));
    folder.write("store/index.json", index.to_string().as_bytes());
}

#[test]
fn an_index_of_many_names_is_read_and_one_of_too_many_can_be_made_shorter() {
    let folder = Folder::in_memory();
    folder.write("base.raw", &noise(1, MIB as usize));
    folder.ok(&["image", "import", "base.raw", "base"]);
    add_names(&folder, 30_000);
    assert!(folder.cost("store/index.json") > 5 * MIB);
    folder.ok(&["image", "tag", "base", "one:more"]);
    folder.ok(&["image", "rm", "one:more"]);
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n");
    // More than is written, as from another program.
    add_names(&folder, 140_000);
    let before = folder.read("store/index.json");
    assert!(before.len() as u64 > 32 * MIB);
    let run = folder.run(&["image", "tag", "base", "one:more"]);
    assert!(run.refused().contains("expected at most"), "{run:?}");
    assert!(folder.read("store/index.json") == before);
    // A layer that can't get its name doesn't stay.
    folder.write("more.raw", &noise(2, MIB as usize));
    let run = folder.run(&["image", "import", "more.raw", "more"]);
    assert!(run.refused().contains("expected at most"), "{run:?}");
    assert_eq!(blobs(&folder).len(), 3);
    folder.ok(&["image", "rm", "n7"]);
    assert!(folder.read("store/index.json").len() < before.len());
}

/// So many in the long form, of which nobody waits for a verb.
fn many(most: usize, few: usize) -> usize {
    if std::env::var("THINPLY_STORE").as_deref() == Ok("full") { most } else { few }
}

/// Runs a verb, and says what it took.
fn timed(folder: &Folder, verb: &[&str]) -> String {
    let begun = Instant::now();
    let out = folder.ok(verb);
    println!("{:>8.2} s  {}", begun.elapsed().as_secs_f64(), verb.join(" "));
    out
}

#[test]
fn every_verb_works_with_very_many_names() {
    let count = many(100_000, 3_000);
    let folder = Folder::in_memory();
    folder.write("base.raw", &noise(1, MIB as usize));
    folder.write("other.raw", &noise(2, MIB as usize));
    folder.ok(&["image", "import", "base.raw", "base"]);
    folder.ok(&["container", "create", "base", "--name", "c"]);
    add_names(&folder, count);
    let lines = timed(&folder, &["image", "ls"]).lines().count();
    assert_eq!(lines, count + 2);
    timed(&folder, &["image", "tag", "n7", "one:more"]);
    assert_eq!(timed(&folder, &["image", "rm", "one:more"]), "Untagged: one:more\n");
    timed(&folder, &["image", "import", "--parent", "n9", "other.raw", "app"]);
    timed(&folder, &["container", "commit", "c", "base:2"]);
    timed(&folder, &["container", "ls", "-s"]);
    assert_eq!(timed(&folder, &["gc"]), "Reclaimed: 0 bytes\n");
    assert!(timed(&folder, &["df"]).contains("Images       3 "));
    assert_eq!(timed(&folder, &["store", "check"]), "clean\n");
    timed(&folder, &["container", "rm", "c"]);
    timed(&folder, &["image", "rm", "app", "base:2"]);
    let id = folder.json(&["image", "inspect", "base"])[0]["id"].as_str().unwrap().to_owned();
    let refused = folder.run(&["image", "rm", &id]);
    assert!(refused.refused().contains(&format!("has {} names", count + 1)), "{refused:?}");
    let removed = timed(&folder, &["image", "rm", "--force", &id]);
    assert_eq!(removed.lines().count(), count + 1 + 3);
    assert_eq!(blobs(&folder), [""; 0]);
    tidy(&folder);
}

#[test]
fn every_verb_works_on_a_long_history_of_long_remarks() {
    // The last configuration has nearly all that one may have.
    let count = many(300, 30);
    let remark = "x".repeat(13_000);
    let folder = Folder::in_memory();
    folder.write("base.raw", &noise(1, MIB as usize));
    folder.ok(&["image", "import", "base.raw", "base"]);
    folder.ok(&["container", "create", "base", "--name", "c"]);
    for number in 0..count {
        folder.ok(&["container", "commit", "-m", &remark, "c", &format!("i{number}")]);
    }
    assert_eq!(timed(&folder, &["image", "ls"]).lines().count(), count + 2);
    let last = format!("i{}", count - 1);
    assert_eq!(timed(&folder, &["image", "history", &last]).matches(&remark).count(), count);
    timed(&folder, &["image", "tag", &last, "last"]);
    timed(&folder, &["container", "ls", "-s"]);
    timed(&folder, &["df"]);
    assert_eq!(timed(&folder, &["gc"]), "Reclaimed: 0 bytes\n");
    assert_eq!(timed(&folder, &["store", "check"]), "clean\n");
    timed(&folder, &["image", "save", "-o", "saved.tar", "last"]);
    timed(&folder, &["container", "rm", "c"]);
    timed(&folder, &["image", "rm", &last, "i7"]);
    timed(&folder, &["image", "load", "saved.tar"]);
    tidy(&folder);
}

#[test]
fn long_remarks_are_kept_until_the_image_would_be_too_large_to_read() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    let remark = "x".repeat(120_000);
    folder.ok(&["container", "commit", "-m", &remark, "c", "idle"]);
    {
        // Alike while a client has it open.
        let served = Served::all(&folder);
        let _client = served.client("container/c").unwrap();
        folder.ok(&["container", "commit", "-m", &remark, "c", "open"]);
    }
    let refused = (3..40)
        .map(|number| {
            folder.run(&["container", "commit", "-m", &remark, "c", &format!("i{number}")])
        })
        .find(|run| run.code != 0)
        .unwrap();
    assert!(refused.refused().contains("configuration would become"), "{refused:?}");
    let images = folder.json(&["image", "ls", "--json"]).as_array().unwrap().len();
    assert!((30..40).contains(&images), "{images}");
    for verb in [&["df"][..], &["gc"], &["store", "check"], &["container", "rm", "c"]] {
        folder.ok(verb);
    }
    folder.ok(&["image", "rm", "i9"]);
}

#[test]
fn a_disk_whose_record_is_too_long_can_be_removed() {
    let folder = stocked();
    folder.ok(&["container", "create", "base", "--name", "c"]);
    folder.write("store/containers/c.json", &vec![b' '; 6 * MIB as usize]);
    folder.ok(&["container", "rm", "c"]);
    tidy(&folder);
}

//! Images of file trees: what they hold, and that they are the same ones each time.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, lgetxattr, llistxattr,
    lsetxattr, makedev, mknodat, utimensat,
};
use rustix::process::getuid;

use crate::support::{Folder, MIB, Run, noise, skip};

const MKE2FS: &str = "/usr/sbin/mke2fs";
const EPOCH: &str = "SOURCE_DATE_EPOCH";
/// 2038 is over, in a fraction of a second that 32 bits don't hold.
const LATE: (i64, i64) = (4_102_444_800, 123_456_789);
/// 1960.
const EARLY: (i64, i64) = (-300_000_000, 987_654_321);
const USUAL: (i64, i64) = (1_600_000_000, 5);

/// Runs a child to its end, and has what it says.
fn output(command: &mut Command) -> Output {
    crate::support::output(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
}

fn can_build() -> bool {
    let found = Path::new(MKE2FS).exists();
    if !found {
        skip("needs mke2fs");
    }
    found
}

fn build(folder: &Folder, args: &[&str], variables: &[(&str, &str)]) -> Run {
    let mut command = folder.command(&[&["image", "build-from"], args].concat());
    command.env_remove(EPOCH).envs(variables.iter().copied());
    output(&mut command).into()
}

fn built(folder: &Folder, tree: &str, name: &str, variables: &[(&str, &str)]) -> String {
    let run = build(folder, &[tree, name], variables);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:?}");
    run.stdout.trim().to_owned()
}

/// The digest of the newest layer of an image.
fn layer(folder: &Folder, name: &str) -> String {
    let history = folder.json(&["image", "history", "--json", name]);
    history[0]["id"].as_str().unwrap().to_owned()
}

/// The disk of an image without a base, as a file.
fn disk(folder: &Folder, name: &str) -> PathBuf {
    let blob = format!("store/blobs/sha256/{}", layer(folder, name));
    let raw = format!("{name}.raw");
    folder.ok(&["export", "--force", &blob, &raw]);
    let checked = output(Command::new("/usr/sbin/e2fsck").arg("-fn").arg(folder.join(&raw)));
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success(), "{said}");
    folder.join(&raw)
}

/// A file system while it is mounted.
struct Mounted(PathBuf);

impl Mounted {
    fn new(args: &[&OsStr], at: PathBuf) -> Option<Self> {
        fs::create_dir_all(&at).unwrap();
        let mounted = output(Command::new("mount").args(args).arg(&at)).status.success();
        if !mounted {
            skip("needs the right to mount");
        }
        mounted.then_some(Self(at))
    }

    fn image(folder: &Folder, name: &str) -> Option<Self> {
        let disk = disk(folder, name);
        let args = [OsStr::new("-o"), OsStr::new("loop,ro"), disk.as_os_str()];
        Self::new(&args, folder.join(&format!("{name}.mount")))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn set_time(path: &Path, (tv_sec, tv_nsec): (i64, i64)) {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_attribute(path: &Path, name: &str, value: &[u8]) {
    lsetxattr(path, name, value, XattrFlags::empty()).unwrap_or_else(|e| panic!("{name}: {e}"));
}

fn attributes(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut list = vec![0; 8192];
    let length = llistxattr(path, &mut list).unwrap();
    let names = list[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let mut found: Vec<_> = names
        .map(|name| {
            let mut value = vec![0; 8192];
            let length = lgetxattr(path, name, &mut value).unwrap();
            value.truncate(length);
            (String::from_utf8_lossy(name).into_owned(), value)
        })
        .collect();
    found.sort();
    found
}

/// What can be seen of each file in a tree, by its path.
fn seen(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap();
        if name == Path::new("lost+found") {
            continue;
        }
        let mut line = format!("{name:?} {:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
        line += &format!(" {}.{:09} {}", meta.mtime(), meta.mtime_nsec(), meta.rdev());
        line += &format!(" {:?}", attributes(&path));
        if meta.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if meta.is_symlink() {
            line += &format!(" {:?}", fs::read_link(&path).unwrap());
        } else {
            line += &format!(" {} {}", meta.nlink(), meta.size());
        }
        if meta.is_file() {
            let mut content = Vec::new();
            File::open(&path).unwrap().take(8 * MIB).read_to_end(&mut content).unwrap();
            line += &format!(" {}", blake3::hash(&content));
        }
        found.push(line);
    }
    found.sort();
    found
}

/// An ACL that names a user, as the kernel hands it out.
fn acl() -> Vec<u8> {
    let none = u32::MAX;
    let entries =
        [(1_u16, 6_u16, none), (2, 4, 1000), (4, 4, none), (0x10, 4, none), (0x20, 0, none)];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend([tag.to_le_bytes(), rights.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// The files of a tree with one of every kind; each can be made without the others.
type Make = fn(&Path);
const KINDS: [(&[u8], Make); 18] = [
    (b"file", |path| fs::write(path, "text").unwrap()),
    (b"empty", |path| fs::write(path, "").unwrap()),
    (b"large", |path| fs::write(path, noise(1, 3 * MIB as usize + 17)).unwrap()),
    (b"sparse", |path| {
        let file = File::create(path).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"end", 5 << 30).unwrap();
    }),
    (b"pieces", |path| {
        let file = File::create(path).unwrap();
        (0..400).for_each(|number| file.write_all_at(b"x", number * 8192).unwrap());
    }),
    (b"zeros", |path| fs::write(path, [0; 20000]).unwrap()),
    (b"not \xff utf-8", |path| fs::write(path, "1").unwrap()),
    (b"two\nlines\x1b[1m\\\"", |path| fs::write(path, "2").unwrap()),
    (&[b'n'; 255], |path| fs::write(path, "3").unwrap()),
    (b"-q", |path| fs::write(path, "4").unwrap()),
    (b"short", |path| symlink("file", path).unwrap()),
    (b"long", |path| symlink("x".repeat(300), path).unwrap()),
    (b"longest", |path| symlink("y/".repeat(2000), path).unwrap()),
    (b"socket", |path| drop(UnixListener::bind(path).unwrap())),
    (b"fifo", |path| {
        mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
    }),
    (b"suid", |path| {
        fs::write(path, "5").unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o6755)).unwrap();
    }),
    (b"folder", |path| {
        fs::create_dir(path).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o1777)).unwrap();
    }),
    (b"many", |path| {
        fs::create_dir(path).unwrap();
        for number in 0..600 {
            fs::write(path.join(format!("a-name-that-is-rather-long-{number}")), "").unwrap();
        }
    }),
];

/// Makes a tree with all of them, in this order or in the other. It has a root that is no usual one.
fn make_tree(tree: &Path, backwards: bool) {
    fs::create_dir(tree).unwrap();
    let ordered = |count: usize| {
        let order = 0..count;
        if backwards { order.rev().collect::<Vec<_>>() } else { order.collect() }
    };
    for number in ordered(KINDS.len()) {
        let (name, make) = KINDS[number];
        make(&tree.join(OsStr::from_bytes(name)));
    }
    let names = ["file", "further name", "folder/third name"];
    names[1..].iter().for_each(|name| fs::hard_link(tree.join("file"), tree.join(name)).unwrap());
    let note =
        [("user.b", vec![0; 30]), ("user.note", b"\0\xff\n".to_vec()), ("user.empty", vec![])];
    let mut attributes = note.map(|(name, value)| ("large", name, value)).to_vec();
    attributes.push(("empty", "user.one", noise(2, 1500)));
    attributes.push(("zeros", "user.most", noise(3, 3900)));
    attributes.push(("zeros", "user.more", noise(4, 60)));
    attributes.push(("zeros", "user.two", noise(5, 50)));
    attributes.push(("folder", "system.posix_acl_default", acl()));
    attributes.push(("", "user.root", b"of the root".to_vec()));
    if getuid().is_root() {
        attributes.push(("suid", "security.capability", [&[1, 0, 0, 2][..], &[0x20; 16]].concat()));
        attributes.push(("short", "trusted.link", b"of a symlink".to_vec()));
    }
    for number in ordered(attributes.len()) {
        let (name, attribute, value) = &attributes[number];
        set_attribute(&tree.join(name), attribute, value);
    }
    set_attribute(&tree.join("large"), "system.posix_acl_access", &acl());
    finish_tree(tree);
}

/// Owners, modes and times, which making the rest would change.
fn finish_tree(tree: &Path) {
    if getuid().is_root() {
        for (name, device) in [("null", makedev(1, 3)), ("wide", makedev(300, 70000))] {
            let mode = Mode::from_raw_mode(0o666);
            mknodat(CWD, tree.join(name), FileType::CharacterDevice, mode, device).unwrap();
        }
        for name in ["file", "folder", "fifo", "long", ""] {
            lchown(tree.join(name), Some(70_000), Some(4_000_000_000)).unwrap();
        }
    }
    fs::set_permissions(tree, Permissions::from_mode(0o2751)).unwrap();
    let mut paths = vec![tree.to_owned()];
    let mut at = 0;
    while let Some(path) = paths.get(at).cloned() {
        if path.is_dir() && !path.is_symlink() {
            paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        at += 1;
    }
    for path in paths.iter().rev() {
        set_time(path, USUAL);
    }
    for (name, time) in [("file", LATE), ("long", LATE), ("folder", EARLY), ("empty", (-1, 1))] {
        set_time(&tree.join(name), time);
    }
    set_time(tree, LATE);
}

#[test]
fn an_image_holds_all_of_a_tree() {
    if !can_build() {
        return;
    }
    let folder = Folder::new();
    make_tree(&folder.join("tree"), false);
    let expected = seen(&folder.join("tree"));
    built(&folder, "tree", "image", &[]);
    assert_eq!(seen(&folder.join("tree")), expected, "the tree itself");
    let Some(Mounted(mount)) = &Mounted::image(&folder, "image") else { return };
    let found = seen(mount);
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
    assert_eq!(found.len(), expected.len());
    // Holes stay holes, and links are links to one file.
    for (name, most) in [("sparse", 16), ("zeros", 8), ("pieces", 3300)] {
        let blocks = fs::metadata(mount.join(name)).unwrap().blocks();
        assert!(blocks <= most, "{name}: {blocks}");
    }
    let number = |name| fs::metadata(mount.join(name)).unwrap().ino();
    assert_eq!(number("file"), number("folder/third name"));
    // A file's other times are the one that it has everywhere.
    let meta = fs::metadata(mount.join("file")).unwrap();
    assert_eq!([(meta.atime(), meta.atime_nsec()), (meta.ctime(), meta.ctime_nsec())], [LATE; 2]);
    assert_eq!(fs::metadata(mount).unwrap().blksize(), 4096);
}

#[test]
fn the_same_tree_makes_the_same_image() {
    if !can_build() {
        return;
    }
    let (folder, memory) = (Folder::new(), Folder::in_memory());
    make_tree(&folder.join("tree"), false);
    let other = memory.join("another-name");
    make_tree(&other, true);
    assert_eq!(seen(&folder.join("tree")), seen(&other));
    let id = built(&folder, "tree", "one", &[(EPOCH, "1700000000"), ("TZ", "Asia/Tokyo")]);
    let image = folder.json(&["image", "inspect", "one"]);
    assert_eq!(image[0]["created"], "2023-11-14T22:13:20Z");
    // Elsewhere, under another name, with other habits, at another time of day.
    let mut shell = Command::new("sh");
    let script = "sleep 1.1; umask 0177; exec \"$@\"";
    shell.args(["-c", script, "sh", env!("CARGO_BIN_EXE_thinply"), "image", "build-from"]);
    shell.arg(&other).arg("two").current_dir("/").env("THINPLY_ROOT", folder.join("store"));
    shell.envs([(EPOCH, "1700000000"), ("TZ", "America/Lima"), ("LC_ALL", "de_DE.UTF-8")]);
    let other_defaults = b"[defaults]\nblocksize = 1024\nreserved_ratio = 1\n";
    folder.write("mke2fs.conf", other_defaults);
    shell.env("MKE2FS_CONFIG", folder.join("mke2fs.conf")).env("E2FSPROGS_FAKE_TIME", "7");
    let second: Run = output(&mut shell).into();
    assert_eq!(second.stdout.trim(), id, "{second:?}");
    // Without the variable the layer is the same each time; only when it was made is not.
    let now = built(&folder, "tree", "now", &[]);
    built(&folder, other.to_str().unwrap(), "later", &[("LANG", "tr_TR.UTF-8")]);
    assert_eq!(layer(&folder, "now"), layer(&folder, "later"));
    assert_ne!(now, id);
    let uuid = |name: &str| fs::read(disk(&folder, name)).unwrap()[1024 + 104..][..16].to_vec();
    // Another content is another file system, though nothing but a byte differs.
    fs::write(folder.join("tree/-q"), "5").unwrap();
    set_time(&folder.join("tree/-q"), USUAL);
    built(&folder, "tree", "other", &[]);
    assert_ne!(uuid("now"), uuid("other"));
}

#[test]
fn no_time_in_an_image_is_later_than_the_source_date() {
    if !can_build() {
        return;
    }
    let folder = Folder::new();
    let mut ids = Vec::new();
    // Zero is a date as any other.
    for (round, epoch) in ["0", "0", "1500000000"].into_iter().enumerate() {
        let tree = format!("tree{round}");
        fs::create_dir(folder.join(&tree)).unwrap();
        fs::write(folder.join(&tree).join("old"), "").unwrap();
        set_time(&folder.join(&tree).join("old"), EARLY);
        fs::write(folder.join(&tree).join("new"), "").unwrap();
        ids.push(built(&folder, &tree, &tree, &[(EPOCH, epoch)]));
    }
    assert_eq!(ids[0], ids[1]);
    let bytes = fs::read(disk(&folder, "tree2")).unwrap();
    // Of writing, of checking, of making.
    for at in [48, 64, 264] {
        assert_eq!(bytes[1024 + at..][..4], 1_500_000_000_u32.to_le_bytes());
    }
    let Some(Mounted(mount)) = &Mounted::image(&folder, "tree2") else { return };
    let time = |name| fs::metadata(mount.join(name)).map(|meta| (meta.mtime(), meta.mtime_nsec()));
    assert_eq!(time("new").unwrap(), (1_500_000_000, 0));
    assert_eq!(time("old").unwrap(), EARLY);
    assert_eq!(time("").unwrap(), (1_500_000_000, 0));
    for wrong in ["", "-1", "1.5", "now", "253402300800", "99999999999999999999"] {
        let run = build(&folder, &["tree0", "wrong"], &[(EPOCH, wrong)]);
        assert!(run.refused().contains(EPOCH), "{run:?}");
    }
    // Newer releases of mke2fs know the variable, and cut other times than all of them.
    let script = format!("test -z \"${EPOCH}\" && exec {MKE2FS} \"$@\"");
    let path = instead_of_mke2fs(&folder, &script);
    built(&folder, "tree0", "unseen", &[(EPOCH, "1500000000"), ("PATH", &path)]);
    folder.write("raw", &noise(9, MIB as usize));
    let mut import = folder.command(&["image", "import", "raw", "imported"]);
    assert!(output(import.env(EPOCH, "86400")).status.success());
    let image = folder.json(&["image", "inspect", "imported"]);
    assert_eq!(image[0]["created"], "1970-01-02T00:00:00Z");
}

#[test]
fn a_tree_of_many_files_has_room() {
    if !can_build() {
        return;
    }
    // Empty ones need inodes and no blocks; small ones a block each, and more of them than the
    // inodes of a device just large enough for that.
    let count = std::env::var("THINPLY_FILES").map_or(20_000, |count| count.parse().unwrap());
    for content in ["", "small"] {
        let folder = Folder::in_memory();
        for number in 0..count {
            let dir = folder.join(&format!("tree/{}", number / 1000));
            if number % 1000 == 0 {
                fs::create_dir_all(&dir).unwrap();
            }
            fs::write(dir.join(number.to_string()), content).unwrap();
        }
        built(&folder, "tree", "image", &[]);
        let listed =
            output(Command::new("/usr/sbin/dumpe2fs").arg("-h").arg(disk(&folder, "image")));
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let free = listed.lines().find_map(|line| line.strip_prefix("Free inodes:")).unwrap();
        // Containers make files too.
        assert!(free.trim().parse::<usize>().unwrap() >= count / 2, "{listed}");
    }
}

#[test]
fn an_empty_tree_and_a_link_to_one_make_images() {
    if !can_build() {
        return;
    }
    let folder = Folder::new();
    fs::create_dir(folder.join("tree")).unwrap();
    fs::set_permissions(folder.join("tree"), Permissions::from_mode(0o700)).unwrap();
    symlink("tree", folder.join("link")).unwrap();
    set_attribute(&folder.join("tree"), "user.root", b"its own");
    built(&folder, "tree", "tree", &[]);
    built(&folder, "link", "link", &[]);
    assert_eq!(layer(&folder, "tree"), layer(&folder, "link"));
    let Some(Mounted(mount)) = &Mounted::image(&folder, "link") else { return };
    assert_eq!(seen(mount), seen(&folder.join("tree")));
}

#[test]
fn what_is_no_tree_is_named() {
    let folder = Folder::new();
    folder.write("file", b"text");
    for (path, reason) in [("nosuch", "No such file"), ("file", "not a folder")] {
        let run = folder.run(&["image", "build-from", path, "x:1"]);
        let message = run.refused();
        assert!(message.contains(&format!("{path}: ")) && message.contains(reason), "{message}");
    }
}

/// A folder for `PATH` with a mke2fs that does something first.
fn instead_of_mke2fs(folder: &Folder, script: &str) -> String {
    fs::create_dir_all(folder.join("bin")).unwrap();
    let path = folder.join("bin/mke2fs");
    let mut file = File::create(&path).unwrap();
    write!(file, "#!/bin/sh\n{script}\n").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", folder.join("bin").display(), std::env::var("PATH").unwrap())
}

#[test]
fn a_tree_that_does_not_keep_still_makes_no_image() {
    if !can_build() {
        return;
    }
    let changes = [
        ("echo more >> tree/folder/file", "tree/folder/file"),
        ("echo less > tree/folder/file", "tree/folder/file"),
        ("touch -d 2001-01-01 tree/folder/file", "tree/folder/file"),
        ("chmod 600 tree/folder/file", "tree/folder/file"),
        ("rm tree/folder/file", "tree/folder"),
        ("rm -r tree/folder", "tree"),
        ("touch tree/folder/new", "tree/folder"),
        ("rm tree/link; ln -s other tree/link", "tree"),
        ("setfattr -n user.new -v 1 tree/folder/file", "tree/folder/file"),
    ];
    for (change, named) in changes {
        for when in ["before", "after"] {
            let folder = Folder::new();
            fs::create_dir_all(folder.join("tree/folder")).unwrap();
            folder.write("tree/folder/file", b"text");
            symlink("file", folder.join("tree/link")).unwrap();
            let script = match when {
                "before" => format!("{change}\nexec {MKE2FS} \"$@\""),
                _ => format!("{MKE2FS} \"$@\" && {{ {change}; }}"),
            };
            let path = instead_of_mke2fs(&folder, &script);
            let run = build(&folder, &["tree", "image"], &[("PATH", &path)]);
            let named = format!("{}: changed", folder.join(named).display());
            assert!(run.refused().contains(&named), "{change}: {run:?}");
            assert_eq!(folder.json(&["image", "ls", "--json"]), serde_json::json!([]));
            let left = fs::read_dir(folder.join("store")).unwrap().map(|entry| entry.unwrap());
            let drafts = left.filter(|entry| entry.file_name().as_bytes().starts_with(b".draft-"));
            assert_eq!(drafts.count(), 0, "{change}");
        }
    }
}

#[test]
fn what_mke2fs_says_is_shown() {
    let folder = Folder::new();
    fs::create_dir(folder.join("tree")).unwrap();
    let says =
        "for line in 1 2 3 4 5 6; do echo \"line $line\" >&2; done; printf 'e\\033[1m\\n' >&2";
    let path = instead_of_mke2fs(&folder, &format!("{says}; exit 7"));
    let run = build(&folder, &["tree", "image"], &[("PATH", &path)]);
    let said = run.refused();
    assert!(
        said.contains("mke2fs failed (exit status: 7): line 4; line 5; line 6; e?[1m"),
        "{said}"
    );
    assert!(!said.contains("line 3") && !said.contains("missing"), "{said}");
    // One that makes something else than what it was told to make.
    let path = instead_of_mke2fs(&folder, "exit 0");
    let run = build(&folder, &["tree", "image"], &[("PATH", &path)]);
    assert!(run.refused().contains("mke2fs"), "{run:?}");
    let mut hidden = Command::new("unshare");
    let script = "mount --bind tree /usr/sbin && mount --bind tree /sbin && exec \"$@\"";
    hidden.args(["-m", "sh", "-c", script, "sh", env!("CARGO_BIN_EXE_thinply")]);
    hidden.args(["image", "build-from", "tree", "image"]).current_dir(folder.path());
    hidden.env("THINPLY_ROOT", folder.join("store")).env("PATH", "/usr/bin:/bin");
    let run: Run = output(&mut hidden).into();
    if run.stderr.contains("unshare") || run.stderr.contains("mount:") {
        return skip("needs the right to mount");
    }
    assert!(run.refused().contains("mke2fs is missing"), "{run:?}");
}

#[test]
fn what_is_mounted_in_a_tree_is_refused() {
    if !can_build() {
        return;
    }
    let folder = Folder::new();
    fs::create_dir_all(folder.join("tree/proc")).unwrap();
    let args = ["-t", "tmpfs", "none"].map(OsStr::new);
    let Some(_mounted) = Mounted::new(&args, folder.join("tree/proc")) else { return };
    let run = build(&folder, &["tree", "image"], &[]);
    assert!(run.refused().contains("tree/proc: something is mounted here"), "{run:?}");
    // What is mounted is a tree itself.
    fs::write(folder.join("tree/proc/file"), "").unwrap();
    built(&folder, "tree/proc", "mounted", &[]);
}

#[test]
fn what_an_image_can_not_keep_is_named() {
    if !can_build() {
        return;
    }
    // In memory there are dates that no disk has.
    let folder = Folder::in_memory();
    fs::create_dir(folder.join("tree")).unwrap();
    folder.write("tree/far", b"");
    set_time(&folder.join("tree/far"), (20_000_000_000, 7));
    let has_date = fs::metadata(folder.join("tree/far")).unwrap().mtime() == 20_000_000_000;
    symlink("x", folder.join("tree/link\u{1b}")).unwrap();
    fs::hard_link(folder.join("tree/link\u{1b}"), folder.join("tree/second\u{1b}")).unwrap();
    let run = build(&folder, &["tree", "image"], &[]);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.stderr.contains("tree/second?: a further name of a symlink"), "{run:?}");
    let Some(Mounted(mount)) = &Mounted::image(&folder, "image") else { return };
    assert_eq!(fs::read_link(mount.join("second\u{1b}")).unwrap(), Path::new("x"));
    if !has_date {
        return skip("needs a file system with dates after 2446");
    }
    assert!(run.stderr.contains("tree/far: ext4 has no such date"), "{run:?}");
    let meta = fs::metadata(mount.join("far")).unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec()), ((1 << 34) - (1 << 31) - 1, 0));
}

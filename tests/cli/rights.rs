//! Who may use what the command makes: a file that takes another's place gets all of its rights, a
//! copy lets in nobody whom the original keeps out.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::process::{getuid, umask};

use crate::store::stocked;
use crate::support::{Folder, MIB, noise, output, skip};

const ACL: &str = "system.posix_acl_access";
/// Of a service, as libvirt has one for guests.
const SERVICE: u32 = 64055;
const STRANGER: u32 = 64999;

/// What `ls -l`, getfacl and getfattr show.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    acl: Option<Vec<u8>>,
    note: Option<Vec<u8>>,
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 1 << 10];
    let length = getxattr(path, name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}

fn seen(path: &Path) -> Seen {
    let meta = fs::metadata(path).unwrap();
    Seen {
        mode: meta.mode() & 0o7777,
        owner: (meta.uid(), meta.gid()),
        acl: attribute(path, ACL),
        note: attribute(path, "user.note"),
    }
}

fn mode(folder: &Folder, name: &str) -> u32 {
    seen(&folder.join(name)).mode
}

fn set_mode(folder: &Folder, name: &str, mode: u32) {
    fs::set_permissions(folder.join(name), Permissions::from_mode(mode)).unwrap();
}

/// An ACL by which `user` may read and the group may nothing, as the kernel stores it.
fn acl_for(user: u32) -> Vec<u8> {
    let none = u32::MAX;
    // Owner, user, group, mask, others.
    let entries = [(1, 6, none), (2, 4, user), (4, 0, none), (0x10, 4, none), (0x20, 0, none)];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend(u16::to_le_bytes(tag));
        bytes.extend(u16::to_le_bytes(rights));
        bytes.extend(u32::to_le_bytes(id));
    }
    bytes
}

/// Gives a file rights of which none is what a new file gets; what it has then.
fn mark(path: &Path) -> Seen {
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    if getuid().is_root() {
        chown(path, Some(SERVICE), Some(SERVICE)).unwrap();
    }
    let attributes = [(ACL, acl_for(1000)), ("user.note", b"kept".to_vec())];
    for (name, value) in attributes {
        if setxattr(path, name, &value, XattrFlags::empty()).is_err() {
            skip(&format!("no {name} on this file system"));
        }
    }
    seen(path)
}

#[test]
fn a_snapshot_leaves_the_disk_to_those_who_had_it() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "8M", "disk.tply"]);
    let before = mark(&folder.join("disk.tply"));
    folder.ok(&["snapshot", "disk.tply", "one.tply"]);
    folder.ok(&["snapshot", "disk.tply", "two.tply"]);
    for name in ["disk.tply", "one.tply", "two.tply"] {
        assert_eq!(seen(&folder.join(name)), before, "{name}");
    }
    // One without an ACL, in a folder that gives new files one.
    let plain = Folder::new();
    plain.ok(&["create", "--size", "8M", "disk.tply"]);
    set_mode(&plain, "disk.tply", 0o640);
    let default = "system.posix_acl_default";
    if setxattr(plain.path(), default, &acl_for(1000), XattrFlags::empty()).is_ok() {
        plain.ok(&["snapshot", "disk.tply", "one.tply"]);
        let now = seen(&plain.join("disk.tply"));
        assert_eq!((now.mode, now.acl), (0o640, None));
    }
}

#[test]
fn containers_keep_their_rights_through_snapshot_commit_and_reset() {
    let folder = stocked();
    folder.ok(&["container", "create", "--name", "web", "base"]);
    let layer = "store/containers/web.tply";
    let before = mark(&folder.join(layer));
    let record = {
        set_mode(&folder, "store/containers/web.json", 0o600);
        seen(&folder.join("store/containers/web.json"))
    };
    let blobs = |folder: &Folder| -> Vec<String> {
        let mut names = crate::store::blobs(folder);
        names.sort();
        names
    };
    folder.ok(&["container", "snapshot", "web", "s1"]);
    assert_eq!(seen(&folder.join(layer)), before);
    assert_eq!(seen(&folder.join("store/containers/web@1.tply")), before);

    let old = blobs(&folder);
    folder.ok(&["container", "commit", "web", "made"]);
    assert_eq!(seen(&folder.join(layer)), before);
    // The container stands on the new layer, which holds what it wrote.
    let new: Vec<_> = blobs(&folder).into_iter().filter(|name| !old.contains(name)).collect();
    let layers = new.iter().map(|name| folder.join(&format!("store/blobs/sha256/{name}")));
    let layers: Vec<_> =
        layers.filter(|path| fs::read(path).unwrap().starts_with(b"TPLYPACK")).collect();
    assert_eq!(layers.len(), 1);
    assert_eq!(seen(&layers[0]), before);

    folder.ok(&["container", "reset", "web"]);
    assert_eq!(seen(&folder.join(layer)), before);
    folder.ok(&["container", "reset", "web", "s1"]);
    assert_eq!(seen(&folder.join(layer)), before);
    assert_eq!(seen(&folder.join("store/containers/web.json")), record);

    // Whatever shows a layer that not everybody may read is closed to the same.
    folder.ok(&["container", "create", "--name", "other", "made"]);
    assert_eq!(mode(&folder, "store/containers/other.tply") & 0o077 & !before.mode, 0);
    folder.ok(&["image", "save", "-o", "made.tar", "made"]);
    assert_eq!(mode(&folder, "made.tar") & 0o077 & !before.mode, 0);
}

#[test]
fn an_export_over_a_file_leaves_it_to_those_who_had_it() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "disk.tply"]);
    folder.write("disk.raw", b"old");
    let before = mark(&folder.join("disk.raw"));
    folder.ok(&["export", "--force", "disk.tply", "disk.raw"]);
    assert_eq!(folder.read("disk.raw").len() as u64, MIB);
    assert_eq!(seen(&folder.join("disk.raw")), before);
}

#[test]
fn copies_let_in_nobody_whom_the_original_keeps_out() {
    let open = umask(rustix::fs::Mode::empty());
    umask(open);
    let usual = 0o666 & !open.as_raw_mode();
    let folder = Folder::new();
    folder.write("disk.raw", &noise(1, 1 << 20));
    folder.ok(&["import", "disk.raw", "open.tply"]);
    assert_eq!(mode(&folder, "open.tply"), usual);

    for secret in [0o600, 0o400] {
        let folder = Folder::new();
        folder.write("disk.raw", &noise(1, 1 << 20));
        set_mode(&folder, "disk.raw", secret);
        folder.ok(&["import", "disk.raw", "base.tply"]);
        set_mode(&folder, "base.tply", secret);
        folder.ok(&["create", "--parent", "base.tply", "child.tply"]);
        // The newest layer alone is open to all, but not what lies under it.
        folder.ok(&["create", "--parent", "base.tply", "top.tply"]);
        set_mode(&folder, "top.tply", 0o644);
        let made: [&[&str]; 9] = [
            &["compact", "base.tply"],
            &["pack", "base.tply"],
            &["pack", "--drop-equal", "base.tply"],
            &["flatten", "top.tply"],
            &["repair", "base.tply"],
            &["rebase", "--parent", "base.tply", "child.tply"],
            &["rebase", "--unsafe", "--parent", "base.tply", "child.tply"],
            &["export", "top.tply"],
            &["import", "--writable", "disk.raw"],
        ];
        assert_eq!(mode(&folder, "base.tply"), secret);
        assert_eq!(mode(&folder, "child.tply"), 0o600);
        for (number, args) in made.iter().enumerate() {
            let out = format!("{number}.out");
            folder.ok(&[args, &[out.as_str()][..]].concat());
            assert_eq!(mode(&folder, &out), 0o600, "{args:?}");
        }
        folder.ok(&["diff", "-o", "diff.tply", "base.tply", "top.tply"]);
        assert_eq!(mode(&folder, "diff.tply"), 0o600);
        folder.ok(&["image", "import", "disk.raw", "secret"]);
        let blobs = fs::read_dir(folder.join("store/blobs/sha256")).unwrap();
        let packed = blobs
            .map(|entry| entry.unwrap().path())
            .find(|path| fs::read(path).unwrap().starts_with(b"TPLYPACK"));
        assert_eq!(seen(&packed.unwrap()).mode, 0o600);
        folder.ok(&["image", "save", "-o", "secret.tar", "secret"]);
        assert_eq!(mode(&folder, "secret.tar"), 0o600);
        let other = Folder::new();
        let archive = folder.join("secret.tar");
        other.ok(&["image", "load", archive.to_str().unwrap()]);
        for name in crate::store::blobs(&other) {
            assert_eq!(mode(&other, &format!("store/blobs/sha256/{name}")) & 0o077, 0);
        }
    }
}

/// Somebody who may write a disk of another owner, but give nothing away.
#[test]
fn whoever_cannot_keep_the_owner_opens_the_disk_to_nobody() {
    if !getuid().is_root() {
        return skip("only root can become others");
    }
    let folder = Folder::new();
    let program = folder.join("thinply");
    fs::copy(env!("CARGO_BIN_EXE_thinply"), &program).unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    let as_stranger = |groups: u32, args: &[&str]| {
        let mut command = std::process::Command::new(&program);
        command.args(args).current_dir(folder.path()).uid(STRANGER).gid(groups);
        let run = output(&mut command);
        assert!(run.status.success(), "{args:?}: {run:?}");
    };
    // In the group of the disk: the group stays, and the owner can go on by it.
    folder.ok(&["create", "--size", "1M", "disk.tply"]);
    chown(folder.join("disk.tply"), Some(SERVICE), Some(SERVICE)).unwrap();
    set_mode(&folder, "disk.tply", 0o660);
    as_stranger(SERVICE, &["snapshot", "disk.tply", "one.tply"]);
    let now = seen(&folder.join("disk.tply"));
    assert_eq!((now.mode, now.owner), (0o660, (STRANGER, SERVICE)));

    // Not in it, but let in by an ACL. Neither the stranger's own group nor others get what the
    // disk's group and that ACL had.
    folder.ok(&["create", "--size", "1M", "acl.tply"]);
    let path = folder.join("acl.tply");
    chown(&path, Some(SERVICE), Some(SERVICE)).unwrap();
    let mut acl = acl_for(STRANGER);
    // The user's entry and the mask: read and write.
    (acl[14], acl[30]) = (6, 6);
    if setxattr(&path, ACL, &acl, XattrFlags::empty()).is_err() {
        return skip("no ACLs on this file system");
    }
    as_stranger(STRANGER, &["snapshot", "acl.tply", "two.tply"]);
    let now = seen(&path);
    assert_eq!((now.mode, now.owner, now.acl), (0o600, (STRANGER, STRANGER), None));
}

//! Files that other programs are using: a running VM, a mounted device.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::{Folder, MIB, output, skip, start};

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU with an image open for writing; none where it is not installed.
fn writer(folder: &Folder, format: &str, name: &str) -> Option<Ended> {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", format, name, "4M"]).current_dir(folder.path());
    if create.status().is_err() {
        skip("qemu-img is not installed");
        return None;
    }
    let mut command = Command::new("qemu-io");
    command.args([
        "-t",
        "writeback",
        "-f",
        format,
        "-c",
        "write -q -P 7 0 1M",
        "-c",
        "sleep 60000",
    ]);
    let child = start(command.arg(name).current_dir(folder.path()).stdout(Stdio::null()));
    let ended = Ended(child);
    let meta = || std::fs::metadata(folder.join(name)).unwrap();
    let inode = meta().ino();
    // What is still growing may be read with a length that it had before.
    let written = || meta().blocks() * 512 >= 1 << 20;
    // QEMU drops all locks but these once it has what it needs.
    let held = || {
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        locks.lines().any(|line| line.contains(&format!(":{inode} 100 101")))
    };
    for _ in 0..1000 {
        if held() && written() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(ended)
}

#[test]
fn what_a_running_vm_writes_is_refused_unless_the_user_insists() {
    for format in ["raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi"] {
        let folder = Folder::new();
        let name = format!("disk.{format}");
        folder.ok(&["create", "--size", "4M", "layer.tply"]);
        let Some(vm) = writer(&folder, format, &name) else { return };
        let holder = format!("qemu-io ({})", vm.0.id());
        let mut verbs: Vec<Vec<&str>> = vec![
            vec!["import", &name, "out.tply"],
            vec!["image", "import", &name, "out"],
            vec!["export", "--force", "layer.tply", &name],
        ];
        if format == "raw" {
            verbs.push(vec!["compare", "-F", "raw", "layer.tply", &name]);
            let mut over = Command::new("qemu-img");
            over.args(["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", &name]);
            assert!(
                over.args(["top.qcow2", "4M"])
                    .current_dir(folder.path())
                    .status()
                    .unwrap()
                    .success()
            );
            verbs.push(vec!["import", "--with", &name, "top.qcow2", "out.tply"]);
            verbs.push(vec!["import", "--chain", "--with", &name, "top.qcow2", "out.tply"]);
        }
        for args in &verbs {
            let run = folder.run(args);
            assert!(run.refused().contains(&holder), "{args:?}: {run:?}");
            assert!(run.stderr.contains("--force-share"), "{run:?}");
        }
        for args in verbs.iter().filter(|args| args[0] != "compare" && args[1] != "--chain") {
            folder.ok(&[&args[..], &["-U"]].concat());
            let _ = std::fs::remove_file(folder.join("out.tply"));
        }
        // And none of it once the VM is gone.
        drop(vm);
        folder.ok(&["import", "--format", "raw", &name, "after.tply"]);
    }
}

#[test]
fn a_vm_does_not_start_on_what_is_being_read_and_readers_disturb_nobody() {
    let folder = Folder::new();
    let Some(vm) = writer(&folder, "raw", "disk.raw") else { return };
    drop(vm);
    let file = File::open(folder.join("disk.raw")).unwrap();
    assert!(!thinply::storage::is_written(std::os::fd::AsFd::as_fd(&file)));
    let qemu_io = |mode: &[&str]| {
        let mut command = Command::new("qemu-io");
        command.args(mode).args(["-f", "raw", "-c", "read -q 0 4k", "disk.raw"]);
        output(command.current_dir(folder.path()).stderr(Stdio::piped())).status.success()
    };
    assert!(qemu_io(&["-r"]));
    assert!(!qemu_io(&[]));
    folder.ok(&["import", "disk.raw", "out.tply"]);
    drop(file);
    assert!(qemu_io(&[]));
}

/// As root, where the machine has loop devices.
#[test]
fn a_mounted_device_is_not_written_over_without_force() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "disk.tply"]);
    File::create(folder.join("host.img")).unwrap().set_len(16 * MIB).unwrap();
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).current_dir(folder.path()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.output().ok().filter(|output| output.status.success())
    };
    if run("mkfs.ext4", &["-q", "host.img"]).is_none() {
        return skip("mkfs.ext4 doesn't run here");
    }
    let Some(found) = run("losetup", &["-f", "--show", "host.img"]) else {
        return skip("no loop devices");
    };
    let device = String::from_utf8(found.stdout).unwrap().trim().to_owned();
    std::fs::create_dir(folder.join("mnt")).unwrap();
    let mounted = run("mount", &[&device, "mnt"]).is_some();
    let refused = folder.run(&["export", "disk.tply", &device]);
    let forced = folder.run(&["export", "--force", "disk.tply", &device]);
    if mounted {
        run("umount", &["mnt"]).unwrap();
    }
    let free = folder.run(&["export", "disk.tply", &device]);
    run("losetup", &["-d", &device]).unwrap();
    if !mounted {
        return skip("mounting is not allowed here");
    }
    assert!(refused.refused().contains("is mounted, or a part of something else"), "{refused:?}");
    assert_eq!((forced.code, free.code), (0, 0), "{forced:?} {free:?}");
}

/// bindfs gives the lock of a file to two open files at once, but tells each of the other. The table
/// of host file systems runs there too; here it is only where bindfs happens to be installed.
#[test]
fn a_second_writer_is_refused_where_a_lock_is_given_twice() {
    let folder = Folder::new();
    for name in ["real", "view"] {
        std::fs::create_dir(folder.join(name)).unwrap();
    }
    let bindfs = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).current_dir(folder.path()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let args = ["--enable-lock-forwarding", "--multithreaded", "real", "view"];
    if !bindfs("bindfs", &args) {
        return;
    }
    folder.ok(&["create", "--size", "1M", "view/disk.tply"]);
    let args = ["serve", "view/disk.tply", "--socket", "nbd.sock"];
    let served = crate::store::Served::start(&folder, &mut folder.command(&args));
    let second = folder.run(&["resize", "view/disk.tply", "2M"]);
    served.signal(rustix::process::Signal::TERM);
    let code = served.end();
    let first_gone = folder.run(&["resize", "view/disk.tply", "2M"]);
    // bindfs doesn't hear that a process was killed.
    drop(crate::store::Served::start(&folder, &mut folder.command(&args)));
    let killed = folder.run(&["resize", "view/disk.tply", "4M"]);
    assert!(bindfs("fusermount3", &["-u", "view"]) || bindfs("umount", &["view"]));
    assert!(second.refused().contains("in use by thinply"), "{second:?}");
    assert_eq!((code, first_gone.code), (Some(0), 0), "{first_gone:?}");
    assert_eq!(killed.code, 0, "{killed:?}");
}

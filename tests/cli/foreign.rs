//! Disks that other programs made, in the shapes that they are met in.

use std::fs;
use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::store::Served;
use crate::support::{Folder, MIB, Run, noise, output, skip, start};

/// Runs the command with a file's bytes coming through a pipe.
fn piped(folder: &Folder, args: &[&str], bytes: &[u8]) -> Run {
    let mut child = start(folder.command(args).stdin(Stdio::piped()));
    // It may refuse before it has heard all.
    let _ = child.stdin.take().unwrap().write_all(bytes);
    let output: Output = child.wait_with_output().unwrap();
    output.into()
}

#[test]
fn what_is_no_raw_disk_is_refused_with_the_way_unless_the_user_insists() {
    let folder = Folder::new();
    let disk = noise(1, MIB as usize);
    let begins = |at: usize, sign: &[u8]| {
        let mut bytes = disk.clone();
        bytes[at..at + sign.len()].copy_from_slice(sign);
        bytes
    };
    folder.ok(&["create", "--size", "1M", "layer.tply"]);
    folder.ok(&["pack", "layer.tply", "packed.tply"]);
    let footer = [&disk[..], b"conectix", &[0; 504]].concat();
    let cases = [
        (begins(0, b"\x1f\x8b\x08"), "gzip -dc"),
        (begins(0, b"\xfd7zXZ\0"), "xz -dc"),
        (begins(0, b"\x28\xb5\x2f\xfd"), "zstd -dc"),
        (begins(0, b"BZh91AY&SY"), "bzip2 -dc"),
        (begins(257, b"ustar"), "tar -xf"),
        (folder.read("layer.tply"), "thinply export"),
        (folder.read("packed.tply"), "thinply export"),
        (footer[..].to_vec(), "--format vhd"),
        (footer[..footer.len() - 1].to_vec(), "--format vhd"),
    ];
    for (bytes, way) in &cases {
        folder.write("disk.raw", bytes);
        for args in [&["import", "disk.raw", "out.tply"][..], &["image", "import", "disk.raw", "o"]]
        {
            let run = folder.run(args);
            assert!(run.refused().contains(way), "{way}: {run:?}");
            assert!(run.stderr.contains("--format raw"), "{run:?}");
        }
        let run = piped(&folder, &["import", "-", "out.tply"], bytes);
        assert!(run.refused().contains("--format raw"), "{way}: {run:?}");
        assert!(!folder.join("out.tply").exists());

        folder.ok(&["import", "--format", "raw", "disk.raw", "out.tply"]);
        let run = piped(&folder, &["import", "--format", "raw", "-", "piped.tply"], bytes);
        assert_eq!(run.code, 0, "{run:?}");
        for name in ["out.tply", "piped.tply"] {
            assert_eq!(folder.export(name)[..bytes.len()], bytes[..], "{way}");
            fs::remove_file(folder.join(name)).unwrap();
        }
    }
}

#[test]
fn a_flat_image_as_vmware_writes_it_comes_in() {
    let folder = Folder::new();
    let (one, two) = (noise(1, MIB as usize), noise(2, MIB as usize));
    folder.write("vm-flat.vmdk", &one);
    folder.write("moved.bin", &two);
    folder.write(
        "vm.vmdk",
        b"# Disk DescriptorFile\nversion=3\nencoding=\"UTF-8\"\nCID=fffffffe\nparentCID=ffffffff\n\
          isNativeSnapshot=\"no\"\ncreateType=\"vmfs\"\nchangeTrackPath=\"vm-ctk.vmdk\"\n\n\
          # Extent description\nRW 2048 VMFS \"vm-flat.vmdk\"\nRW 2048 FLAT \"D:\\vms\\two.vmdk\" 0\n\
          # The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\nddb.encoding = \"UTF-8\"\n",
    );
    let refused = folder.run(&["import", "--with", "vm-flat.vmdk", "vm.vmdk", "out.tply"]);
    assert!(refused.refused().contains("two.vmdk"), "{refused:?}");
    let with = ["--with", "vm-flat.vmdk", "--with", "two.vmdk=moved.bin"];
    folder.ok(&[&["import", "vm.vmdk", "out.tply"], &with[..]].concat());
    assert!(folder.export("out.tply") == [one, two].concat());
}

/// A qcow2 image of a MiB over whatever that text means; none where QEMU's tools are missing.
fn over(folder: &Folder, reference: &str) -> Option<()> {
    let mut create = Command::new("qemu-img");
    create.args([
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-F",
        "raw",
        "-b",
        reference,
        "top.qcow2",
        "1M",
    ]);
    let made = create.current_dir(folder.path()).status().is_ok_and(|status| status.success());
    if !made {
        skip("needs qemu-img");
    }
    made.then_some(())
}

#[test]
fn a_backing_file_is_found_in_every_form_of_its_name() {
    let folder = Folder::new();
    let base = noise(1, MIB as usize);
    folder.write("base.raw", &base);
    folder.write("other.raw", &base);
    let files = [
        "file:base.raw",
        "/elsewhere/base.raw",
        r"C:\vms\base.raw",
        r#"json:{"driver":"raw","file":{"driver":"file","filename":"/x/base.raw"}}"#,
    ];
    for reference in files {
        if over(&folder, reference).is_none() {
            return;
        }
        let advice = folder.run(&["import", "top.qcow2", "out.tply"]);
        assert!(advice.refused().contains("--with"), "{advice:?}");
        for with in ["base.raw", "base.raw=other.raw", &format!("{reference}=other.raw")] {
            folder.ok(&["import", "--with", with, "top.qcow2", "out.tply"]);
            assert!(folder.export("out.tply") == base, "{reference} {with}");
            fs::remove_file(folder.join("out.tply")).unwrap();
        }
    }
    for reference in [
        "nbd://host/base.raw",
        r#"json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"base.raw"}}"#,
    ] {
        over(&folder, reference).unwrap();
        let run = folder.run(&["import", "--with", "base.raw", "top.qcow2", "out.tply"]);
        assert!(run.refused().contains("NAME=FILE"), "{run:?}");
        let with = format!("{reference}=base.raw");
        folder.ok(&["import", "--with", &with, "top.qcow2", "out.tply"]);
        assert!(folder.export("out.tply") == base);
        fs::remove_file(folder.join("out.tply")).unwrap();
    }
    let twice = ["--with", "base.raw=other.raw", "--with", "base.raw=base.raw"];
    over(&folder, "base.raw").unwrap();
    let run = folder.run(&[&["import", "top.qcow2", "out.tply"], &twice[..]].concat());
    assert!(run.refused().contains("more than one --with"), "{run:?}");
}

#[test]
fn an_image_that_is_damaged_or_comes_through_a_pipe_is_refused_with_a_way_that_works() {
    let folder = Folder::new();
    folder.write("base.raw", &noise(1, MIB as usize));
    if over(&folder, "base.raw").is_none() {
        return;
    }
    let image = folder.read("top.qcow2");
    for (mark, what) in [(1, "were not written back"), (2, "marked as corrupt")] {
        let mut bytes = image.clone();
        bytes[79] |= mark;
        folder.write("marked.qcow2", &bytes);
        let run = folder.run(&["import", "--with", "base.raw", "marked.qcow2", "out.tply"]);
        for part in [what, "qemu-img check -r all", "qemu-nbd --read-only"] {
            assert!(run.refused().contains(part), "{part}: {run:?}");
        }
        let mut check = Command::new("qemu-img");
        check.args(["check", "-q", "-r", "all", "marked.qcow2"]).current_dir(folder.path());
        output(check.stdout(Stdio::null()).stderr(Stdio::null()));
        folder.ok(&["import", "--with", "base.raw", "marked.qcow2", "out.tply"]);
        fs::remove_file(folder.join("out.tply")).unwrap();
    }
    for args in
        [&["import", "-", "out.tply"][..], &["import", "--format", "qcow2", "-", "out.tply"]]
    {
        let run = piped(&folder, args, &image);
        assert!(run.refused().contains("save it as a file"), "{run:?}");
        assert!(!run.stderr.contains("--format qcow2"), "{run:?}");
    }
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_server_is_asked_for_blocks_of_the_sizes_that_it_takes() {
    let folder = Folder::new();
    let disk = noise(1, 3 * MIB as usize);
    folder.write("disk.raw", &disk);
    for (number, (minimum, maximum)) in
        [("64K", "64K"), ("1", "64K"), ("4096", "32M")].into_iter().enumerate()
    {
        let socket = folder.join(&format!("socket{number}"));
        let mut command = Command::new("nbdkit");
        command
            .args(["-f", "-r", "--filter=blocksize-policy", "file", "disk.raw", "-U"])
            .arg(&socket);
        command.args(["blocksize-error-policy=error", "blocksize-preferred=64K"]);
        command.arg(format!("blocksize-minimum={minimum}"));
        command.arg(format!("blocksize-maximum={maximum}"));
        let Ok(child) = command.current_dir(folder.path()).stderr(Stdio::null()).spawn() else {
            return skip("needs nbdkit");
        };
        let _ended = Ended(child);
        for _ in 0..500 {
            if socket.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let name = format!("out{number}.tply");
        folder.ok(&["import", &uri, &name]);
        assert!(folder.export(&name) == disk, "{minimum} {maximum}");
    }
}

#[test]
fn a_store_in_a_deep_folder_is_served_and_asked() {
    let folder = Folder::new();
    let deep = format!("{}/{}", "d".repeat(100), "e".repeat(100));
    fs::create_dir_all(folder.join(&deep)).unwrap();
    let root = folder.join(&deep).join("store");
    let run =
        |args: &[&str]| -> Run { output(folder.command(args).env("THINPLY_ROOT", &root)).into() };
    assert_eq!(run(&["volume", "create", "--size", "1M", "data"]).code, 0);
    let mut serve = folder.command(&["serve", "--all", "--socket", "nbd.sock"]);
    let served = Served::start(&folder, serve.env("THINPLY_ROOT", &root));
    // The serving process is asked, by its own socket: it has the disk open.
    let client = served.client("volume/data").unwrap();
    assert!(root.join("control").exists());
    let listed = run(&["volume", "ls"]);
    assert_eq!(listed.code, 0, "{listed:?}");
    drop(client);
    drop(served);

    // A relative name in a deep folder: the address that is printed is taken here, and what other
    // programs need is said.
    let name = format!("{deep}/nbd.sock");
    let mut serve = folder.command(&["serve", "--all", "--once", "--socket", &name]);
    let mut child = start(serve.env("THINPLY_ROOT", &root));
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut uri = String::new();
    std::io::BufRead::read_line(&mut lines, &mut uri).unwrap();
    let uri = uri.trim().replace(":///", ":///volume/data:ro");
    let import = folder.run(&["import", &uri, "out.tply"]);
    let ended = Run::from(child.wait_with_output().unwrap());
    assert_eq!((import.code, ended.code), (0, 0), "{uri}: {import:?} {ended:?}");
    assert!(ended.stderr.contains("symbolic link"), "{ended:?}");
}

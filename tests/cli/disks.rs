//! Bytes in, bytes out: import, export, resize, and what they cost.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use thinply::device::Device;
use thinply::storage::Access;

use crate::support::{Folder, KIB, MIB, Run, noise, output, start};

/// Feeds `input` to a run.
fn piped(folder: &Folder, args: &[&str], input: &[u8]) -> Run {
    let mut child = start(folder.command(args).stdin(Stdio::piped()));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A run that refuses doesn't read all of it.
    let feed = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let run = child.wait_with_output().unwrap().into();
    feed.join().unwrap();
    run
}

fn padded(data: &[u8]) -> Vec<u8> {
    let mut padded = data.to_vec();
    padded.resize(data.len().next_multiple_of(512), 0);
    padded
}

/// Sources of odd sizes and kinds.
fn sources() -> Vec<Vec<u8>> {
    let mut mixed = noise(1, 5 * MIB as usize + 4096 * 3 + 700);
    mixed[MIB as usize..3 * MIB as usize].fill(0);
    mixed[4096..8192].fill(0);
    let mut magic = noise(2, 70_000);
    magic[..8].copy_from_slice(b"TPLYLIVE");
    let mut late = vec![0; 3 * MIB as usize + 1];
    late[3 * MIB as usize] = 1;
    vec![
        vec![7],
        noise(3, 512),
        noise(4, 4095),
        noise(5, 4097),
        vec![0; 100_000],
        noise(6, MIB as usize),
        mixed,
        magic,
        late,
    ]
}

#[test]
fn what_goes_in_comes_out_bit_by_bit() {
    for (number, source) in sources().iter().enumerate() {
        let folder = Folder::new();
        folder.write("raw", source);
        folder.ok(&["import", "raw", "file.tply"]);
        let run = piped(&folder, &["import", "-", "piped.tply"], source);
        assert_eq!((run.code, run.stdout.as_str()), (0, ""), "source {number}: {run:?}");
        for name in ["file.tply", "piped.tply"] {
            folder.ok(&["export", name, &format!("{name}.out")]);
            assert!(
                folder.read(&format!("{name}.out")) == padded(source),
                "source {number}, {name}"
            );
            let stdout = output(&mut folder.command(&["export", name, "-"]));
            assert!(stdout.status.success());
            assert!(stdout.stdout == padded(source), "source {number}, {name} piped");
            let info = folder.json(&["info", "--json", name]);
            assert_eq!(info["state"], "frozen");
            assert_eq!(info["virtual_size"], padded(source).len());
            folder.ok(&["check", "--chain", name]);
        }
    }
}

#[test]
fn what_is_empty_is_no_disk() {
    let folder = Folder::new();
    folder.write("raw", b"");
    for format in [&["--format", "raw"][..], &[]] {
        for source in ["raw", "-"] {
            let layer = [&["import", source, "a.tply"], format].concat();
            let image = [&["image", "import", source, "a"], format].concat();
            for args in [layer, image] {
                let run = piped(&folder, &args, b"");
                assert!(
                    run.refused().contains(&format!("{source}: is empty")),
                    "{args:?}: {run:?}"
                );
            }
        }
    }
    assert_eq!(folder.names(), ["raw", "store"]);
    assert_eq!(folder.ok(&["store", "check"]), "clean\n");
}

#[test]
fn zeros_and_holes_take_no_space_on_either_side() {
    let folder = Folder::new();
    let mut raw = fs::File::create(folder.join("raw")).unwrap();
    raw.seek(SeekFrom::Start(700 * MIB + 4096)).unwrap();
    raw.write_all(&noise(1, 8192)).unwrap();
    raw.write_all(&vec![0; MIB as usize]).unwrap();
    raw.set_len(2048 * MIB).unwrap();
    drop(raw);
    folder.ok(&["import", "raw", "a.tply"]);
    assert!(folder.cost("a.tply") <= 24 * KIB, "{}", folder.cost("a.tply"));
    folder.ok(&["export", "a.tply", "out"]);
    assert!(folder.cost("out") <= 16 * KIB, "{}", folder.cost("out"));
    assert_eq!(fs::metadata(folder.join("out")).unwrap().len(), 2048 * MIB);
    let compared = output(Command::new("cmp").args([folder.join("raw"), folder.join("out")]));
    assert!(compared.status.success(), "{compared:?}");
}

#[test]
fn an_empty_disk_of_any_size_is_mapped_and_copied_at_once() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "8T", "a.tply"]);
    folder.change("a.tply", 5 << 40, &[1; 512]);
    let begin = Instant::now();
    let map = folder.json(&["map", "--json", "a.tply"]);
    assert_eq!(map["extents"].as_array().unwrap().len(), 3, "{map}");
    folder.ok(&["export", "a.tply", "out"]);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    assert_eq!(fs::metadata(folder.join("out")).unwrap().len(), 8 << 40);
}

#[test]
fn a_child_stores_only_what_differs() {
    let folder = Folder::new();
    let base = noise(1, 8 * MIB as usize);
    folder.write("base", &base);
    folder.ok(&["import", "base", "base.tply"]);
    let mut changed = base.clone();
    changed[MIB as usize + 5] ^= 1;
    changed[2 * MIB as usize..3 * MIB as usize].fill(0);
    changed[8 * MIB as usize - 1] ^= 1;
    folder.write("changed", &changed);
    let run = folder.run(&["import", "--parent", "base.tply", "changed", "a.tply"]);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "the parent was frozen before");
    let run = piped(&folder, &["import", "--parent", "base.tply", "-", "b.tply"], &changed);
    assert_eq!(run.code, 0, "{run:?}");
    for name in ["a.tply", "b.tply"] {
        // Two blocks of data, two header slots, one bitmap page, and one where the host file system
        // lists such pieces.
        assert!(folder.cost(name) <= 24 * KIB, "{name}: {}", folder.cost(name));
        let map = folder.json(&["map", "--json", name]);
        let own = map["extents"].as_array().unwrap().iter().filter(|e| e["depth"] == 0);
        let own: Vec<_> =
            own.map(|e| (e["offset"].as_u64().unwrap(), e["length"].as_u64().unwrap())).collect();
        assert_eq!(own, [(MIB, 4096), (2 * MIB, MIB), (8 * MIB - 4096, 4096)], "{name}");
        folder.ok(&["export", name, "out"]);
        assert!(folder.read("out") == changed, "{name}");
        fs::remove_file(folder.join("out")).unwrap();
    }
}

#[test]
fn a_child_may_be_shorter_or_longer_than_its_parent() {
    let folder = Folder::new();
    folder.write("base", &noise(1, MIB as usize));
    folder.ok(&["import", "base", "base.tply"]);
    for (name, length) in [("short", 300 * KIB as usize + 100), ("long", 3 * MIB as usize)] {
        let mut data = noise(2, length.min(100_000));
        data.resize(length, 0);
        folder.write(name, &data);
        for extra in [&[][..], &["--size", "4M"]] {
            let mut expected = padded(&data);
            if !extra.is_empty() {
                expected.resize(4 * MIB as usize, 0);
            }
            let tail = ["--parent", "base.tply"];
            folder.ok(&[&["import", name, "a.tply"], extra, &tail].concat());
            let run = piped(&folder, &[&["import", "-", "b.tply"], extra, &tail].concat(), &data);
            assert_eq!(run.code, 0, "{run:?}");
            for layer in ["a.tply", "b.tply"] {
                folder.ok(&["export", layer, "out"]);
                assert!(folder.read("out") == expected, "{name} {extra:?} {layer}");
                fs::remove_file(folder.join("out")).unwrap();
                fs::remove_file(folder.join(layer)).unwrap();
            }
        }
    }
}

#[test]
fn a_size_that_does_not_do_is_refused_before_anything_is_made() {
    let folder = Folder::new();
    folder.write("raw", &noise(1, 10_000));
    let runs: [&[&str]; 5] = [
        &["import", "--size", "9K", "raw", "a.tply"],
        &["import", "--size", "1000", "raw", "a.tply"],
        &["create", "--size", "0", "a.tply"],
        &["create", "--size", "65P", "a.tply"],
        &["create", "--size", "big", "a.tply"],
    ];
    for args in runs {
        assert!(folder.run(args).refused().contains("--size"), "{args:?}");
        assert_eq!(folder.names(), ["raw"], "{args:?}");
    }
    assert!(folder.run(&["create", "a.tply"]).refused().contains("needs a size"));
    let run = piped(&folder, &["import", "--size", "8K", "-", "a.tply"], &noise(1, 10_000));
    assert!(run.refused().contains("10000 bytes"), "{run:?}");
    assert_eq!(folder.names(), ["raw"]);
}

#[test]
fn a_writable_import_is_written_on() {
    let folder = Folder::new();
    folder.write("raw", &noise(1, 10_240));
    folder.ok(&["import", "--writable", "--size", "1M", "raw", "a.tply"]);
    assert_eq!(folder.json(&["info", "--json", "a.tply"])["state"], "writable");
    folder.change("a.tply", 500_000, b"more");
}

#[test]
fn an_interrupted_import_leaves_nothing() {
    let folder = Folder::new();
    let mut child = start(folder.command(&["import", "-", "a.tply"]).stdin(Stdio::piped()));
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&noise(1, 3 * MIB as usize)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while folder.names().is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(folder.names().len(), 1, "a draft");
    let id = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(folder.names(), [] as [&str; 0]);
}

#[test]
fn a_shrink_must_be_asked_for_and_what_it_cuts_never_comes_back() {
    let folder = Folder::new();
    let data = noise(1, 4 * MIB as usize);
    folder.write("raw", &data);
    folder.ok(&["import", "raw", "base.tply"]);
    folder.ok(&["create", "--parent", "base.tply", "a.tply"]);
    folder.change("a.tply", 3 * MIB, &[1; 8192]);
    let size = || folder.json(&["info", "--json", "a.tply"])["virtual_size"].as_u64().unwrap();
    folder.run(&["resize", "a.tply", "-1M"]).refused();
    assert_eq!(size(), 4 * MIB);
    folder.ok(&["resize", "--shrink", "a.tply", "-3M"]);
    folder.ok(&["resize", "--shrink", "a.tply", "1000K"]);
    assert_eq!(size(), 1000 * KIB);
    folder.ok(&["resize", "a.tply", "+1M"]);
    folder.ok(&["resize", "a.tply", "8M"]);
    assert_eq!(size(), 8 * MIB);
    folder.ok(&["export", "a.tply", "out"]);
    let out = folder.read("out");
    let kept = 1000 * KIB as usize;
    assert!(out[..kept] == data[..kept]);
    assert!(out[kept..].iter().all(|&byte| byte == 0));
    for wrong in ["-8M", "1000", "-9M"] {
        let run = folder.run(&["resize", "a.tply", wrong, "--shrink"]);
        assert!(run.refused().contains("a.tply: "), "{run:?}");
    }
    assert!(folder.run(&["resize", "base.tply", "9M"]).refused().contains("frozen"));
    assert_eq!(size(), 8 * MIB);
}

#[test]
fn a_layer_that_was_not_closed_is_read_as_it_was_flushed() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "a.tply"]);
    folder.crash("a.tply", 8192, &[7; 4096]);
    assert_eq!(folder.json(&["info", "--json", "a.tply"])["state"], "in use");
    assert!(folder.ok(&["check", "a.tply"]).contains("was not closed"));
    folder.ok(&["export", "a.tply", "out"]);
    assert_eq!(folder.read("out")[8192..12288], [7; 4096]);
    folder.ok(&["resize", "a.tply", "2M"]);
    assert_eq!(folder.json(&["info", "--json", "a.tply"])["state"], "writable");
    let mut back = [0; 4096];
    folder.open("a.tply", Access::Read).read(8192, &mut back).unwrap();
    assert_eq!(back, [7; 4096]);
}

#[test]
fn standard_input_may_be_a_file_that_is_open_in_the_middle() {
    let folder = Folder::new();
    let data = noise(1, 10_000);
    folder.write("raw", &data);
    let mut raw = fs::File::open(folder.join("raw")).unwrap();
    raw.seek(SeekFrom::Start(1000)).unwrap();
    let run = output(folder.command(&["import", "-", "a.tply"]).stdin(raw));
    assert!(run.status.success(), "{run:?}");
    let out = output(&mut folder.command(&["export", "a.tply", "-"])).stdout;
    assert!(out == padded(&data[1000..]));
}

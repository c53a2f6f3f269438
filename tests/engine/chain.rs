//! What a chain promises, on real files.

use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use testkit::bench::{BLOCK, Bench, Disk};
use testkit::hooked::{Call, Hooked};
use thinply::chain::{Chain, Gate, Kind, MAX_DEPTH, MapExtent, create, seal};
use thinply::device::{Detail, Device, Prefetch, ZeroMode};
use thinply::error::ErrorKind;
use thinply::format::geometry::{bitmap_offset, block_offset, file_length};
use thinply::packed::Compression;
use thinply::storage::{Access, FileFolder, Folder, MemoryFolder};
use thinply::types::{Block, Group, WORD_BYTES};
use thinply::wait::{NotDone, Wait};

const MIB: u64 = 1 << 20;

struct Files {
    dir: tempfile::TempDir,
    bench: Bench,
}

impl Files {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bench = Bench::in_folder(Arc::new(FileFolder::new(dir.path())));
        Self { dir, bench }
    }

    fn disk_use(&self, name: &str) -> u64 {
        fs::metadata(self.dir.path().join(name)).unwrap().blocks() * 512
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.dir.path().join(name)).unwrap()
    }
}

fn read(chain: &Chain, offset: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0xee; length];
    chain.read(offset, &mut data).unwrap();
    data
}

fn extents(chain: &Chain, offset: u64, length: u64, detail: Detail) -> Vec<MapExtent> {
    let mut found = Vec::new();
    let mut visit = |extent| {
        found.push(extent);
        ControlFlow::Continue(())
    };
    chain.map(offset, length, detail, &mut visit).unwrap();
    found
}

/// Where each extent of the whole device begins, and what it holds.
fn kinds(chain: &Chain, detail: Detail) -> Vec<(u64, Kind)> {
    let found = extents(chain, 0, chain.size(), detail);
    found.iter().map(|extent| (extent.offset, extent.kind)).collect()
}

#[test]
fn an_overlay_larger_than_its_base_reads_zeros_beyond_it() {
    let files = Files::new();
    // The base ends in the middle of a block that it owns.
    files.bench.create("base", MIB + 512);
    let base = files.bench.write("base");
    base.write(MIB - 4096, &[7; 4096 + 512]).unwrap();
    base.close().unwrap();
    files.bench.overlay("top", "base", Some(2 * MIB));
    let top = files.bench.write("top");
    let mut expected = vec![7; 512];
    expected.resize(4096, 0);
    assert_eq!(read(&top, MIB, 4096), expected);
    assert_eq!(read(&top, MIB + 4096, 65536), vec![0; 65536]);
    // Copy-up of the block at the edge brings no byte from behind the base's end.
    top.write(MIB + 4000, &[9; 10]).unwrap();
    expected[4000..4010].fill(9);
    assert_eq!(read(&top, MIB, 4096), expected);
}

#[test]
fn a_group_that_is_owned_whole_is_read_through_an_overlay() {
    let bench = Bench::default();
    let group = 127 * MIB;
    bench.create("base", group);
    bench.change("base", |base| base.write(0, &vec![7; group as usize]).unwrap());
    bench.overlay("top", "base", None);
    assert_eq!(read(&bench.write("top"), group - 4096, 4096), [7; 4096]);
}

#[test]
fn shrinking_and_growing_shows_zeros_never_old_data() {
    let files = Files::new();
    files.bench.create("base", MIB);
    let base = files.bench.write("base");
    base.write(0, &vec![7; MIB as usize]).unwrap();
    base.close().unwrap();
    files.bench.overlay("top", "base", None);
    let top = files.bench.write("top");
    top.write(8192, &[9; 4096]).unwrap();
    top.write(16 * 4096, &[9; 4096]).unwrap();
    assert_eq!(top.resize(8192 + 512, false).unwrap_err().kind(), ErrorKind::InvalidInput);
    top.resize(8192 + 512, true).unwrap();
    top.resize(8192 + 512, false).unwrap();
    top.resize(MIB, false).unwrap();
    let check = |top: &Chain| {
        assert_eq!(read(top, 0, 8192), vec![7; 8192]);
        assert_eq!(read(top, 8192, 512), vec![9; 512]);
        let rest = (MIB - 8192 - 512) as usize;
        assert_eq!(read(top, 8192 + 512, rest), vec![0; rest]);
    };
    check(&top);
    top.close().unwrap();
    check(&files.bench.read("top"));
}

#[test]
fn a_file_that_a_cut_off_resize_left_too_long_shows_nothing_of_it() {
    let files = Files::new();
    files.bench.create("top", 32 * 4096);
    let top = files.bench.write("top");
    top.write(16 * 4096, &[9; 4096]).unwrap();
    top.resize(8 * 4096, true).unwrap();
    top.close().unwrap();
    drop(top);
    // The block's bit is still there, and so is its data, as if the file had not been cut.
    let file = fs::OpenOptions::new().write(true).open(files.dir.path().join("top")).unwrap();
    file.set_len(file_length(32 * 4096)).unwrap();
    file.write_all_at(&[9; 4096], block_offset(Block(16)).0).unwrap();
    drop(file);
    let top = files.bench.write("top");
    assert_eq!(files.bytes("top").len() as u64, file_length(8 * 4096));
    top.resize(32 * 4096, false).unwrap();
    assert_eq!(read(&top, 0, 32 * 4096), vec![0; 32 * 4096]);
    top.close().unwrap();
}

#[test]
fn a_group_that_a_shrink_cut_off_is_forgotten_and_a_new_one_is_there() {
    let bench = Bench::default();
    bench.create("top", 200 * MIB);
    let top = bench.write("top");
    top.write(190 * MIB, &[9; 4096]).unwrap();
    top.resize(MIB, true).unwrap();
    top.resize(1 << 30, false).unwrap();
    let kinds = || kinds(&top, Detail::Bitmaps);
    assert_eq!(kinds(), [(0, Kind::Absent)]);
    let last = (1 << 30) - 4096;
    top.write(last, &[8; 4096]).unwrap();
    assert_eq!(kinds(), [(0, Kind::Absent), (last, Kind::Data)]);
}

#[test]
fn growth_spends_space_only_on_an_owned_last_block() {
    let files = Files::new();
    for (name, owned) in [("absent", false), ("owned", true)] {
        files.bench.create(name, 4096 + 512);
        let top = files.bench.write(name);
        if owned {
            top.write(4096, &[9; 512]).unwrap();
        }
        top.resize(MIB, false).unwrap();
        let kinds = kinds(&top, Detail::Files);
        top.close().unwrap();
        assert_eq!(kinds.len(), if owned { 3 } else { 1 }, "{kinds:?}");
        let file = files.bench.folder.open(name, Access::Read).unwrap();
        let data = file.next_data(block_offset(Block(0)).0).unwrap();
        assert_eq!(data, owned.then_some(block_offset(Block(1)).0), "{name}");
    }
}

#[test]
fn a_write_to_one_container_is_never_seen_in_another_and_the_base_stays() {
    let files = Files::new();
    files.bench.create("base", 10 * MIB);
    let base = files.bench.write("base");
    base.write(MIB, &vec![1; MIB as usize]).unwrap();
    base.close().unwrap();
    for name in ["a", "b", "c"] {
        files.bench.overlay(name, "base", None);
    }
    let before = files.bytes("base");
    let tops = ["a", "b", "c"].map(|name| files.bench.write(name));
    for (fill, top) in (10..).zip(&tops) {
        top.write(MIB + 100, &[fill; 5000]).unwrap();
        top.trim(MIB + 16384, 8192).unwrap();
        top.write(5 * MIB, &[fill; 4096]).unwrap();
        top.flush().unwrap();
    }
    for (fill, top) in (10..).zip(&tops) {
        assert_eq!(read(top, MIB, 100), [1; 100]);
        assert_eq!(read(top, MIB + 100, 5000), [fill; 5000]);
        assert_eq!(read(top, MIB + 5100, 4096), [1; 4096]);
        assert_eq!(read(top, MIB + 16384, 8192), [0; 8192]);
        assert_eq!(read(top, 5 * MIB, 4096), [fill; 4096]);
    }
    tops.iter().for_each(|top| top.close().unwrap());
    assert!(files.bytes("base") == before, "the base has changed");
    assert_eq!(read(&files.bench.read("base"), MIB, 8192), [1; 8192]);
}

#[test]
fn a_fresh_overlay_of_a_large_disk_costs_three_blocks_at_most() {
    let files = Files::new();
    files.bench.create("base", 1 << 40);
    files.bench.overlay("top", "base", None);
    assert!(files.disk_use("top") <= 12 << 10, "{} bytes", files.disk_use("top"));
    let top = files.bench.write("top");
    assert_eq!(top.size(), 1 << 40);
    top.write((1 << 40) - 4096, &[5; 4096]).unwrap();
    top.close().unwrap();
    assert!(files.disk_use("top") <= 32 << 10, "{} bytes", files.disk_use("top"));
}

/// Prints what a creation takes; in a memory file system, where a sync costs nothing, too. Run with
/// `--nocapture` to see it.
#[test]
fn creating_an_overlay_of_a_large_disk_reports_its_time() {
    let memory = Path::new("/dev/shm").is_dir().then(|| tempfile::tempdir_in("/dev/shm").unwrap());
    for dir in [Some(tempfile::tempdir().unwrap()), memory].into_iter().flatten() {
        let bench = Bench::in_folder(Arc::new(FileFolder::new(dir.path())));
        bench.create("base", 1 << 40);
        bench.overlay("first", "base", None);
        let start = Instant::now();
        for number in 0..20 {
            bench.overlay(&format!("top-{number}"), "base", None);
        }
        println!("{}: {:?} each", dir.path().display(), start.elapsed() / 20);
    }
}

#[test]
fn sub_block_writes_copy_up_at_most_a_block() {
    let files = Files::new();
    files.bench.create("base", 10 * MIB);
    let base = files.bench.write("base");
    base.write(0, &vec![3; 10 * MIB as usize]).unwrap();
    base.close().unwrap();
    files.bench.overlay("top", "base", None);
    let top = files.bench.write("top");
    top.write(MIB + 5, &[9]).unwrap();
    top.write(3 * MIB + 4095, &[9; 2]).unwrap();
    let mut owned = extents(&top, 0, top.size(), Detail::Bitmaps);
    owned.retain(|extent| extent.depth == Some(0));
    let owned: Vec<_> = owned.iter().map(|extent| (extent.offset, extent.length)).collect();
    assert_eq!(owned, [(MIB, 4096), (3 * MIB, 8192)]);
    let mut expected = vec![3; 8192];
    expected[4095..4097].fill(9);
    assert_eq!(read(&top, 3 * MIB, 8192), expected);
}

#[test]
fn a_walk_names_every_byte_once_and_skips_what_is_empty() {
    let bench = Bench::default();
    let (group, size) = (127 * MIB, 3 * 127 * MIB + 512);
    bench.create("base", size);
    // Over the end of the first group.
    bench.change("base", |base| base.write(group - MIB, &vec![1; 2 * MIB as usize]).unwrap());
    bench.overlay("top", "base", None);
    let top = bench.write("top");
    top.zero(group - MIB, 4096, ZeroMode::default()).unwrap();
    top.write(group + MIB, &[2; 4096]).unwrap();
    assert_eq!(top.skip_absent(0).unwrap(), 0, "what an open top owns may be in memory alone");
    top.close().unwrap();
    drop(top);
    let still = bench.read("top");
    let mut found = Vec::new();
    let mut note = |extent: MapExtent| {
        found.push((extent.offset, extent.length, extent.depth, extent.kind));
        Ok(())
    };
    still.walk(&mut note).unwrap();
    let rest = group + MIB + 4096;
    let expected = [
        (0, group - MIB, None, Kind::Absent),
        (group - MIB, 4096, Some(0), Kind::Zero),
        (group - MIB + 4096, 2 * MIB - 4096, Some(1), Kind::Data),
        (group + MIB, 4096, Some(0), Kind::Data),
        (rest, size - rest, None, Kind::Absent),
    ];
    assert_eq!(found, expected);
    assert_eq!(still.skip_absent(rest).unwrap(), rest);
    assert_eq!(still.skip_absent(2 * group + 5).unwrap(), size);
    bench.create("far", size);
    bench.change("far", |far| far.write(2 * group + 8192, &[1]).unwrap());
    assert_eq!(bench.read("far").skip_absent(4096).unwrap(), 2 * group);
}

#[test]
fn trim_and_zero_give_space_back_and_hide_the_parent() {
    let files = Files::new();
    files.bench.create("base", 10 * MIB);
    let base = files.bench.write("base");
    base.write(0, &vec![3; MIB as usize]).unwrap();
    base.close().unwrap();
    files.bench.overlay("top", "base", None);
    let top = files.bench.write("top");
    top.write(0, &vec![4; 4 * MIB as usize]).unwrap();
    top.flush().unwrap();
    let full = files.disk_use("top");
    top.trim(0, 2 * MIB).unwrap();
    top.zero(2 * MIB, 2 * MIB, ZeroMode::default()).unwrap();
    top.flush().unwrap();
    assert!(files.disk_use("top") + 4 * MIB <= full + 65536, "space was not given back");
    assert!(read(&top, 0, 4 * MIB as usize).iter().all(|&byte| byte == 0));
    // Nobody owns it: no bit is spent.
    top.trim(5 * MIB, MIB).unwrap();
    assert_eq!(kinds(&top, Detail::Files), [(0, Kind::Zero), (4 * MIB, Kind::Absent)]);
    let fast = ZeroMode { fast_only: true, allocate: false };
    top.zero(MIB, 4096, fast).unwrap();
    for (offset, length) in [(MIB + 1, 4096), (MIB, 4097)] {
        let error = top.zero(offset, length, fast).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    let allocated = ZeroMode { fast_only: false, allocate: true };
    let before = files.disk_use("top");
    top.zero(6 * MIB, MIB, allocated).unwrap();
    top.flush().unwrap();
    assert!(files.disk_use("top") >= before + MIB, "no space was allocated");
    // A part of a block that nobody owns is zeros already, but space it has none.
    for (mode, expected) in [(ZeroMode::default(), None), (allocated, Some(0))] {
        top.zero(8 * MIB + 100, 100, mode).unwrap();
        let found = extents(&top, 8 * MIB, 4096, Detail::Bitmaps);
        let depths: Vec<_> = found.iter().map(|extent| extent.depth).collect();
        assert_eq!(depths, [expected]);
    }
}

#[test]
fn sizes_from_one_sector_to_many_tebibytes() {
    let files = Files::new();
    for size in [512, 1536, 4096, 4608, 127 * MIB, 127 * MIB + 512, 8 << 40, 15 << 40] {
        let name = format!("disk-{size}");
        files.bench.create(&name, size);
        let chain = files.bench.write(&name);
        let length = size.min(10_000) as usize;
        let (start, end) = (vec![1; length / 2], vec![2; length - length / 2]);
        chain.write(0, &start).unwrap();
        chain.write(size - end.len() as u64, &end).unwrap();
        assert_eq!(chain.write(size, &[1]).unwrap_err().kind(), ErrorKind::OutOfRange);
        chain.close().unwrap();
        let chain = files.bench.read(&name);
        assert_eq!(read(&chain, 0, start.len()), start, "{size}");
        assert_eq!(read(&chain, size - end.len() as u64, end.len()), end, "{size}");
        fs::remove_file(files.dir.path().join(&name)).unwrap();
    }
    for size in [0, 511, 513, (1 << 56) + 512] {
        let layers = Gate::default();
        let error = thinply::chain::create(&files.bench.folder, "bad", Some(size), None, &layers);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidInput, "{size}");
    }
}

#[test]
fn one_writer_and_the_parent_gate() {
    let files = Files::new();
    let bench = &files.bench;
    bench.create("base", MIB);
    bench.overlay("top", "base", None);
    let writer = bench.write("top");
    for access in [Access::Write, Access::Read] {
        assert_eq!(bench.open("top", access).unwrap_err().kind(), ErrorKind::InUse);
    }
    assert_eq!(seal(&*bench.folder, "top").unwrap_err().kind(), ErrorKind::InUse);
    writer.close().unwrap();
    drop(writer);
    assert_eq!(bench.open("base", Access::Write).unwrap_err().kind(), ErrorKind::ReadOnly);

    let fresh = || Bench::in_folder(bench.folder.clone());
    let path = |name: &str| files.dir.path().join(name);
    fs::rename(path("base"), path("moved")).unwrap();
    assert_eq!(fresh().open("top", Access::Read).unwrap_err().kind(), ErrorKind::NotFound);
    // A layer of the same name that is somebody else.
    bench.create("base", MIB);
    assert_eq!(fresh().open("top", Access::Read).unwrap_err().kind(), ErrorKind::ParentMismatch);
    seal(&*bench.folder, "base").unwrap();
    assert_eq!(fresh().open("top", Access::Write).unwrap_err().kind(), ErrorKind::ParentMismatch);
    // The right layer, but through a link.
    fs::remove_file(path("base")).unwrap();
    std::os::unix::fs::symlink(path("moved"), path("base")).unwrap();
    assert!(fresh().open("top", Access::Read).is_err());
    // In another folder that the user names, where somebody else's is what is worth telling.
    fs::remove_file(path("base")).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let open = |names: &[&str]| {
        let folder =
            |name| Arc::new(FileFolder::new(elsewhere.path().join(name))) as Arc<dyn Folder>;
        let layers = Arc::new(Gate::new(names.iter().map(folder).collect()));
        Chain::open(bench.folder.clone(), "top", Access::Read, layers).map(drop)
    };
    for (name, from) in [("wrong", "top"), ("right", "moved"), ("empty", "")] {
        fs::create_dir(elsewhere.path().join(name)).unwrap();
        if !from.is_empty() {
            fs::copy(path(from), elsewhere.path().join(name).join("base")).unwrap();
        }
    }
    assert_eq!(open(&["empty"]).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(open(&["empty", "wrong"]).unwrap_err().kind(), ErrorKind::ParentMismatch);
    open(&["wrong", "empty", "right"]).unwrap();
}

#[test]
fn children_of_one_parent_share_its_open_stack() {
    let bench = Bench::default();
    bench.create("base", MIB);
    bench.overlay("middle", "base", None);
    let link = seal(&*bench.folder, "middle").unwrap().link;
    let stack = || bench.layers.stack(&link, &bench.folder).unwrap();
    let (one, other) = (stack(), stack());
    assert!(Arc::ptr_eq(&one, &other));
    // Not beyond the last of them.
    let weak = Arc::downgrade(&one);
    drop((one, other));
    assert!(weak.upgrade().is_none());
    assert_eq!(stack().layers().len(), 2);
}

#[test]
fn a_chain_may_be_deep_but_not_endless() {
    let bench = Bench::default();
    bench.create("top", MIB);
    let top = bench.write("top");
    let mut disk = Disk::new(MIB);
    for level in 0..MAX_DEPTH as u64 - 1 {
        let data = level.to_le_bytes().repeat(BLOCK / 8);
        let offset = level % 200 * BLOCK as u64;
        top.write(offset, &data).unwrap();
        disk.write(offset, &data);
        top.snapshot(&format!("s{level}")).unwrap();
    }
    assert_eq!(top.snapshot("one-too-many").unwrap_err().kind(), ErrorKind::Limit);
    top.close().unwrap();
    drop(top);
    let fresh = Bench::in_folder(bench.folder.clone());
    let top = fresh.write("top");
    assert!(read(&top, 0, MIB as usize) == disk.read(0, MIB as usize));
}

#[test]
fn an_interrupted_snapshot_is_finished_by_the_next_open() {
    let files = Files::new();
    let bench = &files.bench;
    bench.create("top", MIB);
    let top = bench.write("top");
    top.write(0, &[5; 4096]).unwrap();
    top.snapshot("snap").unwrap();
    top.close().unwrap();
    drop(top);
    // As if the last rename had not happened.
    let path = |name: &str| files.dir.path().join(name);
    fs::rename(path("top"), path(".top.top")).unwrap();
    fs::hard_link(path("snap"), path("top")).unwrap();
    let fresh = Bench::in_folder(bench.folder.clone());
    let top = fresh.write("top");
    top.write(4096, &[6; 4096]).unwrap();
    top.close().unwrap();
    assert!(!path(".top.top").exists());
    assert_eq!(read(&fresh.read("top"), 0, 4096), [5; 4096]);
    assert_eq!(read(&fresh.read("snap"), 4096, 4096), [0; 4096]);
}

#[test]
fn a_new_top_that_cannot_be_looked_at_is_no_missing_one() {
    let hooked = Arc::new(Hooked::new(Arc::new(MemoryFolder::new("m"))));
    let bench = Bench::in_folder(hooked.clone());
    bench.create("top", MIB);
    let top = bench.write("top");
    hooked.on_calls(|call| match call {
        Call::Remove { .. } => Err(std::io::ErrorKind::PermissionDenied.into()),
        _ => Ok(usize::MAX),
    });
    assert_eq!(top.snapshot("snap").unwrap_err().kind(), ErrorKind::PermissionDenied);
    hooked.on_calls(|_| Ok(usize::MAX));
    top.snapshot("snap").unwrap();
    top.close().unwrap();
    drop(top);
    // As if the last rename had not happened.
    bench.folder.rename("top", ".top.top").unwrap();
    bench.folder.link("snap", "top").unwrap();
    hooked.on_calls(|call| match call {
        Call::Open { name: ".top.top" } => Err(std::io::ErrorKind::PermissionDenied.into()),
        _ => Ok(usize::MAX),
    });
    let opened = bench.open("top", Access::Write).map(drop);
    let sealed = seal(&*bench.folder, "top").map(drop);
    for result in [opened, sealed] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
}

#[test]
fn a_chain_goes_over_to_another_parent_only_from_the_one_it_stands_on() {
    let bench = Bench::default();
    bench.create("base", MIB);
    bench.change("base", |base| base.write(0, &[1; 8192]).unwrap());
    bench.overlay("top", "base", None);
    bench.pack(&bench.read("base"), "packed", Compression::None);
    let [old, new] = ["base", "packed"].map(|name| seal(&*bench.folder, name).unwrap().link);
    let top = bench.write("top");
    top.write(4096, &[2; 10]).unwrap();
    let error = top.relink(new.identity, &new).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentMismatch);
    top.relink(old.identity, &new).unwrap();
    let mut expected = vec![1; 8192];
    expected[4096..4106].fill(2);
    assert_eq!(read(&top, 0, 8192), expected);
    top.close().unwrap();
    drop(top);
    bench.folder.remove("base").unwrap();
    let fresh = Bench::in_folder(bench.folder.clone());
    assert_eq!(read(&fresh.read("top"), 0, 8192), expected);
}

#[test]
fn a_packed_layers_zeros_are_shown_only_where_the_files_are_asked() {
    let bench = Bench::default();
    bench.create("base", MIB);
    let blocks = [[1; 4096], [0; 4096], [2; 4096]];
    bench.change("base", |base| base.write(0, blocks.as_flattened()).unwrap());
    bench.pack(&bench.read("base"), "packed", Compression::None);
    let packed = bench.read("packed");
    let (one, two, end) = ((0, Kind::Data), (8192, Kind::Data), (12288, Kind::Absent));
    assert_eq!(kinds(&packed, Detail::Files), [one, (4096, Kind::Zero), two, end]);
    assert_eq!(kinds(&packed, Detail::Bitmaps), [one, end]);
}

/// A base with the bytes from 60 MiB to 130 MiB, over the end of its first group, and a top with one
/// word and the last block of its own.
fn half_covered(bench: &Bench) -> Chain {
    bench.create("base", 200 * MIB);
    let data: Vec<u8> = (0..70 * MIB / 8).flat_map(u64::to_le_bytes).collect();
    bench.change("base", |base| base.write(60 * MIB, &data).unwrap());
    bench.overlay("top", "base", None);
    let top = bench.write("top");
    top.write(64 * MIB, &vec![9; WORD_BYTES as usize]).unwrap();
    top.write(200 * MIB - 4096, &[9; 4096]).unwrap();
    top
}

#[test]
fn bytes_that_stand_side_by_side_in_one_file_are_handed_out_as_its_range() {
    let files = Files::new();
    let top = half_covered(&files.bench);
    let check = |chain: &Chain, offset: u64, length: u64, whole: bool| {
        let range = chain.host_range(offset, length).unwrap();
        assert_eq!(range.is_some(), whole, "{length} bytes at {offset}");
        let Some(range) = range else { return };
        let mut found = vec![0; length as usize];
        File::from(range.file).read_exact_at(&mut found, range.offset).unwrap();
        assert!(found == read(chain, offset, length as usize), "{length} bytes at {offset}");
    };
    let end = 64 * MIB + WORD_BYTES;
    for (offset, length, whole) in [
        (64 * MIB + 5, 100, true),
        (64 * MIB, WORD_BYTES, true),
        (end, 3 * WORD_BYTES, true),
        (end + 512, WORD_BYTES, true),
        (60 * MIB, 4 * MIB, true),
        // From one layer into the other, over a group's end, and where there is nothing.
        (64 * MIB - 512, 1024, false),
        (end - 512, 1024, false),
        (127 * MIB - 512, 512, true),
        (127 * MIB, 512, true),
        (127 * MIB - 512, 1024, false),
        (MIB, 4096, false),
        (130 * MIB - 512, 1024, false),
        (200 * MIB - 4096, 4096, true),
    ] {
        check(&top, offset, length, whole);
    }
    assert!(!top.read_only());
    top.close().unwrap();
    drop(top);
    let still = files.bench.read("top");
    assert!(still.read_only());
    check(&still, 64 * MIB, WORD_BYTES, true);
    // What is no file of the host has no range.
    assert!(half_covered(&Bench::default()).host_range(64 * MIB, 512).unwrap().is_none());
}

#[test]
fn what_is_cached_is_read_and_what_is_settled_written_without_waiting() {
    let top = half_covered(&Bench::default());
    let mut data = [0; 512];
    top.try_read(64 * MIB, (&mut data).into(), Wait::Never).unwrap();
    assert_eq!(data, [9; 512]);
    assert_eq!(top.try_write(64 * MIB, (&[8; 512]).into(), Wait::Never).unwrap(), 512);
    assert_eq!(read(&top, 64 * MIB, 1024), [[8; 512], [9; 512]].concat());
    top.flush().unwrap();
    top.write(100 * MIB, &[7; 4096]).unwrap();
    top.flush().unwrap();
    // Named by the last record, so it has to wait for another one.
    assert_eq!(top.try_write(100 * MIB, (&[6; 512]).into(), Wait::Never).unwrap(), 0);
    assert_eq!(read(&top, 100 * MIB, 512), [7; 512]);
}

/// Somebody else's snapshot, between the look at a layer and its lock.
#[test]
fn a_layer_that_was_frozen_while_it_was_opened_is_followed_by_its_new_top() {
    let memory: Arc<dyn Folder> = Arc::new(MemoryFolder::new("m"));
    let hooked = Arc::new(Hooked::new(memory.clone()));
    create(&memory, "base", Some(MIB), None, &Gate::default()).unwrap();
    let base = seal(&*memory, "base").unwrap();
    create(&memory, "disk", None, Some(&base), &Gate::default()).unwrap();
    let opened = AtomicUsize::new(0);
    hooked.on_calls(move |call| {
        // The parent is opened in between.
        let parent = matches!(call, Call::Open { name: "base" });
        if parent && opened.fetch_add(1, Ordering::Relaxed) == 0 {
            let open = Chain::open(memory.clone(), "disk", Access::Write, Arc::default());
            let other = open.unwrap();
            other.write(0, &[1; 512]).unwrap();
            other.snapshot("first").unwrap();
            other.close().unwrap();
        }
        Ok(usize::MAX)
    });
    let folder: Arc<dyn Folder> = hooked;
    let chain = Chain::open(folder, "disk", Access::Write, Arc::default()).unwrap();
    assert_eq!(chain.paths().len(), 3);
    assert_eq!(read(&chain, 0, 512), [1; 512]);
    chain.close().unwrap();
}

/// A disk whose calls a try may not make: maps of any layout and copy-up included.
#[test]
fn what_may_not_wait_asks_no_disk_for_what_it_does_not_know() {
    let hooked = Arc::new(Hooked::new(Arc::new(MemoryFolder::new("m"))));
    let bench = Bench::in_folder(hooked.clone());
    half_covered(&bench).close().unwrap();
    bench.pack(&bench.read("base"), "packed", Compression::Zstd(1));
    bench.overlay("over", "packed", None);
    for name in ["top", "over"] {
        let chain = bench.write(name);
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        hooked.on_calls(move |call| {
            match call {
                Call::ReadCached { .. } => return Err(io::ErrorKind::WouldBlock.into()),
                Call::Read { .. } | Call::Write { .. } | Call::Allocate { .. } => {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
                _ => {}
            }
            Ok(usize::MAX)
        });
        let none = |what: &str| assert_eq!(calls.swap(0, Ordering::Relaxed), 0, "{name}: {what}");
        let mut data = [0; 512];
        for wait in [Wait::Never, Wait::Decode] {
            let tried = chain.try_read(60 * MIB, (&mut data).into(), wait);
            assert!(matches!(tried, Err(NotDone::WouldWait)), "{name}: {wait:?}");
            let mut extents = Vec::new();
            let mut ask = |chain: &Chain, detail| {
                let tried = chain.try_extents(60 * MIB, MIB, detail, 9, &mut extents, wait);
                matches!(tried, Err(NotDone::WouldWait))
            };
            assert!(ask(&chain, Detail::Bitmaps) && ask(&chain, Detail::Files));
            none("nothing is known yet");
        }
        assert_eq!(chain.try_write(61 * MIB, (&[1; 512]).into(), Wait::Never).unwrap(), 0);
        assert!(chain.host_range(60 * MIB, 512).unwrap().is_none());
        none("nothing is known yet");
        // Known now: but a part of a block that is absent takes the bytes around it.
        chain.read(60 * MIB, &mut data).unwrap();
        calls.store(0, Ordering::Relaxed);
        assert_eq!(chain.try_write(61 * MIB, (&[1; 512]).into(), Wait::Never).unwrap(), 0);
        none("the bytes around it are not in the cache");
        // All is in the page cache but the second group's page.
        hooked.on_calls(|call| match call {
            Call::ReadCached { offset, .. } if offset == bitmap_offset(Group(1)).0 => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            _ => Ok(usize::MAX),
        });
        chain.write(61 * MIB, &[1; 512]).unwrap();
        assert_eq!(read(&chain, 61 * MIB, 512), [1; 512]);
        // Up to where it would wait, and no further. (A top without anything knows that.)
        let both = vec![2; 2 * WORD_BYTES as usize];
        let seam = 127 * MIB - WORD_BYTES;
        let written = chain.try_write(seam, (&both).into(), Wait::Never).unwrap();
        let all = name == "over";
        assert_eq!(written, if all { 2 * WORD_BYTES } else { WORD_BYTES }, "{name}");
        assert_eq!(read(&chain, seam, 512), [2; 512]);
        assert_eq!(read(&chain, 127 * MIB, 512) == [2; 512], all);
    }
}

#[test]
fn each_layer_is_told_which_of_its_bytes_will_be_read() {
    let hooked = Arc::new(Hooked::new(Arc::new(MemoryFolder::new("m"))));
    let bench = Bench::in_folder(hooked.clone());
    let top = half_covered(&bench);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = asked.clone();
    hooked.on_calls(move |call| {
        if let Call::Prefetch { name, offset, length } = call {
            noted.lock().unwrap().push((name.to_owned(), offset, length));
        }
        Ok(usize::MAX)
    });
    assert_eq!(top.prefetch(64 * MIB - 4096, WORD_BYTES + 2 * 4096).unwrap(), Prefetch::All);
    let at = |offset: u64| block_offset(Block(offset / 4096)).0;
    let end = 64 * MIB + WORD_BYTES;
    let expected = [
        ("base".to_owned(), at(64 * MIB - 4096), 4096),
        ("top".to_owned(), at(64 * MIB), WORD_BYTES),
        ("base".to_owned(), at(end), 4096),
    ];
    assert_eq!(*asked.lock().unwrap(), expected);
    assert_eq!(top.prefetch(64 * MIB + 4096, 8192).unwrap(), Prefetch::All);
    let inside = ("top".to_owned(), at(64 * MIB + 4096), 8192);
    assert_eq!(asked.lock().unwrap()[expected.len()..], [inside]);
    assert_eq!(top.prefetch(MIB, 4096).unwrap(), Prefetch::All, "zeros take no reading");
    assert_eq!(asked.lock().unwrap().len(), expected.len() + 1);
    // A packed layer is read when it is asked for.
    bench.pack(&bench.read("base"), "packed", Compression::None);
    bench.overlay("over", "packed", None);
    let over = bench.write("over");
    over.write(64 * MIB, &[1; 4096]).unwrap();
    assert_eq!(over.prefetch(64 * MIB, 4096).unwrap(), Prefetch::All);
    assert_eq!(over.prefetch(64 * MIB, 2 * 4096).unwrap(), Prefetch::InPart);
    assert_eq!(over.prefetch(64 * MIB - 4096, 2 * 4096).unwrap(), Prefetch::InPart);
}

/// The second reader, written from the specification alone, reads the same bytes.
#[test]
fn a_reader_in_another_language_reads_the_same() {
    let reader = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader/thinply_reader.py");
    let files = Files::new();
    let size = 128 * MIB + 512;
    files.bench.create("top", size);
    let mut disk = Disk::new(size);
    let mut random = 1u64;
    let read_with_python = |name: &str, disk: &Disk| {
        let out = files.dir.path().join("out.raw");
        let run = Command::new("python3")
            .arg(&reader)
            .arg(files.dir.path().join(name))
            .arg("-o")
            .arg(&out)
            .output()
            .expect("python3 is needed");
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let found = fs::read(&out).unwrap();
        assert_eq!(found.len() as u64, size);
        for (number, block) in found.chunks(BLOCK).enumerate() {
            let expected = disk.read((number * BLOCK) as u64, block.len());
            assert!(block == expected, "{name}: block {number} differs");
        }
        fs::remove_file(out).unwrap();
    };
    for round in 0..4 {
        let top = files.bench.write("top");
        for _ in 0..60 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let offset = (random >> 20) % (size - 20_000);
            let data = vec![(random >> 33) as u8; (random >> 40) as usize % 20_000];
            top.write(offset, &data).unwrap();
            disk.write(offset, &data);
            if random >> 60 == 3 {
                top.flush().unwrap();
            }
        }
        top.trim(MIB * round, MIB / 2).unwrap();
        disk.trim(MIB * round, MIB / 2);
        if round == 3 {
            // Not closed: the reader has to replay the journal.
            top.flush().unwrap();
            top.write(64 * MIB, &[9; 100]).unwrap();
            disk.write(64 * MIB, &[9; 100]);
            top.flush().unwrap();
        } else {
            top.snapshot(&format!("snap-{round}")).unwrap();
            top.close().unwrap();
        }
        drop(top);
        read_with_python("top", &disk);
    }
}

/// As on mergerfs and unionfs-fuse, where each name of a file has a number of its own.
#[test]
fn a_snapshot_is_repeated_over_its_link_and_never_over_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let hooked = Arc::new(Hooked::new(Arc::new(FileFolder::new(dir.path()))));
    hooked.without_numbers();
    let bench = Bench::in_folder(hooked);
    bench.create("top", MIB);
    let top = bench.write("top");
    top.write(0, &[7; 4096]).unwrap();
    top.flush().unwrap();
    fs::copy(path("top"), path("copy")).unwrap();
    fs::write(path("other"), "precious").unwrap();
    for taken in ["copy", "other"] {
        assert_eq!(top.snapshot(taken).unwrap_err().kind(), ErrorKind::Exists, "{taken}");
    }
    // What a crash leaves after the link.
    fs::hard_link(path("top"), path("snap")).unwrap();
    top.snapshot("snap").unwrap();
    top.write(0, &[8; 4096]).unwrap();
    top.close().unwrap();
    assert_eq!(fs::read(path("other")).unwrap(), b"precious");
    let (snap, top) = (bench.read("snap"), bench.read("top"));
    assert_eq!((read(&snap, 0, 4096), read(&top, 0, 4096)), (vec![7; 4096], vec![8; 4096]));
}

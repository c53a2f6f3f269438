//! Flatten: what it promises beyond what the model test compares, and power losses inside it.

use std::ops::ControlFlow;
use std::sync::Arc;

use testkit::bench::Bench;
use testkit::crash::Random;
use testkit::crash::disk::Disk;
use testkit::crash::folder::CrashFolder;
use thinply::chain::{Chain, Kind, Layer, MapExtent, Parent, seal};
use thinply::derive::Plan;
use thinply::device::{Detail, Device, ZeroMode};
use thinply::error::{ErrorKind, Result};
use thinply::format::header::ParentLink;
use thinply::packed::Compression;
use thinply::storage::{Access, Folder};

const BLOCK: u64 = 4096;
const SIZE: u64 = 8 * BLOCK + 512;

/// A base of 0x11, a layer over it with a change and a hole, and a top that is shorter than both.
fn build(bench: &Bench) {
    bench.create("base", SIZE);
    bench.change("base", |base| base.write(0, &vec![0x11; SIZE as usize]).unwrap());
    bench.overlay("middle", "base", Some(SIZE + 4 * BLOCK));
    bench.change("middle", |middle| {
        middle.write(BLOCK, &[0x22; BLOCK as usize]).unwrap();
        middle.zero(2 * BLOCK, BLOCK, ZeroMode::default()).unwrap();
        middle.zero(SIZE + 2 * BLOCK, BLOCK, ZeroMode::default()).unwrap();
        middle.write(7 * BLOCK, &[0x22; BLOCK as usize]).unwrap();
    });
    bench.overlay("top", "middle", None);
    let top = bench.write("top");
    // The cut goes through a block of the middle layer; the growth must not show it again.
    top.resize(7 * BLOCK + 1024, true).unwrap();
    top.resize(SIZE + BLOCK, false).unwrap();
    top.write(3 * BLOCK + 100, &[0x33; 10]).unwrap();
    top.close().unwrap();
}

fn content(chain: &Chain) -> Vec<u8> {
    let mut all = vec![0xee; chain.size() as usize];
    chain.read(0, &mut all).unwrap();
    all
}

fn layer(folder: &dyn Folder, name: &str) -> Layer {
    Layer::open(folder.open(name, Access::Read).unwrap()).unwrap()
}

fn flatten(bench: &Bench, name: &str, onto: Option<&str>) -> Result<Parent> {
    let link = onto.map(|name| seal(&*bench.folder, name).unwrap().link);
    let chain = bench.open("top", Access::Read)?;
    fold(&chain, &bench.folder, name, link.as_ref())
}

fn fold(
    chain: &Chain,
    folder: &Arc<dyn Folder>,
    name: &str,
    onto: Option<&ParentLink>,
) -> Result<Parent> {
    let plan = Plan::flatten(chain, onto)?;
    chain.derive_live(&plan, folder, name, Arc::default(), &mut |_| {})?;
    seal(&**folder, name)
}

#[test]
fn a_hole_hides_the_ancestor_and_sizes_are_kept() {
    let bench = Bench::default();
    build(&bench);
    let expected = content(&bench.read("top"));
    assert_eq!(expected[2 * BLOCK as usize..3 * BLOCK as usize], [0; BLOCK as usize]);
    assert_eq!(expected[7 * BLOCK as usize..7 * BLOCK as usize + 1024], [0x22; 1024]);
    assert!(expected[7 * BLOCK as usize + 1024..].iter().all(|&byte| byte == 0));
    for (name, onto) in [("all", None), ("part", Some("base")), ("one", Some("middle"))] {
        flatten(&bench, name, onto).unwrap();
        let flat = bench.read(name);
        assert!(content(&flat) == expected, "{name}");
        let layer = layer(&*bench.folder, name);
        assert!(layer.identity().is_some(), "{name} is not frozen");
        let visible = if onto.is_some() { 7 * BLOCK + 1024 } else { 0 };
        assert_eq!(layer.visible_parent_size(), visible, "{name}");
    }
    let owned = |name: &str| {
        let mut owned = Vec::new();
        let chain = bench.read(name);
        chain
            .map(0, chain.size(), Detail::Files, &mut |extent: MapExtent| {
                if extent.depth == Some(0) {
                    owned.push((extent.offset / BLOCK, extent.length.div_ceil(BLOCK), extent.kind));
                }
                ControlFlow::Continue(())
            })
            .unwrap();
        owned
    };
    assert_eq!(owned("one"), [(3, 1, Kind::Data)]);
    assert_eq!(
        owned("part"),
        [(1, 1, Kind::Data), (2, 1, Kind::Zero), (3, 1, Kind::Data), (7, 1, Kind::Data)]
    );
    let all = owned("all");
    assert!(all.iter().all(|&(_, _, kind)| kind == Kind::Data), "nothing to hide: {all:?}");
}

#[test]
fn what_is_no_ancestor_or_not_still_is_refused() {
    let bench = Bench::default();
    build(&bench);
    bench.create("stranger", SIZE);
    assert_eq!(flatten(&bench, "x", Some("stranger")).unwrap_err().kind(), ErrorKind::InvalidInput);
    let open = bench.write("top");
    let error = fold(&open, &bench.folder, "x", None);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidInput);
    open.close().unwrap();
    // An ancestor that OUT would not find again.
    let link = seal(&*bench.folder, "base").unwrap().link;
    let elsewhere: Arc<dyn Folder> = Arc::new(thinply::storage::MemoryFolder::new("elsewhere"));
    let top = bench.read("top");
    let error = fold(&top, &elsewhere, "x", Some(&link));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(bench.folder.open("x", Access::Read).is_err());
    assert!(elsewhere.open("x", Access::Read).is_err());
}

#[test]
fn packed_layers_are_folded_and_stood_on_like_live_ones() {
    let bench = Bench::default();
    build(&bench);
    for (name, packed) in [("base", "packed-base"), ("middle", "packed-middle")] {
        bench.pack(&bench.read(name), packed, Compression::Zstd(3));
    }
    // A live top over the packed middle, whose parent is the live base, and one over both packed.
    for (name, parent) in [("a", "packed-middle"), ("b", "packed-base")] {
        bench.overlay(name, parent, None);
        let top = bench.write(name);
        top.write(4 * BLOCK + 7, &[0x44; 9]).unwrap();
        top.zero(5 * BLOCK, BLOCK, ZeroMode::default()).unwrap();
        top.close().unwrap();
        let onto = seal(&*bench.folder, if name == "a" { "base" } else { parent }).unwrap().link;
        let chain = bench.read(name);
        for (suffix, onto) in [("all", None), ("part", Some(&onto))] {
            let out = format!("{name}-{suffix}");
            fold(&chain, &bench.folder, &out, onto).unwrap();
            let flat = bench.read(&out);
            assert!(content(&flat) == content(&chain), "{out}");
            assert_eq!(flat.paths().len(), 1 + usize::from(onto.is_some()), "{out}");
        }
    }
}

/// The power goes at every call in turn, until one run gets through: the old layers keep every byte,
/// and a new one that says it is frozen shows all that it should.
#[test]
fn a_power_loss_at_any_step_leaves_the_old_layers_and_no_half_truth() {
    let folder = CrashFolder::new(Disk::default());
    let bench = Bench::in_folder(Arc::new(folder.clone()));
    build(&bench);
    let expected = content(&bench.read("top"));
    folder.sync().unwrap();
    drop(bench);
    let before = folder.disk();
    let mut random = Random::new(5);
    let mut done = false;
    for calls in 0..2000 {
        let folder = CrashFolder::new(before.crashed(&mut random));
        let bench = Bench::in_folder(Arc::new(folder.clone()));
        let base = seal(&folder, "base").unwrap().link;
        folder.lose_power_after(calls);
        let flattened = bench
            .open("top", Access::Read)
            .and_then(|chain| fold(&chain, &bench.folder, "new", Some(&base)));
        let through = flattened.is_ok();
        drop(bench);
        let disk = folder.disk().crashed(&mut random);
        for name in ["base", "middle", "top"] {
            let (file, old) = (disk.names()[name], before.names()[name]);
            assert!(disk.same_content(file, &before, old), "call {calls}: {name} has changed");
        }
        let bench = Bench::in_folder(Arc::new(CrashFolder::new(disk)));
        assert!(content(&bench.read("top")) == expected, "call {calls}");
        let new = bench.open("new", Access::Read);
        if let Ok(new) = new.as_ref().map_err(|error| error.kind())
            && layer(&*bench.folder, "new").identity().is_some()
        {
            assert!(content(new) == expected, "call {calls}: frozen, but not whole");
        }
        if through {
            done = true;
            break;
        }
    }
    assert!(done, "no run got through");
}

//! What comparing and folding two disks answers, and what is looked at for it.

use std::sync::Arc;

use testkit::bench::Bench;
use thinply::chain::{Chain, Kind, Layer, MapExtent, Stored, seal};
use thinply::derive::{Mismatch, PackOptions, Plan, Raw, Rule, Sink, compare};
use thinply::device::{Device, ZeroMode};
use thinply::error::Result;
use thinply::format::geometry::block_offset;
use thinply::packed::Compression;
use thinply::storage::{Access, Share, write_all_at};
use thinply::types::Block;

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
/// What compare takes in one go.
const PIECE: u64 = 16 * MIB;

fn disk(bench: &Bench, name: &str, size: u64, write: impl FnOnce(&Chain)) -> Chain {
    bench.create(name, size);
    change(bench, name, write)
}

fn overlay(bench: &Bench, name: &str, parent: &str, write: impl FnOnce(&Chain)) -> Chain {
    bench.overlay(name, parent, None);
    change(bench, name, write)
}

fn change(bench: &Bench, name: &str, write: impl FnOnce(&Chain)) -> Chain {
    bench.change(name, write);
    bench.read(name)
}

fn fill(chain: &Chain, from: u64, to: u64, byte: u8) {
    chain.write(from, &vec![byte; (to - from) as usize]).unwrap();
}

/// What either rule answers, both ways round.
fn answers(a: &Chain, b: &Chain) -> [Option<Mismatch>; 2] {
    [Rule::Content, Rule::Strict].map(|rule| {
        let [one, other] = [(a, b), (b, a)].map(|(a, b)| compare(a, b, rule, &|_| {}).unwrap());
        assert_eq!(one, other, "{rule:?}: the order of the disks matters");
        one
    })
}

#[test]
fn zeros_beyond_an_end_count_as_the_same_unless_sizes_do() {
    let bench = Bench::default();
    let write = |chain: &Chain| fill(chain, 0, BLOCK, 1);
    let short = disk(&bench, "short", 3 * BLOCK + 512, write);
    let long = disk(&bench, "long", PIECE + BLOCK, write);
    assert_eq!(answers(&short, &long), [None, Some(Mismatch::Size)]);
    drop(long);
    // In the piece in which the shorter one ends, and in one behind it.
    for place in [3 * BLOCK + 512, 3 * BLOCK + 700, 9 * BLOCK, PIECE + 10] {
        let name = format!("long-{place}");
        let long = disk(&bench, &name, PIECE + BLOCK, |chain| {
            write(chain);
            chain.write(place, &[7]).unwrap();
        });
        let expected = [Some(Mismatch::Content(place)), Some(Mismatch::Size)];
        assert_eq!(answers(&short, &long), expected);
    }
}

#[test]
fn owned_zeros_are_the_same_as_none_but_for_the_strict_rule() {
    let bench = Bench::default();
    let size = 16 * BLOCK;
    let place = 3 * BLOCK;
    let absent = disk(&bench, "absent", size, |_| {});
    let data = disk(&bench, "data", size, |chain| fill(chain, place, place + BLOCK, 0));
    let allocate = ZeroMode { allocate: true, fast_only: false };
    let zero = disk(&bench, "zero", size, |chain| {
        chain.zero(place, BLOCK, allocate).unwrap();
        chain.trim(place, BLOCK).unwrap();
    });
    let differs = Some(Mismatch::Allocation(place));
    assert_eq!(answers(&absent, &data), [None, differs]);
    assert_eq!(answers(&absent, &zero), [None, differs]);
    assert_eq!(answers(&data, &zero), [None, None]);
    // What is not owned at all differs from data by its content first.
    let ones = disk(&bench, "ones", size, |chain| fill(chain, place, place + BLOCK, 1));
    assert_eq!(answers(&absent, &ones), [Some(Mismatch::Content(place)), differs]);
    assert_eq!(answers(&zero, &ones), [Some(Mismatch::Content(place)); 2]);
}

#[test]
fn the_first_of_many_differences_is_named() {
    let bench = Bench::default();
    let size = 5 * PIECE + 512;
    let a = disk(&bench, "a", size, |_| {});
    let places = [4 * PIECE + 5, 2 * PIECE + MIB + 17, 2 * PIECE + MIB + 16, PIECE - 1, 0];
    for (number, place) in places.into_iter().enumerate() {
        // Each disk has one more, before all others.
        let b = disk(&bench, &format!("b{number}"), size, |chain| {
            for place in &places[..=number] {
                chain.write(*place, &[3]).unwrap();
            }
        });
        assert_eq!(
            compare(&a, &b, Rule::Content, &|_| {}).unwrap(),
            Some(Mismatch::Content(place))
        );
    }
}

#[test]
fn a_raw_file_has_holes_where_nothing_is_owned() {
    let bench = Bench::default();
    let size = 2 * PIECE + 700 * 512;
    let raw = bench.folder.create("raw").unwrap();
    raw.set_length(size).unwrap();
    write_all_at(&*raw, &[5; 2 * BLOCK as usize], PIECE + BLOCK).unwrap();
    let raw = Raw::new(raw).unwrap();
    let same = disk(&bench, "same", size, |chain| {
        fill(chain, PIECE + BLOCK, PIECE + 3 * BLOCK, 5);
    });
    for rule in [Rule::Content, Rule::Strict] {
        assert_eq!(compare(&raw, &same, rule, &|_| {}).unwrap(), None, "{rule:?}");
    }
    let more = disk(&bench, "more", size, |chain| {
        fill(chain, PIECE + BLOCK, PIECE + 3 * BLOCK, 5);
        fill(chain, PIECE + 3 * BLOCK, PIECE + 4 * BLOCK, 0);
    });
    assert_eq!(compare(&raw, &more, Rule::Content, &|_| {}).unwrap(), None);
    let owned = Some(Mismatch::Allocation(PIECE + 3 * BLOCK));
    assert_eq!(compare(&raw, &more, Rule::Strict, &|_| {}).unwrap(), owned);
}

/// Notes what a fold takes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Notes {
    data: Vec<(u64, u64)>,
    zeros: Vec<(u64, u64)>,
}

impl Sink for Notes {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.data.push((offset, bytes.len() as u64));
        Ok(())
    }

    fn share(&mut self, _: &MapExtent) -> Result<Share> {
        panic!("changes are compared, not shared");
    }

    fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        self.zeros.push((offset, length));
        Ok(())
    }
}

#[test]
fn changes_are_whole_runs_of_blocks_and_nothing_else() {
    let bench = Bench::default();
    let size = 64 * BLOCK + 1024;
    drop(disk(&bench, "base", size, |chain| fill(chain, 0, size, 1)));
    // Two layers, so that the other disk's map has a border inside what differs.
    drop(overlay(&bench, "middle", "base", |chain| fill(chain, 8 * BLOCK, 16 * BLOCK, 2)));
    let other = overlay(&bench, "top", "middle", |chain| fill(chain, 16 * BLOCK, 24 * BLOCK, 3));
    let disk = overlay(&bench, "new", "base", |chain| {
        fill(chain, 8 * BLOCK, 24 * BLOCK, 4);
        fill(chain, 9 * BLOCK, 10 * BLOCK, 2);
        chain.zero(30 * BLOCK, 2 * BLOCK, ZeroMode::default()).unwrap();
        fill(chain, 32 * BLOCK, 33 * BLOCK, 0);
        fill(chain, 40 * BLOCK, 41 * BLOCK, 1);
        chain.write(size - 1, &[9]).unwrap();
    });
    let (mut notes, mut last) = (Notes::default(), 0);
    disk.changes_from(&other, &mut notes, &mut |done| last = done).unwrap();
    let blocks = |list: &[(u64, u64)]| -> Vec<_> {
        list.iter().map(|(from, blocks)| (from * BLOCK, blocks * BLOCK)).collect()
    };
    let mut data = blocks(&[(8, 1), (10, 14)]);
    data.push((64 * BLOCK, 1024));
    assert_eq!(notes, Notes { data, zeros: blocks(&[(30, 2), (32, 1)]) });
    assert_eq!(last, size);
}

/// An overlay that shows a block and a sector of its base, which is ones.
fn partly_shown(bench: &Bench, size: u64, write: impl FnOnce(&Chain)) -> Chain {
    drop(disk(bench, "base", size, |chain| fill(chain, 0, size, 1)));
    overlay(bench, "part", "base", |chain| {
        chain.resize(BLOCK + 512, true).unwrap();
        chain.resize(size, false).unwrap();
        write(chain);
    })
}

#[test]
fn a_block_of_which_only_a_part_shows_is_one_change() {
    let bench = Bench::default();
    let size = 4 * BLOCK;
    let part = partly_shown(&bench, size, |_| {});
    let changes = |other: &Chain| {
        let mut notes = Notes::default();
        part.changes_from(other, &mut notes, &mut |_| {}).unwrap();
        notes
    };
    let zeros = vec![(2 * BLOCK, 2 * BLOCK)];
    let other = disk(&bench, "other", size, |chain| fill(chain, 0, size, 2));
    let data = vec![(0, BLOCK), (BLOCK, BLOCK)];
    assert_eq!(changes(&other), Notes { data, zeros: zeros.clone() });
    // Up to where it stops showing, both have it of the same layer.
    let child = overlay(&bench, "child", "base", |_| {});
    assert_eq!(changes(&child), Notes { data: vec![(BLOCK, BLOCK)], zeros });
}

#[test]
fn compacting_and_relinking_keep_what_shows_of_the_parent() {
    let bench = Bench::default();
    let size = 4 * BLOCK;
    let part = partly_shown(&bench, size, |chain| fill(chain, 3 * BLOCK, size, 3));
    let base = seal(&*bench.folder, "base").unwrap();
    for (name, plan) in [("a", Plan::compact(&part)), ("b", Plan::relink(&part, &base))] {
        part.derive_live(&plan, &bench.folder, name, Arc::default(), &mut |_| {}).unwrap();
        let layer = Layer::open(bench.folder.open(name, Access::Read).unwrap()).unwrap();
        assert_eq!(layer.parent().map(|link| link.identity), Some(base.link.identity), "{name}");
        assert_eq!(layer.visible_parent_size(), BLOCK + 512, "{name}");
        drop(layer);
        assert_eq!(answers(&part, &bench.read(name)), [None; 2], "{name}");
    }
}

#[test]
fn what_no_ancestor_has_is_not_packed_as_zeros() {
    let bench = Bench::default();
    drop(disk(&bench, "base", 16 * BLOCK, |chain| fill(chain, 0, 4 * BLOCK, 1)));
    let top = overlay(&bench, "top", "base", |chain| {
        chain.zero(BLOCK, BLOCK, ZeroMode::default()).unwrap();
    });
    let (plan, layers) = (Plan::flatten(&top, None).unwrap(), Arc::default());
    let none = Compression::None;
    let made = top.derive_packed(&plan, &bench.folder, Vec::new(), layers, none, &mut |_| {});
    let (all, _) = made.unwrap();
    assert_eq!((all.data_blocks, all.zero_blocks), (3, 0));
}

#[test]
fn packing_tells_how_far_it_is() {
    let bench = Bench::default();
    let group = 127 * MIB;
    drop(disk(&bench, "base", 2 * group, |_| ()));
    let top = overlay(&bench, "top", "base", |chain| {
        fill(chain, group - BLOCK, group + 2 * BLOCK, 1);
    });
    let told = |drop_equal| {
        let mut told = Vec::new();
        let options = PackOptions { compression: Compression::None, drop_equal };
        top.pack(Vec::new(), &options, &mut |bytes| told.push(bytes)).unwrap();
        told
    };
    assert_eq!(told(false), [BLOCK, 3 * BLOCK]);
    let device = told(true);
    assert!(device.is_sorted());
    assert_eq!(device.last(), Some(&top.size()));
}

#[test]
fn data_stands_in_a_live_file_group_by_group() {
    let bench = Bench::default();
    let group = 127 * MIB;
    let size = group + 40 * BLOCK;
    drop(disk(&bench, "base", size, |chain| fill(chain, group - 2 * BLOCK, group + BLOCK, 1)));
    let top = overlay(&bench, "top", "base", |chain| fill(chain, 0, BLOCK, 2));
    let extent = |from: u64, length, depth, kind| MapExtent { offset: from, length, depth, kind };
    let stored = |extent: &MapExtent, most: usize| {
        let mut found = Vec::new();
        let all = top.stored(extent, &mut |part: &Stored<'_>| {
            let name = part.file.path().file_name().unwrap().to_str().unwrap().to_owned();
            assert_eq!(part.at, block_offset(Block(part.offset / BLOCK)).0);
            found.push((name, part.offset, part.length));
            Ok(if found.len() < most { Share::Done } else { Share::Refused })
        });
        (all.unwrap(), found)
    };
    let base = |from, length| ("base".to_owned(), from, length);
    let whole = extent(group - 2 * BLOCK, 3 * BLOCK, Some(1), Kind::Data);
    let parts = vec![base(group - 2 * BLOCK, 2 * BLOCK), base(group, BLOCK)];
    assert_eq!(stored(&whole, usize::MAX), (Share::Done, parts.clone()));
    assert_eq!(stored(&whole, 1), (Share::Refused, parts[..1].to_vec()));
    // Only whole blocks.
    let cut = extent(group - 2 * BLOCK + 512, 2 * BLOCK, Some(1), Kind::Data);
    assert_eq!(stored(&cut, usize::MAX), (Share::Done, vec![base(group - BLOCK, BLOCK)]));
    for other in [
        extent(BLOCK, BLOCK, None, Kind::Absent),
        extent(BLOCK, BLOCK, Some(1), Kind::Zero),
        extent(0, BLOCK, Some(2), Kind::Data),
    ] {
        assert_eq!(stored(&other, usize::MAX), (Share::Refused, vec![]));
    }
    let mut never = |_: &Stored<'_>| -> Result<Share> { panic!("nothing to show") };
    bench.pack(&bench.read("base"), "packed", Compression::None);
    let packed = bench.read("packed");
    let here = extent(group, BLOCK, Some(0), Kind::Data);
    assert_eq!(packed.stored(&here, &mut never).unwrap(), Share::Refused);
    drop(top);
    let open = bench.open("top", Access::Write).unwrap();
    let first = extent(0, BLOCK, Some(0), Kind::Data);
    assert_eq!(open.stored(&first, &mut never).unwrap(), Share::Refused);
}

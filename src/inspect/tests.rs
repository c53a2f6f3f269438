use std::sync::Arc;

use super::parts::{Slots, each_data};
use super::{Finding, Part, Report, RingRecord, Standing, check, dump};
use crate::chain::{Chain, Gate, create, seal};
use crate::device::Device;
use crate::error::ErrorKind;
use crate::format::geometry::{GROUP_SLOT_SIZE, SLOT_OFFSETS, bitmap_offset, record_offset};
use crate::format::header::{Header, State};
use crate::storage::{Access, Folder, MemoryFolder, Storage, read_exact_at, write_all_at};
use crate::types::{GROUP_BYTES, Group};

/// Two groups.
const LARGE: u64 = GROUP_BYTES + (1 << 20);
/// One group.
const SMALL: u64 = 64 << 10;

fn folder() -> Arc<dyn Folder> {
    Arc::new(MemoryFolder::new("m"))
}

fn open(folder: &Arc<dyn Folder>, name: &str) -> Chain {
    Chain::open(folder.clone(), name, Access::Write, Arc::default()).unwrap()
}

/// A layer with blocks in its first and its last group, written to in two lives and closed.
fn closed(folder: &Arc<dyn Folder>, name: &str, size: u64) {
    create(folder, name, Some(size), None, &Gate::default()).unwrap();
    for life in 0..2 {
        let chain = open(folder, name);
        chain.write(life * 8192, &[7; 5000]).unwrap();
        chain.flush().unwrap();
        chain.write(size - 4096 * (1 + life), &[9; 512]).unwrap();
        chain.close().unwrap();
    }
}

/// Commits three records to a closed layer, which stays open; `copy_name` is what a crash would leave.
fn commit_three(folder: &Arc<dyn Folder>, name: &str, copy_name: &str) -> Chain {
    let chain = open(folder, name);
    for block in 0..3 {
        chain.write((10 + block) * 4096, &[3; 4096]).unwrap();
        chain.flush().unwrap();
    }
    copy(folder, name, copy_name);
    chain
}

fn report(folder: &Arc<dyn Folder>, name: &str) -> Report {
    check(&*folder.open(name, Access::Read).unwrap()).unwrap()
}

/// A copy of what stands in a file, as a crash would leave it.
fn copy(folder: &Arc<dyn Folder>, from: &str, to: &str) {
    let (from, to) = (folder.open(from, Access::Read).unwrap(), folder.create(to).unwrap());
    let length = from.length().unwrap();
    to.set_length(length).unwrap();
    each_data(&*from, 0, length, &mut |start, end| {
        let mut buf = vec![0; (end - start) as usize];
        read_exact_at(&*from, &mut buf, start).unwrap();
        write_all_at(&*to, &buf, start).unwrap();
        Ok(())
    })
    .unwrap();
}

fn flip(file: &dyn Storage, offset: u64, bit: u8) {
    let mut byte = [0];
    read_exact_at(file, &mut byte, offset).unwrap();
    byte[0] ^= 1 << bit;
    write_all_at(file, &byte, offset).unwrap();
}

/// Flips one bit, and demands a finding that leads to it.
fn flip_is_found(file: &dyn Storage, offset: u64, bit: u8) {
    flip(file, offset, bit);
    let report = check(file).unwrap();
    let near = |finding: &Finding| (offset / 4096 * 4096..=offset).contains(&finding.offset);
    assert!(report.findings.iter().any(near), "bit {bit} of byte {offset}: {report:?}");
    flip(file, offset, bit);
}

/// Flips bits of every `step`-th byte of the structures, and some of what lies between.
fn every_flip_is_found(folder: &Arc<dyn Folder>, name: &str, step: usize) {
    let file = folder.open(name, Access::Write).unwrap();
    let [first, second] = SLOT_OFFSETS.map(|offset| offset.0);
    let bitmap = bitmap_offset(Group(0)).0;
    for start in [first, second, bitmap] {
        for offset in (start..start + 4096).step_by(step) {
            // All bits where the values are, one bit of each byte elsewhere.
            let bits = match offset - start {
                0..232 | 4088.. => 0..8,
                _ => (offset % 8) as u8..(offset % 8) as u8 + 1,
            };
            bits.for_each(|bit| flip_is_found(&*file, offset, bit));
        }
    }
    // Everything between the structures, and the ring, in steps; the first and last byte of each.
    let areas =
        [(4096, second), (second + 4096, bitmap), (bitmap + 4096, bitmap + GROUP_SLOT_SIZE)];
    for (from, to) in areas {
        let steps = (from..to).step_by(4099).chain([to - 1]);
        steps.for_each(|offset| flip_is_found(&*file, offset, (offset % 8) as u8));
    }
    assert!(check(&*file).unwrap().is_clean());
}

#[test]
fn every_flipped_bit_of_a_closed_layer_is_found() {
    let folder = folder();
    closed(&folder, "a", SMALL);
    assert_eq!(report(&folder, "a"), Report::default());
    every_flip_is_found(&folder, "a", 1);
}

#[test]
fn every_flipped_bit_of_a_frozen_layer_is_found() {
    let folder = folder();
    closed(&folder, "a", SMALL);
    seal(&*folder, "a").unwrap();
    assert_eq!(report(&folder, "a"), Report::default());
    every_flip_is_found(&folder, "a", 7);
}

#[test]
fn what_a_crash_leaves_is_noted_and_never_found() {
    let folder = folder();
    closed(&folder, "a", SMALL);
    commit_three(&folder, "a", "crashed");
    let crashed = report(&folder, "crashed");
    assert!(crashed.is_clean(), "{crashed:?}");
    let notes: Vec<_> = crashed.notes.iter().map(|note| note.what.as_str()).collect();
    assert_eq!(
        notes,
        [
            "the layer was not closed; the next open for writing recovers it",
            "3 journal records to recover",
        ]
    );

    // The last record torn, as when its sync never returned.
    let file = folder.open("crashed", Access::Write).unwrap();
    let header = crate::live::newest_header(&*file).unwrap();
    let last = record_offset(header.journal_tail + 2).0;
    write_all_at(&*file, &[0xff; 512], last).unwrap();
    let torn = check(&*file).unwrap();
    assert!(torn.is_clean(), "{torn:?}");
    assert!(torn.notes.iter().any(|note| note.offset == last), "{torn:?}");

    // The first one torn is loss: the others can't be reached.
    flip(&*file, record_offset(header.journal_tail).0 + 50, 0);
    let lost = check(&*file).unwrap();
    assert_eq!(lost.findings.len(), 1, "{lost:?}");
    assert!(lost.findings[0].what.contains("can't be reached"), "{lost:?}");
}

/// The ring of a frozen layer is given back without a sync, so a power loss may leave pieces of
/// records there, for ever.
#[test]
fn a_ring_that_was_given_back_in_part_is_noted() {
    let folder = folder();
    closed(&folder, "a", SMALL);
    let chain = commit_three(&folder, "a", "before");
    chain.close().unwrap();
    seal(&*folder, "a").unwrap();
    let (before, file) =
        (folder.open("before", Access::Read).unwrap(), folder.open("a", Access::Write).unwrap());
    let first = record_offset(crate::live::newest_header(&*before).unwrap().journal_tail).0;
    for (place, sectors) in [(first, 8), (first + 4096, 1), (first + 8192, 4)] {
        let mut left = vec![0; sectors * 512];
        read_exact_at(&*before, &mut left, place).unwrap();
        write_all_at(&*file, &left, place).unwrap();
    }
    let report = check(&*file).unwrap();
    assert!(report.is_clean(), "{report:?}");
    flip(&*file, first + 700, 3);
    let report = check(&*file).unwrap();
    assert_eq!(report.findings.len(), 1, "{report:?}");
}

#[test]
fn bits_that_a_shrink_left_are_legal() {
    let folder = folder();
    create(&folder, "a", Some(64 << 20), None, &Gate::default()).unwrap();
    let chain = open(&folder, "a");
    chain.write(0, &vec![1; 64 << 20]).unwrap();
    chain.resize(4096 * 3 + 512, true).unwrap();
    chain.close().unwrap();
    let report = report(&folder, "a");
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.notes.len(), 1, "{report:?}");
    assert!(report.notes[0].what.starts_with("16380 blocks"), "{report:?}");
}

#[test]
fn a_file_that_is_cut_short_is_found_or_no_image_at_all() {
    let folder = folder();
    closed(&folder, "a", SMALL);
    let file = folder.open("a", Access::Write).unwrap();
    let full = file.length().unwrap();
    for length in [full - 1, 3 << 20, (2 << 20) + 100, 1 << 20, 69632, 69631, 65536, 4096, 4095, 8]
    {
        file.set_length(length).unwrap();
        let report = check(&*file).unwrap();
        assert!(!report.is_clean(), "{length}");
    }
    file.set_length(7).unwrap();
    assert_eq!(check(&*file).unwrap_err().kind(), ErrorKind::NotAnImage);
}

#[test]
fn slots_that_contradict_each_other_are_found() {
    let folder = folder();
    closed(&folder, "a", SMALL);
    let file = folder.open("a", Access::Write).unwrap();
    let slots = Slots::read(&*file).unwrap();
    let newest = slots.newest().unwrap();
    let (header, other) = (newest.header().unwrap().clone(), 1 - newest.number);
    let found = |change: &dyn Fn(&mut Header)| {
        let mut older = Header { generation: header.generation - 1, ..header.clone() };
        change(&mut older);
        write_all_at(&*file, &*older.encode(other), SLOT_OFFSETS[other].0).unwrap();
        check(&*file).unwrap().findings.len()
    };
    assert_eq!(found(&|_| {}), 0);
    assert_eq!(found(&|older| older.state = State::InUse), 0);
    assert_eq!(found(&|older| older.uuid.0[0] ^= 1), 1);
    assert_eq!(found(&|older| older.generation -= 1), 1);
    assert_eq!(found(&|older| older.epoch += 1), 1);
    assert_eq!(found(&|older| older.virtual_size += 512), 1);
    assert_eq!(found(&|older| older.compatible = 1), 1);
    assert_eq!(found(&|older| older.state = State::Frozen(crate::types::FreezeId([1; 16]))), 1);
}

#[test]
fn a_petabyte_that_is_claimed_costs_nothing() {
    let folder = folder();
    create(&folder, "a", Some(1 << 30), None, &Gate::default()).unwrap();
    let file = folder.open("a", Access::Write).unwrap();
    for slot in &Slots::read(&*file).unwrap().0 {
        let header = Header { virtual_size: 1 << 56, ..slot.header().unwrap().clone() };
        write_all_at(&*file, &*header.encode(slot.number), slot.offset).unwrap();
    }
    let report = check(&*file).unwrap();
    assert_eq!(report.findings.len(), 1, "{report:?}");
}

#[test]
fn the_dump_shows_what_stands_there_even_if_nothing_opens_it() {
    let folder = folder();
    closed(&folder, "a", LARGE);
    let chain = open(&folder, "a");
    chain.write(1 << 20, &[3; 4096]).unwrap();
    chain.flush().unwrap();
    copy(&folder, "a", "b");
    let file = folder.open("b", Access::Write).unwrap();
    let dumped = || {
        let (mut valid, mut live, mut owned) = (0, 0, Vec::new());
        dump(&*file, &mut |part| {
            match part {
                Part::Slot(slot, _) => valid += usize::from(slot.header().is_some()),
                Part::Ring(place) => {
                    let counts = matches!(place.content, RingRecord::Valid(_, Standing::Live));
                    live += usize::from(counts);
                }
                Part::Bitmap(page) => owned.push((page.group.0, page.runs())),
            }
            Ok(())
        })
        .unwrap();
        (valid, live, owned)
    };
    let block = crate::types::Block;
    let expected = vec![(0, vec![(block(0), 4)]), (1, vec![(block(32766), 2)])];
    assert_eq!(dumped(), (2, 1, expected.clone()));
    // Without a valid slot nobody can say which records count, but all still stand there.
    flip(&*file, 200, 0);
    flip(&*file, 65536 + 200, 0);
    assert!(crate::live::newest_header(&*file).is_err());
    assert_eq!(dumped(), (0, 0, expected));
}

#[test]
fn a_torn_header_slot_is_noted_and_a_damaged_one_found() {
    let folder = folder();
    closed(&folder, "a", SMALL);
    let file = folder.open("a", Access::Write).unwrap();
    let slots = Slots::read(&*file).unwrap();
    let newest = slots.newest().unwrap();
    let (header, number) = (newest.header().unwrap(), 1 - newest.number);
    let place = SLOT_OFFSETS[number].0;
    let old = slots.0[number].bytes.clone();
    let next = Header {
        generation: header.generation + 1,
        epoch: header.epoch + 1,
        state: State::InUse,
        ..header.clone()
    };
    let new = next.encode(number);
    // Cut at every sector, from either side.
    for cut in (512..4096).step_by(512) {
        for (front, back) in [(&new, &old), (&old, &new)] {
            let torn = [&front[..cut], &back[cut..]].concat();
            write_all_at(&*file, &torn, place).unwrap();
            let report = check(&*file).unwrap();
            assert!(report.is_clean() && report.notes.len() == 1, "cut at {cut}: {report:?}");
        }
    }
    // One bit of either whole slot, or something else in a torn one.
    let torn = [&new[..512], &old[512..]].concat();
    for whole in [&new[..], &old[..]] {
        write_all_at(&*file, whole, place).unwrap();
        for bit in 0..512 * 8 {
            flip_is_found(&*file, place + bit / 8, (bit % 8) as u8);
        }
    }
    for damaged in [3, 20, 45, 57, 100, 170, 600, 4000] {
        write_all_at(&*file, &torn, place).unwrap();
        write_all_at(&*file, &[0xa5], place + damaged).unwrap();
        assert!(!check(&*file).unwrap().is_clean(), "byte {damaged}");
    }
}

//! What commits and recovery write, to the byte: that no more is written than the protocol asks for,
//! and that a write during a checkpoint is no part of it.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use testkit::hooked::{Call, Hooked};
use thinply::chain::{Chain, Gate, create};
use thinply::device::{Device, ZeroMode};
use thinply::format::geometry::{JOURNAL_OFFSET, JOURNAL_RECORDS, bitmap_offset};
use thinply::inspect::{Part, RingRecord, Standing, dump};
use thinply::live::newest_header;
use thinply::storage::{Access, Folder, MemoryFolder};
use thinply::types::Group;

const BLOCK: u64 = 4096;
const SIZE: u64 = 4 << 20;

fn disk(folder: &Arc<dyn Folder>) -> Arc<Chain> {
    let layers = Arc::new(Gate::default());
    create(folder, "a", Some(SIZE), None, &layers).unwrap();
    Arc::new(Chain::open(folder.clone(), "a", Access::Write, layers).unwrap())
}

fn memory() -> Arc<dyn Folder> {
    Arc::new(MemoryFolder::new("m"))
}

/// How many entries each live record has, and the blocks that the bitmap pages on disk own.
fn stands(folder: &Arc<dyn Folder>) -> (Vec<usize>, Vec<u64>) {
    let (mut records, mut owned) = (Vec::new(), Vec::new());
    let file = folder.open("a", Access::Read).unwrap();
    dump(&*file, &mut |part| {
        match part {
            Part::Ring(place) => {
                if let RingRecord::Valid(record, Standing::Live) = place.content {
                    records.push(record.entries.len());
                }
            }
            Part::Bitmap(page) => {
                let runs = page.runs();
                owned.extend(runs.iter().flat_map(|(first, count)| first.0..first.0 + count));
            }
            Part::Slot(..) => {}
        }
        Ok(())
    })
    .unwrap();
    (records, owned)
}

#[test]
fn a_flush_with_nothing_fresh_writes_no_record() {
    let folder = memory();
    let chain = disk(&folder);
    chain.flush().unwrap();
    assert_eq!(stands(&folder).0, [0usize; 0]);
    chain.write(0, &[1; 4096]).unwrap();
    for _ in 0..3 {
        chain.flush().unwrap();
        assert_eq!(stands(&folder).0, [1]);
    }
}

#[test]
fn a_record_takes_338_blocks_and_one_more_makes_a_checkpoint() {
    let folder = memory();
    let chain = disk(&folder);
    chain.write(0, &vec![1; 338 * BLOCK as usize]).unwrap();
    chain.flush().unwrap();
    assert_eq!(stands(&folder), (vec![338], vec![]));
    chain.write(400 * BLOCK, &vec![1; 339 * BLOCK as usize]).unwrap();
    chain.flush().unwrap();
    let (records, owned) = stands(&folder);
    assert_eq!((records, owned.len()), (vec![338], 338 + 339));
}

#[test]
fn the_ring_is_used_to_its_end_each_time_round_and_four_places_are_allocated_at_a_time() {
    let hooked = Arc::new(Hooked::new(memory()));
    let folder: Arc<dyn Folder> = hooked.clone();
    let chain = disk(&folder);
    let ring = JOURNAL_OFFSET.0..JOURNAL_OFFSET.0 + JOURNAL_RECORDS * BLOCK;
    let allocated = Arc::new(Mutex::new(Vec::new()));
    let (noted, start) = (allocated.clone(), ring.start);
    hooked.on_calls(move |call| {
        match call {
            Call::Allocate { offset, length } if ring.contains(&offset) => {
                noted.lock().unwrap().push(((offset - start) / BLOCK, length / BLOCK));
            }
            _ => {}
        }
        Ok(usize::MAX)
    });
    for block in 0..2 * (JOURNAL_RECORDS + 1) {
        chain.write(block * BLOCK, &[1; 10]).unwrap();
        chain.flush().unwrap();
        // The flush that finds no room makes a checkpoint instead.
        let expected = (block + 1) % (JOURNAL_RECORDS + 1);
        assert_eq!(stands(&folder).0.len() as u64, expected, "flush {block}");
    }
    // The second time begins at place 1: the first number after a checkpoint is left out.
    let first = (0..64).map(|n| (4 * n, 4));
    let second = (0..63).map(|n| (4 * n + 1, 4)).chain([(253, 3), (0, 4)]);
    assert_eq!(*allocated.lock().unwrap(), first.chain(second).collect::<Vec<_>>());
}

/// So that a checkpoint can't run out of space for a page.
#[test]
fn what_first_owns_a_block_of_a_group_allocates_its_page_and_nothing_else_does() {
    let write = |chain: &Chain, block| chain.write(block * BLOCK, &[1; 10]).unwrap();
    let mode = ZeroMode { allocate: true, fast_only: false };
    let zero = |chain: &Chain, block| chain.zero(block * BLOCK, BLOCK, mode).unwrap();
    for own in [&write as &dyn Fn(&Chain, u64), &zero] {
        let hooked = Arc::new(Hooked::new(memory()));
        let folder: Arc<dyn Folder> = hooked.clone();
        let chain = disk(&folder);
        let allocated = Arc::new(AtomicUsize::new(0));
        let (noted, page) = (allocated.clone(), bitmap_offset(Group(0)).0);
        hooked.on_calls(move |call| {
            if matches!(call, Call::Allocate { offset, length: BLOCK } if offset == page) {
                noted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(usize::MAX)
        });
        for block in 0..3 {
            own(&chain, block);
            assert_eq!(allocated.load(Ordering::Relaxed), 1, "block {block}");
        }
        chain.close().unwrap();
        drop(chain);
        let again = Chain::open(folder.clone(), "a", Access::Write, Arc::default()).unwrap();
        own(&again, 9);
        assert_eq!(allocated.load(Ordering::Relaxed), 1, "the page was there already");
    }
}

#[test]
fn a_flush_takes_no_space_where_its_group_has_a_block() {
    let hooked = Arc::new(Hooked::new(memory()));
    let folder: Arc<dyn Folder> = hooked.clone();
    let chain = disk(&folder);
    chain.write(0, &[1; BLOCK as usize]).unwrap();
    let ring = JOURNAL_OFFSET.0..JOURNAL_OFFSET.0 + JOURNAL_RECORDS * BLOCK;
    for write_too in [false, true] {
        let ring = ring.clone();
        hooked.on_calls(move |call| match call {
            Call::Allocate { offset, .. } if !write_too && ring.contains(&offset) => {
                Err(io::ErrorKind::StorageFull.into())
            }
            Call::Write { offset, .. } if write_too && ring.contains(&offset) => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(usize::MAX),
        });
        let block = 1 + u64::from(write_too);
        chain.write(block * BLOCK, &[1; BLOCK as usize]).unwrap();
        chain.flush().unwrap();
        assert_eq!(stands(&folder), (vec![], (0..=block).collect()));
        // Nor does a change of what was flushed last.
        chain.write(block * BLOCK, &[2; BLOCK as usize]).unwrap();
        chain.flush().unwrap();
    }
    // With space there are records again.
    hooked.on_calls(|_| Ok(usize::MAX));
    chain.write(3 * BLOCK, &[1; BLOCK as usize]).unwrap();
    chain.flush().unwrap();
    assert_eq!(stands(&folder), (vec![1], vec![0, 1, 2]));
    chain.close().unwrap();
    assert_eq!(stands(&folder).1, [0, 1, 2, 3]);
}

#[test]
fn a_closed_layer_has_given_the_ring_back() {
    let folder = memory();
    let chain = disk(&folder);
    for block in 0..10 {
        chain.write(block * BLOCK, &[1; 10]).unwrap();
        chain.flush().unwrap();
    }
    let file = folder.open("a", Access::Read).unwrap();
    let ring = JOURNAL_OFFSET.0;
    assert_eq!(file.next_data(ring).unwrap(), Some(ring));
    chain.close().unwrap();
    assert_eq!(file.next_data(ring).unwrap(), Some(bitmap_offset(Group(0)).0));
    assert_eq!(stands(&folder), (vec![], (0..10).collect()));
}

#[test]
fn a_write_during_a_checkpoint_is_no_part_of_it() {
    let hooked = Arc::new(Hooked::new(memory()));
    let folder: Arc<dyn Folder> = hooked.clone();
    let chain = disk(&folder);
    let late = 500;
    chain.write(0, &vec![1; 400 * BLOCK as usize]).unwrap();
    let writer = Mutex::new(Some(chain.clone()));
    hooked.at_next_sync(move || {
        // After that sync was begun: nothing promises that this block is durable.
        let chain = writer.lock().unwrap().take().unwrap();
        chain.write(late * BLOCK, &[2; BLOCK as usize]).unwrap();
    });
    chain.flush().unwrap();
    assert_eq!(stands(&folder).1, (0..400).collect::<Vec<_>>());
    let mut data = [0; 1];
    chain.read(late * BLOCK, &mut data).unwrap();
    assert_eq!(data, [2]);
    chain.close().unwrap();
    assert_eq!(stands(&folder).1.last(), Some(&late));
}

#[test]
fn the_tail_moves_behind_the_records_that_recovery_took_and_an_epoch_begins() {
    let folder = memory();
    let chain = disk(&folder);
    let header = || newest_header(&*folder.open("a", Access::Read).unwrap()).unwrap();
    let (mut expected, epoch) = (header().journal_tail, header().epoch);
    let mut chain = Some(chain);
    for life in 1..4 {
        for block in 0..3 {
            let open = chain.as_ref().unwrap();
            open.write((10 * life + block) * BLOCK, &[1; 10]).unwrap();
            open.flush().unwrap();
        }
        chain = None;
        expected += 3;
        assert_eq!(chain.is_none(), stands(&folder).0.len() == 3);
        let open = Chain::open(folder.clone(), "a", Access::Write, Arc::default()).unwrap();
        assert_eq!((header().journal_tail, header().epoch), (expected, epoch + life));
        chain = Some(Arc::new(open));
    }
}

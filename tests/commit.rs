//! What commits and recovery write, to the byte: that no more is written than the protocol asks for,
//! and that a write during a checkpoint is no part of it.

mod common;

use std::sync::{Arc, Mutex};

use common::hooked::Hooked;
use thinply::chain::{Chain, Layers, create};
use thinply::device::Device;
use thinply::format::geometry::{JOURNAL_OFFSET, bitmap_offset};
use thinply::inspect::{Part, RingRecord, Standing, dump};
use thinply::live::newest_header;
use thinply::storage::{Access, Folder, MemoryFolder};
use thinply::types::Group;

const BLOCK: u64 = 4096;
const SIZE: u64 = 4 << 20;

fn disk(folder: &Arc<dyn Folder>) -> Arc<Chain> {
    let layers = Arc::new(Layers::default());
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
fn the_tail_moves_behind_the_records_that_recovery_took() {
    let folder = memory();
    let chain = disk(&folder);
    let header = || newest_header(&*folder.open("a", Access::Read).unwrap()).unwrap();
    let mut expected = header().journal_tail;
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
        assert_eq!(header().journal_tail, expected);
        chain = Some(Arc::new(open));
    }
}

//! Journals with valid checksums that say anything, against recovery as the specification tells it.
#![no_main]

use std::ops::ControlFlow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use thinply::device::Detail;
use thinply::storage::{Access, Folder, MemoryFolder, write_all_at};
use thinply::chain::{Chain, Gate};
use thinply::error::{ErrorKind, Result};
use thinply::format::bitmap;
use thinply::format::geometry::{
    SLOT_OFFSETS, bitmap_offset, block_offset, file_length, record_offset,
};
use thinply::format::header::{Header, State};
use thinply::format::journal::{Entry, Record, encode};
use thinply::inspect;
use thinply::types::{Block, FreezeId, Group, Uuid};
use thinply_fuzz::limits::within_limits;

const BLOCKS: u64 = 48;
const UUID: Uuid = Uuid([9; 16]);

fuzz_target!(|input: &[u8]| within_limits(|| run(input)));

/// Takes numbers off the input; zeros once it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        byte
    }

    fn below(&mut self, bound: u8) -> u64 {
        (self.byte() % bound).into()
    }
}

/// What stands in a place of the ring.
struct Placed {
    record: Record,
    torn: bool,
    /// In which place it stands.
    place: u64,
}

struct Journal {
    header: Header,
    ring: BTreeMap<u64, Placed>,
    paged: BTreeSet<u64>,
}

fn content(block: u64) -> [u8; 4096] {
    [block as u8 + 1; 4096]
}

fn journal(input: &mut Input) -> Journal {
    let state = match input.below(8) {
        0 => State::Writable,
        1 => State::Frozen(FreezeId([3; 16])),
        _ => State::InUse,
    };
    let (epoch, journal_tail) = (1 + input.below(4), input.below(8) * 100 + input.below(100));
    let header = Header {
        uuid: UUID,
        generation: 5,
        state,
        epoch,
        journal_tail,
        virtual_size: BLOCKS * 4096,
        visible_parent_size: 0,
        parent: None,
        compatible: 0,
        read_only_compatible: 0,
        extensions: Vec::new(),
    };
    let mut paged = BTreeSet::new();
    for _ in 0..input.below(6) {
        paged.insert(input.below(BLOCKS as u8));
    }
    let (mut ring, mut next) = (BTreeMap::new(), journal_tail);
    while !input.0.is_empty() && ring.len() < 40 {
        let odd = input.below(32);
        let sequence = match odd {
            0 => input.below(255) * 7,
            1 => next + 1,
            _ => next,
        };
        let epoch = match odd {
            2 => epoch - 1,
            3 => epoch + 1,
            _ => epoch,
        };
        let blocks: BTreeSet<u64> =
            (0..input.below(8)).map(|_| input.below(BLOCKS as u8 + u8::from(odd == 4))).collect();
        let entries = blocks.into_iter().map(|block| {
            let right = crc32fast::hash(&content(block));
            Entry { block: Block(block), crc: right ^ u32::from(input.below(4) == 0) }
        });
        let record = Record { epoch, sequence, entries: entries.collect() };
        let place = if odd == 5 { sequence + 1 } else { sequence } % 256;
        ring.insert(place, Placed { record, torn: odd == 6, place });
        next = sequence + 1;
    }
    Journal { header, ring, paged }
}

fn write(journal: &Journal) -> Arc<dyn Folder> {
    let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("fuzz"));
    let file = folder.create("a").unwrap();
    let header = &journal.header;
    file.set_length(file_length(header.virtual_size)).unwrap();
    let older = Header { generation: 4, ..header.clone() };
    write_all_at(&*file, &*older.encode(0), SLOT_OFFSETS[0].0).unwrap();
    write_all_at(&*file, &*header.encode(1), SLOT_OFFSETS[1].0).unwrap();
    for block in 0..BLOCKS {
        write_all_at(&*file, &content(block), block_offset(Block(block)).0).unwrap();
    }
    let mut bits = [0; 508];
    bits[0] = journal.paged.iter().fold(0, |word, block| word | 1 << block);
    let page = bitmap::encode(UUID, Group(0), &bits);
    write_all_at(&*file, &page, bitmap_offset(Group(0)).0).unwrap();
    for Placed { record, torn, place } in journal.ring.values() {
        let mut bytes = encode(UUID, record);
        if *torn {
            bytes[600] ^= 1;
        }
        write_all_at(&*file, &*bytes, record_offset(*place).0).unwrap();
    }
    folder
}

/// The owned blocks, by the steps of the specification ("Recovery").
fn expected(journal: &Journal) -> std::result::Result<BTreeSet<u64>, ErrorKind> {
    let Journal { header, ring, paged } = journal;
    let valid: Vec<&Record> = ring
        .values()
        .filter(|placed| !placed.torn && placed.record.sequence % 256 == placed.place)
        .map(|placed| &placed.record)
        .filter(|record| record.epoch >= header.epoch)
        .collect();
    if valid.iter().any(|record| record.epoch > header.epoch) {
        return Err(ErrorKind::Loss);
    }
    let find = |sequence| valid.iter().find(|record| record.sequence == sequence);
    let accepted: Vec<_> = (header.journal_tail..).map_while(find).collect();
    let missing = header.journal_tail + accepted.len() as u64;
    let beyond = |record: &&Record| record.entries.iter().any(|entry| entry.block.0 >= BLOCKS);
    let corrupt = accepted.iter().any(|record| beyond(record));
    let closed = header.state != State::InUse && !accepted.is_empty();
    if corrupt {
        return Err(ErrorKind::Corrupt);
    }
    if closed || valid.iter().any(|record| record.sequence >= missing) {
        return Err(ErrorKind::Loss);
    }
    let mut owned = paged.clone();
    for (number, record) in accepted.iter().enumerate() {
        let last = number + 1 == accepted.len();
        let arrived =
            |entry: &&Entry| !last || entry.crc == crc32fast::hash(&content(entry.block.0));
        owned.extend(record.entries.iter().filter(arrived).map(|entry| entry.block.0));
    }
    Ok(owned)
}

fn owned(folder: &Arc<dyn Folder>, access: Access) -> Result<BTreeSet<u64>> {
    let chain = Chain::open(folder.clone(), "a", access, Arc::new(Gate::default()))?;
    let mut owned = BTreeSet::new();
    chain.map(0, BLOCKS * 4096, Detail::Bitmaps, &mut |extent| {
        if extent.depth.is_some() {
            owned.extend(extent.offset / 4096..(extent.offset + extent.length) / 4096);
        }
        ControlFlow::Continue(())
    })?;
    Ok(owned)
}

fn run(input: &[u8]) {
    let journal = journal(&mut Input(input));
    let folder = write(&journal);
    let expected = expected(&journal);
    let found = owned(&folder, Access::Read).map_err(|error| error.kind());
    assert_eq!(found, expected, "read-only");
    let report = inspect::check(&*folder.open("a", Access::Read).unwrap()).unwrap();
    let torn = journal.header.state != State::InUse
        && journal.ring.values().any(|p| p.torn || p.record.sequence % 256 != p.place);
    assert_eq!(report.is_clean(), expected.is_ok() && !torn, "{report:?}");
    if let State::Frozen(_) = journal.header.state {
        return;
    }
    // The writer recovers the same, and twice is as good as once.
    for round in 0..2 {
        let found = owned(&folder, Access::Write).map_err(|error| error.kind());
        assert_eq!(found, expected, "writing, round {round}");
    }
}

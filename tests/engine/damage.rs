//! A small image of two layers, cut at every byte and with every bit of its metadata flipped: opening
//! and reading it give the same data or an error, and `check` finds what was flipped.
//!
//! The last record of a layer that was not closed is excepted, as the specification says ("Limits"):
//! there a flip may look like a flush that never returned.
//!
//! Where nothing but zeros stand, the usual run takes every 61st byte of the holes and one bit of a
//! byte; `THINPLY_DAMAGE=full` takes every byte and every bit.

use std::ops::Range;
use std::sync::Arc;

use thinply::chain::{Chain, Gate, create, seal};
use thinply::device::Device;
use thinply::error::{ErrorKind, Result};
use thinply::inspect;
use thinply::storage::{Access, Folder, MemoryFolder, Storage, read_exact_at, write_all_at};

const BLOCK: u64 = 4096;
const SIZE: u64 = 12 * BLOCK + 512;
const SLOTS: [Range<u64>; 2] = [0..4096, 65536..69632];
const RING: Range<u64> = 1 << 20..2 << 20;
const BITMAP: Range<u64> = 2 << 20..(2 << 20) + 4096;
/// A prime, so that all places in a sector and all bits of a byte get their turn.
const STRIDE: u64 = 61;
/// The last record of the top that was not closed writes this block.
const LAST: u64 = 9;

#[derive(Clone, Copy, PartialEq)]
enum Ending {
    Closed,
    Killed,
}

fn image(ending: Ending) -> Arc<dyn Folder> {
    let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("m"));
    let layers = Arc::new(Gate::default());
    let open = |name| Chain::open(folder.clone(), name, Access::Write, layers.clone()).unwrap();
    create(&folder, "base", Some(SIZE), None, &layers).unwrap();
    let base = open("base");
    base.write(0, &vec![1; SIZE as usize]).unwrap();
    base.close().unwrap();
    drop(base);
    let parent = seal(&*folder, "base").unwrap();
    create(&folder, "top", None, Some(&parent), &layers).unwrap();
    let top = open("top");
    for block in [2, 5, LAST] {
        top.write(block * BLOCK + 10, &[block as u8; 5000]).unwrap();
        top.flush().unwrap();
    }
    if ending == Ending::Closed {
        top.close().unwrap();
    }
    drop(top);
    copy(&folder)
}

fn copy(folder: &Arc<dyn Folder>) -> Arc<dyn Folder> {
    let copy: Arc<dyn Folder> = Arc::new(MemoryFolder::new("m"));
    for name in ["base", "top"] {
        let (from, to) = (folder.open(name, Access::Read).unwrap(), copy.create(name).unwrap());
        to.set_length(from.length().unwrap()).unwrap();
        let mut at = 0;
        while let Some(start) = from.next_data(at).unwrap() {
            at = from.next_hole(start).unwrap();
            let mut data = vec![0; (at - start) as usize];
            read_exact_at(&*from, &mut data, start).unwrap();
            write_all_at(&*to, &data, start).unwrap();
        }
    }
    copy
}

fn read(folder: &Arc<dyn Folder>, access: Access) -> Result<Vec<u8>> {
    let chain = Chain::open(folder.clone(), "top", access, Arc::new(Gate::default()))?;
    let mut data = vec![0; SIZE as usize];
    assert_eq!(chain.size(), SIZE);
    chain.read(0, &mut data).map(|()| data)
}

fn is_full() -> bool {
    std::env::var("THINPLY_DAMAGE").is_ok_and(|value| value == "full")
}

/// Runs `part` on as many threads as there are processors, each with its share of `range`.
fn in_parallel(range: Range<u64>, part: impl Fn(Range<u64>) + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let share = (range.end - range.start).div_ceil(threads);
    std::thread::scope(|scope| {
        for number in 0..threads {
            let start = range.start + number * share;
            let (end, part) = ((start + share).min(range.end), &part);
            scope.spawn(move || part(start..end));
        }
    });
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let original = image(Ending::Closed);
    for name in ["base", "top"] {
        let length = original.open(name, Access::Read).unwrap().length().unwrap();
        in_parallel(0..length, |lengths| {
            let folder = copy(&original);
            let file = folder.open(name, Access::Write).unwrap();
            for length in lengths.rev().filter(|&length| is_near(length) || is_full()) {
                file.set_length(length).unwrap();
                let error = read(&folder, Access::Read).unwrap_err();
                let expected =
                    if length < BLOCK { ErrorKind::NotAnImage } else { ErrorKind::Corrupt };
                assert_eq!(error.kind(), expected, "{name} of {length} bytes: {error}");
            }
        });
    }
}

/// Whether a length ends inside or beside something that is no hole.
fn is_near(length: u64) -> bool {
    let [first, second] = SLOTS;
    let data = 3 << 20..u64::MAX;
    let stands =
        |range: &Range<u64>| range.start.saturating_sub(1) <= length && length <= range.end;
    [first, second, BITMAP, data].iter().any(stands) || length.is_multiple_of(STRIDE)
}

struct Flips {
    original: Arc<dyn Folder>,
    expected: Vec<u8>,
    name: &'static str,
    /// Flips of the last record may show what lies below its block.
    last: Range<u64>,
    /// A torn record is nothing unusual where the layer was not closed.
    noted: Range<u64>,
}

impl Flips {
    /// Flips `bits` of every byte of `range`, one at a time.
    fn flip(&self, range: Range<u64>, bits: fn(u64) -> Range<u32>) {
        in_parallel(range, |bytes| {
            let folder = copy(&self.original);
            let file = folder.open(self.name, Access::Write).unwrap();
            for at in bytes {
                for bit in bits(at) {
                    flip(&*file, at, bit);
                    self.judge(&folder, &*file, at, bit);
                    flip(&*file, at, bit);
                }
            }
        });
    }

    fn structures(&self) {
        let [first, second] = SLOTS;
        for slot in [first, second] {
            self.flip(slot, used);
        }
        self.flip(BITMAP, all);
    }

    fn judge(&self, folder: &Arc<dyn Folder>, file: &dyn Storage, at: u64, bit: u32) {
        let what = format!("bit {bit} of byte {at} of {}", self.name);
        if let Ok(data) = read(folder, Access::Read) {
            self.same_data(&data, at, &what);
        }
        let found = match inspect::check(file) {
            Ok(report) => {
                !report.is_clean() || self.noted.contains(&at) && !report.notes.is_empty()
            }
            Err(error) => error.kind() == ErrorKind::Unsupported,
        };
        assert!(found, "check does not find {what}");
        // A writer changes the file, so it gets one of its own; a flip in an empty ring place is
        // the same to it wherever it is.
        if !RING.contains(&at) || at.is_multiple_of(BLOCK) {
            let own = copy(folder);
            if let Ok(data) = read(&own, Access::Write) {
                self.same_data(&data, at, &what);
                let again = read(&own, Access::Read).expect("what was opened for writing reopens");
                assert!(again == data, "{what}: recovering twice gives other data");
            }
        }
    }

    fn same_data(&self, data: &[u8], at: u64, what: &str) {
        let mut expected = self.expected.clone();
        if self.last.contains(&at) {
            for block in [LAST, LAST + 1] {
                let range = (block * BLOCK) as usize..((block + 1) * BLOCK) as usize;
                if data[range.clone()].iter().all(|&byte| byte == 1) {
                    expected[range].fill(1);
                }
            }
        }
        assert!(data == expected, "{what}: other data");
    }
}

fn flip(file: &dyn Storage, at: u64, bit: u32) {
    let mut byte = [0];
    read_exact_at(file, &mut byte, at).unwrap();
    write_all_at(file, &[byte[0] ^ 1 << bit], at).unwrap();
}

/// All bits of a byte.
fn all(_at: u64) -> Range<u32> {
    0..8
}

/// All bits of the bytes of a slot that are in use, one of the others.
fn used(at: u64) -> Range<u32> {
    match at % BLOCK {
        512..4092 if !is_full() => one(at),
        _ => all(at),
    }
}

fn one(at: u64) -> Range<u32> {
    (at % 8) as u32..(at % 8) as u32 + 1
}

/// A bit of every so many bytes.
fn few(at: u64) -> Range<u32> {
    match at % STRIDE {
        _ if is_full() => all(at),
        0 => one(at),
        _ => 0..0,
    }
}

fn flips(ending: Ending, name: &'static str) -> Flips {
    let original = image(ending);
    let expected = read(&original, Access::Read).unwrap();
    let file = original.open("top", Access::Read).unwrap();
    let (mut last, mut noted) = (0..0, 0..0);
    if ending == Ending::Killed && name == "top" {
        let tail = thinply::live::newest_header(&*file).unwrap().journal_tail;
        let start = RING.start + (tail + 2) % 256 * BLOCK;
        (last, noted) = (start..start + BLOCK, RING);
    }
    Flips { original, expected, name, last, noted }
}

#[test]
fn a_flipped_bit_of_a_frozen_parent_gives_the_same_data_or_an_error() {
    flips(Ending::Closed, "base").structures();
}

#[test]
fn a_flipped_bit_of_a_closed_top_gives_the_same_data_or_an_error() {
    flips(Ending::Closed, "top").structures();
}

#[test]
fn a_flipped_bit_of_a_top_that_was_not_closed_gives_the_same_data_or_an_error() {
    let flips = flips(Ending::Killed, "top");
    flips.structures();
    flips.flip(flips.last.start - 2 * BLOCK..flips.last.end, used);
}

#[test]
fn a_flipped_bit_of_an_empty_journal_changes_no_data() {
    for name in ["base", "top"] {
        flips(Ending::Closed, name).flip(RING, few);
    }
}

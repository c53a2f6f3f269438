//! `repair` saves what opening refuses, says what it could not, and never touches what it reads.

use std::ops::Range;
use std::sync::Arc;

use testkit::bench::{BLOCK, Bench};
use thinply::chain::{Chain, Gate};
use thinply::device::Device;
use thinply::error::ErrorKind;
use thinply::format::header::{Header, State};
use thinply::inspect::{self, Fate, Loss, Reason, Repaired};
use thinply::live::newest_header;
use thinply::storage::{Access, Storage, read_exact_at, write_all_at};

const KIB: u64 = 1 << 10;
const SIZE: u64 = 200 * KIB;
const RING: u64 = 1 << 20;
const BITMAP: u64 = 2 << 20;
const DATA: u64 = 3 << 20;

/// A frozen base and a top that trimmed a block, wrote to two and was closed or killed.
struct Image {
    bench: Bench,
    expected: Vec<u8>,
}

impl Image {
    fn new(close: bool) -> Self {
        let bench = Bench::default();
        bench.create("base", SIZE);
        bench.change("base", |base| base.write(0, &vec![1; SIZE as usize]).unwrap());
        bench.overlay("top", "base", None);
        let top = bench.write("top");
        let mut expected = vec![1; SIZE as usize];
        top.trim(4 * KIB, 4 * KIB).unwrap();
        expected[4096..8192].fill(0);
        top.flush().unwrap();
        for (offset, fill) in [(16 * KIB, 3), (100 * KIB, 4)] {
            top.write(offset, &[fill; BLOCK]).unwrap();
            top.flush().unwrap();
            expected[offset as usize..][..BLOCK].fill(fill);
        }
        if close {
            top.close().unwrap();
        }
        Self { bench, expected }
    }

    fn file(&self, name: &str) -> Arc<dyn Storage> {
        self.bench.folder.open(name, Access::Write).unwrap()
    }

    /// Inverts the bits of a byte.
    fn damage(&self, name: &str, offset: u64) {
        let (file, mut byte) = (self.file(name), [0]);
        read_exact_at(&*file, &mut byte, offset).unwrap();
        write_all_at(&*file, &[!byte[0]], offset).unwrap();
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let file = self.file(name);
        let mut bytes = vec![0; file.length().unwrap() as usize];
        read_exact_at(&*file, &mut bytes, 0).unwrap();
        bytes
    }

    /// Repairs `name` into `new`; the old file stays as it is, the new one is clean.
    fn repair(&self, name: &str) -> Repaired {
        let before = self.bytes(name);
        let file = self.bench.folder.open(name, Access::Read).unwrap();
        let new = self.bench.folder.create("new").unwrap();
        let repaired = inspect::repair(&*file, &*new).unwrap();
        assert!(before == self.bytes(name), "the damaged file was changed");
        let report = inspect::check(&*new).unwrap();
        assert_eq!(report, inspect::Report::default());
        repaired
    }

    fn refused(&self, name: &str) -> ErrorKind {
        let chain = self.open(name).and_then(|chain| {
            let mut data = vec![0; SIZE as usize];
            chain.read(0, &mut data)
        });
        chain.unwrap_err().kind()
    }

    fn open(&self, name: &str) -> thinply::error::Result<Chain> {
        Chain::open(self.bench.folder.clone(), name, Access::Read, Arc::new(Gate::default()))
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let chain = self.open(name).unwrap();
        let mut data = vec![0; chain.size() as usize];
        chain.read(0, &mut data).unwrap();
        data
    }
}

fn loss(range: Range<u64>, fate: Fate, reason: Reason) -> Loss {
    Loss { offset: range.start, length: range.end - range.start, fate, reason }
}

#[test]
fn what_is_whole_is_saved_completely_and_a_frozen_layer_keeps_its_identity() {
    for close in [true, false] {
        let image = Image::new(close);
        let old = newest_header(&*image.file("top")).unwrap();
        let repaired = image.repair("top");
        assert!(repaired.is_complete(), "{repaired:?}");
        assert_eq!((repaired.blocks, repaired.header.state), (3, State::Writable));
        assert_ne!(repaired.header.uuid, old.uuid);
        assert!(image.read("new") == image.expected);
        image.bench.folder.remove("new").unwrap();

        let repaired = image.repair("base");
        let old = newest_header(&*image.file("base")).unwrap();
        assert_eq!(repaired.header.identity(), old.identity());
        image.bench.folder.rename("new", "base").unwrap();
        assert!(image.read("top") == image.expected, "a child stands on the copy too");
    }
}

#[test]
fn with_one_header_slot_everything_is_saved_and_with_none_it_is_a_guess() {
    let image = Image::new(true);
    image.damage("top", 100);
    assert!(image.repair("top").is_complete());
    assert!(image.read("new") == image.expected);
    image.bench.folder.remove("new").unwrap();
    image.damage("top", 65536 + 60);
    assert_eq!(image.refused("top"), ErrorKind::Corrupt);
    let repaired = image.repair("top");
    assert!(!repaired.is_complete() && repaired.losses.is_empty(), "{repaired:?}");
    assert!(image.read("new") == image.expected);
}

#[test]
fn without_a_header_that_fits_the_file_nothing_is_saved() {
    let image = Image::new(true);
    let refused = |kind| {
        let new = image.bench.folder.create("new").unwrap();
        let error = inspect::repair(&*image.file("top"), &*new).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(inspect::check(&*new).unwrap_err().kind(), ErrorKind::NotAnImage);
        image.bench.folder.remove("new").unwrap();
    };
    for slot in [0, 65536] {
        image.damage("top", slot + 92);
    }
    refused(ErrorKind::Corrupt);
    for slot in [0, 65536] {
        image.damage("top", slot);
    }
    refused(ErrorKind::NotAnImage);
    for slot in [0, 1] {
        let other = newest_header(&*image.file("base")).unwrap();
        let mut bytes = other.encode(slot);
        // A feature of a later version.
        bytes[16] = 4;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&(slot as u32).to_le_bytes());
        hasher.update(&bytes[..4092]);
        bytes[4092..].copy_from_slice(&hasher.finalize().to_le_bytes());
        write_all_at(&*image.file("top"), &*bytes, slot as u64 * 65536).unwrap();
    }
    refused(ErrorKind::Unsupported);
}

#[test]
fn of_a_lost_bitmap_sector_data_are_taken_as_a_guess_and_holes_are_lost() {
    let image = Image::new(true);
    image.damage("top", BITMAP + 7);
    assert_eq!(image.refused("top"), ErrorKind::Corrupt);
    let repaired = image.repair("top");
    let sector = |range, fate| loss(range, fate, Reason::BitmapSector);
    assert_eq!(
        repaired.losses,
        [
            sector(0..16 * KIB, Fate::Lost),
            sector(16 * KIB..20 * KIB, Fate::Guessed),
            sector(20 * KIB..100 * KIB, Fate::Lost),
            sector(100 * KIB..104 * KIB, Fate::Guessed),
            sector(104 * KIB..SIZE, Fate::Lost),
        ]
    );
    // The one thing that can't be known: that a block had been trimmed.
    let mut expected = image.expected.clone();
    expected[4096..8192].fill(1);
    assert!(image.read("new") == expected);
}

#[test]
fn without_a_parent_a_hole_is_zeros_whoever_owns_it() {
    let bench = Bench::default();
    bench.create("base", SIZE);
    bench.change("base", |base| base.write(8 * KIB, &[5; BLOCK]).unwrap());
    let image = Image { bench, expected: Vec::new() };
    let expected = image.read("base");
    image.damage("base", BITMAP);
    let repaired = image.repair("base");
    let guessed = loss(8 * KIB..12 * KIB, Fate::Guessed, Reason::BitmapSector);
    assert_eq!(repaired.losses, [guessed]);
    assert!(image.read("new") == expected);
}

#[test]
fn behind_a_gap_in_the_journal_records_count_and_other_data_are_a_guess() {
    let image = Image::new(false);
    let Header { journal_tail, .. } = newest_header(&*image.file("top")).unwrap();
    image.damage("top", RING + (journal_tail + 1) % 256 * 4096 + 40);
    assert_eq!(image.refused("top"), ErrorKind::Loss);
    let repaired = image.repair("top");
    assert_eq!(repaired.doubts.len(), 1, "{repaired:?}");
    let guessed = loss(16 * KIB..20 * KIB, Fate::Guessed, Reason::Journal);
    assert_eq!(repaired.losses, [guessed], "the block that the lost record named");
    assert!(image.read("new") == image.expected);
}

#[test]
fn a_record_whose_data_did_not_arrive_is_no_loss() {
    let image = Image::new(false);
    image.damage("top", DATA + 100 * KIB + 5);
    let repaired = image.repair("top");
    assert!(repaired.is_complete(), "{repaired:?}");
    let mut expected = image.expected.clone();
    expected[100 << 10..][..BLOCK].fill(1);
    assert!(image.read("new") == expected, "it is as if its flush had never returned");
}

#[test]
fn what_the_file_has_no_room_for_is_lost() {
    let image = Image::new(true);
    image.file("base").set_length(DATA + 150 * KIB + 10).unwrap();
    assert_eq!(image.refused("base"), ErrorKind::Corrupt);
    let repaired = image.repair("base");
    assert_eq!(repaired.losses, [loss(148 * KIB..SIZE, Fate::Lost, Reason::BeyondTheEnd)]);
    assert!(image.read("new")[..148 << 10] == vec![1; 148 << 10]);
    assert!(matches!(repaired.header.state, State::Writable), "another identity");
    image.bench.folder.remove("new").unwrap();
    // Not even the bitmap.
    image.file("base").set_length(BITMAP).unwrap();
    let repaired = image.repair("base");
    assert_eq!(repaired.losses, [loss(0..SIZE, Fate::Lost, Reason::BeyondTheEnd)]);
}

#[test]
fn the_link_to_a_parent_stays_whether_or_not_it_is_there() {
    let image = Image::new(true);
    let old = newest_header(&*image.file("top")).unwrap();
    image.bench.folder.rename("base", "elsewhere").unwrap();
    assert_eq!(image.refused("top"), ErrorKind::NotFound);
    let repaired = image.repair("top");
    assert!(repaired.is_complete(), "{repaired:?}");
    assert_eq!(repaired.header.parent, old.parent);
    assert_eq!(repaired.header.visible_parent_size, old.visible_parent_size);
    image.bench.folder.rename("elsewhere", "base").unwrap();
    assert!(image.read("new") == image.expected);
}

//! Images made to harm: each is refused with an error of the right kind that names the file, leaves
//! the file as it is, and takes next to no memory or time. `tests/engine/hostile.rs` says which test shows
//! what.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;

use thinply::chain::{Chain, Gate, MAX_DEPTH, create, seal};
use thinply::device::Device;
use thinply::error::{Error, ErrorKind, Result};
use thinply::format::journal::{Entry, Record, encode};
use thinply::inspect;
use thinply::live::newest_header;
use thinply::storage::{Access, FileFolder, Folder, write_all_at};
use thinply::types::{Block, Uuid};

const SIZE: u64 = 64 << 10;
const SLOTS: [u64; 2] = [0, 64 << 10];
const RING: u64 = 1 << 20;

struct Files {
    dir: tempfile::TempDir,
    folder: Arc<dyn Folder>,
}

impl Files {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder: Arc<dyn Folder> = Arc::new(FileFolder::new(dir.path()));
        Self { dir, folder }
    }

    /// With a layer `a` that holds some data and is closed.
    fn with_disk() -> Self {
        let files = Self::new();
        files.create("a", None);
        files
    }

    fn create(&self, name: &str, parent: Option<&str>) {
        let parent = parent.map(|name| seal(&*self.folder, name).unwrap());
        create(&self.folder, name, Some(SIZE), parent.as_ref(), &Gate::default()).unwrap();
        let chain = self.open(name, Access::Write).unwrap();
        chain.write(0, name.as_bytes()).unwrap();
        chain.close().unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self, name: &str, access: Access) -> Result<Chain> {
        Chain::open(self.folder.clone(), name, access, Arc::new(Gate::default()))
    }

    /// Changes bytes of both header slots, under checksums that hold.
    fn forge(&self, name: &str, mut change: impl FnMut(&mut [u8])) {
        let file = fs::OpenOptions::new().read(true).write(true).open(self.path(name)).unwrap();
        for (number, at) in (0u32..).zip(SLOTS) {
            let mut slot = [0; 4096];
            file.read_exact_at(&mut slot, at).unwrap();
            change(&mut slot);
            let mut hasher = crc32fast::Hasher::new();
            hasher.update(&number.to_le_bytes());
            hasher.update(&slot[..4092]);
            slot[4092..].copy_from_slice(&hasher.finalize().to_le_bytes());
            file.write_all_at(&slot, at).unwrap();
        }
    }

    fn refuse(&self, name: &str, access: Access) -> Error {
        let begun = self.bytes(name);
        let error = self.open(name, access).unwrap_err();
        assert!(begun == self.bytes(name), "{error}: a refused file was changed");
        assert!(error.path().is_some(), "{error}: no file is named");
        error
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }
}

/// Forges a field of a fresh disk's header, which must then be refused.
fn forged(offset: usize, bytes: &[u8]) -> ErrorKind {
    let files = Files::with_disk();
    files.forge("a", |slot| slot[offset..offset + bytes.len()].copy_from_slice(bytes));
    let error = files.refuse("a", Access::Read);
    assert_eq!(files.refuse("a", Access::Write).kind(), error.kind());
    let file = files.folder.open("a", Access::Read).unwrap();
    let found = inspect::check(&*file);
    assert!(found.is_err() || !found.unwrap().is_clean(), "{offset}: check finds nothing");
    error.kind()
}

fn put(value: u64) -> [u8; 8] {
    value.to_le_bytes()
}

#[test]
fn huge_header_and_extension_lengths() {
    for length in [0, 4095, 8192, u32::MAX] {
        assert_eq!(forged(12, &length.to_le_bytes()), ErrorKind::Unsupported);
    }
    for length in [1, 8, 3581, u32::MAX] {
        assert_eq!(forged(456, &length.to_le_bytes()), ErrorKind::Corrupt, "{length}");
    }
    // An extension whose body is longer than everything.
    let mut extensions = [0; 56 + 16];
    extensions[0] = 16;
    extensions[56] = 9;
    extensions[64..68].fill(255);
    assert_eq!(forged(456, &extensions), ErrorKind::Corrupt);
    assert_eq!(forged(164, &u32::MAX.to_le_bytes()), ErrorKind::Corrupt, "the hint's length");
}

#[test]
fn shifts_and_sizes_that_overflow() {
    for log2 in [0, 11, 13, 64, u32::MAX] {
        assert_eq!(forged(68, &log2.to_le_bytes()), ErrorKind::Unsupported);
    }
    for size in [0, 1, 511, 513, (1 << 56) + 512, 1 << 63, u64::MAX] {
        assert_eq!(forged(88, &put(size)), ErrorKind::Corrupt, "virtual size {size}");
    }
    // Generation, epoch, journal tail, visible parent size.
    for offset in [56, 72, 80, 96] {
        for value in [1 << 63, u64::MAX] {
            assert_eq!(forged(offset, &put(value)), ErrorKind::Corrupt, "{offset}");
        }
    }
}

/// A writer that counted on would leave a layer that nothing opens.
#[test]
fn counters_near_their_end() {
    // Generation, epoch, journal tail.
    for offset in [56, 72, 80] {
        for (value, writable) in [((1 << 62) - 1, true), (1 << 62, false), ((1 << 63) - 1, false)] {
            let files = Files::with_disk();
            let mut counter = value - 2;
            files.forge("a", |slot| {
                counter += 1;
                slot[offset..offset + 8].copy_from_slice(&put(counter));
            });
            files.open("a", Access::Read).unwrap();
            if writable {
                files.open("a", Access::Write).unwrap().close().unwrap();
            } else {
                assert_eq!(files.refuse("a", Access::Write).kind(), ErrorKind::ReadOnly);
            }
            files.open("a", Access::Read).unwrap();
        }
    }
}

#[test]
fn a_tiny_file_that_claims_a_petabyte() {
    assert_eq!(forged(88, &put(1 << 50)), ErrorKind::Corrupt);
    assert_eq!(forged(88, &put(1 << 56)), ErrorKind::Corrupt);
}

/// As much as the host's file systems allow: memory follows what is touched.
#[test]
fn a_sparse_file_of_terabytes_takes_little_memory() {
    let files = Files::new();
    create(&files.folder, "a", Some(8 << 40), None, &Gate::default()).unwrap();
    let before = resident();
    let chain = files.open("a", Access::Write).unwrap();
    for at in [0, 4 << 40, (8 << 40) - 512] {
        chain.write(at, &[1; 512]).unwrap();
    }
    chain.flush().unwrap();
    assert!(inspect::check(&*files.folder.open("a", Access::Read).unwrap()).unwrap().is_clean());
    let taken = resident().saturating_sub(before);
    assert!(taken < 64 << 20, "{taken} bytes");
}

fn resident() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn tables_past_the_end_or_unaligned() {
    // Offsets of journal and groups, their strides and counts.
    for offset in [104, 120, 128] {
        for value in [0, 1, 1 << 20 | 1, 1 << 62, u64::MAX] {
            assert_eq!(forged(offset, &put(value)), ErrorKind::Unsupported, "{offset}");
        }
    }
    for offset in [112, 116, 136, 140] {
        for value in [0, 1, u32::MAX] {
            assert_eq!(forged(offset, &value.to_le_bytes()), ErrorKind::Unsupported, "{offset}");
        }
    }
}

#[test]
fn an_unknown_incompatible_feature() {
    for bit in 0..64 {
        let files = Files::with_disk();
        files.forge("a", |slot| slot[16..24].copy_from_slice(&put(1 << bit)));
        let error = files.refuse("a", Access::Read);
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(&format!("bit {bit} ")), "{error}");
    }
    assert_eq!(forged(8, &2u32.to_le_bytes()), ErrorKind::Unsupported, "a later version");
}

#[test]
fn hints_that_are_no_plain_names() {
    let files = Files::new();
    files.create("base", None);
    files.create("child", Some("base"));
    fs::create_dir(files.path("sub")).unwrap();
    fs::copy(files.path("base"), files.path("sub/base")).unwrap();
    let absolute = files.path("base").display().to_string();
    let hints = [
        "..",
        ".",
        "",
        "../base",
        "sub/base",
        &absolute,
        "/etc/passwd",
        "nbd://host/base",
        "file:base",
        "json:{\"driver\":\"raw\"}",
        "a\\base",
        "a\0b",
        "a\nb",
        "\u{85}",
    ];
    for hint in hints {
        files.forge("child", |slot| {
            slot[164..168].copy_from_slice(&(hint.len() as u32).to_le_bytes());
            slot[200..456].fill(0);
            slot[200..200 + hint.len()].copy_from_slice(hint.as_bytes());
        });
        for access in [Access::Read, Access::Write] {
            assert_eq!(files.refuse("child", access).kind(), ErrorKind::Corrupt, "{hint:?}");
        }
    }
}

#[test]
fn a_symlink_where_a_parent_should_be() {
    let files = Files::new();
    files.create("base", None);
    files.create("child", Some("base"));
    fs::rename(files.path("base"), files.path("real")).unwrap();
    symlink(files.path("real"), files.path("base")).unwrap();
    assert!(files.refuse("child", Access::Read).to_string().contains("not a link"));
    // Nor one in the place of a folder on the way, since a hint has none.
    fs::remove_file(files.path("base")).unwrap();
    fs::create_dir(files.path("base")).unwrap();
    files.refuse("child", Access::Read);
}

/// Links a layer to whatever identity another one has.
fn link(files: &Files, child: &str, parent: &str) {
    let header = newest_header(&*files.folder.open(parent, Access::Read).unwrap()).unwrap();
    let slot = header.encode(0);
    files.forge(child, |bytes| {
        bytes[96..104].copy_from_slice(&put(SIZE));
        bytes[160] = 1;
        bytes[168..184].copy_from_slice(&slot[40..56]);
        bytes[184..200].copy_from_slice(&slot[144..160]);
        bytes[164] = parent.len() as u8;
        bytes[200..456].fill(0);
        bytes[200..200 + parent.len()].copy_from_slice(parent.as_bytes());
    });
}

#[test]
fn a_parent_cycle() {
    let files = Files::new();
    for name in ["a", "b"] {
        files.create(name, None);
        seal(&*files.folder, name).unwrap();
    }
    files.create("top", Some("a"));
    link(&files, "a", "b");
    link(&files, "b", "a");
    assert_eq!(files.refuse("top", Access::Write).kind(), ErrorKind::Corrupt);
    link(&files, "a", "a");
    let error = files.refuse("a", Access::Read);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

/// More than ten thousand would not be looked at either: the walk ends at the limit.
#[test]
fn a_chain_that_is_too_deep() {
    let files = Files::new();
    files.create("0", None);
    seal(&*files.folder, "0").unwrap();
    let first = files.bytes("0");
    for level in 1..=MAX_DEPTH + 1 {
        let (name, below) = (level.to_string(), (level - 1).to_string());
        // The first one's header in a file of its own: quicker than creating and freezing each.
        let file = files.folder.create(&name).unwrap();
        file.set_length((3 << 20) + SIZE).unwrap();
        for slot in SLOTS {
            write_all_at(&*file, &first[slot as usize..][..4096], slot).unwrap();
        }
        files.forge(&name, |slot| {
            slot[40..56].copy_from_slice(&Uuid((level as u128).to_le_bytes()).0);
        });
        link(&files, &name, &below);
    }
    let error = files.refuse(&(MAX_DEPTH + 1).to_string(), Access::Read);
    assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
}

#[test]
fn a_parent_that_was_replaced() {
    let files = Files::new();
    files.create("base", None);
    files.create("child", Some("base"));
    fs::remove_file(files.path("base")).unwrap();
    files.create("base", None);
    assert_eq!(files.refuse("child", Access::Write).kind(), ErrorKind::ParentMismatch);
    seal(&*files.folder, "base").unwrap();
    assert_eq!(files.refuse("child", Access::Write).kind(), ErrorKind::ParentMismatch);
}

#[test]
fn a_parent_shorter_or_longer_than_the_child() {
    let files = Files::new();
    files.create("base", None);
    let parent = seal(&*files.folder, "base").unwrap();
    for (name, size) in [("shorter", SIZE - 4096 - 512), ("longer", SIZE + 4096 + 512)] {
        create(&files.folder, name, Some(size), Some(&parent), &Gate::default()).unwrap();
        let chain = files.open(name, Access::Read).unwrap();
        let mut data = vec![7; size as usize];
        chain.read(0, &mut data).unwrap();
        assert_eq!(&data[..4], b"base");
        assert!(data[4..].iter().all(|&byte| byte == 0));
    }
    // One that shows more of its parent than there is.
    files.forge("longer", |slot| slot[96..104].copy_from_slice(&put(SIZE + 512)));
    assert_eq!(files.refuse("longer", Access::Read).kind(), ErrorKind::Corrupt);
}

#[test]
fn guest_data_that_begins_with_the_magic() {
    let files = Files::with_disk();
    let inner = files.bytes("a");
    create(&files.folder, "outer", Some(8 << 20), None, &Gate::default()).unwrap();
    let outer = files.open("outer", Access::Write).unwrap();
    outer.write(0, &inner).unwrap();
    outer.close().unwrap();
    let outer = files.open("outer", Access::Read).unwrap();
    let mut data = vec![0; inner.len()];
    outer.read(0, &mut data).unwrap();
    assert!(data == inner, "what looks like a layer is bytes to whoever reads the disk");
    assert_eq!(outer.size(), 8 << 20);
}

/// Puts a record into the ring of `a`, after `change` was made to it.
fn put_record(files: &Files, record: &Record, change: impl FnOnce(&mut [u8])) {
    let header = newest_header(&*files.folder.open("a", Access::Read).unwrap()).unwrap();
    let mut bytes = encode(header.uuid, record);
    change(&mut *bytes);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header.uuid.0);
    hasher.update(&bytes[8..]);
    bytes[4..8].copy_from_slice(&hasher.finalize().to_le_bytes());
    let file = fs::OpenOptions::new().write(true).open(files.path("a")).unwrap();
    file.write_all_at(&*bytes, RING + record.sequence % 256 * 4096).unwrap();
}

/// A disk that was not closed, with one record; the next one's number and epoch.
fn unclosed() -> (Files, u64, u64) {
    let files = Files::with_disk();
    let chain = files.open("a", Access::Write).unwrap();
    chain.write(8192, &[5; 4096]).unwrap();
    chain.flush().unwrap();
    drop(chain);
    let header = newest_header(&*files.folder.open("a", Access::Read).unwrap()).unwrap();
    (files, header.journal_tail + 1, header.epoch)
}

fn shown(files: &Files) -> Vec<u8> {
    let mut data = vec![0; SIZE as usize];
    files.open("a", Access::Read).unwrap().read(0, &mut data).unwrap();
    data
}

#[test]
fn a_stale_journal_of_an_earlier_epoch() {
    let (files, next, epoch) = unclosed();
    let before = shown(&files);
    let entries = vec![Entry { block: Block(7), crc: 0xc71c_0011 }];
    for sequence in [next, next + 1, next + 100] {
        let record = Record { epoch: epoch - 1, sequence, entries: entries.clone() };
        put_record(&files, &record, |_| {});
    }
    assert!(shown(&files) == before);
}

#[test]
fn gaps_in_the_sequence() {
    let (files, next, epoch) = unclosed();
    put_record(&files, &Record { epoch, sequence: next + 1, entries: vec![] }, |_| {});
    for access in [Access::Read, Access::Write] {
        assert_eq!(files.refuse("a", access).kind(), ErrorKind::Loss);
    }
}

#[test]
fn counts_beyond_their_page() {
    for count in [339, 340, 1 << 16, u32::MAX] {
        let (files, next, epoch) = unclosed();
        put_record(&files, &Record { epoch, sequence: next, entries: vec![] }, |bytes| {
            bytes[24..28].copy_from_slice(&count.to_le_bytes());
        });
        assert_eq!(files.refuse("a", Access::Write).kind(), ErrorKind::Corrupt, "{count}");
    }
    // A block beyond the device.
    for block in [SIZE / 4096, 1 << 40, u64::MAX] {
        let (files, next, epoch) = unclosed();
        let entries = vec![Entry { block: Block(block), crc: 0 }];
        put_record(&files, &Record { epoch, sequence: next, entries }, |_| {});
        assert_eq!(files.refuse("a", Access::Write).kind(), ErrorKind::Corrupt, "{block}");
    }
}

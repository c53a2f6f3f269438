//! Hosts that misbehave while a chain is open. Faults at every call are in `tests/crash/crash.rs`;
//! `tests/engine/hostile.rs` says which test shows what.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use testkit::hooked::{Call, Hooked};
use thinply::chain::{Chain, Gate, create, seal};
use thinply::device::{Device, ZeroMode};
use thinply::error::ErrorKind;
use thinply::inspect;
use thinply::storage::{Access, Folder, MemoryFolder};

const SIZE: u64 = 1 << 20;
const EIO: i32 = 5;

fn hooked() -> (Arc<Hooked>, Arc<dyn Folder>) {
    let hooked = Arc::new(Hooked::new(Arc::new(MemoryFolder::new("m"))));
    (hooked.clone(), hooked)
}

fn open(folder: &Arc<dyn Folder>, name: &str) -> Chain {
    Chain::open(folder.clone(), name, Access::Write, Arc::default()).unwrap()
}

/// A base that is all ones, and an overlay.
fn overlay(folder: &Arc<dyn Folder>) -> Chain {
    let layers = Gate::default();
    create(folder, "base", Some(SIZE), None, &layers).unwrap();
    let base = open(folder, "base");
    base.write(0, &vec![1; SIZE as usize]).unwrap();
    base.close().unwrap();
    drop(base);
    let parent = seal(&**folder, "base").unwrap();
    create(folder, "top", None, Some(&parent), &layers).unwrap();
    open(folder, "top")
}

#[test]
fn a_parent_that_cannot_be_read_is_an_error_and_no_zeros() {
    let (hooked, folder) = hooked();
    let top = overlay(&folder);
    top.read(0, &mut [0]).unwrap();
    let data = 3 << 20;
    hooked.on_calls(move |call| match call {
        Call::Read { name: "base", offset, .. } if offset >= data => {
            Err(io::Error::from_raw_os_error(EIO))
        }
        _ => Ok(usize::MAX),
    });
    let error = top.read(8192, &mut [0; 512]).unwrap_err();
    assert_eq!((error.kind(), error.path().unwrap().ends_with("base")), (ErrorKind::Io, true));
    // Copy-up needs the parent's bytes, so it fails too, and owns nothing.
    assert_eq!(top.write(8192, &[9; 10]).unwrap_err().kind(), ErrorKind::Io);
    // A whole block needs none.
    top.write(16384, &[9; 4096]).unwrap();
    top.flush().unwrap();
    hooked.on_calls(|_| Ok(usize::MAX));
    let mut found = [0; 4096];
    top.read(8192, &mut found).unwrap();
    assert_eq!(found, [1; 4096]);
    top.read(16384, &mut found).unwrap();
    assert_eq!(found, [9; 4096]);
}

#[test]
fn short_and_interrupted_calls_are_gone_on_with() {
    let (hooked, folder) = hooked();
    let calls = AtomicU64::new(0);
    // Every second call does a few bytes, every third is interrupted.
    hooked.on_calls(move |call| {
        let number = calls.fetch_add(1, Ordering::Relaxed);
        match call {
            Call::Read { .. } | Call::Write { .. } if number.is_multiple_of(3) => {
                Err(io::ErrorKind::Interrupted.into())
            }
            Call::Read { .. } | Call::Write { .. } => Ok(1 + number as usize % 700),
            _ => Ok(usize::MAX),
        }
    });
    let top = overlay(&folder);
    top.write(5000, &[7; 20_000]).unwrap();
    top.flush().unwrap();
    drop(top);
    let top = open(&folder, "top");
    let mut found = vec![0; SIZE as usize];
    top.read(0, &mut found).unwrap();
    let mut expected = vec![1; SIZE as usize];
    expected[5000..25_000].fill(7);
    assert!(found == expected);
    top.close().unwrap();
    assert!(inspect::check(&*folder.open("top", Access::Read).unwrap()).unwrap().is_clean());
}

#[test]
fn a_failed_sync_is_never_followed_by_success() {
    let (hooked, folder) = hooked();
    let top = overlay(&folder);
    top.write(0, &[5; 4096]).unwrap();
    hooked.on_calls(|call| match call {
        Call::Sync => Err(io::Error::from_raw_os_error(EIO)),
        _ => Ok(usize::MAX),
    });
    assert_eq!(top.flush().unwrap_err().kind(), ErrorKind::Poisoned);
    // The host says that all is well again; the layer does not believe it.
    hooked.on_calls(|_| Ok(usize::MAX));
    assert_eq!(top.flush().unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(top.write(8192, &[5; 10]).unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(top.close().unwrap_err().kind(), ErrorKind::Poisoned);
    drop(top);
    let top = open(&folder, "top");
    top.write(8192, &[6; 10]).unwrap();
    top.close().unwrap();
}

#[test]
fn a_file_system_without_holes_serves_as_well() {
    let (hooked, folder) = hooked();
    hooked.without_holes();
    let top = overlay(&folder);
    top.write(0, &[5; 12_288]).unwrap();
    top.trim(4096, 4096).unwrap();
    top.zero(512 << 10, 8192, ZeroMode::default()).unwrap();
    top.flush().unwrap();
    top.close().unwrap();
    drop(top);
    let top = open(&folder, "top");
    let mut found = vec![0; SIZE as usize];
    top.read(0, &mut found).unwrap();
    let mut expected = vec![1; SIZE as usize];
    expected[..12_288].fill(5);
    expected[4096..8192].fill(0);
    expected[512 << 10..][..8192].fill(0);
    assert!(found == expected);
    assert!(inspect::check(&*folder.open("base", Access::Read).unwrap()).unwrap().is_clean());
}

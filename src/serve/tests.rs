//! Moments over a real chain.

use std::sync::Arc;

use super::{Moment, Opened, Served};
use crate::chain::{Chain, Gate, create};
use crate::device::{BLOCK_SIZE, Device, ZeroMode};
use crate::error::ErrorKind;
use crate::storage::{Access, Folder, MemoryFolder, Storage};

const SIZE: u64 = 10 * BLOCK_SIZE + 512;

fn served() -> Arc<Served<Chain>> {
    let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("m"));
    let layers = Arc::new(Gate::default());
    create(&folder, "a", Some(SIZE), None, &layers).unwrap();
    let chain = Chain::open(folder, "a", Access::Write, layers).unwrap();
    Arc::new(Served::new("a", Opened::new(chain)).unwrap())
}

fn scratch() -> Arc<dyn Storage> {
    MemoryFolder::new("scratch").create("kept").unwrap()
}

fn read(moment: &Moment) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    moment.read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn shows_what_was_there_whatever_changes() {
    let served = served();
    let old: Vec<_> = (0..SIZE).map(|at| (at / 512) as u8 + 1).collect();
    served.write(0, &old).unwrap();
    assert!(served.moments.idle().is_some());
    let moment = served.moment(scratch()).unwrap();
    assert!(served.moments.idle().is_none());
    assert!(read(&moment) == old);
    for round in 0..2 {
        served.write(100, &[round; BLOCK_SIZE as usize]).unwrap();
        served.zero(3 * BLOCK_SIZE, 2 * BLOCK_SIZE, ZeroMode::default()).unwrap();
        served.trim(7 * BLOCK_SIZE - 1, BLOCK_SIZE + 1).unwrap();
        served.write(SIZE - 100, &[round; 100]).unwrap();
        assert!(read(&moment) == old);
    }
    let mut part = [0; 1000];
    moment.read(BLOCK_SIZE - 500, &mut part).unwrap();
    assert!(part == old[BLOCK_SIZE as usize - 500..][..1000]);
    drop(moment);
    assert!(served.moments.idle().is_some());
    let later = served.moment(scratch()).unwrap();
    assert_eq!(read(&later)[100..200], [1; 100]);
}

#[test]
fn there_is_one_at_a_time() {
    let served = served();
    let first = served.moment(scratch()).unwrap();
    assert_eq!(served.moment(scratch()).err().unwrap().kind(), ErrorKind::InUse);
    served.write(0, &[1]).unwrap();
    assert_eq!(read(&first)[0], 0, "the second one took nothing from the first");
    drop(first);
    assert!(served.moment(scratch()).is_ok());
}

#[test]
fn what_cannot_be_kept_fails_the_moment_and_not_the_client() {
    let served = served();
    let folder = MemoryFolder::new("scratch");
    folder.create("kept").unwrap();
    // Kept nowhere: this handle may not write.
    let moment = served.moment(folder.open("kept", Access::Read).unwrap()).unwrap();
    assert_eq!(read(&moment)[0], 0);
    served.write(0, &[1]).unwrap();
    let error = moment.read(0, &mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(error.to_string().contains("keeping what is about to change"), "{error}");
}

#[test]
fn two_blocks_that_change_together_never_show_apart() {
    let served = served();
    let pair = [0, 7 * BLOCK_SIZE];
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in (1..=255).cycle().take(20_000) {
                for offset in pair {
                    served.write(offset, &[round; BLOCK_SIZE as usize]).unwrap();
                }
            }
        });
        while !writer.is_finished() {
            let moment = served.moment(scratch()).unwrap();
            let bytes = read(&moment);
            let [first, second] = pair.map(|at| bytes[at as usize]);
            assert!(first == second || first == second % 255 + 1, "{first} {second}");
            for at in pair {
                assert!(
                    bytes[at as usize..][..BLOCK_SIZE as usize]
                        .iter()
                        .all(|b| *b == bytes[at as usize])
                );
            }
            assert!(read(&moment) == bytes);
        }
    });
}

//! The paths that every request takes, in memory: no disk, no socket.
//!
//! `cargo bench` measures their time. `tests/bench/instructions` counts the instructions of the same
//! work (`count WORK TIMES`), which is exact on a busy machine too.

use std::hint::black_box;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use criterion::Criterion;
use thinply::chain::{Chain, Gate, create, seal};
use thinply::device::{Detail, Device};
use thinply::nbd::proto::numbers::CMD_READ;
use thinply::nbd::proto::{self, Request, Terms};
use thinply::storage::{Access, Folder, MemoryFolder};
use thinply::wait::Wait;

const SIZE: u64 = 64 << 20;
const BLOCK: u64 = 4096;
/// Operations on one fresh overlay: what it holds in memory is bounded by them.
const ROUND: u64 = 4096;
const DEEP: u64 = 64;

/// One operation, told its number.
type Operation = Box<dyn FnMut(u64)>;

/// A fresh start of some work.
type Make = fn() -> Operation;

/// Each work by name.
const WORKS: [(&str, Make); 7] = [
    ("lookup, depth 64", || lookup(&DEEP_CHAIN)),
    ("read 4 KiB, depth 1", || read(&FLAT_CHAIN)),
    ("read 4 KiB, depth 64", || read(&DEEP_CHAIN)),
    ("allocate 4 KiB", || write(overlay(), false)),
    ("allocate 4 KiB and commit", || write(overlay(), true)),
    ("parse a request", parse),
    ("build a reply", reply),
];

static FLAT_CHAIN: LazyLock<Chain> = LazyLock::new(|| chain(1));
static DEEP_CHAIN: LazyLock<Chain> = LazyLock::new(|| chain(DEEP));

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["works"] => WORKS.iter().for_each(|(name, _)| println!("{name}")),
        ["count", name, times] => {
            let (_, make) = WORKS.iter().find(|work| work.0 == name).expect("a work's name");
            run(*make, times.parse().expect("a number"));
        }
        _ => {
            let mut criterion = Criterion::default().configure_from_args();
            for (name, make) in WORKS {
                criterion.bench_function(name, |bencher| {
                    bencher.iter_custom(|times| run(make, times));
                });
            }
            criterion.final_summary();
        }
    }
}

/// Does an operation so many times; how long that took without the fresh starts.
fn run(make: Make, times: u64) -> Duration {
    let (mut left, mut took) = (times, Duration::ZERO);
    while left > 0 {
        let mut operation = make();
        let part = left.min(ROUND);
        let begun = Instant::now();
        (0..part).for_each(&mut operation);
        took += begun.elapsed();
        left -= part;
    }
    took
}

/// A chain whose base owns every block and each other layer its share, spread over the disk.
fn chain(depth: u64) -> Chain {
    let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("memory"));
    let layers = Arc::new(Gate::default());
    for level in 0..depth {
        let parent = level.checked_sub(1).map(|below| seal(&*folder, &below.to_string()).unwrap());
        let name = level.to_string();
        create(&folder, &name, Some(SIZE), parent.as_ref(), &layers).unwrap();
        let top = open(&folder, &name, &layers);
        let step = if level == 0 { 1 } else { depth as usize };
        for block in (level..SIZE / BLOCK).step_by(step) {
            top.write(block * BLOCK, &[level as u8 | 1; BLOCK as usize]).unwrap();
        }
        top.close().unwrap();
    }
    open(&folder, &(depth - 1).to_string(), &layers)
}

fn open(folder: &Arc<dyn Folder>, name: &str, layers: &Arc<Gate>) -> Chain {
    Chain::open(folder.clone(), name, Access::Write, layers.clone()).unwrap()
}

/// An empty layer over an empty one.
fn overlay() -> Chain {
    let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("memory"));
    let layers = Arc::new(Gate::default());
    create(&folder, "base", Some(SIZE), None, &layers).unwrap();
    let parent = seal(&*folder, "base").unwrap();
    create(&folder, "top", None, Some(&parent), &layers).unwrap();
    open(&folder, "top", &layers)
}

/// A place that jumps about the disk and meets every block before it meets one again.
fn offset(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b1) % (SIZE / BLOCK) * BLOCK
}

fn lookup(chain: &'static Chain) -> Operation {
    let mut extents = Vec::new();
    Box::new(move |number| {
        extents.clear();
        chain.extents(offset(number), BLOCK, Detail::Bitmaps, 64, &mut extents).unwrap();
        black_box(&extents);
    })
}

fn read(chain: &'static Chain) -> Operation {
    let mut buffer = [0; BLOCK as usize];
    // The first touch of a group may have to wait.
    chain.read(0, &mut buffer).unwrap();
    Box::new(move |number| {
        chain.try_read(offset(number), (&mut buffer).into(), Wait::Never).unwrap();
        black_box(&buffer);
    })
}

fn write(chain: Chain, commit: bool) -> Operation {
    let data = [7; BLOCK as usize];
    // The first touch of a group may have to wait.
    chain.write(SIZE - BLOCK, &data).unwrap();
    chain.flush().unwrap();
    Box::new(move |number| {
        let written = chain.try_write(offset(number), (&data).into(), Wait::Never).unwrap();
        assert_eq!(written, BLOCK);
        if commit {
            chain.flush().unwrap();
        }
    })
}

fn parse() -> Operation {
    let bytes = proto::request_header(0, CMD_READ, 0, 0, BLOCK as u32);
    let terms = Terms { size: SIZE, read_only: false, structured: true, allocation: true };
    Box::new(move |_| {
        black_box(Request::parse(black_box(&bytes), &terms).unwrap());
    })
}

fn reply() -> Operation {
    Box::new(|number| {
        black_box(proto::data_header(number, true, black_box(0), BLOCK as u32));
        black_box(proto::simple_reply(number, None));
    })
}

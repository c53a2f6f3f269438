//! What clients do to a disk. A seed decides.

use std::ops::Range;
use std::time::Duration;

use fastrand::Rng;

use super::history::{History, SECTOR};

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;

const BLOCK: u64 = 4096 / SECTOR;
/// Sectors in a group of blocks.
const GROUP: u64 = 32512 * BLOCK;
/// Sectors of the device: a group, some blocks and a part of one.
pub const SIZE: u64 = GROUP + 64 * BLOCK + 3;
/// Where the load is, in sectors: a part larger than a round covers, and both sides of the edges of
/// a bitmap sector and of the group.
const AREAS: [Range<u64>; 4] = [
    0..1800 * BLOCK,
    1800 * BLOCK..6000 * BLOCK,
    4032 * BLOCK..4096 * BLOCK,
    GROUP - 64 * BLOCK..SIZE,
];
/// Sectors that a client with a narrow taste comes back to.
const NARROW: u64 = 12 * BLOCK;
/// More than a journal record holds.
const LONG: u64 = 400 * BLOCK;

/// What a disk begins with: data here and there, handed to `put` with its offset. The history of it.
pub fn born(random: &mut Rng, mut put: impl FnMut(u64, &[u8])) -> History {
    let history = History::default();
    for start in (0..SIZE).step_by(64).take(700).chain([SIZE - 20]) {
        let range = start..start + random.u64(1..20);
        let mut content = Vec::new();
        let version = history.begin(&range, false).unwrap();
        History::content(&range, version, &mut content);
        put(start * SECTOR, &content);
        history.end(&range, true);
    }
    history
}

/// What NBD calls a command.
#[derive(Clone, Debug)]
pub struct Request {
    pub command: u16,
    pub flags: u16,
    /// In sectors; empty for a flush.
    pub range: Range<u64>,
}

/// What a client likes to do.
pub struct Taste {
    random: Rng,
    /// Requests that it has under way at a time.
    pub depth: usize,
    area: Range<u64>,
    /// In 256 requests.
    flushes: u8,
    /// In 256 changes.
    fua: u8,
    /// Whether it rests now and then.
    rests: bool,
}

impl Taste {
    pub fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let mut area = AREAS[random.usize(..AREAS.len())].clone();
        if random.u8(..) < 80 {
            let start = area.start + random.u64(..(area.end - area.start - NARROW) / BLOCK) * BLOCK;
            area = start..start + NARROW;
        }
        Self {
            depth: random.usize(1..=8),
            area,
            flushes: *random.choice(&[1, 4, 16, 16, 64, 120]).unwrap(),
            fua: *random.choice(&[0, 0, 8, 128]).unwrap(),
            rests: random.bool(),
            random,
        }
    }

    /// The next request.
    pub fn choose(&mut self) -> Request {
        let random = &mut self.random;
        if random.u8(..) < self.flushes {
            return Request { command: FLUSH, flags: 0, range: 0..0 };
        }
        let command = match random.u8(..100) {
            0..72 => WRITE,
            72..80 => READ,
            80..90 => TRIM,
            _ => WRITE_ZEROES,
        };
        let whole = command == TRIM || random.u8(..) < 160;
        let mut length = match random.u8(..) {
            0 if command != READ => LONG,
            1..16 if command != READ => BLOCK * random.u64(2..16),
            _ if whole => BLOCK,
            _ => random.u64(1..2 * BLOCK),
        };
        let Range { start, end } = self.area;
        let mut from = start + random.u64(..end - start);
        if whole {
            from -= from % BLOCK;
        }
        // A trim that ends with the device takes the part of a block there too.
        length = length.min(end - from);
        if command == TRIM && !(from + length).is_multiple_of(BLOCK) && from + length != SIZE {
            length -= length % BLOCK;
        }
        let mut flags = if random.u8(..) < self.fua && command != READ { FUA } else { 0 };
        if command == WRITE_ZEROES && random.bool() {
            flags |= NO_HOLE;
        }
        Request { command, flags, range: from..from + length }
    }

    /// Sleeps now and then, if it does that.
    pub fn rest(&mut self) {
        if self.rests && self.random.u8(..) < 8 {
            std::thread::sleep(Duration::from_micros(self.random.u64(..2000)));
        }
    }
}

//! What clients do to a chain.

use super::Random;
use super::disk::PAGE;

pub const SECTOR: u64 = 512;
const GROUP: u64 = 127 << 20;
/// A group, and some blocks of a second one; the last block is one sector.
pub const SIZE: u64 = GROUP + 8 * PAGE + SECTOR;
/// The blocks that are used: at edges of words, bitmap sectors, the group and the device.
pub const BLOCKS: [u64; 16] = [
    0,
    1,
    2,
    3,
    63,
    64,
    4063,
    4064,
    8127,
    8128,
    32510,
    32511,
    32512,
    32513,
    32514,
    GROUP / PAGE + 8,
];
/// One thing that a client does.
#[derive(Clone, Debug)]
pub enum Op {
    Write {
        offset: u64,
        length: u64,
    },
    /// A write that is durable when it is answered.
    WriteThrough {
        offset: u64,
        length: u64,
    },
    Zero {
        offset: u64,
        length: u64,
        allocate: bool,
    },
    Trim {
        offset: u64,
        length: u64,
    },
    /// Changes nothing that can be read.
    Allocate {
        offset: u64,
        length: u64,
    },
    Flush,
    Read {
        offset: u64,
    },
    Snapshot,
    /// Close, and open again.
    Close,
    /// More fresh blocks than a record holds.
    Burst,
    /// So many commits, each of a block of its own.
    Commits(u64),
}

impl Op {
    /// Something at one of `blocks`, with sectors whole where `aligned`.
    pub fn random(random: &mut Random, aligned: bool, blocks: &[u64]) -> Self {
        let block = *random.pick(blocks) * PAGE;
        let (from, length) = match random.below(4) {
            0 => (random.below(8) * SECTOR, (1 + random.below(8)) * SECTOR),
            1 if !aligned => (random.below(PAGE), 1 + random.below(2 * PAGE)),
            _ => (0, (1 + random.below(3)) * PAGE),
        };
        let offset = (block + from).min(SIZE - SECTOR);
        let length = length.min(SIZE - offset);
        match random.below(20) {
            0..7 => Self::Write { offset, length },
            7 => Self::WriteThrough { offset, length },
            8..10 => Self::Zero { offset, length, allocate: random.one_in(2) },
            10..12 => Self::Trim { offset, length },
            12 => Self::Read { offset },
            13 if random.one_in(4) => Self::Snapshot,
            14 if random.one_in(4) => Self::Close,
            15 if random.one_in(8) => Self::Burst,
            16 => Self::Allocate { offset, length },
            _ => Self::Flush,
        }
    }
}

/// Every script of so many operations on blocks around the edges of sectors, words, bitmap sectors,
/// groups and the device; `None` behind the last.
pub fn enumerated(length: u32, number: usize) -> Option<Vec<Op>> {
    let [group, sector, word, end] = [32511 * PAGE, 4063 * PAGE, 63 * PAGE, SIZE - SECTOR];
    let alphabet = [
        Op::Write { offset: group, length: 2 * PAGE },
        Op::Write { offset: sector, length: 2 * PAGE },
        Op::Write { offset: word, length: 2 * PAGE },
        Op::Write { offset: 0, length: PAGE },
        Op::Write { offset: group + PAGE - SECTOR, length: 2 * SECTOR },
        Op::Write { offset: 3 * SECTOR, length: SECTOR },
        Op::Write { offset: 1000, length: 100 },
        Op::Write { offset: end, length: SECTOR },
        Op::WriteThrough { offset: 0, length: PAGE },
        Op::WriteThrough { offset: group + PAGE - SECTOR, length: 2 * SECTOR },
        Op::Zero { offset: group, length: 2 * PAGE, allocate: false },
        Op::Zero { offset: 0, length: PAGE, allocate: true },
        Op::Zero { offset: word + PAGE / 2, length: PAGE, allocate: false },
        Op::Trim { offset: sector, length: 2 * PAGE },
        Op::Trim { offset: 0, length: PAGE },
        Op::Allocate { offset: word, length: 2 * PAGE },
        Op::Flush,
        Op::Snapshot,
        Op::Close,
    ];
    let count = alphabet.len();
    (number < count.pow(length)).then(|| {
        (0..length).map(|place| alphabet[number / count.pow(place) % count].clone()).collect()
    })
}

/// Up to 24 operations of one client.
pub fn several(random: &mut Random, aligned: bool) -> Vec<Op> {
    (0..1 + random.below(24)).map(|_| Op::random(random, aligned, &BLOCKS)).collect()
}

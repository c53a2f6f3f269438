//! Operations on a chain as an input: eight bytes each.

/// One group, and a bit of a second one that doesn't end at a block.
pub const SIZE: u64 = GROUP + 40 * BLOCK + 512;
const BLOCK: u64 = 4096;
const GROUP: u64 = 127 << 20;
/// Places where something changes: words, sectors of the bitmap page, groups, ends.
const EDGES: [u64; 8] =
    [0, 256 << 10, 4064 * BLOCK, GROUP, SIZE, GROUP / 2, 9000 * BLOCK, SIZE - 512];

/// What to do.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    Write {
        offset: u64,
        length: u64,
        fill: u8,
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
    Read {
        offset: u64,
        length: u64,
    },
    Flush,
    Snapshot,
    Resize {
        size: u64,
    },
    Reopen,
    /// Drop the chain without closing it, after a flush; recovery must bring all back.
    Kill,
}

/// The operations that an input describes, at most `limit`.
pub fn decode(input: &[u8], limit: usize) -> impl Iterator<Item = Operation> + '_ {
    input.chunks_exact(8).take(limit).map(|bytes| {
        let [kind, edge, blocks, fill, delta @ .., low, high] = bytes else { unreachable!() };
        let delta = i64::from(i16::from_le_bytes([delta[0], delta[1]]) % 700);
        let blocks = i64::from(*blocks as i8) * BLOCK as i64;
        let offset = EDGES[usize::from(edge % 8)].saturating_add_signed(blocks + delta);
        let length = match u64::from(u16::from_le_bytes([*low, *high])) {
            // More than a record holds, at most.
            blocks @ 0xff00.. => (blocks - 0xff00) * 2 * BLOCK,
            bytes => bytes,
        };
        match kind % 24 {
            0..8 => Operation::Write { offset, length, fill: *fill | 1 },
            8..10 => Operation::Zero { offset, length, allocate: fill & 1 == 1 },
            10..13 => Operation::Trim { offset, length },
            13..15 => Operation::Read { offset, length },
            15..19 => Operation::Flush,
            19 => Operation::Snapshot,
            20 => Operation::Resize { size: (offset / 512 * 512).clamp(512, 2 * SIZE) },
            21 => Operation::Reopen,
            _ => Operation::Kill,
        }
    })
}

//! Where things stand in a live layer file (`format-spec.md`, "Live layout").

use crate::types::{
    BLOCK_SIZE, Block, FileOffset, GROUP_BLOCKS, GROUP_BYTES, Group, SECTOR_SIZE, WORD_BYTES, Word,
};

/// The two header slots.
pub const SLOT_OFFSETS: [FileOffset; 2] = [FileOffset(0), FileOffset(64 << 10)];
/// Start of the journal ring.
pub const JOURNAL_OFFSET: FileOffset = FileOffset(1 << 20);
/// Records in the ring.
pub const JOURNAL_RECORDS: u64 = 256;
/// Start of the first group.
pub const GROUPS_OFFSET: FileOffset = FileOffset(2 << 20);
/// Distance between the starts of two groups.
pub const GROUP_STRIDE: u64 = 128 << 20;
/// Distance from a group's start, where its bitmap page stands, to its first block.
pub const GROUP_SLOT_SIZE: u64 = 1 << 20;
/// Largest virtual size; keeps every file offset far below 2^63.
pub const MAX_VIRTUAL_SIZE: u64 = 1 << 56;

const _: () = assert!(GROUP_SLOT_SIZE + GROUP_BYTES == GROUP_STRIDE);

/// Whether `size` may be a virtual size: a positive multiple of 512 bytes up to
/// [`MAX_VIRTUAL_SIZE`].
pub fn is_virtual_size(size: u64) -> bool {
    size != 0 && size.is_multiple_of(SECTOR_SIZE) && size <= MAX_VIRTUAL_SIZE
}

/// Blocks that a virtual size takes; the last one may be partly beyond it.
pub fn block_count(virtual_size: u64) -> u64 {
    virtual_size.div_ceil(BLOCK_SIZE)
}

/// Groups that a virtual size takes.
pub fn group_count(virtual_size: u64) -> u64 {
    block_count(virtual_size).div_ceil(GROUP_BLOCKS)
}

/// The exact length of a layer file.
pub fn file_length(virtual_size: u64) -> u64 {
    let last = Block(block_count(virtual_size) - 1);
    block_offset(last).0 + BLOCK_SIZE
}

/// Where the record with this sequence number stands.
pub fn record_offset(sequence: u64) -> FileOffset {
    FileOffset(JOURNAL_OFFSET.0 + sequence % JOURNAL_RECORDS * BLOCK_SIZE)
}

/// Where a group's bitmap page stands.
pub fn bitmap_offset(group: Group) -> FileOffset {
    FileOffset(GROUPS_OFFSET.0 + group.0 * GROUP_STRIDE)
}

/// Where a word's first block stands; the other 63 follow.
pub fn word_offset(word: Word) -> FileOffset {
    let index = word.index() as u64;
    FileOffset(bitmap_offset(word.group()).0 + GROUP_SLOT_SIZE + index * WORD_BYTES)
}

/// Where a block stands.
pub fn block_offset(block: Block) -> FileOffset {
    let word = block.word();
    FileOffset(word_offset(word).0 + (block.0 - word.block(0).0) * BLOCK_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_stand_where_the_spec_says() {
        assert_eq!(block_offset(Block(0)).0, 3 << 20);
        assert_eq!(block_offset(Block(32511)).0, (130 << 20) - 4096);
        assert_eq!(block_offset(Block(32512)).0, 131 << 20);
        assert_eq!(bitmap_offset(Group(1)).0, 130 << 20);
        assert_eq!(file_length(512), (3 << 20) + 4096);
        assert_eq!(file_length(GROUP_BYTES), 130 << 20);
        assert_eq!(file_length(GROUP_BYTES + 1), (131 << 20) + 4096);
        assert!(file_length(MAX_VIRTUAL_SIZE) < i64::MAX as u64);
    }
}

//! Sets of blocks on their way to being durably owned.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::{Group, Word};

/// A set of blocks, one entry a word, so that a long sequential write costs little.
#[derive(Clone, Debug, Default)]
pub(super) struct BlockSet {
    words: BTreeMap<Word, u64>,
    blocks: usize,
}

impl BlockSet {
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Number of words with a block: what the set costs in memory.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    pub fn insert(&mut self, word: Word, mask: u64) {
        if mask != 0 {
            let entry = self.words.entry(word).or_default();
            self.blocks += (mask & !*entry).count_ones() as usize;
            *entry |= mask;
        }
    }

    pub fn remove(&mut self, word: Word, mask: u64) {
        if let Some(entry) = self.words.get_mut(&word) {
            self.blocks -= (mask & *entry).count_ones() as usize;
            *entry &= !mask;
            if *entry == 0 {
                self.words.remove(&word);
            }
        }
    }

    /// Takes all of `other` in.
    pub fn append(&mut self, other: Self) {
        if self.is_empty() {
            *self = other;
        } else {
            other.iter().for_each(|(word, mask)| self.insert(word, mask));
        }
    }

    pub fn meets(&self, word: Word, mask: u64) -> bool {
        self.words.get(&word).is_some_and(|entry| entry & mask != 0)
    }

    pub fn iter(&self) -> impl Iterator<Item = (Word, u64)> + '_ {
        self.words.iter().map(|(&word, &mask)| (word, mask))
    }

    /// The blocks of one group.
    pub fn in_group(&self, group: Group) -> impl Iterator<Item = (Word, u64)> + '_ {
        let range = group.first_word()..Group(group.0 + 1).first_word();
        self.words.range(range).map(|(&word, &mask)| (word, mask))
    }

    pub fn groups(&self) -> BTreeSet<Group> {
        self.words.keys().map(|word| word.group()).collect()
    }
}

/// Where the blocks of a layer stand that are not yet settled. A block that is owned and in no set
/// is settled for ever: it may be overwritten in place without a lock.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Owned in memory alone; may be overwritten under its stripe lock.
    pub fresh: BlockSet,
    /// Taken by a checkpoint that has not finished; as fresh, but part of that checkpoint.
    pub syncing: BlockSet,
    /// Named by the record on its way or by the last durable one: must stay as they are.
    pub unconfirmed: BlockSet,
    /// Groups whose page on disk lacks bits that the journal has.
    pub dirty: BTreeSet<Group>,
}

/// What a writer must mind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Settled,
    /// Hold the stripe lock.
    Fresh,
    /// Wait for the next commit.
    Unconfirmed,
}

impl Pending {
    /// The strictest standing of the blocks in `mask`.
    pub fn standing(&self, word: Word, mask: u64) -> Standing {
        if self.unconfirmed.meets(word, mask) {
            Standing::Unconfirmed
        } else if self.fresh.meets(word, mask) || self.syncing.meets(word, mask) {
            Standing::Fresh
        } else {
            Standing::Settled
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_counts_its_blocks_and_lists_them_in_order() {
        let mut set = BlockSet::default();
        set.insert(Word(508), 0b101);
        set.insert(Word(1), 1 << 63);
        set.insert(Word(508), 0b100);
        set.insert(Word(2), 0);
        assert_eq!((set.len(), set.words()), (3, 2));
        assert_eq!(set.iter().collect::<Vec<_>>(), [(Word(1), 1 << 63), (Word(508), 0b101)]);
        assert_eq!(set.in_group(Group(1)).collect::<Vec<_>>(), [(Word(508), 0b101)]);
        set.remove(Word(508), 0b111);
        assert!(!set.meets(Word(508), u64::MAX));
        assert_eq!((set.len(), set.words()), (1, 1));
    }

    #[test]
    fn what_is_removed_or_taken_in_twice_counts_once() {
        let mut set = BlockSet::default();
        assert!(set.is_empty());
        set.insert(Word(7), 0b11111);
        // Some that are there, some that are not, and a word that is not there at all.
        set.remove(Word(7), 0b110110);
        set.remove(Word(8), 0b1);
        assert_eq!(set.iter().collect::<Vec<_>>(), [(Word(7), 0b1001)]);
        assert_eq!((set.len(), set.words(), set.is_empty()), (2, 1, false));
        let mut other = BlockSet::default();
        other.insert(Word(7), 0b11);
        other.insert(Word(600), 0b1);
        set.append(other);
        assert_eq!(set.iter().collect::<Vec<_>>(), [(Word(7), 0b1011), (Word(600), 1)]);
        assert_eq!((set.len(), set.words()), (4, 2));
        assert_eq!(set.groups(), BTreeSet::from([Group(0), Group(1)]));
    }

    #[test]
    fn the_strictest_standing_counts() {
        let mut pending = Pending::default();
        pending.fresh.insert(Word(1), 0b0011);
        pending.syncing.insert(Word(1), 0b0100);
        pending.unconfirmed.insert(Word(1), 0b0001);
        let standing = |mask| pending.standing(Word(1), mask);
        assert_eq!(standing(0b1000), Standing::Settled);
        assert_eq!(standing(0b0110), Standing::Fresh);
        assert_eq!(standing(0b0100), Standing::Fresh);
        assert_eq!(standing(0b0010), Standing::Fresh);
        assert_eq!(standing(0b0101), Standing::Unconfirmed);
    }
}

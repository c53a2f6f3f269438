//! The owner map of a stack: for each block the layer that answers for it, so that a read costs the
//! same at any depth. Built a group at a time, on first touch, and common to all children.

use super::layer::Layer;
use crate::types::{BLOCK_SIZE, GROUP_WORDS, Group, WORD_BLOCKS, Word, runs, touched};
use crate::wait::{Attempt, Wait};

/// A layer's place in its stack, newest first.
pub(super) type Place = u16;
/// No layer owns the block.
pub(super) const NOBODY: Place = 0x7fff;
/// Marks a word whose blocks have several owners; the rest is an index into `mixed`.
const MIXED: u16 = 0x8000;

type MixedWord = [Place; WORD_BLOCKS as usize];

/// The owners of one group's blocks.
#[derive(Debug)]
pub(super) enum GroupOwners {
    /// Nobody owns a block.
    Empty,
    /// An owner, or a mixed word, for each word.
    Words { words: Box<[u16; GROUP_WORDS as usize]>, mixed: Vec<MixedWord> },
}

/// The owners of one word's blocks.
#[derive(Clone, Copy, Debug)]
pub(super) enum WordOwners<'a> {
    One(Place),
    Mixed(&'a MixedWord),
}

impl GroupOwners {
    /// Asks the layers newest-first. `clips[i]` is how many bytes of layer `i` show.
    pub fn build<'a>(
        group: Group,
        layers: impl Iterator<Item = &'a Layer>,
        clips: &[u64],
        wait: Wait,
    ) -> Attempt<Self> {
        let mut words = Box::new([NOBODY; GROUP_WORDS as usize]);
        let mut mixed: Vec<MixedWord> = Vec::new();
        let mut open = Box::new([u64::MAX; GROUP_WORDS as usize]);
        for (owner, (layer, &clip)) in (0..).zip(layers.zip(clips)) {
            // A layer that ends before the group has no page for it.
            if clip <= group.first_word().guest_offset() {
                break;
            }
            let Some(bits) = layer.bits(group, wait)? else { continue };
            for (index, &bits) in bits.iter().enumerate() {
                let shown = shown(Word(group.first_word().0 + index as u64), clip);
                let taken = bits & open[index] & shown;
                if taken == 0 {
                    continue;
                }
                open[index] &= !taken;
                if taken == u64::MAX {
                    words[index] = owner;
                    continue;
                }
                if words[index] & MIXED == 0 {
                    mixed.push([words[index]; WORD_BLOCKS as usize]);
                    words[index] = MIXED | (mixed.len() - 1) as u16;
                }
                let owners = &mut mixed[usize::from(words[index] & !MIXED)];
                for (first, end) in runs(taken) {
                    owners[first as usize..end as usize].fill(owner);
                }
            }
        }
        let empty = words.iter().all(|&word| word == NOBODY);
        Ok(if empty { Self::Empty } else { Self::Words { words, mixed } })
    }

    pub fn word(&self, word: Word) -> WordOwners<'_> {
        match self {
            Self::Empty => WordOwners::One(NOBODY),
            Self::Words { words, mixed } => match words[word.index()] {
                entry if entry & MIXED != 0 => {
                    WordOwners::Mixed(&mixed[usize::from(entry & !MIXED)])
                }
                owner => WordOwners::One(owner),
            },
        }
    }
}

/// The blocks of a word that show at least one byte where `clip` bytes of the device show.
pub(crate) fn shown(word: Word, clip: u64) -> u64 {
    let start = word.guest_offset();
    let bytes = clip.saturating_sub(start).min(WORD_BLOCKS * BLOCK_SIZE);
    touched(0, bytes)
}

impl WordOwners<'_> {
    /// The blocks that somebody owns.
    pub fn owned(self) -> u64 {
        match self {
            Self::One(NOBODY) => 0,
            Self::One(_) => u64::MAX,
            Self::Mixed(owners) => owners
                .iter()
                .enumerate()
                .fold(0, |mask, (bit, &owner)| mask | u64::from(owner != NOBODY) << bit),
        }
    }

    /// The owner of block `first`, and the first block behind it, `end` at most, that has another.
    pub fn run(self, first: u32, end: u32) -> (Place, u32) {
        match self {
            Self::One(owner) => (owner, end),
            Self::Mixed(owners) => {
                let owner = owners[first as usize];
                let other = owners[first as usize..end as usize].iter().position(|o| *o != owner);
                (owner, other.map_or(end, |other| first + other as u32))
            }
        }
    }
}

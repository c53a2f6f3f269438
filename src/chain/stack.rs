//! The sealed layers of a chain: many layers that read as one, whatever their number.

use std::sync::Arc;

use super::layer::Layer;
use super::layers::Found;
use super::owners::{GroupOwners, NOBODY, Owner, WordOwners, shown};
use crate::error::Result;
use crate::format::geometry::group_count;
use crate::live::{Under, words};
use crate::storage::Wait;
use crate::sync::LazyTable;
use crate::types::{BLOCK_SIZE, Word};

/// Sealed layers, newest first, with their owner map.
#[derive(Debug)]
pub struct Stack {
    layers: Vec<Arc<Found>>,
    /// How many bytes of each layer show: the least visible parent size of those above it.
    clips: Vec<u64>,
    owners: LazyTable<GroupOwners>,
}

impl Stack {
    /// A stack of at least one layer. Each layer's parent is the next one.
    pub(super) fn new(layers: Vec<Arc<Found>>) -> Self {
        let size = layers.first().map_or(0, |layer| layer.layer.virtual_size());
        let clips = layers
            .iter()
            .scan(size, |clip, layer| {
                let shows = *clip;
                *clip = shows.min(layer.layer.visible_parent_size());
                Some(shows)
            })
            .collect();
        Self { layers, clips, owners: LazyTable::new(group_count(size)) }
    }

    /// The layers, newest first.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = &Layer> {
        self.layers.iter().map(|found| &found.layer)
    }

    pub(super) fn found(&self) -> &[Arc<Found>] {
        &self.layers
    }

    /// Size of the newest layer's device.
    pub fn virtual_size(&self) -> u64 {
        self.clips[0]
    }

    fn owners(&self, word: Word) -> Result<WordOwners<'_>> {
        let group = word.group();
        let owners = self
            .owners
            .get_or_try_make(group.0, || GroupOwners::build(group, self.layers(), &self.clips))?;
        Ok(owners.word(word))
    }
}

/// A stack as the layer above it sees it: `clip` bytes of it show, zeros beyond. Without a stack
/// all is zeros.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    pub stack: Option<&'a Stack>,
    pub clip: u64,
}

/// A run of bytes of one word with one owner below.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a> {
    /// First byte, counted from the word's start.
    pub from: u64,
    /// End, likewise.
    pub to: u64,
    /// The owner's place in the stack and the layer, or nobody: zeros.
    pub owner: Option<(Owner, &'a Layer)>,
}

impl<'a> View<'a> {
    fn owners(&self, word: Word) -> Result<WordOwners<'a>> {
        match self.stack {
            Some(stack) if word.guest_offset() < self.clip => stack.owners(word),
            _ => Ok(WordOwners::One(NOBODY)),
        }
    }

    /// Cuts bytes `from..to` of a word into runs and hands them to `visit` in order, for as long as
    /// it answers true; false if it did not.
    pub fn runs(
        &self,
        word: Word,
        from: u64,
        to: u64,
        mut visit: impl FnMut(Run<'a>) -> Result<bool>,
    ) -> Result<bool> {
        let blocks = ((from / BLOCK_SIZE) as u32, to.div_ceil(BLOCK_SIZE) as u32);
        for (first, end, owner) in self.owners(word)?.runs(blocks.0, blocks.1) {
            let from = from.max(u64::from(first) * BLOCK_SIZE);
            let to = to.min(u64::from(end) * BLOCK_SIZE);
            let (layer, clip) = match self.stack {
                Some(stack) if owner != NOBODY => {
                    let place = usize::from(owner);
                    (Some((owner, &stack.layers[place].layer)), stack.clips[place].min(self.clip))
                }
                _ => (None, 0),
            };
            let cut = clip.saturating_sub(word.guest_offset()).clamp(from, to);
            if cut > from && !visit(Run { from, to: cut, owner: layer })? {
                return Ok(false);
            }
            if cut < to && !visit(Run { from: cut, to, owner: None })? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fills `buf` from byte `from` of a word; false as in [`Under::read`].
    pub fn read_word(&self, word: Word, from: u64, buf: &mut [u8], wait: Wait) -> Result<bool> {
        let to = from + buf.len() as u64;
        self.runs(word, from, to, |run| {
            let part = &mut buf[(run.from - from) as usize..(run.to - from) as usize];
            match run.owner {
                Some((_, layer)) => layer.read(word, run.from, part, wait),
                None => {
                    part.fill(0);
                    Ok(true)
                }
            }
        })
    }
}

impl Under for View<'_> {
    fn owned(&self, word: Word) -> Result<u64> {
        Ok(self.owners(word)?.owned() & shown(word, self.clip))
    }

    fn read(&self, offset: u64, buf: &mut [u8], wait: Wait) -> Result<bool> {
        let mut rest = buf;
        for (word, from, to) in words(offset, rest.len() as u64) {
            let (part, after) = rest.split_at_mut((to - from) as usize);
            if !self.read_word(word, from, part, wait)? {
                return Ok(false);
            }
            rest = after;
        }
        Ok(true)
    }
}

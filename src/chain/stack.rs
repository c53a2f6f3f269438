//! The sealed layers of a chain: many layers that read as one, whatever their number.

use std::sync::Arc;

use super::gate::Found;
use super::layer::Layer;
use super::owners::{GroupOwners, WordOwners, shown};
use super::walk::Walk;
use crate::format::geometry::group_count;
use crate::live::Under;
use crate::memory::Scatter;
use crate::sync::LazyTable;
use crate::types::Word;
use crate::wait::{Attempt, Wait};

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

    /// The layer at a place, and how many bytes of it show.
    pub(super) fn layer(&self, place: usize) -> (&Layer, u64) {
        (&self.layers[place].layer, self.clips[place])
    }

    /// Who owns the blocks of a word.
    pub(super) fn owners(&self, word: Word, wait: Wait) -> Attempt<WordOwners<'_>> {
        let group = word.group();
        let build = || GroupOwners::build(group, self.layers(), &self.clips, wait);
        Ok(self.owners.get(group.0, build)?.word(word))
    }
}

/// A stack as the layer above it sees it: `clip` bytes of it show, zeros beyond. Without a stack
/// all is zeros.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    pub stack: Option<&'a Stack>,
    pub clip: u64,
}

impl Under for View<'_> {
    fn owned(&self, word: Word, wait: Wait) -> Attempt<u64> {
        match self.stack {
            Some(stack) if word.guest_offset() < self.clip => {
                Ok(stack.owners(word, wait)?.owned() & shown(word, self.clip))
            }
            _ => Ok(0),
        }
    }

    fn read(&self, offset: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        Walk::new(None, *self, offset, into.len() as u64, wait).read(into)
    }
}

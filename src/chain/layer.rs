//! A sealed layer of either layout, as the stack sees it.

use std::path::Path;
use std::sync::Arc;

use crate::error::Result;
use crate::format::bitmap::Bits;
use crate::format::geometry::word_offset;
use crate::format::header::ParentLink;
use crate::live::Sealed;
use crate::memory::Scatter;
use crate::packed::Packed;
use crate::storage::{Storage, failed};
use crate::types::{Group, Identity, Word};
use crate::wait::{Attempt, Wait};

/// A layer that is only read.
#[derive(Debug)]
pub enum Layer {
    /// Live layout: frozen, or not written while it is open.
    Live(Sealed),
    /// Packed layout.
    Packed(Packed),
}

impl Layer {
    /// Opens a layer of whichever layout the file begins with, under a shared lock.
    ///
    /// # Errors
    /// Those of [`Sealed::open`] and [`Packed::open`].
    pub fn open(file: Arc<dyn Storage>) -> Result<Self> {
        if Packed::is_packed(&*file)? {
            return Packed::open(file).map(Self::Packed);
        }
        Sealed::open(file).map(Self::Live)
    }

    /// The identity that children link to; none for a layer that is not frozen.
    pub fn identity(&self) -> Option<Identity> {
        match self {
            Self::Live(layer) => layer.header().identity(),
            Self::Packed(layer) => Some(layer.identity()),
        }
    }

    /// Size of the device in bytes.
    pub fn virtual_size(&self) -> u64 {
        match self {
            Self::Live(layer) => layer.header().virtual_size,
            Self::Packed(layer) => layer.header().virtual_size,
        }
    }

    /// How many bytes of the parent show.
    pub fn visible_parent_size(&self) -> u64 {
        match self {
            Self::Live(layer) => layer.header().visible_parent_size,
            Self::Packed(layer) => layer.header().visible_parent_size,
        }
    }

    /// The layer below.
    pub fn parent(&self) -> Option<&ParentLink> {
        match self {
            Self::Live(layer) => layer.header().parent.as_ref(),
            Self::Packed(layer) => layer.parent(),
        }
    }

    /// The file; none for a layer that is far away.
    pub(super) fn file(&self) -> Option<&dyn Storage> {
        match self {
            Self::Live(layer) => Some(layer.file()),
            Self::Packed(layer) => layer.file(),
        }
    }

    /// What the layer is called in messages: its file, or where it comes from.
    pub fn path(&self) -> &Path {
        match self {
            Self::Live(layer) => layer.file().path(),
            Self::Packed(layer) => layer.path(),
        }
    }

    /// The owned blocks of a group; `None` where there are none.
    pub fn bits(&self, group: Group, wait: Wait) -> Attempt<Option<Box<Bits>>> {
        match self {
            Self::Live(layer) => layer.bits(group, wait),
            Self::Packed(layer) => layer.bits(group, wait),
        }
    }

    /// The first group at or after `from` that may own a block.
    pub fn next_group(&self, from: Group) -> Result<Option<Group>> {
        match self {
            Self::Live(layer) => layer.next_group(from),
            Self::Packed(layer) => Ok(layer.next_group(from)),
        }
    }

    /// Reads owned bytes, `from` counted from the word's start.
    pub fn read(&self, word: Word, from: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        match self {
            Self::Live(layer) => layer.read(word, from, into, wait),
            Self::Packed(layer) => layer.read(word, from, into, wait),
        }
    }
}

/// Starts to read blocks of a live layer's file into the page cache.
pub(super) fn prefetch(file: &dyn Storage, word: Word, from: u64, length: u64) -> Result<()> {
    let at = word_offset(word).0 + from;
    file.prefetch(at, length).map_err(failed(file, "prefetching", at))
}

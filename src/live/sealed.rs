//! A layer that is only read: a frozen one, or one that nobody writes while it is open.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::pages::{first_unused_group, next_group, read_page};
use super::recover::recover;
use crate::error::Result;
use crate::format::bitmap::Bits;
use crate::format::geometry::{file_length, word_offset};
use crate::format::header::{Header, State};
use crate::live::slots::newest_header;
use crate::memory::Scatter;
use crate::storage::{Lock, Storage, failed, read_blocks, take_lock};
use crate::types::{Group, Word};
use crate::wait::{Attempt, Wait};

/// A layer open for reading, under a shared lock. The file is not changed, not even where it was
/// not closed cleanly: then the journal is replayed in memory.
#[derive(Debug)]
pub struct Sealed {
    file: Arc<dyn Storage>,
    header: Header,
    /// Whole bitmaps of the groups that the journal speaks of.
    replayed: BTreeMap<Group, Box<Bits>>,
    /// From this group on the file holds nothing.
    unused: Group,
}

impl Sealed {
    /// Opens a layer.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::InUse`] where somebody writes it; `NotAnImage`, `Corrupt`,
    /// `Unsupported`, `Loss`; host errors.
    pub fn open(file: Arc<dyn Storage>) -> Result<Self> {
        take_lock(&*file, Lock::Shared)?;
        let header = newest_header(&*file)?;
        if header.state == State::InUse {
            // What a killed writer left in the page cache counts only once it is on the disk.
            file.sync_data().map_err(failed(&*file, "syncing a layer that was not closed", 0))?;
            file.drop_cache(0, file_length(header.virtual_size)).map_err(failed(
                &*file,
                "dropping cached pages",
                0,
            ))?;
        }
        let replayed = recover(&*file, &header)?.bits;
        let unused = first_unused_group(&*file)?;
        Ok(Self { file, header, replayed, unused })
    }

    /// The layer of a file that this process has just frozen, and holds.
    pub(super) fn frozen(file: Arc<dyn Storage>, header: Header) -> Result<Self> {
        let unused = first_unused_group(&*file)?;
        Ok(Self { file, header, replayed: BTreeMap::new(), unused })
    }

    /// The header that counts.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file below.
    pub fn file(&self) -> &dyn Storage {
        &*self.file
    }

    /// The owned blocks of a group; `None` where there are none.
    pub fn bits(&self, group: Group, wait: Wait) -> Attempt<Option<Box<Bits>>> {
        match self.replayed.get(&group) {
            Some(bits) => Ok(Some(bits.clone())),
            None if group >= self.unused => Ok(None),
            None => read_page(&*self.file, self.header.uuid, group, wait),
        }
    }

    /// The first group at or after `from` that may own a block.
    pub fn next_group(&self, from: Group) -> Result<Option<Group>> {
        let replayed = self.replayed.range(from..).next().map(|(&group, _)| group);
        let stored = next_group(&*self.file, from)?;
        Ok(replayed.into_iter().chain(stored).min())
    }

    /// Reads owned bytes, `from` counted from the word's start.
    pub fn read(&self, word: Word, from: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        read_blocks(&*self.file, word_offset(word).0 + from, into, wait)
    }
}

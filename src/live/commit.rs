//! Commits: making what was written durable with one sync (`format-spec.md`, "Durability").

use super::pages::{Page, write_page};
use super::pending::BlockSet;
use super::writable::Writable;
use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::word_offset;
use crate::format::header::Header;
use crate::format::journal::{Entry, RECORD_CAPACITY, Record};
use crate::live::journal::Journal;
use crate::planted::{Bug, planted};
use crate::storage::{failed, read_exact_at};
use crate::sync::guard;
use crate::types::{BLOCK_SIZE, Word, runs};

/// What a commit has to do.
enum Plan {
    Sync,
    /// A record of these blocks.
    Record(BlockSet),
    Checkpoint,
}

impl Writable {
    /// Returns once every write, zero and trim that completed before this call survives a power
    /// loss.
    ///
    /// # Errors
    /// [`ErrorKind::Poisoned`] after a sync failed, now or earlier; [`ErrorKind::NoSpace`], after
    /// which it may be tried again; host errors.
    pub fn flush(&self) -> Result<()> {
        self.turn.join(false, |confirm| self.commit(confirm))
    }

    /// Returns once the blocks of the last record may be overwritten.
    pub(super) fn confirm(&self) -> Result<()> {
        self.turn.join(true, |confirm| self.commit(confirm))
    }

    /// Fails once a sync has failed: then nothing is known about the file.
    pub(super) fn check_poison(&self) -> Result<()> {
        match self.poison.get() {
            None => Ok(()),
            Some(cause) => Err(self.poisoned(cause)),
        }
    }

    fn poisoned(&self, cause: &Error) -> Error {
        let detail = format!("closed to writing since a failure ({cause})");
        Error::new(ErrorKind::Poisoned, detail).in_file(self.file.path())
    }

    /// The one way to sync. A failure poisons the layer before anybody is answered, and is never
    /// retried: the kernel may have dropped the pages it could not write.
    pub(super) fn sync(&self) -> Result<()> {
        self.check_poison()?;
        let mut result = self.file.sync_data();
        if planted(Bug::FailedSyncRetried) && result.is_err() {
            result = self.file.sync_data();
        }
        result.map_err(|error| {
            let error = failed(&*self.file, "syncing", 0)(error);
            if planted(Bug::FailedSyncForgotten) {
                return error;
            }
            self.poisoned(self.poison.get_or_init(|| error))
        })
    }

    /// Runs one commit. The turn sees to it that there is one at a time.
    fn commit(&self, confirm: bool) -> Result<()> {
        self.check_poison()?;
        let mut journal = guard(&self.journal);
        match self.plan(&journal, confirm) {
            Plan::Sync => self.sync(),
            Plan::Record(fresh) => match self.append(&mut journal, fresh) {
                // The bitmap pages have theirs.
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    self.make_checkpoint(&mut journal)
                }
                done => done,
            },
            Plan::Checkpoint => self.make_checkpoint(&mut journal),
        }
    }

    /// A checkpoint, after which the ring has room.
    fn make_checkpoint(&self, journal: &mut Journal) -> Result<()> {
        self.checkpoint()?;
        if journal.has_room() { Ok(()) } else { self.move_tail(journal, |_| {}) }
    }

    fn plan(&self, journal: &Journal, confirm: bool) -> Plan {
        let pending = guard(&self.pending);
        let wanted = confirm && !pending.unconfirmed.is_empty();
        if !pending.syncing.is_empty() || pending.fresh.len() > RECORD_CAPACITY {
            Plan::Checkpoint
        } else if pending.fresh.is_empty() && !wanted {
            Plan::Sync
        } else if journal.has_room() {
            Plan::Record(pending.fresh.clone())
        } else {
            Plan::Checkpoint
        }
    }

    /// Data and record in one sync. On an error before the sync the blocks are fresh again and the
    /// next commit writes the same place of the ring.
    fn append(&self, journal: &mut Journal, blocks: BlockSet) -> Result<()> {
        self.capture(&blocks);
        let written = self.entries(&blocks).and_then(|entries| {
            let record = Record { epoch: journal.epoch, sequence: journal.next, entries };
            journal.write(&*self.file, self.uuid, &record)
        });
        if let Err(error) = written {
            let mut pending = guard(&self.pending);
            blocks.iter().for_each(|(word, mask)| pending.unconfirmed.remove(word, mask));
            if !planted(Bug::FailedRecordKeepsItsBlocks) {
                pending.fresh.append(blocks);
            }
            return Err(error);
        }
        if !planted(Bug::RecordNotSynced) {
            self.sync()?;
        }
        journal.advance();
        let mut pending = guard(&self.pending);
        pending.dirty.extend(blocks.groups());
        pending.unconfirmed = blocks;
        Ok(())
    }

    /// Moves fresh blocks to *unconfirmed*, each word under its stripe lock, so that no write to them
    /// is under way afterwards and none begins.
    fn capture(&self, blocks: &BlockSet) {
        for (word, mask) in blocks.iter() {
            let _stripe = (!planted(Bug::ChecksumWithoutLock)).then(|| guard(self.stripe(word)));
            let mut pending = guard(&self.pending);
            pending.fresh.remove(word, mask);
            pending.unconfirmed.insert(word, mask);
        }
    }

    fn entries(&self, blocks: &BlockSet) -> Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(blocks.len());
        let mut content = Vec::new();
        for (word, mask) in blocks.iter() {
            for (first, end) in runs(mask) {
                content.resize((end - first) as usize * BLOCK_SIZE as usize, 0);
                let offset = word_offset(word).0 + u64::from(first) * BLOCK_SIZE;
                read_exact_at(&*self.file, &mut content, offset).map_err(failed(
                    &*self.file,
                    "reading blocks to commit",
                    offset,
                ))?;
                let parts = content.chunks_exact(BLOCK_SIZE as usize);
                entries.extend((first..end).zip(parts).map(|(bit, part)| Entry {
                    block: word.block(bit),
                    crc: crc32fast::hash(part),
                }));
            }
        }
        Ok(entries)
    }

    /// Makes everything that is fresh when it begins durable through the bitmap pages. On an error
    /// the blocks stay in *syncing*, and the next commit is a checkpoint too.
    fn checkpoint(&self) -> Result<()> {
        {
            let mut pending = guard(&self.pending);
            let fresh = std::mem::take(&mut pending.fresh);
            pending.syncing.append(fresh);
        }
        if !planted(Bug::BitBeforeItsData) {
            self.sync()?;
        }
        let groups = {
            let pending = guard(&self.pending);
            &pending.dirty | &pending.syncing.groups()
        };
        if groups.is_empty() {
            return Ok(());
        }
        for group in groups {
            let mut bits = self.page(group)?.copy();
            // The copy comes first: every bit in it is in the fresh set too if its data is newer
            // than the sync above.
            for (word, mask) in guard(&self.pending).fresh.in_group(group) {
                if !planted(Bug::FreshBitInCheckpoint) {
                    bits[word.index()] &= !mask;
                }
            }
            write_page(&*self.file, self.uuid, group, &bits)?;
        }
        self.sync()?;
        let mut pending = guard(&self.pending);
        pending.syncing = BlockSet::default();
        pending.unconfirmed = BlockSet::default();
        pending.dirty.clear();
        Ok(())
    }

    /// Frees the ring after a checkpoint: its places may be used again once the header is durable.
    fn move_tail(&self, journal: &mut Journal, change: impl FnOnce(&mut Header)) -> Result<()> {
        let tail = journal.new_tail();
        self.write_header(|header| {
            if !planted(Bug::RingPlaceReusedEarly) {
                header.journal_tail = tail;
            }
            change(header);
        })?;
        journal.move_tail(tail);
        Ok(())
    }

    /// A checkpoint that leaves nothing in the journal, and a change of the header with it.
    pub(super) fn settle(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.check_poison()?;
        let mut journal = guard(&self.journal);
        self.checkpoint()?;
        self.move_tail(&mut journal, change)
    }

    /// Records that blocks became owned. The caller holds the word's stripe lock, and their data is
    /// written. The bit comes last: whoever sees it finds the block in the set.
    pub(super) fn own(&self, page: &Page, word: Word, mask: u64) {
        if let Some(kept) = &self.kept
            && mask != 0
        {
            kept.mark(word, mask);
        }
        guard(&self.pending).fresh.insert(word, mask);
        page.set(word, mask);
    }
}

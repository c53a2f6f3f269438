//! The top layer, open for writing: its life from open to close, freeze and resize.

use std::sync::{Arc, OnceLock};

use super::create::random;
use super::journal::Journal;
use super::keeper::{FreshMap, Keeper, Kept};
use super::pages::{Page, Pages, first_unused_group, write_page};
use super::pending::Pending;
use super::recover::{Recovered, recover};
use super::sealed::Sealed;
use super::slots::Slots;
use super::turn::Turn;
use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::{
    JOURNAL_OFFSET, JOURNAL_RECORDS, block_offset, file_length, group_count, is_virtual_size,
    word_offset,
};
use crate::format::header::{Header, ParentLink, State};
use crate::memory::Scatter;
use crate::planted::{Bug, planted};
use crate::storage::{Lock, Storage, Writeback, failed, read_blocks, take_lock, write_all_at};
use crate::sync::{Mutex, guard};
use crate::types::{BLOCK_SIZE, Block, FreezeId, Group, Identity, Uuid, Word};
use crate::wait::{Attempt, Wait, waited};

const STRIPES: usize = 64;

/// A layer open for writing, under an exclusive lock. All methods with `&self` may be called from
/// many threads.
///
/// Dropping it leaves the file as a crash would: nothing that was flushed is lost, and the next
/// open recovers it. [`Writable::close`] leaves it clean.
#[derive(Debug)]
pub struct Writable {
    pub(super) file: Arc<dyn Storage>,
    pub(super) uuid: Uuid,
    pub(super) pages: Pages,
    /// Held from copy-up until bit and pending state are set; one word always has the same stripe.
    pub(super) stripes: Box<[Mutex<()>; STRIPES]>,
    /// Taken inside a stripe, never the other way round.
    pub(super) pending: Mutex<Pending>,
    /// Locked by whoever runs the commit.
    pub(super) journal: Mutex<Journal>,
    pub(super) turn: Turn,
    /// Set by the first sync that failed.
    pub(super) poison: OnceLock<Error>,
    pub(super) writeback: Writeback,
    /// What another process would go on with.
    pub(super) kept: Option<Arc<dyn FreshMap>>,
    slots: Mutex<Slots>,
    virtual_size: u64,
}

impl Writable {
    /// Opens a layer for writing and recovers it if it was not closed. Afterwards its header says
    /// *in use* under a new epoch, durably.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`], [`ErrorKind::ReadOnly`] for a frozen layer, an unknown
    /// read-only-compatible feature or counters near their end, `NotAnImage`, `Corrupt`, `Unsupported`, `Loss`; host errors.
    pub fn open(file: Arc<dyn Storage>) -> Result<Self> {
        Self::open_for(file, None)
    }

    /// [`Writable::open`] of a layer that `keeper`, if there is one, keeps from now on until it is
    /// closed or frozen.
    ///
    /// # Errors
    /// As [`Writable::open`]; those of keeping it.
    pub fn open_for(file: Arc<dyn Storage>, keeper: Option<&dyn Keeper>) -> Result<Self> {
        take_lock(&*file, Lock::Exclusive)?;
        let slots = Slots::read_durable(&*file)?;
        check_writable(&slots.header).map_err(|error| error.in_file(file.path()))?;
        if slots.header.state == State::InUse {
            let length = file_length(slots.header.virtual_size);
            file.drop_cache(0, length).map_err(failed(&*file, "dropping cached pages", 0))?;
        }
        let groups = group_count(slots.header.virtual_size);
        let recovered = recover(&*file, &slots.header)?;
        let kept = keeper.map(|keeper| keeper.keep(&file, groups)).transpose()?;
        let opened = Self::begin(file, slots, recovered, kept.clone());
        if let (Err(_), Some(kept)) = (&opened, kept) {
            kept.release();
        }
        opened
    }

    /// Goes on with one of the [`survivors`](super::survivors), where the process that wrote it died:
    /// all that it answered is there, durably.
    ///
    /// # Errors
    /// As [`Writable::open`].
    pub fn go_on(kept: Kept) -> Result<Self> {
        let Kept { file, fresh, .. } = kept;
        let slots = Slots::read(&*file)?;
        check_writable(&slots.header).map_err(|error| error.in_file(file.path()))?;
        let mut recovered = recover(&*file, &slots.header)?;
        let marks = fresh.marks().map_err(failed(&*file, "reading which blocks are fresh", 0))?;
        recovered.add(&*file, &slots.header, marks)?;
        Self::begin(file, slots, recovered, Some(fresh))
    }

    /// Makes what was recovered durable, and the layer one in use under a new epoch.
    fn begin(
        file: Arc<dyn Storage>,
        mut slots: Slots,
        recovered: Recovered,
        kept: Option<Arc<dyn FreshMap>>,
    ) -> Result<Self> {
        let sync = |operation| file.sync_data().map_err(failed(&*file, operation, 0));
        for (&group, bits) in &recovered.bits {
            write_page(&*file, slots.header.uuid, group, bits)?;
        }
        let size = slots.header.virtual_size;
        cut_to(&*file, file_length(size))?;
        sync("syncing recovered bitmap pages")?;
        let epoch = slots.header.epoch + 1;
        let in_use = Header {
            state: State::InUse,
            epoch,
            journal_tail: recovered.next,
            ..slots.header.clone()
        };
        slots.write_older(&*file, &in_use)?;
        if !planted(Bug::EpochNotSynced) {
            sync("syncing the header")?;
        }
        slots.adopt(in_use);
        let unused = first_unused_group(&*file)?;
        Ok(Self {
            uuid: slots.header.uuid,
            pages: Pages::new(slots.header.uuid, group_count(size), unused),
            stripes: Box::new(std::array::from_fn(|_| Mutex::new(()))),
            pending: Mutex::default(),
            journal: Mutex::new(Journal::new(epoch, recovered.next)),
            turn: Turn::default(),
            poison: OnceLock::new(),
            writeback: Writeback::default(),
            kept,
            slots: Mutex::new(slots),
            virtual_size: size,
            file,
        })
    }

    /// The header that counts.
    pub fn header(&self) -> Header {
        guard(&self.slots).header.clone()
    }

    /// The file below.
    pub fn file(&self) -> &dyn Storage {
        &*self.file
    }

    /// A group's page, read if it is not known yet.
    pub(super) fn page(&self, group: Group) -> Result<&Page> {
        waited(self.pages.get(&*self.file, group, Wait::Allowed))
    }

    /// The owned blocks of a word.
    pub fn owned(&self, word: Word, wait: Wait) -> Attempt<u64> {
        Ok(self.pages.get(&*self.file, word.group(), wait)?.word(word))
    }

    /// Reads owned bytes, `from` counted from the word's start.
    pub fn read(&self, word: Word, from: u64, into: Scatter<'_>, wait: Wait) -> Attempt {
        read_blocks(&*self.file, word_offset(word).0 + from, into, wait)
    }

    /// Makes everything durable and marks the layer as closed. On an error it stays *in use*, to be
    /// recovered by the next open.
    pub fn close(self) -> Result<()> {
        self.settle(|header| header.state = State::Writable)?;
        self.release();
        self.punch_ring()
    }

    /// A new freeze id, and the identity that the layer will have once frozen under it.
    ///
    /// # Errors
    /// [`ErrorKind::Poisoned`]: an earlier freeze may have got through to the disk.
    pub fn plan_freeze(&self) -> Result<(FreezeId, Identity)> {
        self.check_poison()?;
        let id = FreezeId(random()?);
        Ok((id, Identity::Frozen(self.uuid, id)))
    }

    /// Makes everything durable and the layer read-only for ever, under an id of
    /// [`Writable::plan_freeze`]. It may be a parent from now on; this object writes no more.
    ///
    /// # Errors
    /// Host errors; the layer may be frozen on disk or not then, and is poisoned here.
    pub fn freeze(&mut self, id: FreezeId) -> Result<Sealed> {
        let freeze = |header: &mut Header| header.state = State::Frozen(id);
        self.settle(freeze)
            .and_then(|()| self.write_header(freeze))
            .map(|()| self.release())
            .and_then(|()| self.punch_ring())
            .and_then(|()| take_lock(&*self.file, Lock::Shared))
            .and_then(|()| Sealed::frozen(self.file.clone(), self.header()))
            .inspect_err(|error| {
                self.poison.get_or_init(|| error.clone());
            })
    }

    /// Changes the virtual size. Growth reads as zeros, and so does whatever a shrink cut off, even
    /// after a later growth.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a size that cannot be; host errors, after which the size on
    /// disk may be either and the layer is poisoned unless nothing of the change was begun.
    pub fn resize(&mut self, size: u64) -> Result<()> {
        if !is_virtual_size(size) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("virtual size {size}, expected a positive multiple of 512 up to 2^56"),
            ));
        }
        self.settle(|_| {})?;
        if size > self.virtual_size {
            self.extend_file(size)?;
        }
        let resize = |header: &mut Header| {
            header.virtual_size = size;
            header.visible_parent_size = header.visible_parent_size.min(size);
        };
        self.write_header(resize).and_then(|()| self.write_header(resize)).inspect_err(
            |error| {
                self.poison.get_or_init(|| error.clone());
            },
        )?;
        self.pages.resize(group_count(size));
        self.virtual_size = size;
        cut_to(&*self.file, file_length(size))?;
        self.sync()
    }

    /// Gives the layer another parent, which must read the same as far as this layer shows it. Both
    /// have to stay until this has returned.
    ///
    /// # Errors
    /// Host errors; the layer may stand on either on disk then, and is poisoned here.
    pub fn relink(&mut self, parent: &ParentLink) -> Result<()> {
        self.settle(|_| {})?;
        let relink = |header: &mut Header| header.parent = Some(parent.clone());
        self.write_header(relink).and_then(|()| self.write_header(relink)).inspect_err(|error| {
            self.poison.get_or_init(|| error.clone());
        })
    }

    /// Prepares the file for a larger size: all that the growth will show is zeros, durably.
    fn extend_file(&self, size: u64) -> Result<()> {
        let file = &*self.file;
        if let Some(kept) = &self.kept {
            let grown = kept.grow(group_count(size));
            grown.map_err(failed(file, "growing the map of fresh blocks", 0))?;
        }
        self.zero_tail()?;
        cut_to(file, file_length(self.virtual_size))?;
        file.set_length(file_length(size)).map_err(failed(
            file,
            "growing the file",
            file_length(size),
        ))?;
        self.sync()
    }

    /// Zeroes what an owned last block holds behind the virtual size.
    fn zero_tail(&self) -> Result<()> {
        let used = self.virtual_size % BLOCK_SIZE;
        let block = Block(self.virtual_size / BLOCK_SIZE);
        if used == 0 || self.page(block.word().group())?.word(block.word()) & block.mask() == 0 {
            return Ok(());
        }
        let offset = block_offset(block).0 + used;
        write_all_at(&*self.file, &vec![0; (BLOCK_SIZE - used) as usize], offset).map_err(failed(
            &*self.file,
            "zeroing the old tail",
            offset,
        ))
    }

    /// Replaces the older header slot, durably.
    pub(super) fn write_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut slots = guard(&self.slots);
        let mut header = slots.header.clone();
        change(&mut header);
        slots.write_older(&*self.file, &header)?;
        self.sync()?;
        slots.adopt(header);
        Ok(())
    }

    /// Nobody is to go on with this layer.
    pub fn release(&self) {
        if let Some(kept) = &self.kept {
            kept.release();
        }
    }

    /// Writes the header anew, so that it differs from that of any copy of the layer.
    pub fn mark(&self) -> Result<()> {
        self.settle(|_| {})
    }

    /// Gives the ring's space back, once no header needs a record of it.
    fn punch_ring(&self) -> Result<()> {
        let (offset, length) = (JOURNAL_OFFSET.0, JOURNAL_RECORDS * BLOCK_SIZE);
        self.file.punch(offset, length).map_err(failed(&*self.file, "clearing the journal", offset))
    }

    pub(super) fn stripe(&self, word: Word) -> &Mutex<()> {
        &self.stripes[word.0 as usize % STRIPES]
    }
}

fn check_writable(header: &Header) -> Result<()> {
    if let State::Frozen(_) = header.state {
        return Err(Error::new(ErrorKind::ReadOnly, "the layer is frozen"));
    }
    if header.read_only_compatible != 0 {
        let bit = header.read_only_compatible.trailing_zeros();
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!("writing needs the feature in bit {bit}, which this build lacks"),
        ));
    }
    if header.highest_counter() >= 1 << 62 {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            "generation, epoch or journal tail of 2^62 or more: no room to count the writes",
        ));
    }
    Ok(())
}

/// Cuts a file that a crash in a resize left longer than it should be.
fn cut_to(file: &dyn Storage, length: u64) -> Result<()> {
    let current = file.length().map_err(failed(file, "reading the length", 0))?;
    if current > length {
        file.set_length(length).map_err(failed(file, "cutting the file", length))?;
    }
    Ok(())
}

//! A disk as it was at one moment, while its clients go on: what a request is about to change is
//! copied aside first (copy before write), for as long as somebody looks.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, TryLockError};

use super::{AnyServed, Disk, Served};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Storage, failed, read_exact_at, write_all_at};
use crate::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, guard};
use crate::types::BLOCK_SIZE;

/// What every change of a disk's content passes by.
#[derive(Debug, Default)]
pub(super) struct Moments {
    /// Held for reading by each change, for as long as it takes, so that a moment begins between
    /// changes.
    current: RwLock<Option<Arc<Kept>>>,
}

/// Leave to change the content.
pub(super) struct Permit<'a>(#[allow(dead_code, reason = "held for its lock")] Guard<'a>);

type Guard<'a> = RwLockReadGuard<'a, Option<Arc<Kept>>>;

impl Moments {
    /// Keeps what a range holds if somebody looks, and gives leave to change it.
    pub fn before_change<D>(&self, disk: &D, offset: u64, length: u64) -> Permit<'_>
    where
        D: Device + ?Sized,
    {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = &*current {
            kept.keep(disk, offset, length);
        }
        Permit(current)
    }

    /// Leave to change the content, if nobody looks and there is nothing to wait for.
    pub fn idle(&self) -> Option<Permit<'_>> {
        let current = match self.current.try_read() {
            Ok(current) => current,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        current.is_none().then(|| Permit(current))
    }

    /// Begins after the changes under way.
    fn begin(&self, kept: &Arc<Kept>) -> Result<()> {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.is_some() {
            return Err(Error::new(ErrorKind::InUse, "somebody looks at it already"));
        }
        *current = Some(kept.clone());
        Ok(())
    }

    fn end(&self) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The blocks that have changed since.
#[derive(Debug)]
struct Kept {
    scratch: Arc<dyn Storage>,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    /// Where in the scratch each block is, in blocks.
    of_block: HashMap<u64, u64>,
    /// Why a block could not be kept. The client's request is not to fail for it.
    failed: Option<Error>,
}

impl Kept {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        guard(&self.slots)
    }

    fn keep<D: Device + ?Sized>(&self, disk: &D, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(disk.size());
        for block in offset / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE) {
            let mut slots = self.slots();
            if slots.failed.is_some() {
                return;
            }
            if !slots.of_block.contains_key(&block)
                && let Err(error) = self.copy(disk, block, &mut slots)
            {
                slots.failed = Some(error);
            }
        }
    }

    fn copy<D: Device + ?Sized>(&self, disk: &D, block: u64, slots: &mut Slots) -> Result<()> {
        let start = block * BLOCK_SIZE;
        let mut data = [0; BLOCK_SIZE as usize];
        let length = (disk.size() - start).min(BLOCK_SIZE) as usize;
        disk.read(start, &mut data[..length])?;
        let slot = slots.of_block.len() as u64;
        let (scratch, at) = (&*self.scratch, slot * BLOCK_SIZE);
        write_all_at(scratch, &data, at).map_err(failed(
            scratch,
            "keeping what is about to change",
            at,
        ))?;
        slots.of_block.insert(block, slot);
        Ok(())
    }

    /// Reads a part of one block.
    fn read<D: Device + ?Sized>(&self, disk: &D, offset: u64, buf: &mut [u8]) -> Result<()> {
        // Held while the disk is read, so that no change of this block comes in between.
        let slots = self.slots();
        if let Some(error) = &slots.failed {
            return Err(error.clone());
        }
        match slots.of_block.get(&(offset / BLOCK_SIZE)) {
            Some(slot) => {
                let (scratch, at) = (&*self.scratch, slot * BLOCK_SIZE + offset % BLOCK_SIZE);
                read_exact_at(scratch, buf, at).map_err(failed(
                    scratch,
                    "reading what was kept",
                    at,
                ))
            }
            None => disk.read(offset, buf),
        }
    }
}

/// A disk as it was when this was made. One at a time for each disk.
pub struct Moment {
    served: Arc<AnyServed>,
    kept: Arc<Kept>,
}

impl<D: Disk + 'static> Served<D> {
    /// Keeps what the disk holds now, until the moment is dropped. Waits for the changes under way;
    /// what changes later is copied into `scratch` first, an empty file that is nobody else's. While
    /// it lasts, nobody may change the disk's size.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while there is another one.
    pub fn moment(self: &Arc<Self>, scratch: Arc<dyn Storage>) -> Result<Moment> {
        let kept = Arc::new(Kept { scratch, slots: Mutex::default() });
        self.moments.begin(&kept).map_err(|error| error.in_file(&self.name))?;
        Ok(Moment { served: self.clone(), kept })
    }
}

impl Moment {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.served.disk.size()
    }

    /// Fills `buf` with what the disk held.
    ///
    /// # Errors
    /// Those of reading the disk and the scratch; that of a block that could not be kept.
    pub fn read(&self, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            let count = (BLOCK_SIZE - offset % BLOCK_SIZE).min(buf.len() as u64);
            let (part, rest) = buf.split_at_mut(count as usize);
            self.kept.read(&self.served.disk, offset, part)?;
            offset += count;
            buf = rest;
        }
        Ok(())
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        self.served.moments.end();
    }
}

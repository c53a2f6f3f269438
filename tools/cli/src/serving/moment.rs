//! A device as it was at one moment, while its clients go on: what a request is about to change is
//! copied aside first (copy before write), for as long as somebody looks.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, TryLockError};

use thinply::device::Device;
use thinply::error::{Error, Result};
use thinply::types::BLOCK_SIZE;

/// What every change of a device passes by.
#[derive(Debug, Default)]
pub struct Moments {
    /// Held for reading by each change, for as long as it takes, so that a moment begins between
    /// changes.
    current: RwLock<Option<Arc<Kept>>>,
}

/// Leave to change the device.
pub struct Permit<'a>(#[allow(dead_code, reason = "held for its lock")] Guard<'a>);

type Guard<'a> = RwLockReadGuard<'a, Option<Arc<Kept>>>;

impl Moments {
    /// Keeps what a range holds if somebody looks, and gives leave to change it.
    pub fn before_change(&self, device: &dyn Device, offset: u64, length: u64) -> Permit<'_> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = &*current {
            kept.keep(device, offset, length);
        }
        Permit(current)
    }

    /// Leave to change the device, if nobody looks and there is nothing to wait for.
    pub fn idle(&self) -> Option<Permit<'_>> {
        let current = match self.current.try_read() {
            Ok(current) => current,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        current.is_none().then(|| Permit(current))
    }

    fn set(&self, kept: Option<Arc<Kept>>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = kept;
    }
}

/// The blocks that have changed since.
#[derive(Debug)]
struct Kept {
    file: File,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    /// Where in the file each block is, in blocks.
    of_block: HashMap<u64, u64>,
    /// Why a block could not be kept. The client's request is not to fail for it.
    failed: Option<Error>,
}

impl Kept {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, device: &dyn Device, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(device.size());
        for block in offset / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE) {
            let mut slots = self.slots();
            if slots.failed.is_some() {
                return;
            }
            if !slots.of_block.contains_key(&block)
                && let Err(error) = self.copy(device, block, &mut slots)
            {
                slots.failed = Some(error);
            }
        }
    }

    fn copy(&self, device: &dyn Device, block: u64, slots: &mut Slots) -> Result<()> {
        let start = block * BLOCK_SIZE;
        let mut data = [0; BLOCK_SIZE as usize];
        let length = (device.size() - start).min(BLOCK_SIZE) as usize;
        device.read(start, &mut data[..length])?;
        let slot = slots.of_block.len() as u64;
        self.file
            .write_all_at(&data, slot * BLOCK_SIZE)
            .map_err(|error| Error::io(error, "keeping what is about to change"))?;
        slots.of_block.insert(block, slot);
        Ok(())
    }

    /// Reads a part of one block.
    fn read(&self, device: &dyn Device, offset: u64, buf: &mut [u8]) -> Result<()> {
        // Held while the device is read, so that no change of this block comes in between.
        let slots = self.slots();
        if let Some(error) = &slots.failed {
            return Err(Error::new(error.kind(), error.to_string()));
        }
        match slots.of_block.get(&(offset / BLOCK_SIZE)) {
            Some(slot) => self
                .file
                .read_exact_at(buf, slot * BLOCK_SIZE + offset % BLOCK_SIZE)
                .map_err(|error| Error::io(error, "reading what was kept")),
            None => device.read(offset, buf),
        }
    }
}

/// A device as it was when this was made. One at a time for each device.
pub struct Moment {
    device: Arc<dyn Device>,
    moments: Arc<Moments>,
    kept: Arc<Kept>,
}

impl Moment {
    /// Begins after the changes under way. What changes later is copied into a file without a name
    /// in `folder`.
    pub fn begin(device: Arc<dyn Device>, moments: Arc<Moments>, folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder)
            .map_err(|error| Error::io(error, "making a temporary file").in_file(folder))?;
        let kept = Arc::new(Kept { file, slots: Mutex::default() });
        moments.set(Some(kept.clone()));
        Ok(Self { device, moments, kept })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.device.size()
    }

    /// Fills `buf` with what the device held.
    pub fn read(&self, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            let count = (BLOCK_SIZE - offset % BLOCK_SIZE).min(buf.len() as u64);
            let (part, rest) = buf.split_at_mut(count as usize);
            self.kept.read(&*self.device, offset, part)?;
            offset += count;
            buf = rest;
        }
        Ok(())
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        self.moments.set(None);
    }
}

#[cfg(test)]
mod tests {
    use thinply::chain::{Chain, Layers, create};
    use thinply::device::ZeroMode;
    use thinply::storage::{Access, Folder, MemoryFolder};

    use super::*;

    const SIZE: u64 = 10 * BLOCK_SIZE + 512;

    fn device() -> Arc<dyn Device> {
        let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("m"));
        let layers = Arc::new(Layers::default());
        create(&folder, "a", Some(SIZE), None, &layers).unwrap();
        Arc::new(Chain::open(folder, "a", Access::Write, layers).unwrap())
    }

    fn read(moment: &Moment) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        moment.read(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn shows_what_was_there_whatever_changes() {
        let (device, moments) = (device(), Arc::new(Moments::default()));
        let old: Vec<_> = (0..SIZE).map(|at| (at / 512) as u8 + 1).collect();
        device.write(0, &old).unwrap();
        assert!(moments.idle().is_some());
        let folder = tempfile::tempdir().unwrap();
        let moment = Moment::begin(device.clone(), moments.clone(), folder.path()).unwrap();
        assert!(moments.idle().is_none());
        assert!(read(&moment) == old);
        let change = |offset, length| moments.before_change(&*device, offset, length);
        for round in 0..2 {
            let permit = change(100, BLOCK_SIZE);
            device.write(100, &[round; BLOCK_SIZE as usize]).unwrap();
            drop(permit);
            let permit = change(3 * BLOCK_SIZE, 2 * BLOCK_SIZE);
            device.zero(3 * BLOCK_SIZE, 2 * BLOCK_SIZE, ZeroMode::default()).unwrap();
            drop(permit);
            let permit = change(SIZE - 100, 100);
            device.write(SIZE - 100, &[round; 100]).unwrap();
            drop(permit);
            assert!(read(&moment) == old);
        }
        let mut part = [0; 1000];
        moment.read(BLOCK_SIZE - 500, &mut part).unwrap();
        assert!(part == old[BLOCK_SIZE as usize - 500..][..1000]);
        drop(moment);
        assert!(moments.idle().is_some());
        let later = Moment::begin(device.clone(), moments, folder.path()).unwrap();
        assert_eq!(read(&later)[100..200], [1; 100]);
    }

    #[test]
    fn two_blocks_that_change_together_never_show_apart() {
        let (device, moments) = (device(), Arc::new(Moments::default()));
        let folder = tempfile::tempdir().unwrap();
        let pair = [0, 7 * BLOCK_SIZE];
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for round in (1..=255).cycle().take(20_000) {
                    for offset in pair {
                        let _permit = moments.before_change(&*device, offset, BLOCK_SIZE);
                        device.write(offset, &[round; BLOCK_SIZE as usize]).unwrap();
                    }
                }
            });
            while !writer.is_finished() {
                let moment = Moment::begin(device.clone(), moments.clone(), folder.path()).unwrap();
                let bytes = read(&moment);
                let [first, second] = pair.map(|at| bytes[at as usize]);
                assert!(first == second || first == second % 255 + 1, "{first} {second}");
                for at in pair {
                    assert!(
                        bytes[at as usize..][..BLOCK_SIZE as usize]
                            .iter()
                            .all(|b| *b == bytes[at as usize])
                    );
                }
                assert!(read(&moment) == bytes);
            }
        });
    }
}

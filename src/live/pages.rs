//! Bitmap pages in memory, loaded on first touch. An empty page costs a few bytes.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::Result;
use crate::format::bitmap::{Bits, PageBytes, decode, encode};
use crate::format::geometry::{GROUP_STRIDE, GROUPS_OFFSET, bitmap_offset};
use crate::storage::{Storage, allocate_ahead, failed, read_blocks, write_all_at};
use crate::sync::LazyTable;
use crate::types::{BLOCK_SIZE, GROUP_WORDS, Group, Uuid, Word};
use crate::wait::{Attempt, Wait};

/// The bits of a group as the file has them; `None` for an empty page.
pub(super) fn read_page(
    file: &dyn Storage,
    uuid: Uuid,
    group: Group,
    wait: Wait,
) -> Attempt<Option<Box<Bits>>> {
    let offset = bitmap_offset(group).0;
    let mut bytes: PageBytes = [0; BLOCK_SIZE as usize];
    read_blocks(file, offset, (&mut bytes).into(), wait)?;
    Ok(decode(uuid, group, &bytes)
        .map_err(|error| error.relative_to(offset).in_file(file.path()))?)
}

/// The first group from which on the file holds nothing: its pages are known without a wait. Where
/// that takes more than a few looks, it is beyond all.
pub(super) fn first_unused_group(file: &dyn Storage) -> Result<Group> {
    let mut end = Group(0);
    for _ in 0..LOOKS {
        let Some(used) = next_group(file, end)? else { return Ok(end) };
        end = Group(used.0 + 1);
    }
    Ok(Group(u64::MAX))
}

/// How often a file is asked where its data is when it is opened: enough for a gigabyte.
const LOOKS: u32 = 10;

/// The first group at or after `from` that has anything on disk: one before it owns nothing, as far
/// as the file says.
pub fn next_group(file: &dyn Storage, from: Group) -> Result<Option<Group>> {
    let at = bitmap_offset(from).0;
    let data = file.next_data(at).map_err(failed(file, "looking for groups", at))?;
    Ok(data.map(|data| Group((data - GROUPS_OFFSET.0) / GROUP_STRIDE)))
}

/// Writes a group's bits; not synced.
pub(super) fn write_page(file: &dyn Storage, uuid: Uuid, group: Group, bits: &Bits) -> Result<()> {
    let offset = bitmap_offset(group).0;
    write_all_at(file, &encode(uuid, group, bits), offset).map_err(failed(
        file,
        "writing a bitmap page",
        offset,
    ))
}

type AtomicBits = [AtomicU64; GROUP_WORDS as usize];

/// One group's bits. They only ever turn on.
#[derive(Debug, Default)]
pub(super) struct Page {
    bits: OnceLock<Box<AtomicBits>>,
    /// Space for the page on disk is allocated.
    allocated: AtomicBool,
}

impl Page {
    /// The owned blocks of a word. A bit that is seen here was set after its block's data.
    pub fn word(&self, word: Word) -> u64 {
        self.bits.get().map_or(0, |bits| bits[word.index()].load(Ordering::Acquire))
    }

    /// Turns bits on.
    pub fn set(&self, word: Word, mask: u64) {
        let bits = self.bits.get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))));
        bits[word.index()].fetch_or(mask, Ordering::Release);
    }

    /// A copy of all bits.
    pub fn copy(&self) -> Box<Bits> {
        let mut copy = Box::new([0; GROUP_WORDS as usize]);
        if let Some(bits) = self.bits.get() {
            copy.iter_mut()
                .zip(bits.iter())
                .for_each(|(to, from)| *to = from.load(Ordering::Acquire));
        }
        copy
    }

    /// Allocates the page on disk, so that a later checkpoint can't run out of space.
    pub fn allocate(&self, file: &dyn Storage, group: Group) -> Result<()> {
        if !self.allocated.load(Ordering::Acquire) {
            let offset = bitmap_offset(group).0;
            allocate_ahead(file, offset, BLOCK_SIZE).map_err(failed(
                file,
                "allocating a bitmap page",
                offset,
            ))?;
            self.allocated.store(true, Ordering::Release);
        }
        Ok(())
    }
}

/// All pages of a layer.
#[derive(Debug)]
pub(super) struct Pages {
    table: LazyTable<Page>,
    uuid: Uuid,
    /// Pages of this group and those after it are empty until they are touched.
    unused: Group,
}

impl Pages {
    pub fn new(uuid: Uuid, groups: u64, unused: Group) -> Self {
        Self { table: LazyTable::new(groups), uuid, unused }
    }

    pub fn resize(&mut self, groups: u64) {
        self.table.resize(groups);
    }

    /// A group's page, read from the file on first touch.
    pub fn get(&self, file: &dyn Storage, group: Group, wait: Wait) -> Attempt<&Page> {
        self.table.get(group.0, || {
            let page = Page::default();
            if group >= self.unused {
                return Ok(page);
            }
            if let Some(bits) = read_page(file, self.uuid, group, wait)? {
                let atomic = Box::new(bits.map(AtomicU64::new));
                page.bits.get_or_init(|| atomic);
                page.allocated.store(true, Ordering::Release);
            }
            Ok(page)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::geometry::{block_offset, file_length};
    use crate::storage::{Folder, MemoryFolder};
    use crate::types::{Block, GROUP_BLOCKS};

    #[test]
    fn a_group_begins_at_its_page_and_ends_with_its_last_block() {
        let folder = MemoryFolder::new("m");
        let file = folder.create("a").unwrap();
        file.set_length(file_length(3 * GROUP_BLOCKS * BLOCK_SIZE)).unwrap();
        assert_eq!(next_group(&*file, Group(0)).unwrap(), None);
        // A block without its page, as before the first checkpoint.
        write_all_at(&*file, &[1], block_offset(Block(2 * GROUP_BLOCKS - 1)).0).unwrap();
        assert_eq!(next_group(&*file, Group(0)).unwrap(), Some(Group(1)));
        write_page(&*file, Uuid([1; 16]), Group(2), &[1; GROUP_WORDS as usize]).unwrap();
        let found = [1, 2].map(|from| next_group(&*file, Group(from)).unwrap());
        assert_eq!(found, [Some(Group(1)), Some(Group(2))]);
    }
}

//! Memory for bulk data.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// Bytes that begin at a page: the kernel copies file content to and from there faster than where
/// an allocator's header shifts them to, reads by up to a half (`docs/bench/bounds.md`). Memory is
/// taken for those that are touched.
#[derive(Debug, Default)]
pub struct Buffer {
    map: Option<MmapMut>,
    length: usize,
}

impl Buffer {
    /// Makes it `length` bytes long. If other memory has to be found for that, all are zeros then;
    /// otherwise what was there stays.
    pub fn set_length(&mut self, length: usize) {
        if self.capacity() < length {
            let no_memory =
                |_| handle_alloc_error(Layout::array::<u8>(length).unwrap_or(Layout::new::<u8>()));
            self.map = Some(MmapMut::map_anon(length).unwrap_or_else(no_memory));
        }
        self.length = length;
    }

    /// Keeps its memory from being paged out, where the limits of this process allow it, and touches
    /// all of it.
    pub fn lock(&mut self) {
        let Some(map) = &mut self.map else { return };
        if map.lock().is_err() {
            map.fill(0);
        }
    }

    /// Bytes it can have before other memory has to be found.
    pub fn capacity(&self) -> usize {
        self.map.as_ref().map_or(0, |map| map.len())
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_ref().map_or(&[], |map| &map[..self.length])
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.as_mut().map_or(&mut [], |map| &mut map[..self.length])
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_begins_at_a_page_and_keeps_its_memory() {
        let mut buffer = Buffer::default();
        assert!(buffer.is_empty());
        buffer.set_length(10_000);
        assert_eq!((buffer.len(), buffer.as_ptr() as usize % 4096), (10_000, 0));
        buffer[9_999] = 1;
        buffer.set_length(5);
        assert_eq!((buffer.len(), buffer.capacity()), (5, 10_000));
        buffer.set_length(10_000);
        assert_eq!(buffer[9_999], 1);
    }
}

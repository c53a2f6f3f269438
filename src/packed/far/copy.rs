//! The local copy of a layer's parts: a sparse file with every part at the place that it has in the
//! layer, and behind them a head and a bitmap of the parts that are there.
//!
//! A bit is a hint that saves looking. It may be set where the bytes are not, after a crash, and
//! lost where they are, when two processes set bits of one byte at once.

use std::io;
use std::sync::Arc;

use zerocopy::little_endian::U64;
use zerocopy::{Immutable, IntoBytes, Unaligned};

use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Storage, failed, read_exact_at, write_all_at};
use crate::sync::{Mutex, guard};
use crate::types::{BLOCK_SIZE, Root, SECTOR_SIZE};

/// What stands before the bitmap. All of it is in one sector, so it is there whole or not at all.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    root: [u8; 32],
    length: U64,
}

#[derive(Debug)]
pub(super) struct Copy {
    file: Arc<dyn Storage>,
    /// Where the bitmap stands.
    bits: u64,
    /// Held while a byte of the bitmap changes.
    setting: Mutex<()>,
}

impl Copy {
    /// The copy of a layer of `length` bytes; an empty file becomes one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a file that is something else; host errors.
    pub fn open(file: Arc<dyn Storage>, root: Root, length: u64) -> Result<Self> {
        let head = Head { magic: *b"TPLYPART", root: root.0, length: U64::new(length) };
        let at = length.checked_next_multiple_of(BLOCK_SIZE).unwrap_or(length);
        let bits = at.saturating_add(SECTOR_SIZE);
        let host = |operation| move |error| Error::io(error, operation);
        let open = || -> Result<()> {
            let there = file.length().map_err(host("reading the length of the copy"))?;
            let mut found = [0; size_of::<Head>()];
            if there >= bits {
                read_exact_at(&*file, &mut found, at).map_err(host("reading the copy's head"))?;
            }
            if found == head.as_bytes() {
                return Ok(());
            }
            // What a creation leaves that was cut short.
            if there != 0 && (there != bits || found != [0; size_of::<Head>()]) {
                return Err(Error::new(ErrorKind::InvalidInput, "not the copy of this layer"));
            }
            file.set_length(bits).map_err(host("making the copy"))?;
            write_all_at(&*file, head.as_bytes(), at).map_err(host("making the copy"))?;
            // What comes later may be lost, but must not be found without this.
            file.sync_data().map_err(failed(&*file, "syncing the copy's head", at))
        };
        open().map_err(|error| error.in_file(file.path()))?;
        Ok(Self { file, bits, setting: Mutex::new(()) })
    }

    fn byte(&self, part: u64) -> io::Result<u8> {
        let mut byte = [0];
        match read_exact_at(&*self.file, &mut byte, self.bits + part / 8) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            other => other.map(|()| byte[0]),
        }
    }

    /// The bytes of a part that may be right; the caller verifies them.
    pub fn get(&self, part: u64, at: u64, length: u64) -> Option<Vec<u8>> {
        // A copy that can't be read has nothing.
        let there = self.byte(part).ok()? >> (part % 8) & 1 == 1;
        let mut bytes = vec![0; if there { length as usize } else { return None }];
        read_exact_at(&*self.file, &mut bytes, at).ok()?;
        Some(bytes)
    }

    /// Keeps the verified bytes of a part. A full disk and the like only mean that they will be
    /// fetched again.
    pub fn put(&self, part: u64, pieces: &[(u64, &[u8])]) {
        let put = || -> io::Result<()> {
            pieces.iter().try_for_each(|(at, bytes)| write_all_at(&*self.file, *bytes, *at))?;
            let _setting = guard(&self.setting);
            let byte = self.byte(part)? | 1 << (part % 8);
            write_all_at(&*self.file, &[byte], self.bits + part / 8)
        };
        let _ = put();
    }
}

//! Where the bytes of a packed layer come from: a file here, or a source far away.

use std::path::Path;
use std::sync::Arc;

use super::far::Far;
use crate::error::Result;
use crate::format::packed::{CHUNK_FRAMES, Entry, PackedHeader};
use crate::storage::{Storage, read_blocks};
use crate::wait::{Attempt, NotDone, Wait};

/// The file or the source of one layer.
///
/// A layer's *parts* are what is fetched as one: header, footer and directory together, and in each
/// group its frames, its chunks and its map, numbered in this order.
#[derive(Debug)]
pub(super) enum Origin {
    File(Arc<dyn Storage>),
    Far(Far),
}

/// How many parts a group has.
pub(super) fn parts(entry: &Entry, header: &PackedHeader) -> u64 {
    let frames = u64::from(entry.data_blocks.div_ceil(header.frame_blocks));
    frames + frames.div_ceil(CHUNK_FRAMES.into()) + 1
}

impl Origin {
    pub fn name(&self) -> &Path {
        match self {
            Self::File(file) => file.path(),
            Self::Far(far) => far.name(),
        }
    }

    /// The number of the first part of the group at this place of the directory.
    pub fn first_part(&self, place: usize) -> u64 {
        match self {
            // Parts of a file are known by where they stand.
            Self::File(_) => 0,
            Self::Far(far) => far.first_part(place),
        }
    }

    /// The number of a group's map.
    pub fn map_part(&self, place: usize, entry: &Entry, header: &PackedHeader) -> u64 {
        self.first_part(place) + parts(entry, header) - 1
    }

    /// Reads bytes that nothing vouches for.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        match self {
            Self::File(file) => {
                crate::wait::waited(read_blocks(&**file, at, buf.into(), Wait::Allowed))
            }
            Self::Far(far) => far.read(at, buf),
        }
    }

    /// What `check` makes of the part with this number, `length` bytes from `at` on. Bytes that it
    /// refuses are not what was packed.
    pub fn part<T>(
        &self,
        number: u64,
        (at, length): (u64, u64),
        wait: Wait,
        check: impl Fn(&[u8]) -> Result<T>,
    ) -> Attempt<T> {
        match self {
            Self::File(file) => {
                let mut bytes = vec![0; length as usize];
                read_blocks(&**file, at, (&mut bytes).into(), wait)?;
                Ok(check(&bytes).map_err(|error| error.at(at).in_file(file.path()))?)
            }
            Self::Far(_) if wait != Wait::Allowed => Err(NotDone::WouldWait),
            Self::Far(far) => Ok(far.part(number, (at, length), check)?),
        }
    }
}

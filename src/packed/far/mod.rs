//! A packed layer that is far away: only what is read is fetched, and kept in a local copy.
//!
//! Invariants:
//! - no byte gets out, or into the copy, before hashes lead from it to the root that was asked for;
//! - the copy is never believed: what it gives is verified like what the source gives, and fetched
//!   again if it fails. So whatever a crash, another process or time has done to it costs fetches
//!   and nothing else, and it is never synced;
//! - an error leaves no state behind: the next read tries again.

mod copy;
mod source;

use std::path::Path;
use std::sync::Arc;

use self::copy::Copy;
use super::Packed;
use super::opening::Opening;
use super::origin::{Origin, parts};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::types::Root;

pub use source::{ByteSource, FileSource};

/// Number of the part that is header, directory and footer.
const OPENING: u64 = 0;

/// The source of a layer, and what of it is here.
#[derive(Debug)]
pub(super) struct Far {
    source: Box<dyn ByteSource>,
    copy: Option<Copy>,
    /// By the entry's place in the directory: number of the group's first part.
    first_parts: Vec<u64>,
}

impl Packed {
    /// Opens the layer with this root from afar. Opening fetches header, footer and directory; a read
    /// fetches the map of its group, the chunks that describe its frames (48 KiB of data each) and
    /// those frames, unless `copy` has them. All of them are verified up to the root.
    ///
    /// `copy` is an empty file, or one that served as the copy of the same layer before; any number
    /// of processes may share it. Without one, what the process forgets is fetched again.
    ///
    /// # Errors
    /// [`ErrorKind::ParentMismatch`] where the source has another layer;
    /// [`ErrorKind::InvalidInput`] for a file that is something else than this layer's copy;
    /// [`ErrorKind::NotAnImage`], [`ErrorKind::Unsupported`], [`ErrorKind::Corrupt`]; those of the
    /// source, after which a later try may succeed.
    pub fn open_far(
        source: Box<dyn ByteSource>,
        root: Root,
        copy: Option<Arc<dyn Storage>>,
    ) -> Result<Self> {
        let length = source.length()?;
        let copy = copy.map(|file| Copy::open(file, root, length)).transpose()?;
        let mut far = Far { source, copy, first_parts: Vec::new() };
        let opening =
            far.opening(root, length).map_err(|error| error.in_file(far.source.name()))?;
        let mut next = OPENING + 1;
        let first_parts = opening.entries.iter().map(|entry| {
            let first = next;
            next += parts(entry, &opening.header);
            first
        });
        far.first_parts = first_parts.collect();
        Ok(Self::new(Origin::Far(far), opening))
    }
}

impl Far {
    pub fn name(&self) -> &Path {
        self.source.name()
    }

    pub fn first_part(&self, place: usize) -> u64 {
        self.first_parts.get(place).copied().unwrap_or_default()
    }

    fn located(&self, at: u64) -> impl Fn(Error) -> Error {
        move |error| error.at(at).in_file(self.source.name())
    }

    /// Fetches bytes that nothing vouches for.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.source.read(at, buf).map_err(self.located(at))
    }

    /// A part of the layer, from the copy if that has it, else from the source and then into the
    /// copy; `check` verifies the bytes up to the root, wherever they come from.
    pub fn part<T>(
        &self,
        number: u64,
        (at, length): (u64, u64),
        check: impl Fn(&[u8]) -> Result<T>,
    ) -> Result<T> {
        if let Some(bytes) = self.copy.as_ref().and_then(|copy| copy.get(number, at, length))
            && let Ok(value) = check(&bytes)
        {
            return Ok(value);
        }
        let mut bytes = vec![0; length as usize];
        self.read(at, &mut bytes)?;
        let value = check(&bytes).map_err(self.located(at))?;
        self.keep(number, &[(at, &bytes)]);
        Ok(value)
    }

    fn keep(&self, number: u64, pieces: &[(u64, &[u8])]) {
        if let Some(copy) = &self.copy {
            copy.put(number, pieces);
        }
    }

    /// Header, footer and directory of the layer with this root.
    fn opening(&self, root: Root, length: u64) -> Result<Opening> {
        let check = |opening: Opening| match opening.footer.root {
            found if found == root => Ok(opening),
            found => {
                let detail = format!("the layer with the root {found}, expected {root}");
                Err(Error::new(ErrorKind::ParentMismatch, detail))
            }
        };
        let copied = Opening::read(length, &mut |_, at, buf| {
            let copy = self.copy.as_ref();
            let bytes = copy.and_then(|copy| copy.get(OPENING, at, buf.len() as u64));
            buf.copy_from_slice(&bytes.ok_or_else(|| Error::new(ErrorKind::NotFound, "not here"))?);
            Ok(())
        });
        if let Ok(opening) = copied.and_then(check) {
            return Ok(opening);
        }
        let mut fetched = Vec::new();
        let opening = Opening::read(length, &mut |_, at, buf| {
            self.source.read(at, buf).map_err(|error| error.at(at))?;
            fetched.push((at, buf.to_vec()));
            Ok(())
        });
        let opening = opening.and_then(check)?;
        let pieces: Vec<_> = fetched.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
        self.keep(OPENING, &pieces);
        Ok(opening)
    }
}

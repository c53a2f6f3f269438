//! Layers in the making: files in the folder of blobs that mean nothing until they get their
//! digest for a name.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::{Store, json};
use crate::chain::{Chain, Kind, PackOptions, Parent, create, seal};
use crate::device::{Device, ZeroMode};
use crate::error::{Error, ErrorKind, Result};
use crate::packed::Compression;
use crate::storage::{Access, Lock, Storage};
use crate::types::{BLOCK_SIZE, Identity};

const CHUNK: u64 = 1 << 20;
/// zstd's own default.
const LEVEL: i32 = 3;

/// A layer that is being made: first of the live layout, to be filled, then packed. While it lives
/// its files are locked, which keeps [`Store::collect`]
/// from it; dropping it removes them.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    name: String,
    chain: Option<Chain>,
    /// The name of the packed layer, once there is one.
    packed: Option<String>,
    /// Holds the packed layer's lock.
    file: Option<Arc<dyn Storage>>,
}

/// A layer that is whole.
pub(super) struct Blob {
    pub digest: String,
    pub length: u64,
    pub identity: Identity,
    pub virtual_size: u64,
}

impl Draft {
    /// A new layer over `parent`, a blob of the store.
    pub(super) fn new(store: &Store, size: Option<u64>, parent: Option<&Parent>) -> Result<Self> {
        // Under the lock, since nobody holds the file for a moment.
        let _guard = store.lock()?;
        let (folder, name) = (&store.folders.blobs, json::draft_name()?);
        let mut draft = Self { store: store.clone(), name, chain: None, packed: None, file: None };
        create(folder, &draft.name, size, parent, &store.layers)?;
        let chain = Chain::open(folder.clone(), &draft.name, Access::Write, store.layers.clone())?;
        draft.chain = Some(chain);
        Ok(draft)
    }

    /// The layer, to be filled.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] once it is published.
    pub fn chain(&self) -> Result<&Chain> {
        let closed = || Error::new(ErrorKind::InvalidInput, "the layer is finished");
        self.chain.as_ref().ok_or_else(closed)
    }

    /// Writes what the newest `layers` layers of `source` own, where it reads other than the parent.
    pub(super) fn copy_from(&self, source: &Chain, layers: usize) -> Result<()> {
        let chain = self.chain()?;
        source.walk(&mut |extent| {
            if extent.depth.is_none_or(|depth| depth >= layers) {
                return Ok(());
            }
            let end = extent.offset + extent.length;
            let mut at = extent.offset;
            while at < end {
                let part = (end - at).min(CHUNK);
                match extent.kind {
                    Kind::Data => copy_data(source, chain, at, part)?,
                    _ => chain.zero(at, part, ZeroMode::default())?,
                }
                at += part;
            }
            Ok(())
        })
    }

    /// Packs what the layer holds and takes the digest of that. It stays a draft.
    pub(super) fn finish(&mut self) -> Result<Blob> {
        let folder = self.store.folders.blobs.clone();
        // Most of the work comes before the lock.
        self.chain()?.flush()?;
        let guard = self.store.lock()?;
        if let Some(chain) = self.chain.take() {
            chain.close()?;
        }
        seal(&*folder, &self.name)?;
        // A chain that is open for reading holds a lock too.
        let source =
            Chain::open(folder.clone(), &self.name, Access::Read, self.store.layers.clone())?;
        let fail = |error| Error::io(error, "writing the new layer").in_file(folder.path());
        let name = json::draft_name()?;
        let file = folder.create(&name).map_err(fail)?;
        self.packed = Some(name);
        file.lock(Lock::Shared).map_err(fail)?;
        drop(guard);
        let options = PackOptions { compression: Compression::Zstd(LEVEL), drop_equal: true };
        let sink = BufWriter::with_capacity(CHUNK as usize, Sink::new(file.clone()));
        let (summary, sink) = source.pack(sink, &options, &mut |_| {})?;
        let sink = sink.into_inner().map_err(|error| fail(error.into_error()))?;
        file.sync_data().map_err(fail)?;
        self.file = Some(file);
        Ok(Blob {
            digest: sink.digest(),
            length: summary.length,
            identity: Identity::Packed(summary.root),
            virtual_size: source.size(),
        })
    }

    /// Gives the packed layer its digest for a name; under the store's lock. The folder is not
    /// synced.
    pub(super) fn publish(mut self, blob: &Blob) -> Result<()> {
        let folder = &*self.store.folders.blobs;
        let Some(name) = self.packed.take() else {
            return Err(Error::new(ErrorKind::InvalidInput, "the layer is not finished"));
        };
        folder.rename(&name, &blob.digest).map_err(|error| {
            let _ = folder.remove(&name);
            Error::io(error, "naming the new layer").in_file(folder.path())
        })
    }
}

/// Writes a file from its beginning, and takes its digest.
struct Sink {
    file: Arc<dyn Storage>,
    at: u64,
    hasher: Sha256,
}

impl Sink {
    fn new(file: Arc<dyn Storage>) -> Self {
        Self { file, at: 0, hasher: Sha256::new() }
    }

    fn digest(self) -> String {
        json::hex(&self.hasher.finalize())
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write_at(bytes, self.at)?;
        self.hasher.update(bytes.get(..count).unwrap_or_default());
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn copy_data(source: &Chain, target: &Chain, offset: u64, length: u64) -> Result<()> {
    let mut data = vec![0; length as usize];
    let mut below = vec![0; length as usize];
    source.read(offset, &mut data)?;
    target.read(offset, &mut below)?;
    let block = BLOCK_SIZE as usize;
    let mut at = 0;
    while at < data.len() {
        let differs = |at: usize| {
            let end = (at + block).min(data.len());
            data[at..end] != below[at..end]
        };
        let mut end = at + block;
        if differs(at) {
            while end < data.len() && differs(end) {
                end += block;
            }
            let end = end.min(data.len());
            target.write(offset + at as u64, &data[at..end])?;
        }
        at = end;
    }
    Ok(())
}

impl Drop for Draft {
    fn drop(&mut self) {
        // It has been renamed, or can't be helped; `gc` finds what stays.
        drop(self.chain.take());
        for name in std::iter::once(&self.name).chain(&self.packed) {
            let _ = self.store.folders.blobs.remove(name);
        }
    }
}

//! Layers in the making: files in the folder of blobs that mean nothing until they get their
//! digest for a name.

use std::sync::Arc;

use super::{Store, json};
use crate::chain::{Chain, Kind, Parent, create, seal};
use crate::device::{Detail, Device, ZeroMode};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Lock, Storage};
use crate::types::{BLOCK_SIZE, Identity};

const CHUNK: u64 = 1 << 20;

/// A layer that is being made. While it lives its file is locked, which keeps [`Store::collect`]
/// from it; dropping it removes the file.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    name: String,
    chain: Option<Chain>,
    /// Holds the lock once the chain is closed.
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
        let mut draft = Self { store: store.clone(), name, chain: None, file: None };
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
        let mut extents = Vec::new();
        source.map(0, source.size(), Detail::Files, &mut |extent| {
            if extent.depth.is_some_and(|depth| depth < layers) {
                extents.push(extent);
            }
            true
        })?;
        for extent in extents {
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
        }
        Ok(())
    }

    /// Freezes the layer and takes its digest. It stays a draft.
    pub(super) fn finish(&mut self) -> Result<Blob> {
        let folder = &*self.store.folders.blobs;
        // Most of the work comes before the lock.
        self.chain()?.flush()?;
        let guard = self.store.lock()?;
        if let Some(chain) = self.chain.take() {
            chain.close()?;
        }
        let parent = seal(folder, &self.name)?;
        let open = || folder.open(&self.name, Access::Read);
        let fail = |error| Error::io(error, "opening the new layer").in_file(folder.path());
        let file = open().map_err(fail)?;
        file.lock(Lock::Shared).map_err(fail)?;
        self.file = Some(file.clone());
        drop(guard);
        let (digest, length) = json::sha256_file(&*file)?;
        let (identity, virtual_size) = (parent.link.identity, parent.virtual_size);
        Ok(Blob { digest, length, identity, virtual_size })
    }

    /// Gives the layer its digest for a name; under the store's lock. The folder is not synced.
    pub(super) fn publish(self, blob: &Blob) -> Result<()> {
        let folder = &*self.store.folders.blobs;
        folder
            .rename(&self.name, &blob.digest)
            .map_err(|error| Error::io(error, "naming the new layer").in_file(folder.path()))
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
        let _ = self.store.folders.blobs.remove(&self.name);
    }
}

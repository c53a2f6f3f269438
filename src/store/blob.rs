//! The folder of blobs: what is in it by its digest, and layers in the making, files that mean
//! nothing until they get their digest for a name.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::image::bad;
use super::{Store, digest, files};
use crate::chain::{Chain, Layer, Parent, create, seal};
use crate::derive::PackOptions;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::ParentLink;
use crate::packed::Compression;
use crate::storage::{Access, Lock, Rights, Storage, failed, open_in};
use crate::types::Identity;

const BUFFER: usize = 1 << 20;

/// A layer of the live layout that is being filled. While it lives its file is locked, which keeps
/// [`Store::collect`] from it; dropping it removes it.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    name: String,
    chain: Chain,
}

/// A packed layer that is whole, but has no name that counts yet. Locked and removed as a
/// [`Draft`] is.
pub(super) struct NewBlob {
    store: Store,
    /// None once it has its digest for a name.
    name: Option<String>,
    /// Holds the lock.
    _file: Arc<dyn Storage>,
    pub digest: String,
    pub length: u64,
    pub identity: Identity,
    pub virtual_size: u64,
}

/// A blob that may be JSON.
pub(super) enum Document {
    /// JSON, as its bytes and as what they say.
    Json(Vec<u8>, Value),
    /// What its digest says, but no JSON, or too much for a manifest.
    Other,
    Missing,
}

impl Store {
    /// A blob of the index's or of others, whatever they keep there.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for one that was altered; host errors.
    pub(super) fn document(&self, digest: &str) -> Result<Document> {
        let bytes = match self.json_blob(digest) {
            Ok(bytes) => bytes,
            // No manifest is that long; but is it what it was?
            Err(error) if error.kind() == ErrorKind::Limit => {
                let (found, _) = digest::sha256_file(&*self.blob(digest)?)?;
                return if found == digest { Ok(Document::Other) } else { Err(error) };
            }
            Err(error) => return Err(error),
        };
        Ok(match bytes {
            None => Document::Missing,
            Some(bytes) => match serde_json::from_slice(&bytes) {
                Ok(value) => Document::Json(bytes, value),
                Err(_) => Document::Other,
            },
        })
    }

    /// A blob that is JSON, if it has the digest that it should have.
    pub(super) fn json_blob(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        let Some(bytes) = files::read_small(self.blobs(), digest)? else { return Ok(None) };
        let found = digest::sha256(&bytes);
        if found != digest {
            let error = bad(format!("the blob was altered: its SHA-256 is {found}"));
            return Err(error.in_file(self.blobs().path().join(digest)));
        }
        Ok(Some(bytes))
    }

    /// What a child of a layer blob has to know.
    pub(super) fn parent(&self, digest: &str) -> Result<Parent> {
        let path = self.blobs().path().join(digest);
        let layer = Layer::open(open_in(self.blobs(), digest, Access::Read)?)?;
        let identity =
            layer.identity().ok_or_else(|| bad("a layer that is not sealed").in_file(&path))?;
        Ok(Parent {
            link: ParentLink { identity, hint: digest.to_owned() },
            virtual_size: layer.virtual_size(),
            newly_frozen: false,
        })
    }

    /// Stores a small blob under its digest, durably.
    pub(super) fn put(&self, bytes: &[u8]) -> Result<()> {
        files::replace(self.blobs(), &digest::sha256(bytes), bytes)
    }

    /// Bytes of disk that a blob takes.
    pub(super) fn blob_cost(&self, digest: &str) -> Result<u64> {
        let file = self.blob(digest)?;
        file.allocated().map_err(failed(&*file, "looking at its size", 0))
    }

    /// Opens a blob for reading.
    pub fn blob(&self, digest: &str) -> Result<Arc<dyn Storage>> {
        open_in(self.blobs(), digest, Access::Read)
    }
}

impl Draft {
    /// A new layer over `parent`, a blob of the store.
    pub(super) fn new(
        store: &Store,
        size: Option<u64>,
        parent: Option<&Parent>,
        rights: Rights,
    ) -> Result<Self> {
        // Under the lock, since nobody holds the file for a moment.
        let _guard = store.lock()?;
        let (folder, name) = (&store.folders.blobs, files::draft_name()?);
        create(&folder.creating(rights), &name, size, parent, &store.layers)?;
        let chain = store.open_chain(folder, &name, Access::Write);
        let chain = chain.inspect_err(|_| drop(folder.remove(&name)))?;
        Ok(Self { store: store.clone(), name, chain })
    }

    /// The layer, to be filled.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Packs what the layer holds.
    pub(super) fn finish(self) -> Result<NewBlob> {
        let folder = &self.store.folders.blobs;
        // Most of the work comes before the lock.
        self.chain.flush()?;
        let guard = self.store.lock()?;
        self.chain.close()?;
        seal(&**folder, &self.name)?;
        // A chain that is open for reading holds a lock too.
        let source = self.store.open_chain(folder, &self.name, Access::Read)?;
        drop(guard);
        NewBlob::pack(&self.store, &source)
    }
}

impl NewBlob {
    /// Packs the newest layer of `source`, and takes the digest of that. It takes that layer's place,
    /// so it gets its rights.
    pub(super) fn pack(store: &Store, source: &Chain) -> Result<Self> {
        let folder = &store.folders.blobs;
        let fail = |error| Error::io(error, "writing the new layer").in_file(folder.path());
        let name = files::draft_name()?;
        let rights = source.successor_rights()?;
        let guard = store.lock()?;
        let file = folder.creating(rights).create(&name).map_err(fail)?;
        let write = || {
            file.lock(Lock::Shared).map_err(fail)?;
            drop(guard);
            let options = PackOptions { compression: Compression::default(), drop_equal: true };
            let sink = BufWriter::with_capacity(BUFFER, Sink::new(file.clone()));
            let (summary, sink) = source.pack(sink, &options, &mut |_| {})?;
            let sink = sink.into_inner().map_err(|error| fail(error.into_error()))?;
            file.sync_data().map_err(fail)?;
            Ok((summary, sink.digest()))
        };
        let (summary, digest) = write().inspect_err(|_| drop(folder.remove(&name)))?;
        Ok(Self {
            store: store.clone(),
            name: Some(name),
            _file: file,
            digest,
            length: summary.length,
            identity: Identity::Packed(summary.root),
            virtual_size: source.size(),
        })
    }

    /// Gives the layer its digest for a name; under the store's lock. The folder is not synced.
    pub(super) fn publish(mut self) -> Result<()> {
        let folder = self.store.blobs();
        let Some(name) = self.name.take() else { return Ok(()) };
        folder.rename(&name, &self.digest).map_err(|error| {
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
        digest::hex(&self.hasher.finalize())
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write_at(bytes.into(), self.at)?;
        self.hasher.update(bytes.get(..count).unwrap_or_default());
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// What stays of a draft that can't be removed is for `gc` to find.

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = self.store.blobs().remove(&self.name);
    }
}

impl Drop for NewBlob {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = self.store.blobs().remove(name);
        }
    }
}

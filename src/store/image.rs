//! Images: manifests, configurations and the blobs that they name.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::Arc;

use oci_spec::image::{
    Descriptor, DescriptorBuilder, History, HistoryBuilder, ImageConfiguration,
    ImageConfigurationBuilder, ImageManifest, ImageManifestBuilder, MediaType, RootFsBuilder,
    SCHEMA_VERSION, Sha256Digest,
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::blob::{Blob, Draft};
use super::index::{Index, MANIFEST_TYPE, hex_digest, is_hex_digest};
use super::{Reference, Store, json};
use crate::chain::{Chain, Layer, Parent};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::ParentLink;
use crate::storage::{Access, Lock, Rights, Storage, sync_folder, take_lock, write_all_at};
use crate::types::Identity;

/// Media type of a layer blob: a packed layer.
pub const LAYER_TYPE: &str = "application/vnd.thinply.layer.packed.v1";
/// Annotation of a layer: what children name it by.
const IDENTITY: &str = "io.thinply.layer.identity";
/// Annotation of a layer: the identity of the layer it stands on.
const PARENT: &str = "io.thinply.layer.parent";
/// Annotation of a layer: the size of its device in bytes.
const VIRTUAL_SIZE: &str = "io.thinply.layer.virtual-size";
const LINE: usize = 1 << 20;

/// An image of the store.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name; none for an image whose name went to another one.
    pub reference: Option<Reference>,
    /// Hexadecimal SHA-256 of its manifest, which is its id.
    pub id: String,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The configuration.
    pub config: ImageConfiguration,
}

/// What a new image is, beside its layer.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Its name.
    pub reference: Reference,
    /// How it came about, for its history.
    pub created_by: String,
    /// A remark for its history, possibly empty.
    pub comment: String,
}

/// A line of an image's history.
#[derive(Clone, Debug)]
pub struct HistoryEntry {
    /// Hexadecimal SHA-256 of the layer; none for a step that made no layer.
    pub layer: Option<String>,
    /// RFC 3339, possibly empty.
    pub created: String,
    /// How it came about.
    pub created_by: String,
    /// Bytes of disk that the layer takes.
    pub size: u64,
    /// A remark.
    pub comment: String,
}

fn bad(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, detail)
}

fn invalid(error: impl std::fmt::Display) -> Error {
    bad(format!("making a manifest: {error}"))
}

fn hex_of(descriptor: &Descriptor) -> Result<String> {
    let digest = descriptor.digest().to_string();
    let hex = hex_digest(&digest).map(str::to_owned);
    hex.ok_or_else(|| bad(format!("a digest {digest:?}, expected one of SHA-256")))
}

impl Image {
    /// The digests of the layers in hexadecimal, base first.
    pub fn layers(&self) -> Result<Vec<String>> {
        self.manifest.layers().iter().map(hex_of).collect()
    }

    /// The digest of the newest layer.
    pub(super) fn top(&self) -> Result<String> {
        self.layers()?.pop().ok_or_else(|| bad("an image without a layer"))
    }

    /// The media type of a layer that is no packed layer, as images of others have.
    fn foreign_layer(&self) -> Option<String> {
        let mut types = self.manifest.layers().iter().map(|layer| layer.media_type().to_string());
        types.find(|media_type| media_type != LAYER_TYPE)
    }

    /// When it was made, in RFC 3339.
    pub fn created(&self) -> &str {
        self.config.created().as_deref().unwrap_or_default()
    }

    /// The name, or `<none>`.
    pub fn name(&self) -> String {
        self.reference.as_ref().map_or_else(|| "<none>".into(), Reference::to_string)
    }
}

impl Store {
    /// All images, in the order of the index. Entries that are no images of thinply are left out.
    pub fn images(&self) -> Result<Vec<Image>> {
        let index = Index::read(self)?;
        let images = index.entries().filter(|entry| entry.is_manifest).map(|entry| {
            let image = self.load_image(&entry.digest, entry.reference)?;
            Ok(image.filter(|image| image.foreign_layer().is_none()))
        });
        images.filter_map(Result::transpose).collect()
    }

    /// The image of that name, or whose id begins with it (at least 4 digits).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InvalidInput`] for what is neither, or begins several.
    pub fn image(&self, name: &str) -> Result<Image> {
        let missing = || Error::new(ErrorKind::NotFound, format!("there is no image {name:?}"));
        let index = Index::read(self)?;
        let reference = name.parse::<Reference>();
        let named = index.entries().find(|entry| {
            entry.reference.is_some() && entry.reference.as_ref() == reference.as_ref().ok()
        });
        let id = name.strip_prefix("sha256:").unwrap_or(name);
        let is_id = id.len() >= 4 && id.bytes().all(|b| b.is_ascii_hexdigit());
        let entry = match named {
            Some(entry) => entry,
            None if is_id => {
                let mut found: Vec<_> =
                    index.entries().filter(|entry| entry.digest.starts_with(id)).collect();
                found.dedup_by(|a, b| a.digest == b.digest);
                if found.len() > 1 {
                    let detail = format!("{name} begins the ids of {} images", found.len());
                    return Err(Error::new(ErrorKind::InvalidInput, detail));
                }
                found.pop().ok_or_else(missing)?
            }
            None => return Err(reference.err().unwrap_or_else(missing)),
        };
        self.load_image(&entry.digest, entry.reference)?.ok_or_else(missing)
    }

    /// Reads a manifest and its configuration; `None` where the manifest went meanwhile.
    pub(super) fn load_image(
        &self,
        digest: &str,
        reference: Option<Reference>,
    ) -> Result<Option<Image>> {
        let Some(bytes) = self.json_blob(digest)? else { return Ok(None) };
        let path = self.blobs().path().join(digest);
        let manifest: ImageManifest = json::parse(&bytes).map_err(|error| error.in_file(&path))?;
        let config = hex_of(manifest.config()).map_err(|error| error.in_file(&path))?;
        let Some(bytes) = self.json_blob(&config)? else {
            let detail = format!("the configuration {config} of the image is missing");
            return Err(bad(detail).in_file(path));
        };
        let config = json::parse(&bytes)
            .map_err(|error| error.in_file(self.blobs().path().join(&config)))?;
        Ok(Some(Image { reference, id: digest.to_owned(), manifest, config }))
    }

    /// A blob that is JSON, if it has the digest that it should have.
    pub(super) fn json_blob(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        let Some(bytes) = json::read_small(self.blobs(), digest)? else { return Ok(None) };
        let found = json::sha256(&bytes);
        if found != digest {
            let error = bad(format!("the blob was altered: its SHA-256 is {found}"));
            return Err(error.in_file(self.blobs().path().join(digest)));
        }
        Ok(Some(bytes))
    }

    /// What a child of a layer blob has to know.
    pub(super) fn parent(&self, digest: &str) -> Result<Parent> {
        let path = self.blobs().path().join(digest);
        let file = self
            .blobs()
            .open(digest, Access::Read)
            .map_err(|error| Error::io(error, "opening a layer of the image").in_file(&path))?;
        let layer = Layer::open(file)?;
        let identity =
            layer.identity().ok_or_else(|| bad("a layer that is not sealed").in_file(&path))?;
        Ok(Parent {
            link: ParentLink { identity, hint: digest.to_owned() },
            virtual_size: layer.virtual_size(),
            newly_frozen: false,
        })
    }

    /// Opens an image for reading.
    pub fn open_image(&self, image: &Image) -> Result<Chain> {
        let (folder, layers) = (self.folders.blobs.clone(), self.layers.clone());
        Chain::open(folder, &image.top()?, Access::Read, layers)
    }

    /// A new layer to be filled, over an image or none; the image's layer will have its rights.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] without a size or an image, or for a size that can't be.
    pub fn draft(&self, size: Option<u64>, base: Option<&Image>, rights: Rights) -> Result<Draft> {
        let parent = base.map(|image| self.parent(&image.top()?)).transpose()?;
        Draft::new(self, size, parent.as_ref(), rights)
    }

    /// Makes an image of a finished layer over `base`, and gives it its name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the base was removed meanwhile; host errors. Without an answer
    /// nothing but unreferenced blobs may stay, which [`Store::collect`] clears.
    pub fn publish(&self, draft: Draft, base: Option<&Image>, new: &NewImage) -> Result<Image> {
        self.publish_blob(draft.finish()?, base, new)
    }

    /// [`Store::publish`] of a layer that is packed already.
    pub(super) fn publish_blob(
        &self,
        blob: Blob,
        base: Option<&Image>,
        new: &NewImage,
    ) -> Result<Image> {
        let parent = base.map(|base| self.parent(&base.top()?)).transpose()?;
        let created = json::now();
        let (manifest, config) = describe(&blob, base, parent.as_ref(), new, &created)?;
        let _guard = self.lock()?;
        if let Some(base) = base {
            for layer in base.layers()? {
                self.parent(&layer)?;
            }
        }
        blob.publish()?;
        sync_folder(self.blobs())?;
        self.put(&config)?;
        self.put(&manifest)?;
        let id = json::sha256(&manifest);
        let mut index = Index::read(self)?;
        index.set(&new.reference, manifest_descriptor(&id, manifest.len()));
        index.write(self)?;
        self.keep_reserve();
        let image = self.load_image(&id, Some(new.reference.clone()))?;
        image.ok_or_else(|| bad("the new image is not there"))
    }

    /// Stores a small blob under its digest, durably.
    fn put(&self, bytes: &[u8]) -> Result<()> {
        json::replace(self.blobs(), &json::sha256(bytes), bytes)
    }

    /// Gives an image another name. One that had it stays without a name.
    pub fn tag(&self, image: &Image, reference: &Reference) -> Result<()> {
        let _guard = self.lock()?;
        let mut index = Index::read(self)?;
        let Some(descriptor) = index.descriptor(&image.id).cloned() else {
            let detail = format!("the image {} was removed meanwhile", image.name());
            return Err(Error::new(ErrorKind::NotFound, detail));
        };
        index.set(reference, descriptor);
        index.write(self)
    }

    /// Takes a name from an image; with the last one the image goes, and what only it held.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] for the last name of an image that containers stand on or that is
    /// being read, with their names.
    pub fn remove_image(&self, name: &str) -> Result<Vec<String>> {
        let guard = self.lock()?;
        let image = self.image(name)?;
        let mut index = Index::read(self)?;
        let same = index.entries().filter(|entry| entry.digest == image.id).count();
        if same > 1 && image.reference.is_some() {
            index.remove(|entry| entry.reference == image.reference);
            index.write_smaller(self)?;
            return Ok(Vec::new());
        }
        let top = image.top()?;
        let users: Vec<_> = self
            .containers()?
            .into_iter()
            .filter(|c| c.base.as_deref() == Some(top.as_str()) || c.image_id == image.id)
            .map(|container| container.name)
            .collect();
        if !users.is_empty() && !self.has_twin(&index, &image)? {
            let some: Vec<_> = users.iter().take(5).map(String::as_str).collect();
            let more = users.len().saturating_sub(some.len());
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let detail =
                format!("image {} is used by container {}{more}", image.name(), some.join(", "));
            return Err(Error::new(ErrorKind::InUse, detail));
        }
        index.remove(|entry| entry.digest == image.id);
        let garbage = self.garbage_of(&index, &image)?;
        for blob in &garbage {
            let file = self.blobs().open(blob, Access::Write);
            if let Ok(file) = file {
                take_lock(&*file, Lock::Exclusive).map_err(|error| {
                    let detail = format!("image {} is being read: {error}", image.name());
                    Error::new(ErrorKind::InUse, detail)
                })?;
            }
        }
        index.write_smaller(self)?;
        for blob in &garbage {
            json::remove(self.blobs(), blob)?;
        }
        sync_folder(self.blobs())?;
        self.keep_reserve();
        drop(guard);
        Ok(garbage)
    }

    /// Whether another image of the index has the same newest layer.
    fn has_twin(&self, index: &Index, image: &Image) -> Result<bool> {
        let top = image.top()?;
        for entry in index.entries().filter(|entry| entry.is_manifest && entry.digest != image.id) {
            if let Some(other) = self.load_image(&entry.digest, None)?
                && other.top()? == top
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The image's steps, newest first as Docker shows them.
    pub fn history(&self, image: &Image) -> Result<Vec<HistoryEntry>> {
        let mut layers = image.layers()?.into_iter();
        let steps = image.config.history().clone().unwrap_or_default();
        let mut entries = Vec::new();
        for step in steps {
            let layer = if step.empty_layer() == Some(true) { None } else { layers.next() };
            entries.push(self.history_entry(layer, &step)?);
        }
        for layer in layers {
            entries.push(self.history_entry(Some(layer), &History::default())?);
        }
        entries.reverse();
        Ok(entries)
    }

    fn history_entry(&self, layer: Option<String>, step: &History) -> Result<HistoryEntry> {
        let size = layer.as_ref().map_or(Ok(0), |layer| self.blob_cost(layer))?;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        Ok(HistoryEntry {
            layer,
            created: text(step.created()),
            created_by: text(step.created_by()),
            size,
            comment: text(step.comment()),
        })
    }

    /// Bytes of disk that an image's layers take, shared ones included.
    pub fn image_cost(&self, image: &Image) -> Result<u64> {
        image.layers()?.iter().map(|layer| self.blob_cost(layer)).sum()
    }

    /// Bytes of disk that a blob takes.
    pub(super) fn blob_cost(&self, digest: &str) -> Result<u64> {
        let path = self.blobs().path().join(digest);
        let cost = self.blobs().open(digest, Access::Read).and_then(|file| file.allocated());
        cost.map_err(|error| Error::io(error, "looking at a blob").in_file(path))
    }

    /// Stores the bytes of a reader if they have the digest, with these rights, and leaves them
    /// unreferenced. True if they were not there before; those that were keep their rights.
    pub fn add_blob(&self, digest: &str, reader: &mut dyn Read, rights: &Rights) -> Result<bool> {
        if !is_hex_digest(digest) {
            return Err(bad(format!("a blob called {digest:?}, expected a SHA-256")));
        }
        let name = json::draft_name()?;
        let folder = self.blobs();
        let fail = |error| Error::io(error, "storing a blob").in_file(folder.path().join(digest));
        let old = folder.open(digest, Access::Read).ok();
        let rights = old.map_or(Ok(rights.clone()), |old| Rights::of_successor(&*old));
        let rights = rights.map_err(fail)?;
        let guard = self.lock()?;
        let file = folder.creating(rights).create(&name).map_err(fail)?;
        file.lock(Lock::Shared).map_err(fail)?;
        drop(guard);
        let mut store = || {
            let mut hasher = Sha256::new();
            let (mut buffer, mut at) = (vec![0; LINE], 0);
            loop {
                let count = read_full(reader, &mut buffer).map_err(fail)?;
                let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else { break };
                hasher.update(part);
                // What is zeros stays a hole.
                if part.iter().any(|&byte| byte != 0) {
                    write_all_at(&*file, part, at).map_err(fail)?;
                }
                at += count as u64;
            }
            file.set_length(at).map_err(fail)?;
            let found = json::hex(&hasher.finalize());
            if found != digest {
                return Err(bad(format!("the SHA-256 of blob {digest} is {found}")));
            }
            file.sync_data().map_err(fail)?;
            let _guard = self.lock()?;
            let fresh = !folder.same_file(digest, digest).map_err(fail)?;
            folder.rename(&name, digest).map_err(fail)?;
            sync_folder(folder)?;
            Ok(fresh)
        };
        store().inspect_err(|_| {
            let _ = folder.remove(&name);
        })
    }

    /// Gives names to manifests whose blobs were added, after checking that all is there.
    pub fn add_images(&self, index: &[u8]) -> Result<Vec<Image>> {
        let value: Value = json::parse(index)?;
        let _guard = self.lock()?;
        let mut own = Index::read(self)?;
        let mut images = Vec::new();
        let entries = value.get("manifests").and_then(Value::as_array);
        for entry in entries.into_iter().flatten() {
            let digest = entry.get("digest").and_then(Value::as_str).and_then(hex_digest);
            let digest = digest.ok_or_else(|| bad("an entry without a SHA-256 digest"))?;
            let name = entry.pointer("/annotations/org.opencontainers.image.ref.name");
            let reference = name.and_then(Value::as_str).map(str::parse).transpose()?;
            let image = self.load_image(digest, reference.clone())?;
            let image = image.ok_or_else(|| bad(format!("manifest {digest} is missing")))?;
            self.check_layers(&image)?;
            match reference {
                Some(reference) => own.set(&reference, entry.clone()),
                None => return Err(bad(format!("manifest {digest} has no name"))),
            }
            images.push(image);
        }
        own.write(self)?;
        Ok(images)
    }

    /// The digests of all blobs of an image: manifest, configuration, layers.
    pub fn blobs_of(&self, image: &Image) -> Result<Vec<String>> {
        let mut blobs = vec![image.id.clone(), hex_of(image.manifest.config())?];
        blobs.extend(image.layers()?);
        Ok(blobs)
    }

    /// Opens a blob for reading.
    pub fn blob(&self, digest: &str) -> Result<Arc<dyn Storage>> {
        let fail =
            |error| Error::io(error, "opening a blob").in_file(self.blobs().path().join(digest));
        self.blobs().open(digest, Access::Read).map_err(fail)
    }

    /// An index of these images alone, as a layout of its own has it.
    pub fn index_of(&self, images: &[Image]) -> Result<Vec<u8>> {
        let own = Index::read(self)?;
        let mut index = Index::default();
        for image in images {
            let descriptor = own.descriptor(&image.id).cloned();
            let descriptor = descriptor.ok_or_else(|| bad("the image was removed meanwhile"))?;
            let reference = image.reference.as_ref().ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, "an image without a name can't be saved")
            })?;
            index.set(reference, descriptor);
        }
        json::canonical(index.value())
    }

    /// Opens the whole chain, and compares it with the manifest.
    fn check_layers(&self, image: &Image) -> Result<()> {
        if let Some(found) = image.foreign_layer() {
            let detail = format!("a layer of type {found}, expected {LAYER_TYPE}");
            return Err(Error::new(ErrorKind::Unsupported, detail));
        }
        let layers = image.layers()?;
        let chain = self.open_image(image)?;
        let files: Vec<_> = chain
            .paths()
            .iter()
            .rev()
            .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
            .collect();
        if files != layers {
            return Err(bad("the layers of the manifest are not the chain of its newest layer"));
        }
        Ok(())
    }
}

fn read_full(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn manifest_descriptor(digest: &str, length: usize) -> Value {
    serde_json::json!({
        "mediaType": MANIFEST_TYPE,
        "digest": format!("sha256:{digest}"),
        "size": length,
    })
}

fn sha(digest: &str) -> Result<Sha256Digest> {
    digest.parse().map_err(invalid)
}

fn identity_text(identity: &Identity) -> String {
    match identity {
        Identity::Frozen(uuid, freeze) => format!("frozen:{uuid}:{freeze}"),
        Identity::Packed(root) => format!("packed:{root}"),
    }
}

/// The bytes of the manifest and of the configuration of an image with one more layer.
fn describe(
    blob: &Blob,
    base: Option<&Image>,
    parent: Option<&Parent>,
    new: &NewImage,
    created: &str,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut annotations = HashMap::from([
        (IDENTITY.to_owned(), identity_text(&blob.identity)),
        (VIRTUAL_SIZE.to_owned(), blob.virtual_size.to_string()),
    ]);
    if let Some(parent) = parent {
        annotations.insert(PARENT.to_owned(), identity_text(&parent.link.identity));
    }
    let layer = DescriptorBuilder::default()
        .media_type(MediaType::Other(LAYER_TYPE.into()))
        .digest(sha(&blob.digest)?)
        .size(blob.length)
        .annotations(annotations)
        .build()
        .map_err(invalid)?;
    let mut layers = base.map_or_else(Vec::new, |base| base.manifest.layers().clone());
    layers.push(layer);

    let step = HistoryBuilder::default()
        .created(created)
        .created_by(new.created_by.clone())
        .comment(new.comment.clone())
        .build()
        .map_err(invalid)?;
    let mut history = base.and_then(|base| base.config.history().clone()).unwrap_or_default();
    history.push(step);
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.digest().to_string()).collect();
    let root =
        RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build().map_err(invalid)?;
    let config = ImageConfigurationBuilder::default()
        .created(created)
        .rootfs(root)
        .history(history)
        .build()
        .map_err(invalid)?;
    let config = json::canonical(&config)?;

    let descriptor = DescriptorBuilder::default()
        .media_type(MediaType::ImageConfig)
        .digest(sha(&json::sha256(&config))?)
        .size(config.len() as u64)
        .build()
        .map_err(invalid)?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(descriptor)
        .layers(layers)
        .build()
        .map_err(invalid)?;
    Ok((json::canonical(&manifest)?, config))
}

//! Images: their manifests and configurations, their names and their histories.

use oci_spec::image::{Descriptor, History, ImageConfiguration, ImageManifest};

use super::digest::hex_digest;
use super::index::Index;
use super::{OpenDisk, Reference, Store, files, json};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Lock, sync_folder, take_lock};

/// Media type of a layer blob: a packed layer.
pub(super) const LAYER_TYPE: &str = "application/vnd.thinply.layer.packed.v1";

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

pub(super) fn bad(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, detail)
}

pub(super) fn hex_of(descriptor: &Descriptor) -> Result<String> {
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
    pub(super) fn foreign_layer(&self) -> Option<String> {
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

    /// Opens an image for reading.
    pub fn open_image(&self, image: &Image) -> Result<OpenDisk> {
        let chain = self.open_chain(&self.folders.blobs, &image.top()?, Access::Read)?;
        Ok(OpenDisk::new(self, None, chain))
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
            files::remove(self.blobs(), blob)?;
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
}

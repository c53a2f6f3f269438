//! Images: their manifests and configurations, their names and their histories.

use std::collections::HashMap;

use oci_spec::image::{Descriptor, History, ImageConfiguration, ImageManifest};

use super::digest::hex_digest;
use super::index::{Index, IndexEntry};
use super::{DiskKind, Finding, Listed, OpenDisk, Reference, Store, files, json};
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

/// What a removal took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that stand for nothing any more.
    pub names: Vec<Reference>,
    /// Hexadecimal SHA-256 of the blobs that went.
    pub blobs: Vec<String>,
    /// What can't be read and may need the blobs, or can't be removed: so they stayed.
    pub kept: Vec<Finding>,
}

/// What a manifest of the index is of.
#[derive(Clone, Debug)]
pub(super) enum Manifest {
    Image(Box<Image>),
    /// Something of others, and what tells it from an image of thinply.
    Foreign(String),
    Missing,
}

/// What tells a manifest from one of thinply's: it has layers, and all of them are packed layers.
/// Only what is one is read any further, so that whatever others keep in the same layout is left alone.
fn foreign(manifest: &[u8]) -> Option<String> {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(manifest) else {
        return Some("no JSON".into());
    };
    if let Some(inner) = value.get("manifests").and_then(serde_json::Value::as_array) {
        let text = |entry: &serde_json::Value, place| {
            entry.pointer(place).and_then(serde_json::Value::as_str).unwrap_or("?").to_owned()
        };
        let platform = |entry: &serde_json::Value| {
            format!("{}/{}", text(entry, "/platform/os"), text(entry, "/platform/architecture"))
        };
        let platforms: Vec<_> = inner.iter().map(platform).collect();
        let some = some_of(&platforms).escape_debug().to_string();
        return Some(format!("an index of images for {some}: choose one of them"));
    }
    if let Some(kind) = value.get("artifactType").and_then(serde_json::Value::as_str) {
        return Some(format!("an artifact of type {kind:?}"));
    }
    let Some(layers) = value.get("layers").and_then(serde_json::Value::as_array) else {
        return Some("a manifest without layers".into());
    };
    let kind = |layer: &serde_json::Value| {
        layer.get("mediaType").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
    };
    match layers.iter().map(kind).find(|kind| kind != LAYER_TYPE) {
        Some(kind) => Some(format!("a layer of type {kind:?}, expected {LAYER_TYPE}")),
        None if layers.is_empty() => Some("a manifest without layers".into()),
        None => None,
    }
}

fn missing(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no image {name:?}"))
}

/// The first few, for a message.
fn some_of(names: &[impl ToString]) -> String {
    let some: Vec<_> = names.iter().take(5).map(ToString::to_string).collect();
    let more = names.len() - some.len();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", some.join(", "))
}

/// An entry of the index, and how it was called.
struct Found {
    entry: IndexEntry,
    /// By its name, not its id.
    by_name: bool,
}

/// The entry of that name, or whose digest begins with it (at least 4 digits).
fn find(index: &Index, name: &str) -> Result<Found> {
    let reference = name.parse::<Reference>();
    let named = index.entries().find(|entry| {
        entry.reference.is_some() && entry.reference.as_ref() == reference.as_ref().ok()
    });
    if let Some(entry) = named {
        return Ok(Found { entry, by_name: true });
    }
    let id = name.strip_prefix("sha256:").unwrap_or(name);
    if id.len() < 4 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(reference.err().unwrap_or_else(|| missing(name)));
    }
    let mut found: Vec<_> = index.entries().filter(|entry| entry.digest.starts_with(id)).collect();
    found.sort_by(|a, b| a.digest.cmp(&b.digest));
    found.dedup_by(|a, b| a.digest == b.digest);
    if found.len() > 1 {
        let detail = format!("{name} begins the ids of {} images", found.len());
        return Err(Error::new(ErrorKind::InvalidInput, detail));
    }
    let entry = found.pop().ok_or_else(|| missing(name))?;
    Ok(Found { entry, by_name: false })
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
    ///
    /// # Errors
    /// Those of reading the index.
    pub fn images(&self) -> Result<Listed<Image>> {
        let index = Index::read(self)?;
        let mut listed = Listed::default();
        let mut missing = Vec::new();
        // Many names may stand for one image.
        let mut known = HashMap::new();
        for entry in index.entries().filter(|entry| entry.is_manifest) {
            let found = match known.get(&entry.digest) {
                Some(found) => Clone::clone(found),
                None => {
                    let found = self.look_up(&entry.digest, None);
                    known.insert(entry.digest.clone(), found.clone());
                    found
                }
            };
            match found {
                Ok(Manifest::Image(image)) => {
                    listed.found.push(Image { reference: entry.reference, ..*image });
                }
                Ok(Manifest::Foreign(_)) => {}
                Ok(Manifest::Missing) => missing.push(entry),
                Err(error) => listed.bad.push(Finding::new(entry.label(), error)),
            }
        }
        if !missing.is_empty() {
            // One that went meanwhile is no loss.
            let now = Index::read(self)?;
            missing.retain(|entry| now.descriptor(&entry.digest).is_some());
        }
        let lost = |entry: &IndexEntry| {
            Finding::new(entry.label(), format!("manifest {} is missing", entry.digest))
        };
        listed.bad.extend(missing.iter().map(lost));
        Ok(listed)
    }

    /// The image of that name, or whose id begins with it (at least 4 digits).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InvalidInput`] for what is neither, or begins several;
    /// [`ErrorKind::Unsupported`] for what is no image of thinply.
    pub fn image(&self, name: &str) -> Result<Image> {
        let entry = find(&Index::read(self)?, name)?.entry;
        self.load_image(&entry.digest, entry.reference)?.ok_or_else(|| missing(name))
    }

    /// Reads a manifest and its configuration; `None` where the manifest went meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for what is no image of thinply; [`ErrorKind::Corrupt`]; host errors.
    pub(super) fn load_image(
        &self,
        digest: &str,
        reference: Option<Reference>,
    ) -> Result<Option<Image>> {
        match self.look_up(digest, reference)? {
            Manifest::Image(image) => Ok(Some(*image)),
            Manifest::Missing => Ok(None),
            Manifest::Foreign(why) => {
                let detail = format!("{digest} is no image of thinply: {why}");
                Err(Error::new(ErrorKind::Unsupported, detail))
            }
        }
    }

    /// Reads a manifest, whatever it is of.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a blob that was altered, and for an image of thinply that lacks
    /// something; host errors.
    pub(super) fn look_up(&self, digest: &str, reference: Option<Reference>) -> Result<Manifest> {
        let Some(bytes) = self.json_blob(digest)? else { return Ok(Manifest::Missing) };
        if let Some(why) = foreign(&bytes) {
            return Ok(Manifest::Foreign(why));
        }
        let path = self.blobs().path().join(digest);
        let manifest: ImageManifest = json::parse(&bytes).map_err(|error| error.in_file(&path))?;
        let config = hex_of(manifest.config()).map_err(|error| error.in_file(&path))?;
        let Some(bytes) = self.json_blob(&config)? else {
            let detail = format!("the configuration {config} of the image is missing");
            return Err(bad(detail).in_file(path));
        };
        let config = json::parse(&bytes)
            .map_err(|error| error.in_file(self.blobs().path().join(&config)))?;
        let image = Image { reference, id: digest.to_owned(), manifest, config };
        Ok(Manifest::Image(Box::new(image)))
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

    /// Takes a name from an image; with the last one the image goes, and what only it held. An id
    /// stands for its only name, or for all of them where that is insisted on (`all_names`). An image
    /// that can't be read goes too.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] for the last name of an image that containers stand on or that is
    /// being read, with their names; [`ErrorKind::InvalidInput`] for an id with several names.
    pub fn remove_image(&self, name: &str, all_names: bool) -> Result<Removed> {
        let guard = self.lock()?;
        let mut index = Index::read(self)?;
        let Found { entry, by_name } = find(&index, name)?;
        let same = index.entries().filter(|other| other.digest == entry.digest);
        let names: Vec<_> = same.filter_map(|other| other.reference).collect();
        if by_name && names.len() > 1 {
            index.remove(|other| other.reference == entry.reference);
            index.write_smaller(self)?;
            return Ok(Removed {
                names: entry.reference.into_iter().collect(),
                ..Removed::default()
            });
        }
        if names.len() > 1 && !all_names {
            let some = some_of(&names);
            let detail =
                format!("{name} has {} names ({some}): say which, or --force", names.len());
            return Err(Error::new(ErrorKind::InvalidInput, detail));
        }
        self.check_unused(&index, &entry)?;
        index.remove(|other| other.digest == entry.digest);
        let (mut garbage, mut kept) = self.garbage_of(&index, &entry.digest)?;
        let mut held = Vec::new();
        for blob in &garbage {
            if let Ok(file) = self.blobs().open(blob, Access::Write) {
                take_lock(&*file, Lock::Exclusive).map_err(|error| {
                    let detail = format!("{} is being read: {error}", entry.label());
                    Error::new(ErrorKind::InUse, detail)
                })?;
                held.push(file);
            }
        }
        index.write_smaller(self)?;
        garbage.retain(|blob| {
            let removed = files::remove(self.blobs(), blob);
            kept.extend(removed.as_ref().err().map(|error| Finding::new(blob, error)));
            removed.is_ok()
        });
        sync_folder(self.blobs())?;
        self.keep_reserve();
        drop(guard);
        Ok(Removed { names, blobs: garbage, kept })
    }

    /// Fails where containers stand on an image of which no other has the layers.
    fn check_unused(&self, index: &Index, entry: &IndexEntry) -> Result<()> {
        // Of an image that can't be read only its id is known.
        let image = match self.look_up(&entry.digest, None) {
            Ok(Manifest::Image(image)) => Some(image),
            _ => None,
        };
        let top = image.as_ref().map(|image| image.top()).transpose()?;
        let mut users = self.disk_names(DiskKind::Container)?;
        users.retain(|name| self.stands_on(name, &entry.digest, top.as_deref()));
        let has_twin = || image.as_ref().map_or(Ok(false), |image| self.has_twin(index, image));
        if !users.is_empty() && !has_twin()? {
            let detail = format!("{} is used by container {}", entry.label(), some_of(&users));
            return Err(Error::new(ErrorKind::InUse, detail));
        }
        Ok(())
    }

    /// Whether another image of the index has the same newest layer.
    fn has_twin(&self, index: &Index, image: &Image) -> Result<bool> {
        let top = image.top()?;
        for entry in index.entries().filter(|entry| entry.is_manifest && entry.digest != image.id) {
            if let Ok(Manifest::Image(other)) = self.look_up(&entry.digest, None)
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

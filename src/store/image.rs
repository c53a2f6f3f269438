//! Images: their manifests and configurations, their names and their histories.

use std::collections::HashMap;
use std::sync::Arc;

use oci_spec::image::{Descriptor, History, ImageConfiguration, ImageManifest};
use serde_json::Value;

use super::blob::Document;
use super::digest::hex_digest;
use super::index::{Index, IndexEntry, Named};
use super::{Finding, OpenDisk, Reference, Store, Survey, files, json};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Lock, failed, open_in, sync_folder, take_lock};

/// Media type of a layer blob: a packed layer.
pub(super) const LAYER_TYPE: &str = "application/vnd.thinply.layer.packed.v1";

/// An image of the store. Cheap to clone: it may have many names.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name; none for an image whose name went to another one.
    pub reference: Option<Reference>,
    /// Hexadecimal SHA-256 of its manifest, which is its id.
    pub id: String,
    /// The manifest.
    pub manifest: Arc<ImageManifest>,
    /// The configuration.
    pub config: Arc<ImageConfiguration>,
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

/// What a manifest in the index turns out to be.
pub(super) enum Manifest {
    Image(Image),
    /// Something of others, and why it is no image of thinply.
    Foreign(Error),
    Missing,
}

/// What a removal took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemovedImage {
    /// Hexadecimal SHA-256 of the image's manifest.
    pub id: String,
    /// The names that it has no more.
    pub names: Vec<Reference>,
    /// The blobs that went, if those were its last names.
    pub blobs: Vec<String>,
    /// What kept blobs from going, which [`Store::collect`] takes once it is mended or gone.
    pub bad: Vec<Finding>,
}

/// What images take on disk, for those who ask about many: they share layers.
pub struct Costs<'a> {
    store: &'a Store,
    layers: HashMap<String, u64>,
    images: HashMap<String, u64>,
}

impl<'a> Costs<'a> {
    /// For the images of `store`.
    pub fn new(store: &'a Store) -> Self {
        Self { store, layers: HashMap::new(), images: HashMap::new() }
    }

    /// Bytes of disk that an image's layers take, shared ones included.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a layer of another length than the manifest says; host errors.
    pub fn image(&mut self, image: &Image) -> Result<u64> {
        if let Some(&cost) = self.images.get(&image.id) {
            return Ok(cost);
        }
        let layers = image.manifest.layers().iter().map(|layer| self.layer(layer));
        let cost = layers.sum::<Result<u64>>()?;
        self.images.insert(image.id.clone(), cost);
        Ok(cost)
    }

    /// Bytes of disk that a layer takes.
    pub(super) fn layer(&mut self, layer: &Descriptor) -> Result<u64> {
        let digest = hex_of(layer)?;
        if let Some(&cost) = self.layers.get(&digest) {
            return Ok(cost);
        }
        let file = open_in(self.store.blobs(), &digest, Access::Read)?;
        let length = file.length().map_err(failed(&*file, "reading the length", 0))?;
        if length != layer.size() {
            let detail = format!("a layer of {length} bytes, expected {}", layer.size());
            return Err(bad(detail).in_file(file.path()));
        }
        let cost = file.allocated().map_err(failed(&*file, "looking at its size", 0))?;
        self.layers.insert(digest, cost);
        Ok(cost)
    }
}

/// What to say of an index that stands in a manifest's place.
fn platforms(manifests: &Value) -> String {
    let platform = |entry: &Value| {
        let part = |name| entry.pointer(name).and_then(Value::as_str).unwrap_or("?").to_owned();
        format!("{}/{}", part("/platform/os"), part("/platform/architecture"))
    };
    let list = manifests.as_array().map_or(&[][..], Vec::as_slice).iter().take(10).map(platform);
    let list = list.collect::<Vec<_>>().join(", ");
    format!("an index of images for {}: choose one of them", list.escape_debug())
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
    /// All images, in the order of the index, and those that are damaged: whose manifest,
    /// configuration or a layer is missing or not what it should be. Layers are not read for it.
    /// Entries that are no images of thinply are left out.
    pub fn images(&self) -> Result<Survey<Vec<Image>>> {
        self.settled(|| Ok(self.look_at_images(&Index::read(self)?, &mut Costs::new(self))))
    }

    /// [`Store::images`] of an index, which may be about to change.
    pub(super) fn look_at_images(
        &self,
        index: &Index,
        costs: &mut Costs<'_>,
    ) -> Survey<Vec<Image>> {
        let mut survey = Survey::<Vec<Image>>::default();
        let mut known = HashMap::new();
        for entry in index.manifests() {
            let found = known.entry(entry.digest.clone()).or_insert_with(|| {
                match self.read_manifest(&entry.digest) {
                    Ok(Manifest::Image(image)) => costs.image(&image).map(|_| Some(image)),
                    Ok(Manifest::Foreign(_)) => Ok(None),
                    Ok(Manifest::Missing) => Err(missing_manifest(&entry)),
                    Err(error) => Err(error),
                }
            });
            match found {
                Ok(Some(image)) => {
                    survey.good.push(Image { reference: entry.reference, ..image.clone() });
                }
                Ok(None) => {}
                Err(error) => survey.bad.push(Finding::new(entry.label(), error)),
            }
        }
        survey
    }

    /// The image of that name, or whose id begins with it (at least 4 digits).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InvalidInput`] for what is neither, or begins several;
    /// [`ErrorKind::Unsupported`] for what is no image of thinply; [`ErrorKind::Corrupt`].
    pub fn image(&self, name: &str) -> Result<Image> {
        let entry = Index::read(self)?.find(name)?.entry();
        let image = self.load_image(&entry.digest, entry.reference.clone())?;
        image.ok_or_else(|| missing_manifest(&entry))
    }

    /// Reads the manifest and the configuration of an image; `None` where the manifest is missing.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for what is no image of thinply; [`ErrorKind::Corrupt`].
    pub(super) fn load_image(
        &self,
        digest: &str,
        reference: Option<Reference>,
    ) -> Result<Option<Image>> {
        match self.read_manifest(digest)? {
            Manifest::Image(image) => Ok(Some(Image { reference, ..image })),
            Manifest::Foreign(why) => Err(why),
            Manifest::Missing => Ok(None),
        }
    }

    /// Reads a manifest, and if it is an image's the configuration too.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an image that is not whole; host errors.
    pub(super) fn read_manifest(&self, digest: &str) -> Result<Manifest> {
        let path = self.blobs().path().join(digest);
        let (bytes, value) = match self.document(digest)? {
            Document::Json(bytes, value) => (bytes, value),
            Document::Other => {
                let why = Error::new(ErrorKind::Unsupported, "no image of thinply: no manifest");
                return Ok(Manifest::Foreign(why.in_file(path)));
            }
            Document::Missing => return Ok(Manifest::Missing),
        };
        let (own, others): (Vec<_>, Vec<_>) =
            layer_types(&value).partition(|layer_type| *layer_type == LAYER_TYPE);
        if own.is_empty() || !others.is_empty() {
            let found = match others.first() {
                Some(other) => format!("a layer of type {other:?}, expected {LAYER_TYPE}"),
                None => value.get("manifests").map_or("it has no layers".into(), platforms),
            };
            let why = Error::new(ErrorKind::Unsupported, format!("no image of thinply: {found}"));
            return Ok(Manifest::Foreign(why.in_file(path)));
        }
        let manifest: ImageManifest = json::parse(&bytes).map_err(|error| error.in_file(&path))?;
        let config = hex_of(manifest.config()).map_err(|error| error.in_file(&path))?;
        let Some(bytes) = self.json_blob(&config)? else {
            let detail = format!("the configuration {config} of the image is missing");
            return Err(bad(detail).in_file(path));
        };
        let config = json::parse(&bytes)
            .map_err(|error| error.in_file(self.blobs().path().join(&config)))?;
        let (manifest, config) = (Arc::new(manifest), Arc::new(config));
        Ok(Manifest::Image(Image { reference: None, id: digest.to_owned(), manifest, config }))
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

    /// Takes a name from an image; with the last one the image goes, and what only it held. By its id
    /// an image goes that has one name, or with `force` several. A damaged one goes too.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] for the last name of an image that containers stand on or that is
    /// being read, with their names; [`ErrorKind::InvalidInput`] for the id of one with several names;
    /// [`ErrorKind::Unsupported`] for what is no image of thinply.
    pub fn remove_image(&self, name: &str, force: bool) -> Result<RemovedImage> {
        let guard = self.lock()?;
        let mut index = Index::read(self)?;
        let named = index.find(name)?;
        let by_id = matches!(named, Named::ById(_));
        let entry = named.entry();
        // What can't be read may go all the same.
        let image = match self.read_manifest(&entry.digest) {
            Ok(Manifest::Image(image)) => Some(image),
            Ok(Manifest::Foreign(why)) => return Err(why),
            Ok(Manifest::Missing) | Err(_) => None,
        };
        let same = |other: &IndexEntry| other.is_manifest && other.digest == entry.digest;
        let names: Vec<_> =
            index.manifests().filter(same).filter_map(|entry| entry.reference).collect();
        if !by_id && index.manifests().filter(same).count() > 1 {
            index.remove(|other| same(other) && other.reference == entry.reference);
            index.write_smaller(self)?;
            let names = entry.reference.into_iter().collect();
            return Ok(RemovedImage { id: entry.digest, names, ..RemovedImage::default() });
        }
        if names.len() > 1 && !force {
            let detail = format!(
                "the image {name} has {} names: remove them by name, or all with --force: {}",
                names.len(),
                some_of(names.iter().map(Reference::to_string)),
            );
            return Err(Error::new(ErrorKind::InvalidInput, detail));
        }
        self.check_unused(&index, &entry, image.as_ref())?;
        index.remove(same);
        let garbage = self.garbage_of(&index, &entry.digest);
        for blob in &garbage.good {
            if let Ok(file) = self.blobs().open(blob, Access::Write) {
                take_lock(&*file, Lock::Exclusive).map_err(|error| {
                    let detail = format!("{} is being read: {error}", entry.label());
                    Error::new(ErrorKind::InUse, detail)
                })?;
            }
        }
        index.write_smaller(self)?;
        let mut removed =
            RemovedImage { id: entry.digest, names, bad: garbage.bad, ..RemovedImage::default() };
        for blob in garbage.good {
            match files::remove(self.blobs(), &blob) {
                Ok(()) => removed.blobs.push(blob),
                Err(error) => removed.bad.push(Finding::new(format!("blob {blob}"), error)),
            }
        }
        sync_folder(self.blobs())?;
        // Where the disk is full, `gc` does that later.
        let _ = self.forget_made(&guard);
        self.keep_reserve();
        Ok(removed)
    }

    /// Refuses the removal of an image that containers stand on, unless another image has its layers.
    fn check_unused(&self, index: &Index, entry: &IndexEntry, image: Option<&Image>) -> Result<()> {
        let top = image.map(Image::top).transpose()?;
        let stands = self.standing()?;
        let mut users = stands
            .iter()
            .filter(|on| on.image_id == entry.digest || (top.is_some() && on.base == top))
            .map(|on| on.container.clone())
            .peekable();
        if users.peek().is_none() || self.has_twin(index, entry, top.as_deref()) {
            return Ok(());
        }
        let detail = format!("{} is used by container {}", entry.label(), some_of(users));
        Err(Error::new(ErrorKind::InUse, detail))
    }

    /// Whether another image of the index has this newest layer.
    fn has_twin(&self, index: &Index, entry: &IndexEntry, top: Option<&str>) -> bool {
        let mut others: Vec<_> =
            index.manifests().map(|other| other.digest).filter(|id| *id != entry.digest).collect();
        others.sort();
        others.dedup();
        top.is_some_and(|top| {
            others.iter().any(|other| {
                let other = self.load_image(other, None).ok().flatten();
                other.is_some_and(|other| other.top().is_ok_and(|other| other == top))
            })
        })
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
        Costs::new(self).image(image)
    }
}

fn missing_manifest(entry: &IndexEntry) -> Error {
    bad(format!("the manifest {} is missing", entry.digest))
}

/// The media types of the layers that JSON lists, if it is a manifest.
fn layer_types(manifest: &Value) -> impl Iterator<Item = &str> {
    let layers = manifest.get("layers").and_then(Value::as_array).into_iter().flatten();
    layers.map(|layer| layer.get("mediaType").and_then(Value::as_str).unwrap_or_default())
}

/// Some of many names, and how many more there are.
fn some_of(names: impl Iterator<Item = String>) -> String {
    let names: Vec<_> = names.collect();
    let some = names.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(5) {
        0 => some,
        more => format!("{some} and {more} more"),
    }
}

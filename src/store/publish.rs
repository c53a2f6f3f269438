//! New images: the manifest and the configuration that describe a new layer.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use oci_spec::image::{
    DescriptorBuilder, HistoryBuilder, ImageConfigurationBuilder, ImageManifestBuilder, MediaType,
    RootFsBuilder, SCHEMA_VERSION, Sha256Digest,
};
use serde_json::Value;

use super::blob::{Draft, NewBlob};
use super::image::{LAYER_TYPE, bad};
use super::index::{Index, MANIFEST_TYPE};
use super::{Image, Reference, Store, digest, files, json};
use crate::chain::Parent;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Rights, sync_folder};
use crate::types::Identity;

/// Annotation of a layer: what children name it by.
const IDENTITY: &str = "io.thinply.layer.identity";
/// Annotation of a layer: the identity of the layer it stands on.
const PARENT: &str = "io.thinply.layer.parent";
/// Annotation of a layer: the size of its device in bytes.
const VIRTUAL_SIZE: &str = "io.thinply.layer.virtual-size";

/// The end of the year 9999, in seconds since 1970.
const LATEST: u64 = 253_402_300_799;

/// What a new image is, beside its layer.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Its name.
    pub reference: Reference,
    /// How it came about, for its history.
    pub created_by: String,
    /// A remark for its history, possibly empty.
    pub comment: String,
    /// Whether the file system in it is one that this host made ([`Store::is_made_here`]).
    pub made_here: bool,
    /// When it was made: from 1970 to 9999, kept in whole seconds.
    pub created: SystemTime,
}

fn invalid(error: impl std::fmt::Display) -> Error {
    bad(format!("making a manifest: {error}"))
}

impl Store {
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
    /// [`ErrorKind::NotFound`] if the base was removed meanwhile; [`ErrorKind::InvalidInput`] for a time
    /// of creation that can't be; host errors. Nothing stays then, and after a kill nothing but
    /// unreferenced blobs, which [`Store::collect`] clears.
    pub fn publish(&self, draft: Draft, base: Option<&Image>, new: &NewImage) -> Result<Image> {
        self.publish_blob(draft.finish()?, base, new)
    }

    /// [`Store::publish`] of a layer that is packed already.
    pub(super) fn publish_blob(
        &self,
        blob: NewBlob,
        base: Option<&Image>,
        new: &NewImage,
    ) -> Result<Image> {
        let parent = base.map(|base| self.parent(&base.top()?)).transpose()?;
        let (manifest, config) = describe(&blob, base, parent.as_ref(), new)?;
        let guard = self.lock()?;
        if let Some(base) = base {
            for layer in base.layers()? {
                self.parent(&layer)?;
            }
        }
        let id = digest::sha256(&manifest);
        let layer = blob.digest.clone();
        let blobs = vec![layer.clone(), digest::sha256(&config), id.clone()];
        let publish = || {
            blob.publish()?;
            sync_folder(self.blobs())?;
            self.put(&config)?;
            self.put(&manifest)?;
            if new.made_here {
                self.note_made_layer(&layer, &guard)?;
            }
            let mut index = Index::read(self)?;
            index.set(&new.reference, manifest_descriptor(&id, manifest.len()));
            index.write(self)
        };
        publish().inspect_err(|_| self.withdraw(blobs, &guard))?;
        self.keep_reserve();
        let image = self.load_image(&id, Some(new.reference.clone()))?;
        image.ok_or_else(|| bad("the new image is not there"))
    }
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

/// A time as the OCI specification writes it.
fn written(time: SystemTime) -> Result<String> {
    let since = time.duration_since(UNIX_EPOCH).ok();
    since.filter(|since| since.as_secs() <= LATEST).ok_or_else(|| {
        let detail = "an image is created between 1970 and 9999";
        Error::new(ErrorKind::InvalidInput, detail)
    })?;
    Ok(humantime::format_rfc3339_seconds(time).to_string())
}

/// The bytes of the manifest and of the configuration of an image with one more layer.
fn describe(
    blob: &NewBlob,
    base: Option<&Image>,
    parent: Option<&Parent>,
    new: &NewImage,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let created = written(new.created)?;
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
        .created(created.clone())
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
        .digest(sha(&digest::sha256(&config))?)
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
    let manifest = json::canonical(&manifest)?;
    // Before anything of the image is there. A long chain with long remarks has a long history.
    for (what, bytes) in [("manifest", &manifest), ("configuration", &config)] {
        files::check_length(what, bytes)
            .map_err(|error| Error::new(error.kind(), format!("the image's {what} {error}")))?;
    }
    Ok((manifest, config))
}

//! `index.json`: which manifests there are, and their names. Entries of others are kept as they
//! are.

use serde_json::{Value, json};

use super::digest::hex_digest;
use super::{RESERVE_FILE, Reference, Store, files, json};
use crate::error::{Error, ErrorKind, Result};

pub(super) const FILE: &str = "index.json";
const NAME: &str = "org.opencontainers.image.ref.name";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// The index as raw JSON.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Index(Value);

impl Default for Index {
    fn default() -> Self {
        Self(json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}))
    }
}

/// One manifest in the index.
#[derive(Clone, Debug)]
pub(super) struct IndexEntry {
    /// Hexadecimal SHA-256.
    pub digest: String,
    /// None for an image whose name went to another one.
    pub reference: Option<Reference>,
    /// Whether it is an image's manifest rather than an index of others or something unknown.
    pub is_manifest: bool,
}

fn name_of(entry: &Value) -> Option<Reference> {
    entry.get("annotations")?.get(NAME)?.as_str()?.parse().ok()
}

impl Index {
    pub fn read(store: &Store) -> Result<Self> {
        let Some(value) = json::read::<Value>(store.root(), FILE)? else {
            let error = Error::new(ErrorKind::Corrupt, "the store has no index");
            return Err(error.in_file(store.root().path().join(FILE)));
        };
        if !value.get("manifests").is_some_and(Value::is_array) {
            let error = Error::new(ErrorKind::Corrupt, "an index without a list of manifests");
            return Err(error.in_file(store.root().path().join(FILE)));
        }
        Ok(Self(value))
    }

    pub fn write(&self, store: &Store) -> Result<()> {
        files::replace(store.root(), FILE, &json::canonical(&self.0)?)
    }

    /// Writes an index that has become smaller, on a full disk too, and though it be too long still.
    pub fn write_smaller(&self, store: &Store) -> Result<()> {
        let bytes = json::canonical(&self.0)?;
        let write = || files::replace_by_shorter(store.root(), FILE, &bytes);
        match write() {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                files::remove(store.root(), RESERVE_FILE)?;
                write()
            }
            other => other,
        }
    }

    fn raw(&self) -> &[Value] {
        self.0.get("manifests").and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    fn raw_mut(&mut self) -> Option<&mut Vec<Value>> {
        self.0.get_mut("manifests").and_then(Value::as_array_mut)
    }

    /// All entries whose digest is one; others can't be images here.
    pub fn entries(&self) -> impl Iterator<Item = IndexEntry> {
        self.raw().iter().filter_map(|entry| {
            let digest = hex_digest(entry.get("digest")?.as_str()?)?.to_owned();
            let kind = entry.get("mediaType").and_then(Value::as_str);
            let is_manifest = kind == Some(MANIFEST_TYPE);
            Some(IndexEntry { digest, reference: name_of(entry), is_manifest })
        })
    }

    /// The whole JSON, to follow what it refers to.
    pub fn value(&self) -> &Value {
        &self.0
    }

    /// Takes a manifest in that has no name, unless it is there.
    pub fn add(&mut self, descriptor: Value) {
        let digest = descriptor.get("digest").and_then(Value::as_str).and_then(hex_digest);
        if digest.is_some_and(|digest| self.descriptor(digest).is_none())
            && let Some(entries) = self.raw_mut()
        {
            entries.push(descriptor);
        }
    }

    /// Gives a manifest a name. One that had it stays, without a name.
    pub fn set(&mut self, reference: &Reference, mut descriptor: Value) {
        if self.entries().any(|entry| {
            entry.reference.as_ref() == Some(reference)
                && Some(entry.digest.as_str())
                    == descriptor.get("digest").and_then(Value::as_str).and_then(hex_digest)
        }) {
            return;
        }
        let Some(entries) = self.raw_mut() else { return };
        for entry in entries.iter_mut().filter(|entry| name_of(entry).as_ref() == Some(reference)) {
            if let Some(annotations) = entry.get_mut("annotations").and_then(Value::as_object_mut) {
                annotations.remove(NAME);
            }
        }
        if let Some(object) = descriptor.as_object_mut() {
            let annotations = object.entry("annotations").or_insert_with(|| json!({}));
            if let Some(annotations) = annotations.as_object_mut() {
                annotations.insert(NAME.into(), reference.to_string().into());
            }
        }
        entries.push(descriptor);
        // A manifest that has a name needs no entry without one.
        let named = |entry: &&Value| name_of(entry).is_some();
        let digests: Vec<_> =
            entries.iter().filter(named).filter_map(|entry| entry.get("digest").cloned()).collect();
        entries.retain(|entry| {
            name_of(entry).is_some() || !entry.get("digest").is_some_and(|d| digests.contains(d))
        });
    }

    /// The raw entry of a manifest.
    pub fn descriptor(&self, digest: &str) -> Option<&Value> {
        let digest = format!("sha256:{digest}");
        self.raw()
            .iter()
            .find(|entry| entry.get("digest").and_then(Value::as_str) == Some(digest.as_str()))
    }

    /// Takes out the entries that `drop` says.
    pub fn remove(&mut self, drop: impl Fn(&IndexEntry) -> bool) {
        let Some(entries) = self.raw_mut() else { return };
        entries.retain(|raw| {
            let one = Self(json!({"manifests": [raw]}));
            !one.entries().any(|entry| drop(&entry))
        });
    }
}

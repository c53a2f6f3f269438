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
    /// None for an image whose name went to another one, and for a name that none of ours can be.
    pub reference: Option<Reference>,
    /// Length of the manifest, as the index has it.
    pub size: Option<u64>,
    /// Whether it has a name, whatever it is.
    pub is_named: bool,
    /// Whether it may be an image: not an index of others, an artifact or something unknown.
    pub is_manifest: bool,
}

impl IndexEntry {
    /// None for one without a digest that a blob can have: it is no image here.
    fn of(raw: &Value) -> Option<Self> {
        let is_named = raw.get("annotations").is_some_and(|all| all.get(NAME).is_some());
        let is_image = raw.get("mediaType").and_then(Value::as_str) == Some(MANIFEST_TYPE);
        Some(Self {
            digest: hex_digest(raw.get("digest")?.as_str()?)?.to_owned(),
            reference: name_of(raw),
            size: raw.get("size").and_then(Value::as_u64),
            is_named,
            is_manifest: is_image && raw.get("artifactType").is_none(),
        })
    }

    /// What it is called where it is told of.
    pub fn label(&self) -> String {
        match &self.reference {
            Some(reference) => format!("image {reference}"),
            None => format!("image {}", self.digest),
        }
    }
}

fn name_of(raw: &Value) -> Option<Reference> {
    raw.get("annotations")?.get(NAME)?.as_str()?.parse().ok()
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
        self.raw().iter().filter_map(IndexEntry::of)
    }

    /// The entries that may be images.
    pub fn manifests(&self) -> impl Iterator<Item = IndexEntry> {
        self.entries().filter(|entry| entry.is_manifest)
    }

    /// What a name or the beginning of an id (at least 4 digits) stands for.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InvalidInput`] for what is neither, or begins several.
    pub fn find(&self, name: &str) -> Result<Named> {
        let missing = || Error::new(ErrorKind::NotFound, format!("there is no image {name:?}"));
        let reference = name.parse::<Reference>();
        if let Ok(reference) = &reference {
            let mut entries = self.manifests();
            let named = entries.find(|entry| entry.reference.as_ref() == Some(reference));
            if let Some(entry) = named {
                return Ok(Named::ByName(entry));
            }
        }
        let id = name.strip_prefix("sha256:").unwrap_or(name);
        if id.len() < 4 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(reference.err().unwrap_or_else(missing));
        }
        let begun = self.manifests().filter(|entry| entry.digest.starts_with(id));
        let mut begun: Vec<_> = begun.collect();
        let first = begun.pop().ok_or_else(missing)?;
        begun.retain(|entry| entry.digest != first.digest);
        if begun.is_empty() {
            return Ok(Named::ById(first));
        }
        let detail = format!("{name} begins the ids of several images");
        Err(Error::new(ErrorKind::InvalidInput, detail))
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
        let digest_of = |entry: &Value| entry.get("digest").cloned();
        let digest = digest_of(&descriptor);
        let has_name = |entry: &Value| name_of(entry).as_ref() == Some(reference);
        if self.raw().iter().any(|entry| digest_of(entry) == digest && has_name(entry)) {
            return;
        }
        let Some(entries) = self.raw_mut() else { return };
        // Of these an entry without a name says nothing that one with a name doesn't.
        let mut touched = vec![digest];
        for entry in entries.iter_mut().filter(|entry| has_name(entry)) {
            touched.push(digest_of(entry));
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
        let is_named = |entry: &Value| IndexEntry::of(entry).is_some_and(|entry| entry.is_named);
        let named: Vec<_> = entries.iter().filter(|entry| is_named(entry)).map(digest_of).collect();
        touched.retain(|digest| named.contains(digest));
        entries.retain(|entry| is_named(entry) || !touched.contains(&digest_of(entry)));
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
        entries.retain(|raw| !IndexEntry::of(raw).is_some_and(|entry| drop(&entry)));
    }
}

/// What somebody's word for an image stands for.
pub(super) enum Named {
    /// The image of that name.
    ByName(IndexEntry),
    /// The image whose id begins so, under one of its names.
    ById(IndexEntry),
}

impl Named {
    pub fn entry(self) -> IndexEntry {
        match self {
            Self::ByName(entry) | Self::ById(entry) => entry,
        }
    }
}

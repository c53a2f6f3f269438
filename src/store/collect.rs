//! What is needed, what is not, and taking away the latter.

use std::collections::{BTreeSet, HashSet};
use std::io;

use serde_json::Value;

use super::blob::Document;
use super::container::Standing;
use super::digest::{hex_digest, is_hex_digest};
use super::disk::{DiskKind, DiskName, GONE, LAYER, RECORD};
use super::files::listing;
use super::index::Index;
use super::{Costs, Finding, Guard, Image, Store, Survey, files};
use crate::chain::finish_snapshot;
use crate::error::{Error, ErrorKind, Result};
use crate::live::newest_header;
use crate::packed::Packed;
use crate::storage::{
    Access, Folder, Lock, Storage, failed, find_in, is_used, open_in, sync_folder,
};

/// What a collection took away, or would.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Ids of images without a name and without containers.
    pub images: Vec<String>,
    /// Files with their folder in the store, and the bytes of disk that they take.
    pub files: Vec<(String, u64)>,
    /// What can't be read or removed. While there is anything that may refer to blobs, no image and
    /// no blob goes.
    pub bad: Vec<Finding>,
}

impl Collected {
    /// Bytes of disk in all.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// What a kind of thing takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// How many there are.
    pub total: u64,
    /// How many are in use.
    pub active: u64,
    /// Bytes of disk.
    pub size: u64,
    /// Bytes of disk that only those take that are not in use.
    pub reclaimable: u64,
}

/// A folder of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Root,
    Blobs,
    Disks(DiskKind),
}

impl Place {
    fn label(self) -> &'static str {
        match self {
            Self::Root => ".",
            Self::Blobs => "blobs/sha256",
            Self::Disks(DiskKind::Container) => "containers",
            Self::Disks(DiskKind::Volume) => "volumes",
        }
    }
}

/// A file that nothing needs.
#[derive(Debug)]
struct Garbage {
    place: Place,
    name: String,
}

impl Garbage {
    fn label(&self) -> String {
        format!("{}/{}", self.place.label(), self.name)
    }
}

fn is_among(doomed: &[Garbage], place: Place, name: &str) -> bool {
    doomed.iter().any(|garbage| garbage.place == place && garbage.name == name)
}

/// The blobs that something refers to.
#[derive(Debug, Default)]
struct Marks {
    digests: BTreeSet<String>,
    /// What may refer to more, and can't be read.
    bad: Vec<Finding>,
}

impl Marks {
    /// Goes on without a folder that can't be listed.
    fn give_up(&mut self, subject: &str, error: &Error) -> Vec<String> {
        self.bad.push(Finding::new(subject, error));
        Vec::new()
    }
}

/// Whether a manifest is there whose references are marked now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Followed {
    Yes,
    /// It is not there: what it referred to can't be told.
    Missing,
}

/// Leaves each thing in a list once.
fn dedup(bad: &mut Vec<Finding>) {
    let mut seen = HashSet::new();
    bad.retain(|finding| seen.insert((finding.subject.clone(), finding.detail.clone())));
}

impl Store {
    /// Everything that something refers to in the folder of blobs: from the index, from records,
    /// and from the parent links of layers, those of no record included, but for what is `doomed`.
    fn marked(&self, index: &Index, doomed: &[Garbage]) -> Marks {
        let mut marks = Marks::default();
        for entry in index.manifests() {
            let missing = || Finding::new(entry.label(), "its manifest is missing");
            if self.mark_manifest(&entry.digest, &entry.label(), &mut marks) == Followed::Missing {
                marks.bad.push(missing());
            }
        }
        self.mark_json(index.value(), "the index", &mut marks);
        for kind in [DiskKind::Container, DiskKind::Volume] {
            self.mark_disks(kind, doomed, &mut marks);
        }
        // What is being made stands on something too.
        let drafts = listing(self.blobs()).unwrap_or_else(|error| marks.give_up("blobs", &error));
        for name in drafts.iter().filter(|name| name.starts_with(files::DRAFT)) {
            if !is_among(doomed, Place::Blobs, name) {
                self.mark_parents(self.blobs(), name, &mut marks);
            }
        }
        marks
    }

    /// Marks what the records and the layers of a folder refer to.
    fn mark_disks(&self, kind: DiskKind, doomed: &[Garbage], marks: &mut Marks) {
        let folder = &**self.folder(kind);
        let names = listing(folder).unwrap_or_else(|error| marks.give_up(kind.noun(), &error));
        // A record that is lost may have named an image.
        marks.bad.extend(self.strays(kind).map(|strays| strays.findings()).unwrap_or_default());
        for name in names {
            let stem = name.strip_suffix(RECORD).or_else(|| name.strip_suffix(GONE));
            if let Some(stem) = stem {
                let subject = format!("{} {stem}", kind.noun());
                match self.record_in(folder, &name) {
                    Ok(record) => {
                        let manifest = record.unwrap_or_default().manifest;
                        if is_hex_digest(&manifest) {
                            self.mark_manifest(&manifest, &subject, marks);
                        }
                    }
                    // What is being removed needs nothing but what its layers stand on.
                    Err(_) if name.ends_with(GONE) => {}
                    Err(error) => marks.bad.push(Finding::new(subject, error)),
                }
            } else if (name.ends_with(LAYER) || name.ends_with(".top"))
                && !is_among(doomed, Place::Disks(kind), &name)
            {
                self.mark_parents(folder, &name, marks);
            }
        }
    }

    /// Marks the digests in JSON and what those blobs refer to in turn, whatever wrote it.
    fn mark_json(&self, value: &Value, subject: &str, marks: &mut Marks) {
        match value {
            Value::Object(map) => {
                let text = |key| map.get(key).and_then(Value::as_str);
                if let Some(digest) = text("digest").and_then(hex_digest) {
                    let kind = text("mediaType").unwrap_or_default();
                    if kind.contains("manifest") || kind.contains("index") {
                        self.mark_manifest(digest, subject, marks);
                    }
                    marks.digests.insert(digest.to_owned());
                }
                map.values().for_each(|value| self.mark_json(value, subject, marks));
            }
            Value::Array(items) => {
                items.iter().for_each(|item| self.mark_json(item, subject, marks));
            }
            _ => {}
        }
    }

    fn mark_manifest(&self, digest: &str, subject: &str, marks: &mut Marks) -> Followed {
        if !marks.digests.insert(digest.to_owned()) {
            return Followed::Yes;
        }
        match self.document(digest) {
            Ok(Document::Json(_, value)) => self.mark_json(&value, subject, marks),
            Ok(Document::Other) => {}
            Ok(Document::Missing) => return Followed::Missing,
            Err(error) => marks.bad.push(Finding::new(subject, error)),
        }
        Followed::Yes
    }

    /// Marks the blobs below a layer.
    fn mark_parents(&self, folder: &dyn Folder, name: &str, marks: &mut Marks) {
        let mut hint = parent_hint(folder, name);
        loop {
            match hint {
                Ok(Some(digest)) if is_hex_digest(&digest) => {
                    if !marks.digests.insert(digest.clone()) {
                        return;
                    }
                    hint = parent_hint(self.blobs(), &digest);
                }
                Ok(_) => return,
                Err(error) => {
                    return marks.bad.push(Finding::new(format!("layer {name}"), error));
                }
            }
        }
    }

    /// The blobs that only the image with this id needs, by an index that doesn't have it any more:
    /// none where it can't be told.
    pub(super) fn garbage_of(&self, index: &Index, id: &str) -> Survey<Vec<String>> {
        let mut own = Marks::default();
        // Of one that can't be read nothing but its manifest is known; `gc` finds the rest.
        self.mark_manifest(id, "", &mut own);
        self.unmarked(index, own.digests.into_iter().collect())
    }

    /// Those of some blobs that nothing refers to; none where it can't be told.
    fn unmarked(&self, index: &Index, mut blobs: Vec<String>) -> Survey<Vec<String>> {
        let marks = self.marked(index, &[]);
        blobs.retain(|blob| marks.bad.is_empty() && !marks.digests.contains(blob));
        Survey { good: blobs, bad: marks.bad }
    }

    /// Takes blobs away again that were stored for an image that could not be made, unless something
    /// refers to them by now. What this can't tell or do is left to [`Store::collect`].
    pub fn withdraw_blobs(&self, digests: Vec<String>) {
        if let Ok(guard) = self.lock() {
            self.withdraw(digests, &guard);
        }
    }

    /// [`Store::withdraw_blobs`] under the lock.
    pub(super) fn withdraw(&self, digests: Vec<String>, _: &Guard) {
        let Ok(index) = Index::read(self) else { return };
        for blob in self.unmarked(&index, digests).good {
            if self.is_idle(self.blobs(), &blob).unwrap_or(false) {
                let _ = files::remove(self.blobs(), &blob);
            }
        }
        let _ = sync_folder(self.blobs());
    }

    /// Takes away what nothing refers to: blobs, images without a name and without containers, and
    /// what crashes left. With `dry_run` it only tells, and needs no more than to read.
    ///
    /// # Errors
    /// Where nothing could be looked at. What can't be read is told of in what was collected: while
    /// it may refer to something, only what crashes left goes.
    pub fn collect(&self, dry_run: bool) -> Result<Collected> {
        let guard = self.guard(if dry_run { Lock::Shared } else { Lock::Exclusive })?;
        let mut found = Collected::default();
        if !dry_run {
            self.finish_changes(&mut found.bad)?;
        }
        let mut index = Index::read(self)?;
        let mut doomed = self.leftovers(&guard, &mut found.bad)?;
        let unnamed = self.unnamed_images(&index)?;
        index.remove(|entry| !entry.is_named && unnamed.contains(&entry.digest));
        let marks = self.marked(&index, &doomed);
        if marks.bad.is_empty() {
            found.images = unnamed.into_iter().collect();
            doomed.extend(self.unneeded_blobs(&marks, &mut found.bad)?);
        }
        found.bad.extend(marks.bad);
        dedup(&mut found.bad);
        let bytes = |garbage: &Garbage| {
            let file = self.place(garbage.place).open(&garbage.name, Access::Read);
            file.and_then(|file| file.allocated()).unwrap_or(0)
        };
        if dry_run {
            found.files = doomed.iter().map(|garbage| (garbage.label(), bytes(garbage))).collect();
            return Ok(found);
        }
        // The index first: a blob that it still names may not go.
        if !found.images.is_empty() {
            index.write_smaller(self)?;
        }
        for garbage in &doomed {
            let bytes = bytes(garbage);
            match files::remove(self.place(garbage.place), &garbage.name) {
                Ok(()) => found.files.push((garbage.label(), bytes)),
                Err(error) => found.bad.push(Finding::new("leftover", error)),
            }
        }
        for folder in [
            &self.folders.root,
            &self.folders.blobs,
            &self.folders.containers,
            &self.folders.volumes,
        ] {
            sync_folder(&**folder)?;
        }
        self.forget_made(&guard)?;
        self.keep_reserve();
        drop::<Guard>(guard);
        Ok(found)
    }

    /// The blobs that nothing refers to and nobody has open.
    fn unneeded_blobs(&self, marks: &Marks, bad: &mut Vec<Finding>) -> Result<Vec<Garbage>> {
        let mut unneeded = Vec::new();
        for name in listing(self.blobs())? {
            if is_hex_digest(&name) && !marks.digests.contains(&name) {
                match self.is_idle(self.blobs(), &name) {
                    Ok(true) => unneeded.push(Garbage { place: Place::Blobs, name }),
                    Ok(false) => {}
                    Err(error) => bad.push(Finding::new(format!("blob {name}"), error)),
                }
            }
        }
        Ok(unneeded)
    }

    /// What commands left that were killed, and that nobody is making any more.
    fn leftovers(&self, guard: &Guard, bad: &mut Vec<Finding>) -> Result<Vec<Garbage>> {
        let mut found = Vec::new();
        for place in [Place::Root, Place::Blobs] {
            let mut drafts = listing(self.place(place))?;
            drafts.retain(|name| name.starts_with(files::DRAFT));
            for name in drafts {
                let idle = place == Place::Root || {
                    let idle = self.is_idle(self.blobs(), &name);
                    idle.unwrap_or_else(|error| {
                        bad.push(Finding::new("leftover", error));
                        false
                    })
                };
                found.extend(idle.then_some(Garbage { place, name }));
            }
        }
        for kind in [DiskKind::Container, DiskKind::Volume] {
            let folder = &**self.folder(kind);
            for name in self.strays(kind)?.leftovers {
                let idle = self.is_idle(folder, &name).unwrap_or_else(|error| {
                    bad.push(Finding::new("leftover", error));
                    false
                });
                found.extend(idle.then_some(Garbage { place: Place::Disks(kind), name }));
            }
        }
        for name in self.disk_names(DiskKind::Container)? {
            let disk = DiskName { kind: DiskKind::Container, name };
            let abandoned = self.abandoned(&disk, guard).unwrap_or_else(|error| {
                bad.push(Finding::new(&disk, error));
                Vec::new()
            });
            let place = Place::Disks(disk.kind);
            found.extend(abandoned.into_iter().map(|name| Garbage { place, name }));
        }
        Ok(found)
    }

    /// What a snapshot or commit of a container left that was cut off. One that is open is for
    /// whoever has it.
    fn abandoned(&self, disk: &DiskName, _: &Guard) -> Result<Vec<String>> {
        let folder = &**self.folder(disk.kind);
        let exists = |name: &str| files::exists(folder, name);
        let record = self.record(disk)?.unwrap_or_default();
        let (new_top, copy) = (disk.new_top_file(), disk.copy_file());
        let (has_top, has_copy) = (exists(&new_top)?, exists(&copy)?);
        if record.frozen.is_empty() && !has_top && !has_copy {
            return Ok(Vec::new());
        }
        if !self.is_idle(folder, &disk.file())? {
            return Ok(Vec::new());
        }
        let file = open_in(folder, &disk.file(), Access::Read)?;
        let frozen = newest_header(&*file)?.is_frozen();
        let mut names = self.unneeded(disk, &record)?;
        // The frozen layer's new top is still to take its name.
        names.retain(|_| !frozen);
        names.extend((has_top && !frozen).then_some(new_top));
        names.extend(has_copy.then_some(copy));
        let mut found = Vec::new();
        for name in names {
            if exists(&name)? {
                found.push(name);
            }
        }
        Ok(found)
    }

    fn place(&self, place: Place) -> &dyn Folder {
        match place {
            Place::Root => self.root(),
            Place::Blobs => self.blobs(),
            Place::Disks(kind) => &**self.folder(kind),
        }
    }

    /// Brings removals and snapshots to their end that were cut off.
    fn finish_changes(&self, bad: &mut Vec<Finding>) -> Result<()> {
        for kind in [DiskKind::Container, DiskKind::Volume] {
            let folder = &**self.folder(kind);
            for name in listing(folder)? {
                let top = name.strip_prefix('.').and_then(|name| name.strip_suffix(".top"));
                let finished = if let Some(name) = name.strip_suffix(GONE) {
                    self.finish_removal(&DiskName { kind, name: name.to_owned() }).map(drop)
                } else if let Some(layer) = top {
                    match finish_snapshot(folder, layer) {
                        // Somebody is making it just now, or it was of a disk that is gone.
                        Err(error)
                            if matches!(error.kind(), ErrorKind::InUse | ErrorKind::NotFound) =>
                        {
                            Ok(())
                        }
                        finished => finished.map(drop),
                    }
                } else {
                    Ok(())
                };
                if let Err(error) = finished {
                    bad.push(Finding::new(format!("{} {name}", kind.noun()), error));
                }
            }
        }
        Ok(())
    }

    /// Images whose name went to another one and on which no container stands.
    fn unnamed_images(&self, index: &Index) -> Result<BTreeSet<String>> {
        let ground = Ground::new(&self.standing()?);
        let mut unnamed = BTreeSet::new();
        for entry in index.manifests().filter(|entry| !entry.is_named) {
            // What can't be read ends the collection a little later.
            let image = self.load_image(&entry.digest, None).ok().flatten();
            if image.is_some_and(|image| !ground.has(&image)) {
                unnamed.insert(entry.digest);
            }
        }
        Ok(unnamed)
    }

    /// Whether nobody has a file open with a lock on it.
    pub(super) fn is_idle(&self, folder: &dyn Folder, name: &str) -> Result<bool> {
        let file = match find_in(folder, name, Access::Write) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(false),
            // A lock can't be taken then, but asked for.
            Err(error) if error.kind().forbids_writing() => {
                let file = find_in(folder, name, Access::Read)?;
                let file = file.as_deref().and_then(Storage::descriptor);
                return Ok(file.is_some_and(|file| !is_used(file)));
            }
            Err(error) => return Err(error),
        };
        match file.lock(Lock::Exclusive) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(failed(&*file, "locking the file", 0)(error)),
        }
    }

    /// What images, containers and volumes take, in that order; what can't be read is not counted.
    pub fn usage(&self) -> Result<Survey<[Usage; 3]>> {
        self.settled(|| self.look_at_usage())
    }

    fn look_at_usage(&self) -> Result<Survey<[Usage; 3]>> {
        let mut survey = Survey::<[Usage; 3]>::default();
        let bad = &mut survey.bad;
        survey.good = [
            self.usage_of_images(bad)?,
            self.usage_of_disks(DiskKind::Container, bad)?,
            self.usage_of_disks(DiskKind::Volume, bad)?,
        ];
        Ok(survey)
    }

    fn usage_of_images(&self, bad: &mut Vec<Finding>) -> Result<Usage> {
        let ground = Ground::new(&self.standing()?);
        let mut costs = Costs::new(self);
        let images = self.look_at_images(&Index::read(self)?, &mut costs);
        bad.extend(images.bad);
        let mut usage = Usage::default();
        let (mut counted, mut layers) = (HashSet::new(), HashSet::new());
        let mut images: Vec<_> =
            images.good.iter().filter(|image| counted.insert(&image.id)).collect();
        // Those in use first: a layer that they share with others counts as theirs.
        images.sort_by_key(|image| !ground.has(image));
        for image in images {
            let used = ground.has(image);
            usage.total += 1;
            usage.active += u64::from(used);
            for layer in
                image.manifest.layers().iter().filter(|layer| layers.insert(layer.digest()))
            {
                let cost = costs.layer(layer)?;
                usage.size += cost;
                usage.reclaimable += if used { 0 } else { cost };
            }
        }
        Ok(usage)
    }

    fn usage_of_disks(&self, kind: DiskKind, bad: &mut Vec<Finding>) -> Result<Usage> {
        let mut usage = Usage::default();
        for name in self.disk_names(kind)? {
            let disk = DiskName { kind, name };
            let cost = || -> Result<Option<(Survey<u64>, bool)>> {
                let Some(record) = self.record(&disk)? else { return Ok(None) };
                let cost = self.disk_cost(&disk, &record)?;
                Ok(Some((cost, self.is_idle(&**self.folder(kind), &disk.file())?)))
            };
            match cost() {
                Ok(Some((Survey { good: cost, bad: unknown }, idle))) => {
                    bad.extend(unknown);
                    usage.total += 1;
                    usage.active += u64::from(!idle);
                    usage.size += cost;
                    usage.reclaimable += if idle { cost } else { 0 };
                }
                Ok(None) => {}
                Err(error) => bad.push(Finding::new(&disk, error)),
            }
        }
        Ok(usage)
    }
}

/// What containers stand on.
struct Ground {
    images: HashSet<String>,
    blobs: HashSet<String>,
}

impl Ground {
    fn new(stands: &[Standing]) -> Self {
        Self {
            images: stands.iter().map(|on| on.image_id.clone()).collect(),
            blobs: stands.iter().filter_map(|on| on.base.clone()).collect(),
        }
    }

    fn has(&self, image: &Image) -> bool {
        self.images.contains(&image.id) || image.top().is_ok_and(|top| self.blobs.contains(&top))
    }
}

/// The file name that a layer's parent link gives; none where the file is gone, is no layer, or
/// stands on nothing.
fn parent_hint(folder: &dyn Folder, name: &str) -> Result<Option<String>> {
    let Some(file) = find_in(folder, name, Access::Read)? else { return Ok(None) };
    if Packed::is_packed(&*file)? {
        return match Packed::open(file) {
            Ok(layer) => Ok(layer.parent().map(|link| link.hint.clone())),
            // One that is being written; the layer that it is made from keeps the parents.
            Err(_) if name.starts_with(files::DRAFT) => Ok(None),
            Err(error) => Err(error),
        };
    }
    match newest_header(&*file) {
        Ok(header) => Ok(header.parent.map(|link| link.hint)),
        Err(error) if error.kind() == ErrorKind::NotAnImage => Ok(None),
        // A header whose checksums don't hold, of a creation that was cut off.
        Err(error) if name.starts_with(files::DRAFT) && error.kind() == ErrorKind::Corrupt => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

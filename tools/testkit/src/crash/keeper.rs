//! A keeper: what of a disk outlives the process that wrote it, and processes that go on.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use thinply::error::Result;
use thinply::live::{FreshMap, Keeper, Kept};
use thinply::planted::{Bug, planted};
use thinply::storage::Storage;
use thinply::types::{Group, Word};

use super::disk::Disk;
use super::folder::{CrashFolder, Event};

/// What a keeper was told.
#[derive(Clone, Debug)]
pub enum Told {
    Keep { file: usize, failures: u64 },
    Mark { file: usize, word: Word, mask: u64 },
    Release { file: usize },
}

/// A layer that is kept.
#[derive(Clone, Debug, Default)]
struct Layer {
    marks: BTreeMap<Word, u64>,
    /// How many syncs of its file had failed before.
    failures: u64,
}

/// All that is kept, by the number of its file.
#[derive(Clone, Debug, Default)]
pub struct Estate(BTreeMap<usize, Layer>);

impl Estate {
    pub fn apply(&mut self, told: &Told) {
        match *told {
            Told::Keep { file, failures } => {
                self.0.insert(file, Layer { marks: BTreeMap::new(), failures });
            }
            Told::Mark { file, word, mask } => {
                if let Some(layer) = self.0.get_mut(&file) {
                    *layer.marks.entry(word).or_default() |= mask;
                }
            }
            Told::Release { file } => drop(self.0.remove(&file)),
        }
    }

    pub fn has(&self, file: usize) -> bool {
        self.0.contains_key(&file)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn files(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.keys().copied()
    }

    /// Whether a sync of a kept file has failed since.
    pub fn has_lost(&self, disk: &Disk) -> bool {
        self.0.iter().any(|(&file, layer)| disk.failures(file) > layer.failures)
    }
}

/// The keeper of a folder's one disk.
#[derive(Debug)]
pub struct CrashKeeper(pub CrashFolder);

#[derive(Debug)]
struct Map {
    folder: CrashFolder,
    file: usize,
}

impl Keeper for CrashKeeper {
    fn keep(&self, file: &Arc<dyn Storage>, _groups: u64) -> Result<Arc<dyn FreshMap>> {
        let (folder, file) = (self.0.clone(), self.0.number_of(&**file));
        folder.tell(|disk| Told::Keep { file, failures: disk.failures(file) });
        Ok(Arc::new(Map { folder, file }))
    }

    fn kept(&self) -> Result<Vec<Kept>> {
        let layers = self.0.estate().0;
        let kept = layers.into_iter().map(|(file, layer)| Kept {
            file: self.0.kept_handle(file),
            witness: self.0.witness(file, layer.failures),
            fresh: Arc::new(Map { folder: self.0.clone(), file }),
        });
        Ok(kept.collect())
    }
}

impl FreshMap for Map {
    fn reserve(&self, _: Group) -> io::Result<()> {
        self.folder.take_memory()
    }

    fn mark(&self, word: Word, mask: u64) {
        let told = Told::Mark { file: self.file, word, mask };
        match planted(Bug::MarkedAfterTheAnswer) {
            true => self.folder.tell_late(told),
            false => self.folder.tell(|_| told),
        }
    }

    fn marks(&self) -> io::Result<Vec<(Word, u64)>> {
        self.folder.take_memory()?;
        let layers = self.folder.estate().0;
        let marks = layers.get(&self.file).map(|layer| layer.marks.clone());
        Ok(marks.unwrap_or_default().into_iter().collect())
    }

    fn grow(&self, _: u64) -> io::Result<()> {
        self.folder.take_memory()
    }

    fn release(&self) {
        self.folder.tell(|_| Told::Release { file: self.file });
    }
}

impl From<Told> for Event {
    fn from(told: Told) -> Self {
        Self::Keeper(told)
    }
}

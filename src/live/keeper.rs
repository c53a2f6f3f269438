//! What outlives a writer, so that another process can go on where it died
//! (`format-spec.md`, "Going on after the death of a process").

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::planted::{Bug, planted};
use crate::storage::Storage;
use crate::types::{Group, Word};

/// Which blocks became owned since their layer was opened, in memory that the writer's death leaves.
/// All methods may be called from many threads.
pub trait FreshMap: Send + Sync + Debug {
    /// Takes the memory for a group, so that marking in it can't fail.
    ///
    /// # Errors
    /// There is none.
    fn reserve(&self, group: Group) -> io::Result<()>;

    /// Marks blocks of a word. Their data is written; nobody knows yet that they are owned.
    fn mark(&self, word: Word, mask: u64);

    /// All marks.
    ///
    /// # Errors
    /// Host errors.
    fn marks(&self) -> io::Result<Vec<(Word, u64)>>;

    /// The layer is to have so many groups.
    ///
    /// # Errors
    /// Host errors.
    fn grow(&self, groups: u64) -> io::Result<()>;

    /// Nobody needs to go on with the layer any more: it is closed or frozen, or never came to mean
    /// anything. Until then it stays kept, whatever becomes of this object.
    fn release(&self);
}

/// A layer that its writer left open.
#[derive(Clone, Debug)]
pub struct Kept {
    /// As the writer had it open, with its lock.
    pub file: Arc<dyn Storage>,
    /// The same file, opened before it was written, and not synced since.
    pub witness: Arc<dyn Storage>,
    /// What the writer marked.
    pub fresh: Arc<dyn FreshMap>,
}

/// Keeps what one disk has open for writing beyond the end of the process that writes it.
pub trait Keeper: Send + Sync + Debug {
    /// Keeps a locked file to which nothing was written yet, with memory for so many groups.
    ///
    /// # Errors
    /// Host errors; then it is not kept.
    fn keep(&self, file: &Arc<dyn Storage>, groups: u64) -> Result<Arc<dyn FreshMap>>;

    /// What is kept. The process that left it is gone, and so is all I/O that it began.
    ///
    /// # Errors
    /// Host errors.
    fn kept(&self) -> Result<Vec<Kept>>;
}

/// Keeps what many disks have open for writing.
pub trait Keepers: Send + Sync + Debug {
    /// The keeper of the disk of that name.
    fn of(&self, disk: &str) -> Arc<dyn Keeper>;
}

/// What is kept, with all that was answered of it on the disk.
///
/// # Errors
/// [`ErrorKind::Poisoned`] where a sync has failed since it was kept: then what was answered may be
/// lost, and nobody may go on as if it were not. Host errors.
pub fn survivors(keeper: &dyn Keeper) -> Result<Vec<Kept>> {
    let kept = keeper.kept()?;
    for Kept { file, witness, .. } in &kept {
        if planted(Bug::SettledBeforeItsSync) {
            continue;
        }
        witness.sync_data().map_err(|error| {
            let detail = format!("a sync failed ({error}): what was answered may be lost");
            Error::new(ErrorKind::Poisoned, detail).in_file(file.path())
        })?;
    }
    Ok(kept)
}

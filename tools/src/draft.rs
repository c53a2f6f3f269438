//! Files that appear under their name only once they are whole.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use thinply::error::{Error, Result};
use thinply::storage::sync_folder;

use crate::paths::Place;

/// Exit code after an interrupt, as shells have it.
const INTERRUPTED: i32 = 130;

/// The drafts of this process, for the signal handler.
static DRAFTS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn drafts() -> MutexGuard<'static, Vec<PathBuf>> {
    DRAFTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file under a temporary name, in the folder where it shall stay. It is removed unless it is
/// published, also when a signal ends the process.
#[derive(Debug)]
pub struct Draft {
    directory: PathBuf,
    name: String,
}

/// Whether publishing may replace a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replace {
    /// It fails where the name is taken.
    Never,
    /// The new file takes the old one's place.
    Yes,
}

impl Draft {
    /// A name for a file in `directory`; the caller creates the file.
    pub fn new(directory: &Path) -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // Without the handler an interrupted process leaves its draft, and that is all.
            let _ = ctrlc::set_handler(|| {
                // Held to the end, so that nothing is published any more.
                let drafts = drafts();
                drafts.iter().for_each(|path| drop(fs::remove_file(path)));
                std::process::exit(INTERRUPTED);
            });
        });
        let name = format!(".thinply-{:016x}.tmp", RandomState::new().hash_one(()));
        let draft = Self { directory: directory.to_owned(), name };
        drafts().push(draft.path());
        draft
    }

    /// The temporary name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The temporary path.
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// Gives the file the name of a layer that is not there yet, durably.
    pub fn publish_at(self, place: &Place) -> Result<()> {
        self.publish(Path::new(&place.name), Replace::Never)?;
        sync_folder(&*place.folder)
    }

    /// Gives the file the name of a layer that is not there yet, but not for good: it is a part of
    /// something that isn't whole yet.
    pub fn publish_unkept(self, place: &Place) -> Result<Unkept> {
        let unkept = Unkept(place.path());
        let mut drafts = drafts();
        let renamed = rename_no_replace(&self.path(), &unkept.0);
        if renamed.is_ok() {
            drafts.push(unkept.0.clone());
        }
        // Dropping the draft wants the list.
        drop(drafts);
        renamed.map_err(|error| {
            Error::io(error, "giving the new file its name").in_file(place.path())
        })?;
        sync_folder(&*place.folder)?;
        Ok(unkept)
    }

    /// Gives the file its name.
    pub fn publish(self, name: &Path, replace: Replace) -> Result<()> {
        let to = self.directory.join(name);
        let drafts = drafts();
        let renamed = match replace {
            Replace::Yes => fs::rename(self.path(), &to),
            Replace::Never => rename_no_replace(&self.path(), &to),
        };
        // Dropping the draft wants the list.
        drop(drafts);
        renamed.map_err(|error| Error::io(error, "giving the new file its name").in_file(to))
    }
}

/// A file under its own name that is removed after all unless it is kept, also when a signal ends the
/// process.
#[derive(Debug)]
pub struct Unkept(PathBuf);

impl Unkept {
    /// The file stays.
    pub fn keep(self) {
        drafts().retain(|other| *other != self.0);
    }
}

impl Drop for Unkept {
    fn drop(&mut self) {
        let mut drafts = drafts();
        if drafts.contains(&self.0) {
            // What can't be removed can't be helped.
            let _ = fs::remove_file(&self.0);
            drafts.retain(|other| *other != self.0);
        }
    }
}

fn rename_no_replace(from: &Path, to: &Path) -> std::io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that can't; the draft's own name goes when it is dropped.
        Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(from, to),
        other => Ok(other?),
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let path = self.path();
        // It has been renamed, or was never made, or can't be helped.
        let _ = fs::remove_file(&path);
        drafts().retain(|other| *other != path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_never_takes_a_name_that_is_taken_and_never_stays() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("taken"), "old").unwrap();
        let draft = |text: &str| {
            let draft = Draft::new(dir.path());
            fs::write(draft.path(), text).unwrap();
            draft
        };
        assert!(draft("new").publish(Path::new("taken"), Replace::Never).is_err());
        assert_eq!(fs::read_to_string(dir.path().join("taken")).unwrap(), "old");
        draft("new").publish(Path::new("taken"), Replace::Yes).unwrap();
        draft("free").publish(Path::new("free"), Replace::Never).unwrap();
        drop(draft("dropped"));
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["free", "taken"]);
        assert_eq!(fs::read_to_string(dir.path().join("taken")).unwrap(), "new");
    }
}

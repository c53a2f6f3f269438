//! Files that appear under their name only once they are whole.

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use thinply::error::{Error, Result};
use thinply::storage::{FileFolder, Folder, Rights, rename_new, sync_folder};

use crate::io::paths::Place;
use crate::io::pump::BUFFER;
use crate::io::signals;

/// Exit code after an interrupt, as shells have it.
const INTERRUPTED: i32 = 130;

/// The drafts of this process, for the signal handler.
static DRAFTS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn drafts() -> MutexGuard<'static, Vec<PathBuf>> {
    DRAFTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file under a temporary name, in the folder where it shall stay. It is removed unless it is
/// published, also when a signal ends the process. One that a killed process left is removed by the
/// next run that makes a draft in the folder.
#[derive(Debug)]
pub struct Draft {
    directory: PathBuf,
    name: String,
    rights: Rights,
    /// Says to others that there is a draft in use in the folder.
    _presence: Option<File>,
}

const PREFIX: &str = ".thinply-";
const SUFFIX: &str = ".tmp";

/// Locks the folder for as long as the answer is open: everybody who has a draft in it does, so
/// whoever gets the lock alone first finds nothing but drafts that were left over. No answer where
/// folders can't be locked; there nothing is ever cleared.
fn join(directory: &Path) -> Option<File> {
    let folder = File::open(directory).ok()?;
    if flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok() {
        clear(directory);
    }
    // Others clear the folder in no time, but a stranger may hold the lock for ever.
    (0..100).find_map(|_| match flock(&folder, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => {
            std::thread::sleep(Duration::from_millis(10));
            None
        }
        other => Some(other.is_ok()),
    });
    Some(folder)
}

fn clear(directory: &Path) {
    let is_draft = |name: &str| {
        let random = name.strip_prefix(PREFIX).and_then(|name| name.strip_suffix(SUFFIX));
        random.is_some_and(|hex| hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_draft) {
            // One that can't be removed stays in nobody's way.
            let _ = fs::remove_file(entry.path());
        }
    }
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
    /// A name for a file in `directory` that shall have these rights. The caller creates the file,
    /// by [`Draft::file`] or in [`Draft::folder`].
    pub fn new(directory: &Path, rights: Rights) -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // Without the handler an interrupted process leaves its draft, and that is all.
            let _ = signals::on_end(|| {
                // Held to the end, so that nothing is published any more.
                let drafts = drafts();
                drafts.iter().for_each(|path| drop(fs::remove_file(path)));
                std::process::exit(INTERRUPTED);
            });
        });
        let name = format!("{PREFIX}{:016x}{SUFFIX}", RandomState::new().hash_one(()));
        let _presence = join(directory);
        let draft = Self { directory: directory.to_owned(), name, rights, _presence };
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

    /// The folder to create it in.
    pub fn folder(&self) -> Arc<dyn Folder> {
        FileFolder::new(&self.directory).creating(self.rights.clone())
    }

    /// Creates the file.
    pub fn file(&self) -> std::io::Result<File> {
        self.rights.create(&self.path())
    }

    /// Creates the file, has `write` put a packed layer into it, and syncs it.
    pub fn packed<T>(
        &self,
        write: impl FnOnce(BufWriter<File>) -> Result<(T, BufWriter<File>)>,
    ) -> Result<T> {
        let failed = |error| Error::io(error, "writing the new file").in_file(&self.directory);
        let file = self.file().map_err(failed)?;
        let (made, out) = write(BufWriter::with_capacity(BUFFER, file))?;
        let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        Ok(made)
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
        let renamed = rename_new(&self.path(), &unkept.0);
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
            Replace::Never => rename_new(&self.path(), &to),
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
            let draft = Draft::new(dir.path(), Rights::Usual);
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

    #[test]
    fn drafts_that_nobody_has_are_cleared_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let names = || {
            let entries = fs::read_dir(dir.path()).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let others =
            [".thinply-0123.tmp", ".thinply-0123456789abcdef", "thinply-0123456789abcdef.tmp"];
        let left = ".thinply-0123456789abcdef.tmp";
        for name in others.into_iter().chain([left]) {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let alive = Draft::new(dir.path(), Rights::Usual);
        fs::write(alive.path(), "").unwrap();
        assert_eq!(names().len(), others.len() + 1);
        assert!(!names().contains(&left.to_owned()));
        // Somebody has a draft, so nothing is known about the others.
        fs::write(dir.path().join(left), "").unwrap();
        drop(Draft::new(dir.path(), Rights::Usual));
        assert!(alive.path().exists() && names().contains(&left.to_owned()));
        drop(alive);
        drop(Draft::new(dir.path(), Rights::Usual));
        assert_eq!(names(), others);
    }
}

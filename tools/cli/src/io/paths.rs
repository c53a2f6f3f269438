//! From what people type to the folders and plain names that the library works with.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use thinply::chain::{Chain, Gate};
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::{Access, FileFolder, Folder, Lock, Storage, open_in};

/// A layer file: its folder and its name in it.
#[derive(Clone, Debug)]
pub struct Place {
    /// The folder, as the library wants it.
    pub folder: Arc<dyn Folder>,
    /// The folder's canonical path.
    pub directory: PathBuf,
    /// The file's plain name.
    pub name: String,
}

impl Place {
    /// A file that is there. A symbolic link is followed: the user named it, not a layer.
    pub fn existing(path: &Path) -> Result<Self> {
        let real = real(path)?;
        let name = utf8(real.file_name().unwrap_or(OsStr::new("/")), path)?;
        let directory = real.parent().unwrap_or(&real).to_owned();
        Ok(Self::new(directory, name))
    }

    /// A file that is still to be made, in a folder that is there.
    pub fn vacant(path: &Path) -> Result<Self> {
        let (directory, name) = vacant(path)?;
        Ok(Self::new(directory, utf8(&name, path)?))
    }

    fn new(directory: PathBuf, name: String) -> Self {
        Self { folder: Arc::new(FileFolder::new(&directory)), directory, name }
    }

    /// The file's path.
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// Opens the file alone.
    pub fn open(&self, access: Access) -> Result<Arc<dyn Storage>> {
        open_in(&*self.folder, &self.name, access)
    }

    /// Waits, for a while, until nobody writes it. Answers whether that is so.
    ///
    /// # Errors
    /// Host errors.
    pub fn await_free(&self, limit: Duration) -> Result<bool> {
        const PAUSE: Duration = Duration::from_millis(2);
        let deadline = Instant::now() + limit;
        while self.open(Access::Read)?.lock(Lock::Shared).is_err() {
            if Instant::now() > deadline {
                return Ok(false);
            }
            thread::sleep(PAUSE);
        }
        Ok(true)
    }

    /// Opens the chain that ends with this file.
    pub fn chain(&self, access: Access, layers: Arc<Gate>) -> Result<Chain> {
        let opened = Chain::open(self.folder.clone(), &self.name, access, layers);
        opened.map_err(|error| match error.kind() {
            // This file is there: it is a parent that nobody found.
            ErrorKind::NotFound => {
                let detail = format!("{error}; --layers DIR has it looked for in DIR too");
                Error::new(ErrorKind::NotFound, detail)
            }
            _ => error,
        })
    }
}

/// The canonical path of what is there.
pub fn real(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|error| Error::io(error, "opening the file").in_file(path))
}

/// The canonical folder that a path is in, and its name there; none where it has no name.
pub fn split(path: &Path) -> Result<Option<(PathBuf, OsString)>> {
    let Some(name) = path.file_name() else { return Ok(None) };
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let directory = fs::canonicalize(directory)
        .map_err(|error| Error::io(error, "looking at the folder").in_file(directory))?;
    Ok(Some((directory, name.to_owned())))
}

/// The canonical folder and the name of a file that is still to be made.
pub fn vacant(path: &Path) -> Result<(PathBuf, OsString)> {
    let Some((directory, name)) = split(path)? else {
        return Err(Error::new(ErrorKind::InvalidInput, "names no file").in_file(path));
    };
    if fs::symlink_metadata(directory.join(&name)).is_ok() {
        return Err(Error::new(ErrorKind::Exists, "is there already").in_file(path));
    }
    Ok((directory, name))
}

/// Layer names are stored in the layers above them, as UTF-8.
fn utf8(name: &OsStr, path: &Path) -> Result<String> {
    let name = name.to_str().map(str::to_owned);
    name.ok_or_else(|| {
        let detail = "the names of layer files must be UTF-8";
        Error::new(ErrorKind::InvalidInput, detail).in_file(path)
    })
}

/// Runs `change` on an open chain and closes it, whatever came of that: a refused change must not
/// leave the layer marked as in use.
pub fn closing<T>(chain: Chain, change: impl FnOnce(&Chain) -> Result<T>) -> Result<T> {
    let changed = change(&chain);
    let closed = chain.close();
    let value = changed?;
    closed.map(|()| value)
}

/// Whether both paths lead to the same file.
pub fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    identity(a).is_some_and(|a| Some(a) == identity(b))
}

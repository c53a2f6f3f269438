//! Where layers are: the files that the user names, and the folders where parents may be.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use thinply::chain::Layers;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::{FileFolder, Folder};

/// A layer file's folder, and its name in there.
#[derive(Clone, Debug)]
pub struct Place {
    /// The folder.
    pub folder: Arc<dyn Folder>,
    /// The plain name.
    pub name: String,
}

impl Place {
    /// The file at `path`, which is there. A link that the user names is followed: its parent is
    /// beside the real file.
    pub fn existing(path: &Path) -> Result<Self> {
        let real = path
            .canonicalize()
            .map_err(|error| Error::io(error, "opening the file").in_file(path))?;
        Self::split(&real)
    }

    /// The file that shall be at `path`.
    #[allow(dead_code)]
    pub fn new(path: &Path) -> Result<Self> {
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let real = folder
            .canonicalize()
            .map_err(|error| Error::io(error, "opening the folder").in_file(folder))?;
        match path.file_name() {
            Some(name) => Self::split(&real.join(name)),
            None => Err(Error::new(ErrorKind::InvalidInput, "not a file name").in_file(path)),
        }
    }

    fn split(path: &Path) -> Result<Self> {
        let parts = path.parent().zip(path.file_name().and_then(|name| name.to_str()));
        let Some((folder, name)) = parts else {
            let detail = "the name of a layer file must be UTF-8";
            return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(path));
        };
        Ok(Self { folder: Arc::new(FileFolder::new(folder)), name: name.to_owned() })
    }
}

/// Where parents are looked for.
#[derive(Args, Clone, Debug, Default)]
pub struct Search {
    /// Look for parents in this folder too, after the child's own; may be repeated.
    #[arg(long, value_name = "DIR", env = "THINPLY_LAYERS", value_delimiter = ':')]
    layers: Vec<PathBuf>,
}

impl Search {
    /// The gate that looks there.
    pub fn layers(&self) -> Arc<Layers> {
        let folders = self.layers.iter().map(|path| Arc::new(FileFolder::new(path)) as _);
        Arc::new(Layers::new(folders.collect()))
    }
}

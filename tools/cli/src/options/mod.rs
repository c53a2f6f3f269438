//! The options that several verbs share.

pub mod parent;
pub mod share;

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use thinply::chain::Gate;
use thinply::error::{Error, ErrorKind, Result};
use thinply::packed::Compression;
use thinply::storage::{FileFolder, Folder};
use thinply::store::Store;

/// Folders where parents are looked for, as in `PATH`.
pub const LAYERS_VARIABLE: &str = "THINPLY_LAYERS";

/// What verbs take that print facts of a layer.
#[derive(Args, Debug)]
pub struct ShowArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub layers: LayersArg,
    /// The layer
    pub file: PathBuf,
}

/// Where parents are looked for.
#[derive(Args, Debug)]
pub struct LayersArg {
    /// Look for parents in DIR too, after the layer's own folder (repeatable)
    #[arg(long = "layers", value_name = "DIR")]
    folders: Vec<PathBuf>,
}

impl LayersArg {
    /// The folders of the options, then those of the environment.
    pub fn folders(&self) -> Result<Vec<Arc<dyn Folder>>> {
        if let Some(missing) = self.folders.iter().find(|folder| !folder.is_dir()) {
            return Err(Error::new(ErrorKind::NotFound, "not a folder").in_file(missing));
        }
        let variable = std::env::var_os(LAYERS_VARIABLE).unwrap_or_default();
        let named = std::env::split_paths(&variable).filter(|path| !path.as_os_str().is_empty());
        let all = self.folders.iter().cloned().chain(named);
        Ok(all.map(|path| Arc::new(FileFolder::new(path)) as Arc<dyn Folder>).collect())
    }

    /// The parent gate over those folders.
    pub fn layers(&self) -> Result<Arc<Gate>> {
        Ok(Arc::new(Gate::new(self.folders()?)))
    }
}

/// Where the store is.
#[derive(Args, Debug)]
pub struct StoreArg {
    /// The store's folder
    #[arg(long, value_name = "DIR", env = "THINPLY_ROOT", hide_env = true)]
    root: Option<PathBuf>,
}

impl StoreArg {
    /// Opens the store, which must be there.
    pub fn open(&self) -> Result<Store> {
        Store::open(&self.path()?)
    }

    /// Opens the store; it is made where it is missing.
    pub fn open_or_make(&self) -> Result<Store> {
        Store::open_or_make(&self.path()?)
    }

    fn path(&self) -> Result<PathBuf> {
        let variable =
            |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let data =
            || variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")));
        let root = self.root.clone().or_else(|| Some(data()?.join("thinply")));
        root.ok_or_else(|| {
            let detail = "nowhere to keep the store: give --root DIR, or set THINPLY_ROOT or HOME";
            Error::new(ErrorKind::InvalidInput, detail)
        })
    }
}

/// How a packed layer stores its blocks.
#[derive(Args, Debug)]
pub struct PackingArgs {
    /// Compress by zstd at level N [default: 4]
    #[arg(long, value_name = "N", conflicts_with = "uncompressed")]
    zstd: Option<i32>,
    /// Store blocks as they are, so that runs of them are read with one call
    #[arg(long)]
    uncompressed: bool,
}

impl PackingArgs {
    /// As the library has it.
    pub fn compression(&self) -> Compression {
        if self.uncompressed {
            Compression::None
        } else {
            self.zstd.map_or_else(Compression::default, Compression::Zstd)
        }
    }
}

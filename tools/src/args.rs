//! The command line: one [`Command`] a verb, and the options that several verbs share.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use thinply::chain::Layers;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::{FileFolder, Folder};

use crate::Outcome;

/// Folders where parents are looked for, as in `PATH`.
pub const LAYERS_VARIABLE: &str = "THINPLY_LAYERS";

const AFTER_HELP: &str = "\
Exit codes:
  0    done; for check: nothing was found
  1    the answer is no: check or verify found something, repair lost something,
       compare saw a difference
  2    an error, said on standard error; nothing half-made stays
  130  interrupted

Environment:
  THINPLY_LAYERS  folders where parents are looked for, separated by colons,
                  after those of --layers
  THINPLY_ROOT    the store's folder, where --root does not name one; else
                  thinply in XDG_DATA_HOME, or in ~/.local/share

Example:
  thinply create --size 10G disk.tply
  thinply snapshot disk.tply monday.tply
  thinply create --parent monday.tply test.tply
  thinply info --chain test.tply";

/// Copy-on-write block images in plain files.
///
/// An image is a chain of layers, each a file. A reader asks the newest layer first; a writer only
/// ever touches the top.
#[derive(Debug, Parser)]
#[command(name = "thinply", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// One verb with its arguments; what each does is said where its arguments are.
#[derive(Debug, Subcommand)]
pub enum Command {
    Create(crate::create::Create),
    Snapshot(crate::snapshot::Snapshot),
    Info(crate::info::Info),
    Map(crate::map::Map),
    Dump(crate::dump::Dump),
    Check(crate::check::Check),
    Repair(crate::repair::Repair),
    Import(crate::import::Import),
    Export(crate::export::Export),
    Pack(crate::pack::Pack),
    Verify(crate::verify::Verify),
    Flatten(crate::flatten::Flatten),
    Rebase(crate::rebase::Rebase),
    Compact(crate::compact::Compact),
    Diff(crate::diff::Diff),
    Compare(crate::compare::Compare),
    Resize(crate::resize::Resize),
    Serve(crate::serve::Serve),
    Image(crate::image::ImageVerbs),
    Container(crate::container::ContainerVerbs),
    Volume(crate::volume::VolumeVerbs),
    Df(crate::store::Df),
    Gc(crate::store::Gc),
    Store(crate::store::StoreVerbs),
    Demo(crate::demo::Demo),
    Completions(crate::completions::Completions),
    Man(crate::man::Man),
}

impl Command {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        match self {
            Self::Create(verb) => verb.run(),
            Self::Snapshot(verb) => verb.run(),
            Self::Info(verb) => verb.run(),
            Self::Map(verb) => verb.run(),
            Self::Dump(verb) => verb.run(),
            Self::Check(verb) => verb.run(),
            Self::Repair(verb) => verb.run(),
            Self::Import(verb) => verb.run(),
            Self::Export(verb) => verb.run(),
            Self::Pack(verb) => verb.run(),
            Self::Verify(verb) => verb.run(),
            Self::Flatten(verb) => verb.run(),
            Self::Rebase(verb) => verb.run(),
            Self::Compact(verb) => verb.run(),
            Self::Diff(verb) => verb.run(),
            Self::Compare(verb) => verb.run(),
            Self::Resize(verb) => verb.run(),
            Self::Serve(verb) => verb.run(),
            Self::Image(verbs) => verbs.run(),
            Self::Container(verbs) => verbs.run(),
            Self::Volume(verbs) => verbs.run(),
            Self::Df(verb) => verb.run(),
            Self::Gc(verb) => verb.run(),
            Self::Store(verbs) => verbs.run(),
            Self::Demo(verb) => verb.run(),
            Self::Completions(verb) => verb.run(),
            Self::Man(verb) => verb.run(),
        }
    }
}

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
    pub fn layers(&self) -> Result<Arc<Layers>> {
        Ok(Arc::new(Layers::new(self.folders()?)))
    }
}

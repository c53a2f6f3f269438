//! `thinply create`

use std::path::PathBuf;

use clap::Args;
use thinply::chain::create;

use crate::io::draft::Draft;
use crate::io::paths::Place;
use crate::io::size;
use crate::options::parent::ParentArg;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Sizes are bytes, or a number with K, M, G, T, P or E (powers of 1024): 512M, 1.5T.

Examples:
  thinply create --size 10G disk.tply
  thinply create --parent base.tply container.tply";

/// Make a new layer: an empty disk, or a writable view of a parent.
///
/// The file is sparse and costs two blocks until something is written. A parent is found through
/// its file name, in the new file's folder or in those of --layers. A writable parent is frozen by
/// this, for ever; one that is in use is refused.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Create {
    /// Size of the disk; the parent's where it is left out
    #[arg(long, value_name = "S", value_parser = size::parse)]
    size: Option<u64>,
    #[command(flatten)]
    parent: ParentArg,
    /// The file to make; it must not exist
    file: PathBuf,
}

impl Create {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::vacant(&self.file)?;
        size::check(self.size)?;
        let (parent, layers) = self.parent.prepare(&place)?;
        let draft = Draft::new(&place.directory, self.parent.rights()?);
        create(&draft.folder(), draft.name(), self.size, parent.as_ref(), &layers)?;
        draft.publish_at(&place)?;
        Ok(Answer::Yes)
    }
}

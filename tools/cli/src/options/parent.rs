//! Making sure that a file may be the parent of one that is about to be made.

use std::path::{Path, PathBuf};

use clap::Args;
use thinply::chain::{Gate, Parent, seal};
use thinply::error::{Error, ErrorKind, Result};
use thinply::format::header::check_hint;
use thinply::live::newest_header;
use thinply::packed::Packed;
use thinply::storage::{Access, Rights};

use crate::io::output::say;
use crate::io::paths::{Place, same_file};
use crate::options::LayersArg;

/// The layer to stand on.
#[derive(Args, Debug)]
pub struct ParentArg {
    /// Stand on layer P, which is frozen for ever if it isn't yet
    #[arg(long, value_name = "P")]
    parent: Option<PathBuf>,
    /// Where it is looked for.
    #[command(flatten)]
    pub layers: LayersArg,
}

impl ParentArg {
    /// The parent gate, and the parent for a file at `child`. A writable parent is frozen, which is
    /// said; one that the child would not find again is left alone and refused.
    pub fn prepare(&self, child: &Place) -> Result<(Option<Parent>, std::sync::Arc<Gate>)> {
        let layers = self.layers.layers()?;
        let Some(path) = &self.parent else { return Ok((None, layers)) };
        let place = Place::existing(path)?;
        check_hint(&place.name).map_err(|error| {
            Error::new(ErrorKind::InvalidInput, error.to_string()).in_file(path)
        })?;
        let file = place.open(Access::Read)?;
        if !Packed::is_packed(&*file)? {
            let header = newest_header(&*file)?;
            if !header.is_frozen() {
                self.check_found(&place, child)?;
                if let Some(link) = &header.parent {
                    layers.stack(link, &place.folder)?;
                }
            }
        }
        let parent = seal(&*place.folder, &place.name)?;
        if parent.newly_frozen {
            say(format_args!("{} is frozen now: it never changes again", path.display()));
        }
        Ok((Some(parent), layers))
    }

    /// The rights of a file that shows what the parent holds.
    pub fn rights(&self) -> Result<Rights> {
        let Some(path) = &self.parent else { return Ok(Rights::Usual) };
        Rights::of_copy([&*Place::existing(path)?.open(Access::Read)?])
            .map_err(|error| Error::io(error, "looking at the parent's mode").in_file(path))
    }

    /// Refuses a parent that stands where nobody will look for it.
    fn check_found(&self, parent: &Place, child: &Place) -> Result<()> {
        let path = parent.path();
        let holds = |folder: &Path| {
            let candidate = folder.join(&parent.name);
            let link = candidate.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
            !link && same_file(&candidate, &path)
        };
        let folders = self.layers.folders()?;
        if holds(&child.directory) || folders.iter().any(|folder| holds(folder.path())) {
            return Ok(());
        }
        let detail = format!(
            "a child in {} would not find this parent: put it there, or name its folder with \
             --layers",
            child.directory.display()
        );
        Err(Error::new(ErrorKind::NotFound, detail).in_file(path))
    }
}

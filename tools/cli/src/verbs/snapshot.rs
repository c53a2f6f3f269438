//! `thinply snapshot`

use std::path::PathBuf;

use clap::Args;
use thinply::error::{Error, ErrorKind, Result};
use thinply::format::header::check_hint;
use thinply::live::newest_header;
use thinply::storage::Access;

use crate::io::paths::{Place, closing, same_file};
use crate::options::LayersArg;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Example:
  thinply snapshot disk.tply monday.tply";

/// Give a disk's present state a name, and go on writing over it.
///
/// FILE stays the writable disk, now an empty layer; SNAP is what it held, frozen. Both must be in
/// the same folder. A snapshot that was interrupted is finished when FILE is next opened for
/// writing. On a file system without hard links the layer is copied.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Snapshot {
    #[command(flatten)]
    layers: LayersArg,
    /// The writable disk
    file: PathBuf,
    /// The name for its present state; it must not exist
    snap: PathBuf,
}

impl Snapshot {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let name = self.check_name(&place)?;
        let chain = place.chain(Access::Write, self.layers.layers()?)?;
        closing(chain, |chain| chain.snapshot(&name))?;
        Ok(Answer::Yes)
    }

    /// The snapshot's plain name, if it can be made; a leftover link of an interrupted try can.
    fn check_name(&self, place: &Place) -> Result<String> {
        let snap = match Place::vacant(&self.snap) {
            Err(error) if error.kind() == ErrorKind::Exists && self.is_leftover(place) => {
                Place::existing(&self.snap)?
            }
            other => other?,
        };
        if snap.directory != place.directory {
            let detail = format!(
                "a snapshot stays in the folder of its disk: {}",
                place.directory.join(&snap.name).display()
            );
            return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(&self.snap));
        }
        check_hint(&snap.name)
            .map_err(|error| Error::new(ErrorKind::InvalidInput, error.to_string()))?;
        Ok(snap.name)
    }

    fn is_leftover(&self, place: &Place) -> bool {
        let link = self.snap.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
        let other = self.snap.file_name().is_some_and(|name| *name != *place.name);
        let uuid = |place: &Place| newest_header(&*place.open(Access::Read)?).map(|h| h.uuid);
        // The same file, though not every file system shows that: the snapshot makes sure of it.
        let same = || {
            let found = Place::existing(&self.snap).and_then(|snap| uuid(&snap));
            found.is_ok_and(|found| uuid(place).is_ok_and(|own| own == found))
        };
        !link && other && (same_file(&self.snap, &place.path()) || same())
    }
}

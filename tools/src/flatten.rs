//! `thinply flatten`

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use thinply::chain::Layer;
use thinply::device::Device;
use thinply::error::{Error, ErrorKind, Result};
use thinply::format::header::{ParentLink, check_hint};
use thinply::storage::Access;

use crate::args::LayersArg;
use crate::draft::Draft;
use crate::output::Output;
use crate::paths::Place;
use crate::{Answer, Outcome, progress};

const AFTER_HELP: &str = "\
OUT appears when it is whole and durable, and shows exactly what FILE shows. The layers that it was
made from stay as they are.

Exit codes:
  0  done
  2  an error; there is no OUT
  130  interrupted; there is no OUT

Examples:
  thinply flatten disk.tply whole.tply
  thinply flatten --onto base.tply disk.tply changes.tply";

/// Fold the layers of a disk into one new frozen layer.
///
/// All of them, or those above an ancestor. The disk must keep still: one that is being written is
/// refused.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Flatten {
    /// Fold only the layers above ANCESTOR, and stand on it
    #[arg(long, value_name = "ANCESTOR")]
    onto: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    layers: LayersArg,
    /// The disk
    file: PathBuf,
    /// The file to make; it must not exist
    out: PathBuf,
}

#[derive(Debug, Serialize)]
struct Made {
    file: String,
    virtual_size: u64,
    identity: String,
    parent: Option<String>,
}

impl Flatten {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let out = Place::vacant(&self.out)?;
        let onto = self.onto.as_deref().map(ancestor).transpose()?;
        let chain = place.chain(Access::Read, self.layers.layers()?)?;
        let draft = Draft::new(&out.directory);
        let bar = progress::bar(Some(chain.size()));
        let made = chain.flatten(
            &out.folder,
            draft.name(),
            onto.as_ref(),
            self.layers.layers()?,
            &mut |done| bar.set_position(done),
        )?;
        bar.finish_and_clear();
        draft.publish_at(&out)?;
        if self.json {
            let mut output = Output::new();
            output.json(&Made {
                file: out.path().display().to_string(),
                virtual_size: made.virtual_size,
                identity: made.link.identity.to_string(),
                parent: onto.map(|link| link.hint),
            })?;
            output.print()?;
        }
        Ok(Answer::Yes)
    }
}

/// The link to an ancestor; one that is not frozen can't be one.
fn ancestor(path: &Path) -> Result<ParentLink> {
    let place = Place::existing(path)?;
    check_hint(&place.name)
        .map_err(|error| Error::new(ErrorKind::InvalidInput, error.to_string()).in_file(path))?;
    let identity = Layer::open(place.open(Access::Read)?)?.identity().ok_or_else(|| {
        let detail = "is not frozen, so nothing stands on it";
        Error::new(ErrorKind::InvalidInput, detail).in_file(path)
    })?;
    Ok(ParentLink { identity, hint: place.name })
}

//! `thinply compact`

use std::path::PathBuf;

use clap::Args;
use thinply::derive::Plan;
use thinply::storage::Access;

use crate::derive::{Form, Maker};
use crate::io::paths::Place;
use crate::options::LayersArg;
use crate::options::PackingArgs;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
What FILE gives up in OUT: blocks of zeros, blocks that read the same from its parent, and what lies
beyond its end. OUT shows exactly what FILE shows, on the same parent, and is writable, frozen or
packed as FILE is. FILE stays as it is.

Exit codes:
  0  done
  2  an error; there is no OUT
  130  interrupted; there is no OUT

Example:
  thinply compact disk.tply small.tply";

/// Make a copy of a layer that takes no more space than its content needs.
///
/// The disk must keep still: one that is being written is refused.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Compact {
    #[command(flatten)]
    packing: PackingArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    layers: LayersArg,
    /// The layer
    file: PathBuf,
    /// The file to make; it must not exist
    out: PathBuf,
}

impl Compact {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let out = Place::vacant(&self.out)?;
        let form = Form::of(&place, &self.packing)?;
        let chain = place.chain(Access::Read, self.layers.layers()?)?;
        let (layers, json) = (&self.layers, self.json);
        Maker { out: &out, form, layers, depth: 1, json }.make(&chain, &Plan::compact(&chain))?;
        Ok(Answer::Yes)
    }
}

//! `thinply flatten`

use std::path::PathBuf;

use clap::Args;
use thinply::derive::Plan;
use thinply::storage::Access;

use crate::derive::{Form, Maker, sealed};
use crate::io::paths::Place;
use crate::options::LayersArg;
use crate::verbs::{Answer, Outcome};

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

impl Flatten {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let out = Place::vacant(&self.out)?;
        let onto = self.onto.as_deref().map(|path| sealed(&Place::existing(path)?)).transpose()?;
        let chain = place.chain(Access::Read, self.layers.layers()?)?;
        let plan = Plan::flatten(&chain, onto.as_ref().map(|parent| &parent.link))?;
        let Self { layers, json, .. } = self;
        Maker { out: &out, form: Form::Frozen, layers, depth: usize::MAX, json: *json }
            .make(&chain, &plan)?;
        Ok(Answer::Yes)
    }
}

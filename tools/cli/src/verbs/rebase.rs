//! `thinply rebase`

use std::path::PathBuf;

use clap::Args;
use thinply::chain::Chain;
use thinply::derive::Plan;
use thinply::error::{Error, ErrorKind};
use thinply::storage::Access;

use crate::derive::{Form, Maker};
use crate::io::paths::Place;
use crate::options::PackingArgs;
use crate::options::parent::ParentArg;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
OUT appears when it is whole and durable. It shows exactly what FILE shows, and holds the blocks in
which that differs from P; layers that both stand on are not read. It is writable, frozen or packed
as FILE is. FILE stays as it is, and what stands on it goes on standing on it.

With --unsafe, OUT holds what FILE itself holds, whatever P holds. Its content changes unless P reads
as the old parent, which is not looked for: it may be gone, or only have another name by now.

To stand on nothing at all: thinply flatten.

Exit codes:
  0  done
  2  an error; there is no OUT
  130  interrupted; there is no OUT

Examples:
  thinply rebase --parent tuesday.tply disk.tply moved.tply
  thinply rebase --unsafe --parent renamed.tply disk.tply moved.tply";

/// Make a new layer that shows what a disk shows, on another parent.
///
/// The disk must keep still: one that is being written is refused.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP, mut_arg("parent", |arg| arg.required(true)))]
pub struct Rebase {
    /// Only link to P; FILE's own blocks stay, all others may change
    #[arg(long = "unsafe")]
    relink: bool,
    #[command(flatten)]
    packing: PackingArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    parent: ParentArg,
    /// The disk
    file: PathBuf,
    /// The file to make; it must not exist
    out: PathBuf,
}

impl Rebase {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let out = Place::vacant(&self.out)?;
        let layers = self.parent.layers.layers()?;
        let form = Form::of(&place, &self.packing)?;
        let chain = if self.relink {
            Chain::open_alone(place.folder.clone(), &place.name, layers)?
        } else {
            place.chain(Access::Read, layers)?
        };
        let Some(parent) = self.parent.prepare(&out)?.0 else {
            return Err(Error::new(ErrorKind::InvalidInput, "no parent is named"));
        };
        let plan = match self.relink {
            true => Plan::relink(&chain, &parent),
            false => Plan::rebase(&chain, &parent),
        };
        let (layers, json) = (&self.parent.layers, self.json);
        Maker { out: &out, form, layers, depth: usize::MAX, json }.make(&chain, &plan)?;
        Ok(Answer::Yes)
    }
}

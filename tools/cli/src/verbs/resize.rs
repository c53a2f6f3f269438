//! `thinply resize`

use std::path::PathBuf;

use clap::Args;
use thinply::device::Device;
use thinply::error::{Error, ErrorKind};
use thinply::storage::Access;

use crate::io::paths::{Place, closing};
use crate::io::size::{self, NewSize};
use crate::options::LayersArg;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Sizes are bytes, or a number with K, M, G, T, P or E (powers of 1024). What a shrink cuts off never
comes back: growing again shows zeros.

Examples:
  thinply resize disk.tply 20G
  thinply resize disk.tply +512M
  thinply resize --shrink disk.tply -1G";

/// Change a disk's size.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Resize {
    /// Allow a smaller size, which cuts data off
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    layers: LayersArg,
    /// The disk
    file: PathBuf,
    /// The new size, or a change of it with + or -
    #[arg(allow_hyphen_values = true)]
    size: NewSize,
}

impl Resize {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let chain = place.chain(Access::Write, self.layers.layers()?)?;
        closing(chain, |chain| {
            let (old, new) = (chain.size(), self.size.of(chain.size())?);
            size::check(Some(new))?;
            if new < old && !self.shrink {
                let detail =
                    format!("{new} bytes would cut off data of {old}; --shrink allows that");
                return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(&self.file));
            }
            chain.resize(new, self.shrink)
        })?;
        Ok(Answer::Yes)
    }
}

//! `thinply resize`

use std::path::PathBuf;

use clap::Args;
use thinply::control::{self, Request};
use thinply::device::Device;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Access;

use crate::io::paths::{Place, closing};
use crate::io::size::{self, NewSize};
use crate::options::{LayersArg, StoreArg};
use crate::verbs::serve::say;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Sizes are bytes, or a number with K, M, G, T, P or E (powers of 1024). What a shrink cuts off never
comes back: growing again shows zeros.

Examples:
  thinply resize disk.tply 20G
  thinply resize disk.tply +512M
  thinply resize --shrink disk.tply -1G
  thinply resize container/web +5G";

/// Change a disk's size.
///
/// A disk of the store that `serve --all` serves is resized by that process, while its clients go on:
/// those that are connected keep the size that they were told, until they connect again.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Resize {
    /// Allow a smaller size, which cuts data off
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    layers: LayersArg,
    #[command(flatten)]
    store: StoreArg,
    /// The disk; container/NAME or volume/NAME for one of the store
    file: PathBuf,
    /// The new size, or a change of it with + or -
    #[arg(allow_hyphen_values = true)]
    size: NewSize,
}

impl Resize {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let name = self.file.to_str().unwrap_or_default();
        let own = name.split_once('/').filter(|_| !self.file.exists());
        match own {
            Some((kind @ ("container" | "volume"), disk)) => self.resize_in_store(kind, disk),
            _ => self.resize_file(),
        }
    }

    fn resize_in_store(&self, kind: &str, name: &str) -> Outcome {
        let store = self.store.open()?;
        let old = match kind {
            // Says so if there is none.
            "container" => store.container(name).and_then(|_| store.container_size(name))?,
            _ => store.volume(name)?.virtual_size,
        };
        let size = self.new_size(old)?;
        let disk = format!("{kind}/{name}");
        control::carry_out(&store, &Request::Resize { disk, size, shrink: self.shrink }, say())?;
        Ok(Answer::Yes)
    }

    fn resize_file(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let chain = place.chain(Access::Write, self.layers.layers()?)?;
        closing(chain, |chain| chain.resize(self.new_size(chain.size())?, self.shrink))?;
        Ok(Answer::Yes)
    }

    /// What a disk of that size gets.
    fn new_size(&self, old: u64) -> Result<u64> {
        let refused = |error: Error| error.in_file(&self.file);
        let new = self.size.of(old).and_then(size::possible).map_err(refused)?;
        if new < old && !self.shrink {
            let detail = format!("{new} bytes would cut off data of {old}; --shrink allows that");
            return Err(refused(Error::new(ErrorKind::InvalidInput, detail)));
        }
        Ok(new)
    }
}

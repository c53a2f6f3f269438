//! `thinply resize`

use std::path::PathBuf;

use clap::Args;
use thinply::control::{self, Request};
use thinply::device::Device;
use thinply::error::{Error, ErrorKind};
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
            "container" => store.container_size(name)?,
            _ => store.volume(name)?.virtual_size,
        };
        let size = self.size.of(old)?;
        size::check(Some(size))?;
        let disk = format!("{kind}/{name}");
        control::carry_out(&store, &Request::Resize { disk, size, shrink: self.shrink }, say())?;
        Ok(Answer::Yes)
    }

    fn resize_file(&self) -> Outcome {
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

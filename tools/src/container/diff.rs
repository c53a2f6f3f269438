//! `thinply container diff`

use clap::Args;
use serde::Serialize;
use thinply::chain::{Chain, Kind};
use thinply::device::{Detail, Device};
use thinply::error::Result;
use thinply::storage::Access;
use thinply::store::{Disk, DiskKind};

use crate::output::Output;
use crate::store::StoreArg;
use crate::{Answer, Outcome};

/// Show what a container changed.
///
/// Extents are the ranges that its own layers hold: offset and length in bytes, and whether they
/// were zeroed. The container must keep still: one that is being written is refused.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply container diff web")]
pub struct Diff {
    #[command(flatten)]
    store: StoreArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The container's name
    container: String,
}

#[derive(Debug, Serialize)]
struct Extent {
    offset: u64,
    length: u64,
    zero: bool,
}

impl Diff {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let disk = Disk::new(DiskKind::Container, &self.container)?;
        let chain = store.open_disk(&disk, Access::Read)?;
        let own = store.own_depth(&self.container)?;
        let extents = changed(&chain, own)?;
        let mut output = Output::new();
        if self.json {
            output.json(&extents)?;
        } else {
            output.line("          offset           length  change")?;
            for extent in &extents {
                let change = if extent.zero { "zeroed" } else { "written" };
                output
                    .line(format_args!("{:>16} {:>16}  {change}", extent.offset, extent.length))?;
            }
        }
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// The extents that the newest `own` layers hold, neighbours of different layers joined.
fn changed(chain: &Chain, own: usize) -> Result<Vec<Extent>> {
    let mut extents: Vec<Extent> = Vec::new();
    chain.map(0, chain.size(), Detail::Files, &mut |extent| {
        if extent.depth.is_some_and(|depth| depth < own) {
            let zero = extent.kind != Kind::Data;
            match extents.last_mut() {
                Some(last) if last.offset + last.length == extent.offset && last.zero == zero => {
                    last.length += extent.length;
                }
                _ => extents.push(Extent { offset: extent.offset, length: extent.length, zero }),
            }
        }
        true
    })?;
    Ok(extents)
}

//! `thinply container diff`

use clap::Args;
use serde::Serialize;
use thinply::chain::{Chain, Kind};
use thinply::device::{Detail, Device};
use thinply::error::Result;
use thinply::storage::Access;
use thinply::store::{Disk, DiskKind};

use super::files::{self, FileChange};
use crate::output::Output;
use crate::store::StoreArg;
use crate::{Answer, Outcome};

/// Show what a container changed.
///
/// Extents are the ranges that its own layers hold: offset and length in bytes, and whether they
/// were zeroed. Where the disk is an ext4 file system, the files that differ from the image's follow:
/// A added, C changed (in type, size, mode, owner or time of modification), D deleted. The container
/// must keep still: one that is being written is refused.
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
struct Changes {
    extents: Vec<Extent>,
    /// None where the content is no ext4 file system.
    files: Option<Vec<FileChange>>,
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
        let files = files::changed(store.open_base(&self.container)?, chain)?;
        let mut output = Output::new();
        if self.json {
            output.json(&Changes { extents, files })?;
        } else {
            output.line("          offset           length  change")?;
            for extent in &extents {
                let change = if extent.zero { "zeroed" } else { "written" };
                output
                    .line(format_args!("{:>16} {:>16}  {change}", extent.offset, extent.length))?;
            }
            for file in files.iter().flatten() {
                // A name may hold what a terminal takes for a command.
                let path = file.path.replace(char::is_control, "?");
                output.line(format_args!("{} {path}", file.change.letter()))?;
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

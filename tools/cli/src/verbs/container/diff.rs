//! `thinply container diff`

use std::ops::ControlFlow;
use std::sync::Arc;

use clap::Args;
use serde::{Deserialize, Serialize};
use thinply::chain::{Chain, Kind};
use thinply::device::{Detail, Device};
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Access;
use thinply::store::{Disk, DiskKind, Store};

use crate::io::output::Output;
use crate::options::StoreArg;
use crate::serving::control::{self, Request};
use crate::serving::files::{self, FileChange};
use crate::verbs::{Answer, Outcome};

/// Show what a container changed.
///
/// Extents are the ranges that its own layers hold: offset and length in bytes, and whether they
/// were zeroed. Where the disk is an ext4 file system, the files that differ from the image's follow:
/// A added, C changed (in type, size, mode, owner or time of modification), D deleted. A container
/// that `serve --all` serves is looked at by that process, its files as of one moment, while its
/// clients go on; what they have not sent yet can't be seen.
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

/// What a container changed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Changes {
    extents: Vec<Extent>,
    /// None where the content is no ext4 file system.
    files: Option<Vec<FileChange>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Extent {
    offset: u64,
    length: u64,
    zero: bool,
}

impl Changes {
    /// Those of a container that nobody writes.
    pub fn of(store: &Store, container: &str) -> Result<Self> {
        let disk = Disk::new(DiskKind::Container, container)?;
        let chain = Arc::new(store.open_disk(&disk, Access::Read)?);
        Self::between(store, container, &chain, chain.clone())
    }

    /// Those of a container whose chain is open; `still` is what its disk holds.
    pub fn between(
        store: &Store,
        container: &str,
        chain: &Chain,
        still: Arc<dyn files::Still>,
    ) -> Result<Self> {
        let extents = changed(chain, store.own_depth(container)?)?;
        let files = files::changed(Arc::new(store.open_base(container)?), still)?;
        Ok(Self { extents, files })
    }
}

impl Diff {
    /// Has the process look that serves the container, if one does.
    fn changes(&self) -> Result<Changes> {
        let store = self.store.open()?;
        match Changes::of(&store, &self.container) {
            Err(error) if error.kind() == ErrorKind::InUse => {
                let request = Request::Diff { container: self.container.clone() };
                let answer = control::ask(&store, &request).unwrap_or(Err(error))?;
                serde_json::from_value(answer).map_err(|error| {
                    Error::io(error.into(), "reading what the process that serves the store says")
                })
            }
            other => other,
        }
    }

    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let changes = self.changes()?;
        let mut output = Output::new();
        if self.json {
            output.json(&changes)?;
        } else {
            output.line("          offset           length  change")?;
            for extent in &changes.extents {
                let change = if extent.zero { "zeroed" } else { "written" };
                output
                    .line(format_args!("{:>16} {:>16}  {change}", extent.offset, extent.length))?;
            }
            for file in changes.files.iter().flatten() {
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
        ControlFlow::Continue(())
    })?;
    Ok(extents)
}

//! `thinply container diff`

use clap::Args;
use thinply::control::{self, Change, Request};

use crate::io::output::Output;
use crate::options::StoreArg;
use crate::verbs::serve::say;
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

impl Diff {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let request = Request::Diff { container: self.container.clone() };
        let answer = control::carry_out(&self.store.open()?, &request, say())?;
        let control::Answer::Diff(changes) = answer else { return Ok(Answer::No) };
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
                output.line(format_args!("{} {}", letter(file.change), file.path))?;
            }
        }
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// The letter that Docker shows for it.
fn letter(change: Change) -> char {
    match change {
        Change::Added => 'A',
        Change::Changed => 'C',
        Change::Deleted => 'D',
    }
}

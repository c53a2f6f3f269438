//! `thinply check`

use std::sync::Arc;

use clap::Args;
use serde::Serialize;
use thinply::chain::{self, Stack};
use thinply::error::{Error, ErrorKind, Result};
use thinply::inspect::{self, Report};
use thinply::live::newest_header;
use thinply::packed::Packed;
use thinply::storage::{Access, Lock, Storage, take_lock};

use crate::io::output::Output;
use crate::io::paths::Place;
use crate::options::ShowArgs;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
A finding is what must not be; a note is what may be, such as a layer that was not closed.
Data in a live layer's blocks has no checksum and is not judged; a packed layer is
verified whole. Nothing is changed.

Exit codes:
  0  nothing was found
  1  something was found
  2  it could not be checked

Examples:
  thinply check disk.tply
  thinply check --chain --json disk.tply";

/// Look for damage in a layer's metadata.
///
/// The disk must keep still: one that is being written is refused.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Check {
    /// Check the layers below too, and that each is the one its child stands on
    #[arg(long)]
    chain: bool,
    #[command(flatten)]
    show: ShowArgs,
}

/// What was found in a layer.
#[derive(Debug, Serialize)]
struct Layer {
    file: String,
    clean: bool,
    findings: Vec<Found>,
    notes: Vec<Found>,
    left_out: u64,
}

/// A finding: JSON wants names of our own.
#[derive(Debug, Serialize)]
struct Found {
    offset: u64,
    what: String,
}

#[derive(Debug, Serialize)]
struct Gate {
    clean: bool,
    layers: Vec<Layer>,
}

impl Check {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let layers = self.check()?;
        let all = Gate { clean: layers.iter().all(|layer| layer.clean), layers };
        let mut output = Output::new();
        if self.show.json {
            output.json(&all)?;
        } else {
            all.layers.iter().try_for_each(|layer| layer.lines(&mut output))?;
        }
        output.print()?;
        Ok(if all.clean { Answer::Yes } else { Answer::No })
    }

    fn check(&self) -> Result<Vec<Layer>> {
        let place = Place::existing(&self.show.file)?;
        let file = place.open(Access::Read)?;
        let mut report = if Packed::recognise(&*file)? {
            inspect::check_packed(file.clone())?
        } else {
            take_lock(&*file, Lock::Shared)?;
            inspect::check(&*file)?
        };
        let mut below = None;
        if self.chain {
            match self.parents(&place, file.clone()) {
                Ok(stack) => below = stack,
                Err(error) if is_damage(&error) => {
                    let what = format!("the chain can't be opened: {error}");
                    report.findings.push(inspect::Finding { offset: 0, what });
                }
                Err(error) => return Err(error),
            }
        }
        let mut layers = vec![Layer::new(place.path().display().to_string(), report)];
        for layer in below.iter().flat_map(|stack| stack.layers()) {
            let path = layer.path().display().to_string();
            let report = match layer {
                chain::Layer::Live(layer) => inspect::check(layer.file())?,
                chain::Layer::Packed(layer) => inspect::verify(layer)?,
            };
            layers.push(Layer::new(path, report));
        }
        Ok(layers)
    }

    /// The layers below, opened as every reader opens them, which checks how they fit together.
    fn parents(&self, place: &Place, file: Arc<dyn Storage>) -> Result<Option<Arc<Stack>>> {
        let parent = if Packed::recognise(&*file)? {
            Packed::open(file)?.parent().cloned()
        } else {
            newest_header(&*file)?.parent
        };
        let Some(link) = parent else { return Ok(None) };
        let layers = self.show.layers.layers()?;
        let stack = layers.stack(&link, &place.folder)?;
        // The stack knows its own layers; the top's view of it is checked by opening the top.
        place.chain(Access::Read, layers)?;
        Ok(Some(stack))
    }
}

/// Whether a refusal says that the files are wrong, and not that they can't be looked at.
fn is_damage(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound
            | ErrorKind::ParentMismatch
            | ErrorKind::NotAnImage
            | ErrorKind::Corrupt
            | ErrorKind::Loss
            | ErrorKind::Limit
    )
}

impl Layer {
    fn new(file: String, report: Report) -> Self {
        let list = |found: Vec<inspect::Finding>| {
            found.into_iter().map(|f| Found { offset: f.offset, what: f.what }).collect()
        };
        Self {
            file,
            clean: report.is_clean(),
            findings: list(report.findings),
            notes: list(report.notes),
            left_out: report.left_out,
        }
    }

    fn lines(&self, output: &mut Output) -> Result<()> {
        let verdict = match self.findings.len() {
            0 => "clean".into(),
            1 => "1 finding".into(),
            count => format!("{count} findings"),
        };
        output.line(format_args!("{}: {verdict}", self.file))?;
        for finding in &self.findings {
            output.line(format_args!("  at byte {}: {}", finding.offset, finding.what))?;
        }
        for note in &self.notes {
            output.line(format_args!("  note, at byte {}: {}", note.offset, note.what))?;
        }
        if self.left_out > 0 {
            output.line(format_args!("  and {} more", self.left_out))?;
        }
        Ok(())
    }
}

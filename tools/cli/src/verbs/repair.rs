//! `thinply repair`

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use thinply::error::{Error, Result};
use thinply::inspect::{self, Fate, Repaired};
use thinply::storage::{Access, Lock, Rights, take_lock};

use crate::io::draft::Draft;
use crate::io::output::Output;
use crate::io::paths::Place;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
IN is never changed, and may be a layer that nothing else opens. OUT keeps the link to the parent,
which may be missing. A block that can't be read is lost: OUT shows there what lies below. Where
nothing tells any more whether a block was the layer's own, the data at its place are taken, and
told as a guess. OUT is a new layer under a new UUID; only a frozen layer that was saved completely
keeps its own, so that its children may stand on OUT.

Exit codes:
  0  everything was saved
  1  something was lost or guessed
  2  nothing could be saved

Examples:
  thinply repair broken.tply saved.tply
  thinply repair --json broken.tply saved.tply";

/// Save what can be read of a damaged layer into a new one.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Repair {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The damaged layer
    #[arg(value_name = "IN")]
    file: PathBuf,
    /// The new layer; it must not exist
    out: PathBuf,
}

#[derive(Debug, Serialize)]
struct Answered {
    file: String,
    complete: bool,
    virtual_size: u64,
    blocks: u64,
    uuid: String,
    frozen: bool,
    losses: Vec<Range>,
    doubts: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Range {
    offset: u64,
    length: u64,
    fate: &'static str,
    reason: String,
}

impl Repair {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::vacant(&self.out)?;
        let source = Place::existing(&self.file)?;
        let file = source.open(Access::Read)?;
        take_lock(&*file, Lock::Shared)?;

        let rights = Rights::of_copy([&*file])
            .map_err(|error| Error::io(error, "looking at the file's mode").in_file(&self.file))?;
        let draft = Draft::new(&place.directory, rights);
        let new = draft.folder().create(draft.name()).map_err(|error| {
            Error::io(error, "creating the new layer").in_file(&place.directory)
        })?;
        let repaired = inspect::repair(&*file, &*new)?;
        let complete = repaired.is_complete();
        let mut output = Output::new();
        self.report(&place.path(), repaired, &mut output)?;
        draft.publish_at(&place)?;
        output.print()?;
        Ok(if complete { Answer::Yes } else { Answer::No })
    }

    fn report(&self, out: &Path, repaired: Repaired, output: &mut Output) -> Result<()> {
        let answered = Answered::new(out, repaired);
        if self.json { output.json(&answered) } else { answered.lines(output) }
    }
}

impl Answered {
    fn new(out: &Path, repaired: Repaired) -> Self {
        let ranges = repaired.losses.iter().map(|loss| Range {
            offset: loss.offset,
            length: loss.length,
            fate: match loss.fate {
                Fate::Lost => "lost",
                Fate::Guessed => "guessed",
            },
            reason: loss.reason.to_string(),
        });
        Self {
            file: out.display().to_string(),
            complete: repaired.is_complete(),
            virtual_size: repaired.header.virtual_size,
            blocks: repaired.blocks,
            uuid: repaired.header.uuid.to_string(),
            frozen: repaired.header.is_frozen(),
            losses: ranges.collect(),
            doubts: repaired.doubts,
        }
    }

    fn lines(&self, output: &mut Output) -> Result<()> {
        let verdict = if self.complete { "everything was saved" } else { "not all was saved" };
        let kind = if self.frozen { "frozen" } else { "writable" };
        output.line(format_args!(
            "{}: {verdict}: {} blocks of a device of {} bytes, {kind}, {}",
            self.file, self.blocks, self.virtual_size, self.uuid
        ))?;
        for doubt in &self.doubts {
            output.line(format_args!("  in doubt: {doubt}"))?;
        }
        for loss in &self.losses {
            output.line(format_args!(
                "  {}: {} bytes at {}: {}",
                loss.fate, loss.length, loss.offset, loss.reason
            ))?;
        }
        Ok(())
    }
}

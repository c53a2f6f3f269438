//! `thinply verify`

use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;
use thinply::error::{Error, ErrorKind};
use thinply::packed::{Damage, Packed, Watch};
use thinply::storage::Access;
use thinply::types::BLOCK_SIZE;

use crate::io::output::Output;
use crate::io::paths::Place;
use crate::io::progress;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Exit codes: 0 if all is as it was packed, 1 if not, 2 if it could not be told. A live layer has no
checksums of its data to verify; thinply check looks at its structures.

Examples:
  thinply verify base.packed.tply
  thinply verify --json base.packed.tply";

/// Verify every byte of a packed layer against its checksums, hashes and root.
///
/// Names each block that can't be read for it. The layers below are not looked at.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Verify {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The packed layer
    file: PathBuf,
}

#[derive(Debug, Serialize)]
struct Verdict {
    file: String,
    root: Option<String>,
    intact: bool,
    damage: Vec<Lost>,
}

/// What is damaged, and the guest bytes that are lost by it.
#[derive(Debug, Serialize)]
struct Lost {
    offset: Option<u64>,
    guest_offset: Option<u64>,
    guest_length: Option<u64>,
    what: String,
}

struct Watcher {
    damage: Vec<Lost>,
    bar: ProgressBar,
}

impl Watch for Watcher {
    fn found(&mut self, damage: Damage) {
        self.damage.push(Lost::new(damage.error, damage.guest));
    }

    fn verified(&mut self, blocks: u64) {
        self.bar.inc(blocks * BLOCK_SIZE);
    }
}

impl Lost {
    fn new(error: Error, guest: Option<(u64, u64)>) -> Self {
        let (guest_offset, guest_length) = guest.unzip();
        Self { offset: error.offset(), guest_offset, guest_length, what: error.to_string() }
    }
}

impl Verify {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let file = place.open(Access::Read)?;
        let (root, damage) = match Packed::open(file) {
            Ok(layer) => {
                let bar = progress::bar(Some(layer.footer().data_blocks * BLOCK_SIZE));
                let mut watcher = Watcher { damage: Vec::new(), bar };
                layer.verify(&mut watcher)?;
                watcher.bar.finish_and_clear();
                (Some(layer.root().to_string()), watcher.damage)
            }
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                (None, vec![Lost::new(error, None)])
            }
            Err(error) => return Err(error),
        };
        let verdict = Verdict {
            file: place.path().display().to_string(),
            root,
            intact: damage.is_empty(),
            damage,
        };
        let mut output = Output::new();
        if self.json {
            output.json(&verdict)?;
        } else {
            let word = if verdict.intact { "intact" } else { "damaged" };
            let root = verdict.root.iter().map(|root| format!(", root {root}"));
            output.line(format_args!("{}: {word}{}", verdict.file, root.collect::<String>()))?;
            for lost in &verdict.damage {
                let guest = lost.guest_offset.zip(lost.guest_length);
                let guest = guest.map(|(offset, length)| {
                    format!("; lost: {length} bytes at guest offset {offset}")
                });
                output.line(format_args!("  {}{}", lost.what, guest.unwrap_or_default()))?;
            }
        }
        output.print()?;
        Ok(if verdict.intact { Answer::Yes } else { Answer::No })
    }
}

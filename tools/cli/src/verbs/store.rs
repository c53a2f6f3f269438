//! The store as a whole: `df`, `gc`, `store check`, and where it is.

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::io::output::Output;
use crate::io::table::{self, short, short_id};
use crate::options::StoreArg;
use crate::verbs::{Answer, Outcome, tell};

/// Show what images, containers and volumes take on disk.
///
/// Active are images that containers stand on, and disks that somebody has open. Reclaimable is
/// what would come back if all that is not active were removed; layers that several images share
/// count once. What is damaged is not counted but told of on standard error, and the exit code is 1
/// then.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply df --json")]
pub struct Df {
    #[command(flatten)]
    store: StoreArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct UsageRow {
    r#type: &'static str,
    total: u64,
    active: u64,
    size: u64,
    reclaimable: u64,
}

impl Df {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let usage = self.store.open()?.usage()?;
        let rows: Vec<_> = ["Images", "Containers", "Volumes"]
            .into_iter()
            .zip(usage.good)
            .map(|(kind, usage)| UsageRow {
                r#type: kind,
                total: usage.total,
                active: usage.active,
                size: usage.size,
                reclaimable: usage.reclaimable,
            })
            .collect();
        let mut output = Output::new();
        if self.json {
            output.json(&rows)?;
        } else {
            let percent = |row: &UsageRow| {
                let share = (row.reclaimable * 100).checked_div(row.size).unwrap_or(0);
                format!("{} ({share}%)", short(row.reclaimable))
            };
            let rows: Vec<_> = rows
                .iter()
                .map(|row| {
                    let (total, active) = (row.total.to_string(), row.active.to_string());
                    vec![row.r#type.to_owned(), total, active, short(row.size), percent(row)]
                })
                .collect();
            let heading = ["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"];
            table::print(&mut output, &heading, &rows)?;
        }
        output.print()?;
        Ok(tell(&usage.bad))
    }
}

/// Remove what nothing refers to any more.
///
/// That are images whose name went to another one and on which no container stands, layers of no
/// image, and what commands left that were killed. Whatever a command is making just now stays.
/// Where something that may refer to images or layers can't be read, those stay too; it is told of
/// on standard error, and the exit code is 1 then. A dry run needs no more than to read the store.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply gc --dry-run")]
pub struct Gc {
    #[command(flatten)]
    store: StoreArg,
    /// Only tell what would go
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Gc {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let found = self.store.open()?.collect(self.dry_run)?;
        let mut output = Output::new();
        if self.json {
            let files = found
                .files
                .iter()
                .map(|(file, size)| serde_json::json!({"file": file, "size": size}));
            output.json(&serde_json::json!({
                "dry_run": self.dry_run,
                "images": found.images,
                "files": files.collect::<Vec<_>>(),
                "reclaimed_size": found.bytes(),
            }))?;
        } else {
            for image in &found.images {
                output.line(format_args!("Untagged: {}", short_id(image)))?;
            }
            for (file, size) in &found.files {
                output.line(format_args!("Deleted: {file} ({})", short(*size)))?;
            }
            let would = if self.dry_run { "Would reclaim" } else { "Reclaimed" };
            output.line(format_args!("{would}: {}", short(found.bytes())))?;
        }
        output.print()?;
        Ok(tell(&found.bad))
    }
}

/// Look after the store as a whole.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply store check")]
pub struct StoreVerbs {
    #[command(subcommand)]
    verb: StoreVerb,
}

#[derive(Debug, Subcommand)]
enum StoreVerb {
    Check(CheckStore),
}

impl StoreVerbs {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        match &self.verb {
            StoreVerb::Check(verb) => verb.run(),
        }
    }
}

/// Read everything and tell what is not as it should be.
///
/// Blobs are compared with their digests, images with their layers, containers and volumes with
/// their records. The exit code is 1 if anything was found.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply store check")]
struct CheckStore {
    #[command(flatten)]
    store: StoreArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CheckStore {
    fn run(&self) -> Outcome {
        let findings = self.store.open()?.verify()?;
        let mut output = Output::new();
        if self.json {
            let list = findings.iter().map(|finding| {
                serde_json::json!({"subject": finding.subject, "finding": finding.detail})
            });
            output.json(&list.collect::<Vec<_>>())?;
        } else if findings.is_empty() {
            output.line("clean")?;
        } else {
            for finding in &findings {
                output.line(format_args!("{}: {}", finding.subject, finding.detail))?;
            }
        }
        output.print()?;
        Ok(if findings.is_empty() { Answer::Yes } else { Answer::No })
    }
}

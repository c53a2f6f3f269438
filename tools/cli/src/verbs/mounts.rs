//! `thinply mounts`

use clap::Args;

use crate::io::output::Output;
use crate::io::table;
use crate::mounting::uses::{self, Use};
use crate::verbs::{Answer, Outcome};

/// Show what is mounted and attached where.
///
/// WAITING is how many requests to the disk wait for space on the host.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply mounts --json")]
pub struct Mounts {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Mounts {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let uses = uses::all()?;
        let mut output = Output::new();
        if self.json {
            output.json(&uses)?;
        } else {
            let heading =
                ["TARGET", "PART", "DIR", "DEVICE", "MODE", "WAITING", "PID", "USER", "SINCE"];
            let rows: Vec<_> = uses.iter().flat_map(rows).collect();
            table::print(&mut output, &heading, &rows)?;
        }
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// A line for each place that a disk is mounted at, one at least.
fn rows(one: &Use) -> Vec<Vec<String>> {
    let none = || "-".to_owned();
    let row = |folder: String| {
        vec![
            one.target.display().to_string(),
            one.partition.map_or_else(none, |number| number.to_string()),
            folder,
            one.device.as_ref().map_or_else(none, |device| device.display().to_string()),
            if one.read_only { "ro" } else { "rw" }.to_owned(),
            one.waiting.map_or_else(none, |waiting| waiting.to_string()),
            one.pid.map_or_else(none, |pid| pid.to_string()),
            one.user.map_or_else(none, |user| user.to_string()),
            one.since.as_ref().map_or_else(none, |since| table::ago(since)),
        ]
    };
    if one.folders.is_empty() {
        return vec![row(none())];
    }
    one.folders.iter().map(|folder| row(folder.display().to_string())).collect()
}

//! `thinply man`

use std::fs;
use std::path::PathBuf;

use clap::{Args, Command};
use thinply::error::Error;

use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Example:
  thinply man ~/.local/share/man/man1";

/// Write the manual pages: one for thinply, and one for each subcommand.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Man {
    /// The folder to write them to; it is made if need be
    dir: PathBuf,
}

impl Man {
    /// Runs the verb for a whole command line.
    pub fn run(&self, command: Command) -> Outcome {
        fs::create_dir_all(&self.dir)
            .and_then(|()| clap_mangen::generate_to(command, &self.dir))
            .map_err(|error| Error::io(error, "writing the manual pages").in_file(&self.dir))?;
        Ok(Answer::Yes)
    }
}

//! `thinply completions`

use clap::{Args, Command};
use clap_complete::Shell;

use crate::io::output::Output;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Example:
  thinply completions bash > ~/.local/share/bash-completion/completions/thinply";

/// Print a completion script for a shell.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    /// Runs the verb for a whole command line.
    pub fn run(&self, mut command: Command) -> Outcome {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "thinply", &mut script);
        let mut output = Output::new();
        output.bytes(&script)?;
        output.print()?;
        Ok(Answer::Yes)
    }
}

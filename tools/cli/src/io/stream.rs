//! Standard input and output as files.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use thinply::error::{Error, ErrorKind, Result};

/// Standard input.
pub fn input() -> io::Result<File> {
    io::stdin().as_fd().try_clone_to_owned().map(File::from)
}

/// Standard output, for `what`: no terminal, which would obey the bytes.
pub fn output(what: &str) -> Result<File> {
    let stdout = io::stdout();
    if stdout.is_terminal() {
        let detail = format!("a terminal shows no {what}; send standard output elsewhere");
        return Err(Error::new(ErrorKind::InvalidInput, detail));
    }
    let file = stdout.as_fd().try_clone_to_owned().map(File::from);
    file.map_err(|error| Error::io(error, "opening standard output"))
}

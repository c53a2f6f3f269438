//! The `thinply` command.

mod demo;
mod place;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Userspace copy-on-write block images.
#[derive(Parser, Debug)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    Demo(demo::Demo),
    Serve(serve::Serve),
}

fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Demo(demo) => demo.run(),
        Verb::Serve(serve) => serve.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("thinply: {error}");
            ExitCode::from(2)
        }
    }
}

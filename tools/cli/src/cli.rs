//! The command line: one [`Command`] a verb.

use clap::{Parser, Subcommand};

use crate::verbs::Outcome;

const AFTER_HELP: &str = "\
Exit codes:
  0    done; for check: nothing was found
  1    the answer is no: check or verify found something, repair lost something,
       compare saw a difference
  2    an error, said on standard error; nothing half-made stays
  130  interrupted

Environment:
  THINPLY_LAYERS  folders where parents are looked for, separated by colons,
                  after those of --layers
  THINPLY_ROOT    the store's folder, where --root does not name one; else
                  thinply in XDG_DATA_HOME, or in ~/.local/share

Example:
  thinply create --size 10G disk.tply
  thinply snapshot disk.tply monday.tply
  thinply create --parent monday.tply test.tply
  thinply info --chain test.tply";

/// Copy-on-write block images in plain files.
///
/// An image is a chain of layers, each a file. A reader asks the newest layer first; a writer only
/// ever touches the top.
#[derive(Debug, Parser)]
#[command(name = "thinply", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// One verb with its arguments; what each does is said where its arguments are.
#[derive(Debug, Subcommand)]
pub enum Command {
    Create(crate::verbs::create::Create),
    Snapshot(crate::verbs::snapshot::Snapshot),
    Info(crate::verbs::info::Info),
    Map(crate::verbs::map::Map),
    Dump(crate::verbs::dump::Dump),
    Check(crate::verbs::check::Check),
    Repair(crate::verbs::repair::Repair),
    Import(crate::import::Import),
    Export(crate::verbs::export::Export),
    Pack(crate::verbs::pack::Pack),
    Verify(crate::verbs::verify::Verify),
    Flatten(crate::verbs::flatten::Flatten),
    Rebase(crate::verbs::rebase::Rebase),
    Compact(crate::verbs::compact::Compact),
    Diff(crate::verbs::diff::Diff),
    Compare(crate::verbs::compare::Compare),
    Resize(crate::verbs::resize::Resize),
    Serve(crate::verbs::serve::Serve),
    Image(crate::verbs::image::ImageVerbs),
    Container(crate::verbs::container::ContainerVerbs),
    Volume(crate::verbs::volume::VolumeVerbs),
    Df(crate::verbs::store::Df),
    Gc(crate::verbs::store::Gc),
    Store(crate::verbs::store::StoreVerbs),
    Demo(crate::verbs::demo::Demo),
    Completions(crate::verbs::completions::Completions),
    Man(crate::verbs::man::Man),
}

impl Command {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        match self {
            Self::Create(verb) => verb.run(),
            Self::Snapshot(verb) => verb.run(),
            Self::Info(verb) => verb.run(),
            Self::Map(verb) => verb.run(),
            Self::Dump(verb) => verb.run(),
            Self::Check(verb) => verb.run(),
            Self::Repair(verb) => verb.run(),
            Self::Import(verb) => verb.run(),
            Self::Export(verb) => verb.run(),
            Self::Pack(verb) => verb.run(),
            Self::Verify(verb) => verb.run(),
            Self::Flatten(verb) => verb.run(),
            Self::Rebase(verb) => verb.run(),
            Self::Compact(verb) => verb.run(),
            Self::Diff(verb) => verb.run(),
            Self::Compare(verb) => verb.run(),
            Self::Resize(verb) => verb.run(),
            Self::Serve(verb) => verb.run(),
            Self::Image(verbs) => verbs.run(),
            Self::Container(verbs) => verbs.run(),
            Self::Volume(verbs) => verbs.run(),
            Self::Df(verb) => verb.run(),
            Self::Gc(verb) => verb.run(),
            Self::Store(verbs) => verbs.run(),
            Self::Demo(verb) => verb.run(),
            Self::Completions(verb) => verb.run(),
            Self::Man(verb) => verb.run(),
        }
    }
}

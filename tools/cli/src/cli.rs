//! The command line: one [`Command`] a verb.

use clap::{CommandFactory, Parser, Subcommand};

use crate::verbs::{self, Outcome};

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
    Create(verbs::create::Create),
    Snapshot(verbs::snapshot::Snapshot),
    Info(verbs::info::Info),
    Map(verbs::map::Map),
    Dump(verbs::dump::Dump),
    Check(verbs::check::Check),
    Repair(verbs::repair::Repair),
    Import(verbs::import::Import),
    Export(verbs::export::Export),
    Pack(verbs::pack::Pack),
    Verify(verbs::verify::Verify),
    Flatten(verbs::flatten::Flatten),
    Rebase(verbs::rebase::Rebase),
    Compact(verbs::compact::Compact),
    Diff(verbs::diff::Diff),
    Compare(verbs::compare::Compare),
    Resize(verbs::resize::Resize),
    Serve(verbs::serve::Serve),
    Image(verbs::image::ImageVerbs),
    Container(verbs::container::ContainerVerbs),
    Volume(verbs::volume::VolumeVerbs),
    Df(verbs::store::Df),
    Gc(verbs::store::Gc),
    Store(verbs::store::StoreVerbs),
    Demo(verbs::demo::Demo),
    Completions(verbs::completions::Completions),
    Man(verbs::man::Man),
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
            Self::Completions(verb) => verb.run(Cli::command()),
            Self::Man(verb) => verb.run(Cli::command()),
        }
    }
}

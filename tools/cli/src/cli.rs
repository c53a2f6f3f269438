//! The command line: one [`Verb`] a verb.

use std::ffi::{OsStr, OsString};

use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::helper;
use crate::verbs::{self, Outcome};

const AFTER_HELP: &str = "\
Exit codes:
  0    done; for check: nothing was found
  1    the answer is no: check or verify found something, repair lost something,
       compare saw a difference, a part of the store is damaged
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
    verb: Verb,
}

/// Options of many verbs, which may stand before the verb too.
const LEADING: [&str; 2] = ["root", "layers"];

impl Cli {
    /// Reads the arguments of this process, or ends it with what is wrong with them.
    pub fn from_arguments() -> Self {
        let command = command();
        let arguments: Vec<_> = std::env::args_os().collect();
        let arguments = helper::arguments(&arguments).unwrap_or(arguments);
        let arguments = behind_the_verb(&command, arguments);
        let matches = command.get_matches_from(arguments);
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }

    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        self.verb.run()
    }
}

/// All that can be said on the command line.
fn command() -> Command {
    let option = |name: &'static str, help: &'static str| {
        let option = Arg::new(name).long(name).value_name("DIR").action(ArgAction::Append);
        option.help(help).help_heading("Options of verbs that may stand before them too")
    };
    Cli::command().arg(option("root", "The store's folder")).arg(option(
        "layers",
        "Look for parents in DIR too, after the layer's own folder (repeatable)",
    ))
}

/// The arguments with the leading options moved behind the verb, where they have their meaning: a
/// verb that doesn't know one refuses it, wherever it stood.
fn behind_the_verb(command: &Command, arguments: Vec<OsString>) -> Vec<OsString> {
    let (mut moved, mut out) = (Vec::new(), Vec::new());
    let mut command = command;
    let mut rest = arguments.into_iter().peekable();
    out.extend(rest.next());
    while let Some(argument) = rest.next_if(|argument| {
        leading(argument).is_some() || command.find_subcommand(argument).is_some()
    }) {
        if let Some(verb) = command.find_subcommand(&argument) {
            command = verb;
            out.push(argument);
            continue;
        }
        let value_follows = leading(&argument) == Some(true);
        moved.push(argument);
        moved.extend(value_follows.then(|| rest.next()).flatten());
    }
    out.extend(moved);
    out.extend(rest);
    out
}

/// Whether the value of a leading option is the next argument, if this is such an option.
fn leading(argument: &OsStr) -> Option<bool> {
    let option = argument.as_encoded_bytes().strip_prefix(b"--")?;
    LEADING.iter().find_map(|name| match option.strip_prefix(name.as_bytes())? {
        [] => Some(true),
        [b'=', ..] => Some(false),
        _ => None,
    })
}

/// One verb with its arguments; what each does is said where its arguments are.
#[derive(Debug, Subcommand)]
pub enum Verb {
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
    Mount(verbs::mount::Mount),
    Umount(verbs::mount::Umount),
    Attach(verbs::attach::Attach),
    Detach(verbs::attach::Detach),
    Mounts(verbs::mounts::Mounts),
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

impl Verb {
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
            Self::Mount(verb) => verb.run(),
            Self::Umount(verb) => verb.run(),
            Self::Attach(verb) => verb.run(),
            Self::Detach(verb) => verb.run(),
            Self::Mounts(verb) => verb.run(),
            Self::Image(verbs) => verbs.run(),
            Self::Container(verbs) => verbs.run(),
            Self::Volume(verbs) => verbs.run(),
            Self::Df(verb) => verb.run(),
            Self::Gc(verb) => verb.run(),
            Self::Store(verbs) => verbs.run(),
            Self::Demo(verb) => verb.run(),
            Self::Completions(verb) => verb.run(command()),
            Self::Man(verb) => verb.run(command()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        command().debug_assert();
    }

    #[test]
    fn leading_options_go_behind_the_verb() {
        let moved = |line: &str| {
            let arguments = line.split(' ').map(OsString::from).collect();
            behind_the_verb(&command(), arguments).join(OsStr::new(" ")).into_string().unwrap()
        };
        for (line, wanted) in [
            ("t --root d image ls --json", "t image ls --root d --json"),
            ("t --root=d image --layers e ls x", "t image ls --root=d --layers e x"),
            ("t --layers a --layers b info x", "t info --layers a --layers b x"),
            // Values may look like verbs, and arguments of verbs like options.
            ("t --root image volume rm v", "t volume rm --root image v"),
            ("t info x --layers d", "t info x --layers d"),
            ("t info -- --layers", "t info -- --layers"),
            ("t --layers d --help", "t --layers d --help"),
            ("t --rootless info", "t --rootless info"),
            ("t info --root", "t info --root"),
            ("t", "t"),
        ] {
            assert_eq!(moved(line), wanted);
        }
    }
}

//! `thinply image`

mod archive;
mod build;
mod show;

use clap::{Args, Subcommand};
use thinply::store::Reference;

use crate::io::output::Output;
use crate::io::table::short_id;
use crate::options::StoreArg;
use crate::verbs::{Answer, Outcome, each, tell};

/// Make, list, move and remove images: sealed disks under a name.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  thinply image import disk.raw debian:12
  thinply image ls
  thinply image history debian:12")]
pub struct ImageVerbs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Import(build::ImportImage),
    BuildFrom(build::BuildImage),
    Ls(show::ListImages),
    History(show::History),
    Tag(TagImage),
    Rm(RemoveImages),
    Inspect(show::InspectImages),
    Save(archive::Save),
    Load(archive::Load),
}

impl ImageVerbs {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        match &self.verb {
            Verb::Import(verb) => verb.run(),
            Verb::BuildFrom(verb) => verb.run(),
            Verb::Ls(verb) => verb.run(),
            Verb::History(verb) => verb.run(),
            Verb::Tag(verb) => verb.run(),
            Verb::Rm(verb) => verb.run(),
            Verb::Inspect(verb) => verb.run(),
            Verb::Save(verb) => verb.run(),
            Verb::Load(verb) => verb.run(),
        }
    }
}

/// Give an image another name.
///
/// An image that has that name keeps its layers, but has no name any more.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply image tag debian:12 debian:stable")]
struct TagImage {
    #[command(flatten)]
    store: StoreArg,
    /// A name or id
    image: String,
    /// The new name
    #[arg(value_name = "NAME[:TAG]")]
    name: Reference,
}

impl TagImage {
    fn run(&self) -> Outcome {
        let store = self.store.open()?;
        store.tag(&store.image(&self.image)?, &self.name)?;
        Ok(Answer::Yes)
    }
}

/// Remove names of images, and with its last name an image.
///
/// Layers that no other image has go with it. The last name of an image that containers stand on
/// is refused, and they are named. An image that is damaged goes too.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply image rm debian:12")]
struct RemoveImages {
    #[command(flatten)]
    store: StoreArg,
    /// With an id, remove all of an image's names
    #[arg(long, short)]
    force: bool,
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

impl RemoveImages {
    fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let mut output = Output::new();
        let removed = each(&self.images, |name| {
            let removed = store.remove_image(name, self.force)?;
            if removed.names.is_empty() {
                output.line(format_args!("Untagged: sha256:{}", short_id(&removed.id)))?;
            }
            for name in &removed.names {
                output.line(format_args!("Untagged: {name}"))?;
            }
            for blob in &removed.blobs {
                output.line(format_args!("Deleted: sha256:{}", short_id(blob)))?;
            }
            Ok(tell(&removed.bad))
        });
        output.print()?;
        removed
    }
}

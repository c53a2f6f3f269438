//! `thinply container commit`, `snapshot` and `reset`

use clap::Args;
use thinply::control::{self, Request};
use thinply::store::Reference;

use crate::io::output::Output;
use crate::mounting::uses;
use crate::options::StoreArg;
use crate::verbs::serve::say;
use crate::verbs::{Answer, Outcome};

/// Make an image of what a container holds.
///
/// The container goes on over the new image, so that no block is kept twice. One that `serve --all`
/// serves is committed by that process, as of one moment, while its clients go on. A file system of
/// it that is mounted is synced before. Prints the image's id.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply container commit web web:1 -m 'with nginx'")]
pub struct Commit {
    #[command(flatten)]
    store: StoreArg,
    /// A remark for the image's history
    #[arg(long, short, default_value = "", value_name = "TEXT", hide_default_value = true)]
    message: String,
    /// The container's name
    container: String,
    /// The image's name
    #[arg(value_name = "NAME[:TAG]")]
    image: Reference,
}

impl Commit {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        uses::sync(&store, &self.container)?;
        let request = Request::Commit {
            container: self.container.clone(),
            image: self.image.to_string(),
            comment: self.message.clone(),
        };
        let answer = control::carry_out(&store, &request, say())?;
        let mut output = Output::new();
        if let control::Answer::Commit { image } = answer {
            output.line(format_args!("sha256:{image}"))?;
        }
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// Keep the present state of a container under a name.
///
/// The container goes on over it. `reset` goes back to it, and `serve --all` shows it as
/// container/NAME@SNAP. Snapshots go with their container.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply container snapshot web before-upgrade")]
pub struct SnapshotContainer {
    #[command(flatten)]
    store: StoreArg,
    /// The container's name
    container: String,
    /// The snapshot's name
    #[arg(value_name = "SNAP")]
    name: String,
}

impl SnapshotContainer {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        uses::sync(&store, &self.container)?;
        let request =
            Request::Snapshot { container: self.container.clone(), name: self.name.clone() };
        control::carry_out(&store, &request, say())?;
        Ok(Answer::Yes)
    }
}

/// Throw away what a container wrote.
///
/// It holds what its image holds then, or what the snapshot SNAP of it does. A container that
/// somebody has open is refused.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply container reset web")]
pub struct Reset {
    #[command(flatten)]
    store: StoreArg,
    /// The container's name
    container: String,
    /// A snapshot of it
    snap: Option<String>,
}

impl Reset {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        store.reset_container(&self.container, self.snap.as_deref())?;
        Ok(Answer::Yes)
    }
}

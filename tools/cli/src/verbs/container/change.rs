//! `thinply container commit`, `snapshot` and `reset`

use clap::Args;
use serde_json::Value;
use thinply::chain::Chain;
use thinply::error::{ErrorKind, Result};
use thinply::storage::Access;
use thinply::store::{Disk, DiskKind, Reference, Store};

use crate::io::output::Output;
use crate::io::paths::closing;
use crate::options::StoreArg;
use crate::serving::control::{self, Request};
use crate::verbs::{Answer, Outcome};

/// Make an image of what a container holds.
///
/// The container goes on over the new image, so that no block is kept twice. One that `serve --all`
/// serves is committed by that process, as of one moment, while its clients go on. Prints the
/// image's id.
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
        let request = Request::Commit {
            container: self.container.clone(),
            image: self.image.to_string(),
            comment: self.message.clone(),
        };
        let id = here_or_served(&store, &self.container, &request, |chain| {
            let image = store.commit(&self.container, chain, &self.image, &self.message)?;
            Ok(image.id.into())
        })?;
        let mut output = Output::new();
        output.line(format_args!("sha256:{}", id.as_str().unwrap_or_default()))?;
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// Changes a container here, or has the process do it that serves the container.
fn here_or_served(
    store: &Store,
    container: &str,
    request: &Request,
    change: impl FnOnce(&Chain) -> Result<Value>,
) -> Result<Value> {
    let disk = Disk::new(DiskKind::Container, container)?;
    match store.open_disk(&disk, Access::Write) {
        Ok(chain) => closing(chain, change),
        Err(error) if error.kind() == ErrorKind::InUse => {
            control::ask(store, request).unwrap_or(Err(error))
        }
        Err(error) => Err(error),
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
        let request =
            Request::Snapshot { container: self.container.clone(), name: self.name.clone() };
        here_or_served(&store, &self.container, &request, |chain| {
            store.snapshot_container(&self.container, chain, &self.name)?;
            Ok(Value::Null)
        })?;
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

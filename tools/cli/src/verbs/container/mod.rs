//! `thinply container`

mod change;
mod diff;

use std::collections::HashMap;

use clap::{Args, Subcommand};
use serde::Serialize;
use thinply::error::Result;
use thinply::store::{Container, Costs, DiskKind, Finding, Store, Survey};

use crate::io::output::Output;
use crate::io::size;
use crate::io::table::{self, ago, short, short_id};
use crate::options::StoreArg;
use crate::verbs::disks::remove_disks;
use crate::verbs::{Answer, Outcome, tell};

/// Make and change containers: writable disks over images.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  thinply container create debian:12 --name web
  thinply container ls -s
  thinply container commit web web:1")]
pub struct ContainerVerbs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(CreateContainer),
    Ls(ListContainers),
    Inspect(InspectContainers),
    Commit(change::Commit),
    Rm(RemoveContainers),
    Reset(change::Reset),
    Diff(diff::Diff),
    Snapshot(change::SnapshotContainer),
}

impl ContainerVerbs {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        match &self.verb {
            Verb::Create(verb) => verb.run(),
            Verb::Ls(verb) => verb.run(),
            Verb::Inspect(verb) => verb.run(),
            Verb::Commit(verb) => verb.run(),
            Verb::Rm(verb) => verb.run(),
            Verb::Reset(verb) => verb.run(),
            Verb::Diff(verb) => verb.run(),
            Verb::Snapshot(verb) => verb.run(),
        }
    }
}

/// Make a container over an image.
///
/// It costs two blocks and its record until something is written. Prints its name.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply container create debian:12 --name web")]
struct CreateContainer {
    #[command(flatten)]
    store: StoreArg,
    /// Its name; one is made up where it is left out
    #[arg(long)]
    name: Option<String>,
    /// Size of the disk; the image's where it is left out
    #[arg(long, value_name = "S", value_parser = size::parse)]
    size: Option<u64>,
    /// A name or id
    image: String,
}

impl CreateContainer {
    fn run(&self) -> Outcome {
        size::check(self.size)?;
        let store = self.store.open()?;
        let image = store.image(&self.image)?;
        let name = self.name.clone().unwrap_or_else(made_up);
        store.create_container(&name, &image, self.size)?;
        let mut output = Output::new();
        output.line(&name)?;
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// Twelve digits, as Docker's ids are shown.
fn made_up() -> String {
    use std::hash::{BuildHasher, RandomState};
    format!("{:012x}", RandomState::new().hash_one(()) >> 16)
}

#[derive(Debug, Serialize)]
struct Facts {
    name: String,
    image: String,
    image_id: String,
    created: String,
    snapshots: Vec<String>,
    size: Option<u64>,
    virtual_size: Option<u64>,
    device_size: Option<u64>,
    export: String,
}

impl Facts {
    fn of(container: Container) -> Self {
        Self {
            export: format!("container/{}", container.name),
            snapshots: container.snapshots.iter().map(|saved| saved.name.clone()).collect(),
            size: None,
            virtual_size: None,
            device_size: None,
            name: container.name,
            image: container.image,
            image_id: container.image_id,
            created: container.created,
        }
    }

    /// Adds the sizes, as far as they can be known.
    fn measure(&mut self, images: &mut ImageCosts<'_>) -> Result<()> {
        let size = images.store.container_cost(&self.name)?;
        self.size = Some(size);
        self.device_size = Some(images.store.container_size(&self.name)?);
        self.virtual_size = Some(size + images.of(&self.image_id)?);
        Ok(())
    }
}

/// What images take on disk: many containers ask for the same few.
struct ImageCosts<'a> {
    store: &'a Store,
    layers: Costs<'a>,
    images: HashMap<String, u64>,
}

impl<'a> ImageCosts<'a> {
    fn new(store: &'a Store) -> Self {
        Self { store, layers: Costs::new(store), images: HashMap::new() }
    }

    fn of(&mut self, id: &str) -> Result<u64> {
        if let Some(&cost) = self.images.get(id) {
            return Ok(cost);
        }
        let cost = self.layers.image(&self.store.image(id)?)?;
        self.images.insert(id.to_owned(), cost);
        Ok(cost)
    }
}

/// List the containers.
///
/// With -s: what each takes on disk itself, and together with its image. Those that are damaged are
/// told of on standard error, and the exit code is 1 then.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply container ls -s")]
struct ListContainers {
    #[command(flatten)]
    store: StoreArg,
    /// Show sizes
    #[arg(long, short)]
    size: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl ListContainers {
    fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let mut costs = ImageCosts::new(&store);
        let Survey { good: containers, mut bad } = store.containers()?;
        let mut facts = Vec::new();
        for container in containers {
            let subject = format!("container {}", container.name);
            // What has no size is told of already, or now.
            let has_size = self.size && container.base.is_some();
            let mut found = Facts::of(container);
            if has_size && let Err(error) = found.measure(&mut costs) {
                bad.push(Finding { subject, detail: error.to_string() });
            }
            facts.push(found);
        }
        let mut output = Output::new();
        if self.json {
            output.json(&facts)?;
        } else {
            let mut heading = vec!["NAME", "IMAGE", "IMAGE ID", "CREATED"];
            if self.size {
                heading.push("SIZE");
            }
            let rows: Vec<_> = facts.iter().map(row).collect();
            table::print(&mut output, &heading, &rows)?;
        }
        output.print()?;
        Ok(tell(&bad))
    }
}

fn row(facts: &Facts) -> Vec<String> {
    let image = short_id(&facts.image_id);
    let mut cells = vec![facts.name.clone(), facts.image.clone(), image, ago(&facts.created)];
    if let Some(size) = facts.size {
        let all = facts.virtual_size.map_or("unknown".into(), short);
        cells.push(format!("{} (virtual {all})", short(size)));
    }
    cells
}

/// Tell all about containers, in JSON.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply container inspect web")]
struct InspectContainers {
    #[command(flatten)]
    store: StoreArg,
    /// Their names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl InspectContainers {
    fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let mut costs = ImageCosts::new(&store);
        let (mut facts, mut bad) = (Vec::new(), Vec::new());
        for name in &self.names {
            let (container, unknown) = store.container(name)?;
            let mut found = Facts::of(container);
            found.measure(&mut costs)?;
            facts.push(found);
            bad.extend(unknown);
        }
        let mut output = Output::new();
        output.json(&facts)?;
        output.print()?;
        Ok(tell(&bad))
    }
}

/// Remove containers with their snapshots.
///
/// A container that somebody has open is refused. Works on a full disk.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply container rm web")]
struct RemoveContainers {
    #[command(flatten)]
    store: StoreArg,
    /// Their names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl RemoveContainers {
    fn run(&self) -> Outcome {
        remove_disks(&self.store, DiskKind::Container, &self.names)
    }
}

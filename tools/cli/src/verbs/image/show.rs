//! `thinply image ls`, `history` and `inspect`

use clap::Args;
use serde::Serialize;
use thinply::device::Device;
use thinply::error::Result;
use thinply::store::{Costs, Image, Store};

use crate::io::output::Output;
use crate::io::table::{self, ago, short, short_id};
use crate::options::StoreArg;
use crate::verbs::{Answer, Outcome, tell};

/// List the images.
///
/// SIZE is what an image's layers take on disk, those that it shares with others included. Images
/// that are damaged are told of on standard error, and the exit code is 1 then.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply image ls")]
pub struct ListImages {
    #[command(flatten)]
    store: StoreArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    repository: Option<String>,
    tag: Option<String>,
    id: String,
    created: String,
    size: u64,
}

impl ListImages {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let images = store.images()?;
        let mut costs = Costs::new(&store);
        let rows = images.good.into_iter().rev().map(|image| {
            Ok(Row {
                repository: image.reference.as_ref().map(|name| name.repository.clone()),
                tag: image.reference.as_ref().map(|name| name.tag.clone()),
                created: image.created().to_owned(),
                size: costs.image(&image)?,
                id: image.id,
            })
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let mut output = Output::new();
        if self.json {
            output.json(&rows)?;
        } else {
            let none = || "<none>".to_owned();
            let rows: Vec<_> = rows
                .into_iter()
                .map(|row| {
                    let (repository, tag) = (row.repository, row.tag);
                    let name = [repository.unwrap_or_else(none), tag.unwrap_or_else(none)];
                    let rest = [short_id(&row.id), ago(&row.created), short(row.size)];
                    name.into_iter().chain(rest).collect()
                })
                .collect();
            let heading = ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"];
            table::print(&mut output, &heading, &rows)?;
        }
        output.print()?;
        Ok(tell(&images.bad))
    }
}

/// Show the layers of an image, newest first.
///
/// The id is the layer's: images that share a layer show the same id. SIZE is what it takes on
/// disk.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply image history debian:12")]
pub struct History {
    #[command(flatten)]
    store: StoreArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// A name or id
    image: String,
}

#[derive(Debug, Serialize)]
struct Step {
    id: Option<String>,
    created: String,
    created_by: String,
    size: u64,
    comment: String,
}

impl History {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let steps = store.history(&store.image(&self.image)?)?;
        let steps: Vec<_> = steps
            .into_iter()
            .map(|entry| Step {
                id: entry.layer,
                created: entry.created,
                created_by: entry.created_by,
                size: entry.size,
                comment: entry.comment,
            })
            .collect();
        let mut output = Output::new();
        if self.json {
            output.json(&steps)?;
        } else {
            let rows: Vec<_> = steps
                .into_iter()
                .map(|step| {
                    let id = step.id.map_or_else(|| "<missing>".into(), |id| short_id(&id));
                    vec![id, ago(&step.created), step.created_by, short(step.size), step.comment]
                })
                .collect();
            let heading = ["LAYER", "CREATED", "CREATED BY", "SIZE", "COMMENT"];
            table::print(&mut output, &heading, &rows)?;
        }
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// Tell all about images, in JSON.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply image inspect debian:12")]
pub struct InspectImages {
    #[command(flatten)]
    store: StoreArg,
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Facts {
    id: String,
    name: Option<String>,
    created: String,
    size: u64,
    virtual_size: u64,
    containers: Vec<String>,
    export: Option<String>,
    manifest: serde_json::Value,
    config: serde_json::Value,
}

impl InspectImages {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let facts = self.images.iter().map(|name| facts(&store, &store.image(name)?));
        let facts = facts.collect::<Result<Vec<_>>>()?;
        let mut output = Output::new();
        output.json(&facts)?;
        output.print()?;
        Ok(Answer::Yes)
    }
}

fn facts(store: &Store, image: &Image) -> Result<Facts> {
    let name = image.reference.as_ref().map(|name| name.to_string());
    let containers = store.containers()?.good.into_iter().filter(|c| c.image_id == image.id);
    let json = |value: serde_json::Result<serde_json::Value>| value.unwrap_or_default();
    Ok(Facts {
        id: image.id.clone(),
        created: image.created().to_owned(),
        size: store.image_cost(image)?,
        virtual_size: store.open_image(image)?.size(),
        containers: containers.map(|container| container.name).collect(),
        export: name.as_ref().map(|name| format!("image/{name}")),
        name,
        manifest: json(serde_json::to_value(&*image.manifest)),
        config: json(serde_json::to_value(&*image.config)),
    })
}

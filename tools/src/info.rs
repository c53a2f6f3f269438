//! `thinply info`

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use thinply::error::{Error, Result};
use thinply::format::header::{Header, State};
use thinply::live::newest_header;
use thinply::storage::Access;
use thinply::types::Identity;

use crate::args::LayersArg;
use crate::output::Output;
use crate::paths::Place;
use crate::still::Stillness;
use crate::{Answer, Outcome};

const AFTER_HELP: &str = "\
Examples:
  thinply info disk.tply
  thinply info --chain --json disk.tply";

/// Show what a layer is: sizes, state, identity and parent.
///
/// A layer that is being written is read without a lock, and the output says so.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Info {
    /// Show the layers below too, newest first
    #[arg(long)]
    chain: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    layers: LayersArg,
    /// The layer
    file: PathBuf,
}

/// The facts of a layer.
#[derive(Debug, Serialize)]
struct Facts {
    file: String,
    format: &'static str,
    state: &'static str,
    virtual_size: u64,
    disk_size: u64,
    uuid: String,
    freeze_id: Option<String>,
    parent: Option<String>,
    parent_uuid: Option<String>,
    parent_freeze_id: Option<String>,
    parent_root: Option<String>,
    visible_parent_size: Option<u64>,
    generation: u64,
    epoch: u64,
    journal_tail: u64,
    compatible_features: u64,
    read_only_compatible_features: u64,
    note: Option<String>,
}

#[derive(Debug, Serialize)]
struct Layers {
    layers: Vec<Facts>,
}

impl Info {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let facts = self.facts()?;
        let mut output = Output::new();
        match (self.json, self.chain) {
            (true, true) => output.json(&Layers { layers: facts })?,
            (true, false) => output.json(&facts[0])?,
            (false, _) => {
                for (number, facts) in facts.iter().enumerate() {
                    if number > 0 {
                        output.line("")?;
                    }
                    output.facts(facts)?;
                }
            }
        }
        output.print()?;
        Ok(Answer::Yes)
    }

    fn facts(&self) -> Result<Vec<Facts>> {
        let place = Place::existing(&self.file)?;
        let file = place.open(Access::Read)?;
        let still = Stillness::of(&*file)?;
        let header = newest_header(&*file)?;
        let mut all = vec![facts(&place.path(), &header, still.note())?];
        if let Some(link) = header.parent.as_ref().filter(|_| self.chain) {
            let stack = self.layers.layers()?.stack(link, &place.folder)?;
            for layer in stack.layers() {
                all.push(facts(layer.file().path(), layer.header(), None)?);
            }
        }
        Ok(all)
    }
}

fn facts(path: &Path, header: &Header, note: Option<String>) -> Result<Facts> {
    let meta = path
        .metadata()
        .map_err(|error| Error::io(error, "asking for the disk size").in_file(path))?;
    let (state, freeze_id) = match header.state {
        State::Writable => ("writable", None),
        State::InUse => ("in use", None),
        State::Frozen(id) => ("frozen", Some(id.to_string())),
    };
    let link = header.parent.as_ref();
    let (mut uuid, mut freeze, mut root) = (None, None, None);
    match link.map(|link| link.identity) {
        Some(Identity::Frozen(layer, id)) => {
            (uuid, freeze) = (Some(layer.to_string()), Some(id.to_string()));
        }
        Some(Identity::Packed(hash)) => root = Some(hash.to_string()),
        None => {}
    }
    Ok(Facts {
        file: path.display().to_string(),
        format: "thinply live layer, version 1",
        state,
        virtual_size: header.virtual_size,
        disk_size: meta.blocks() * 512,
        uuid: header.uuid.to_string(),
        freeze_id,
        parent: link.map(|link| link.hint.clone()),
        parent_uuid: uuid,
        parent_freeze_id: freeze,
        parent_root: root,
        visible_parent_size: link.map(|_| header.visible_parent_size),
        generation: header.generation,
        epoch: header.epoch,
        journal_tail: header.journal_tail,
        compatible_features: header.compatible,
        read_only_compatible_features: header.read_only_compatible,
        note,
    })
}

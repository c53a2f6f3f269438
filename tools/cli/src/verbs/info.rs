//! `thinply info`

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use clap::Args;
use serde::Serialize;
use thinply::chain::Layer;
use thinply::error::{Error, Result};
use thinply::format::header::{Header, ParentLink, State};
use thinply::live::newest_header;
use thinply::packed::Packed;
use thinply::storage::Access;
use thinply::types::Identity;

use crate::io::output::Output;
use crate::io::paths::Place;
use crate::io::still::Stillness;
use crate::options::ShowArgs;
use crate::verbs::{Answer, Outcome};

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
    #[command(flatten)]
    show: ShowArgs,
}

/// The facts of a layer.
#[derive(Debug, Default, Serialize)]
struct Facts {
    file: String,
    format: &'static str,
    state: &'static str,
    virtual_size: u64,
    disk_size: u64,
    uuid: Option<String>,
    root: Option<String>,
    data_blocks: Option<u64>,
    zero_blocks: Option<u64>,
    freeze_id: Option<String>,
    parent: Option<String>,
    parent_uuid: Option<String>,
    parent_freeze_id: Option<String>,
    parent_root: Option<String>,
    visible_parent_size: Option<u64>,
    generation: Option<u64>,
    epoch: Option<u64>,
    journal_tail: Option<u64>,
    compatible_features: u64,
    read_only_compatible_features: Option<u64>,
    note: Option<String>,
}

#[derive(Debug, Serialize)]
struct Gate {
    layers: Vec<Facts>,
}

impl Info {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let facts = self.facts()?;
        let mut output = Output::new();
        match (self.show.json, self.chain) {
            (true, true) => output.json(&Gate { layers: facts })?,
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
        let place = Place::existing(&self.show.file)?;
        let file = place.open(Access::Read)?;
        let (first, parent) = if Packed::recognise(&*file)? {
            let layer = Packed::open(file)?;
            (packed_facts(&layer)?, layer.parent().cloned())
        } else {
            let still = Stillness::of(&*file)?;
            let header = newest_header(&*file)?;
            (live_facts(&place.path(), &header, still.note())?, header.parent)
        };
        let mut all = vec![first];
        if let Some(link) = parent.filter(|_| self.chain) {
            let stack = self.show.layers.layers()?.stack(&link, &place.folder)?;
            for layer in stack.layers() {
                all.push(match layer {
                    Layer::Live(layer) => live_facts(layer.file().path(), layer.header(), None)?,
                    Layer::Packed(layer) => packed_facts(layer)?,
                });
            }
        }
        Ok(all)
    }
}

/// The facts that both layouts have; the others are for the caller.
fn common_facts(path: &Path, link: Option<&ParentLink>, visible: u64) -> Result<Facts> {
    let meta = path
        .metadata()
        .map_err(|error| Error::io(error, "asking for the disk size").in_file(path))?;
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
        disk_size: meta.blocks() * 512,
        parent: link.map(|link| link.hint.clone()),
        parent_uuid: uuid,
        parent_freeze_id: freeze,
        parent_root: root,
        visible_parent_size: link.map(|_| visible),
        ..Facts::default()
    })
}

fn live_facts(path: &Path, header: &Header, note: Option<String>) -> Result<Facts> {
    let (state, freeze_id) = match header.state {
        State::Writable => ("writable", None),
        State::InUse => ("in use", None),
        State::Frozen(id) => ("frozen", Some(id.to_string())),
    };
    Ok(Facts {
        format: "thinply live layer, version 1",
        state,
        virtual_size: header.virtual_size,
        uuid: Some(header.uuid.to_string()),
        freeze_id,
        generation: Some(header.generation),
        epoch: Some(header.epoch),
        journal_tail: Some(header.journal_tail),
        compatible_features: header.compatible,
        read_only_compatible_features: Some(header.read_only_compatible),
        note,
        ..common_facts(path, header.parent.as_ref(), header.visible_parent_size)?
    })
}

fn packed_facts(layer: &Packed) -> Result<Facts> {
    let header = layer.header();
    Ok(Facts {
        format: "thinply packed layer, version 1",
        state: "packed",
        virtual_size: header.virtual_size,
        root: Some(layer.root().to_string()),
        data_blocks: Some(layer.footer().data_blocks),
        zero_blocks: Some(layer.footer().zero_blocks),
        compatible_features: header.compatible,
        ..common_facts(layer.path(), layer.parent(), header.visible_parent_size)?
    })
}

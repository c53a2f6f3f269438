//! `thinply pack`

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use thinply::chain::Chain;
use thinply::derive::PackOptions;
use thinply::error::Result;
use thinply::packed::Summary;
use thinply::storage::Access;
use thinply::types::BLOCK_SIZE;

use crate::io::draft::Draft;
use crate::io::output::Output;
use crate::io::paths::Place;
use crate::io::progress;
use crate::io::pump::BUFFER;
use crate::options::{LayersArg, PackingArgs};
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
FILE alone is packed, not what it stands on; OUT has the same parent. OUT appears when it is whole.

Examples:
  thinply pack base.tply base.packed.tply
  thinply pack --zstd 19 --drop-equal layer.tply layer.packed.tply
  thinply pack --uncompressed base.tply - | ssh host 'cat > base.tply'";

/// Pack a layer into a sealed file, addressed by its content, for sharing and shipping.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Pack {
    #[command(flatten)]
    packing: PackingArgs,
    /// Leave out blocks that are equal to what lies under them
    #[arg(long)]
    drop_equal: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    layers: LayersArg,
    /// The layer
    file: PathBuf,
    /// The file to make, which must not exist, or - for standard output
    out: PathBuf,
}

/// What was made.
#[derive(Debug, Serialize)]
struct Facts {
    root: String,
    data_size: u64,
    zero_size: u64,
    length: u64,
}

impl Pack {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        if self.out.as_os_str() == "-" {
            let chain = place.chain(Access::Read, self.layers.layers()?)?;
            self.pack(&chain, BufWriter::with_capacity(BUFFER, io::stdout())).map(drop)?;
            return Ok(Answer::Yes);
        }
        let out = Place::vacant(&self.out)?;
        let chain = place.chain(Access::Read, self.layers.layers()?)?;
        let draft = Draft::new(&out.directory, chain.copy_rights(1)?);
        let summary = draft.packed(|file| self.pack(&chain, file))?;
        draft.publish_at(&out)?;
        let facts = Facts {
            root: summary.root.to_string(),
            data_size: summary.data_blocks * BLOCK_SIZE,
            zero_size: summary.zero_blocks * BLOCK_SIZE,
            length: summary.length,
        };
        let mut output = Output::new();
        if self.json {
            output.json(&facts)?
        } else {
            output.facts(&facts)?
        }
        output.print()?;
        Ok(Answer::Yes)
    }

    fn pack<W: Write>(&self, chain: &Chain, out: W) -> Result<(Summary, W)> {
        let options =
            PackOptions { compression: self.packing.compression(), drop_equal: self.drop_equal };
        let bar = progress::bar(None);
        let packed = chain.pack(out, &options, &mut |bytes| bar.set_position(bytes));
        bar.finish_and_clear();
        packed
    }
}

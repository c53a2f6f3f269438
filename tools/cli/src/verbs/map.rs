//! `thinply map`

use clap::Args;
use serde::Serialize;
use thinply::chain::Kind;
use thinply::device::Device;
use thinply::error::Result;
use thinply::storage::Access;

use crate::io::output::Output;
use crate::io::paths::Place;
use crate::options::ShowArgs;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Columns: offset and length in bytes; the owner's depth (0 is FILE) and its file; whether the range
reads as zeros without costing space; whether the owner's file holds bytes there. What no layer
owns has no depth, and reads as zeros.

Examples:
  thinply map disk.tply
  thinply map --json disk.tply";

/// Show which layer owns what.
///
/// The disk must keep still: one that is being written is refused.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Map {
    #[command(flatten)]
    show: ShowArgs,
}

#[derive(Debug, Serialize)]
struct Disk {
    file: String,
    virtual_size: u64,
}

#[derive(Debug, Serialize)]
struct Extent<'a> {
    offset: u64,
    length: u64,
    depth: Option<usize>,
    zero: bool,
    data: bool,
    layer: Option<&'a str>,
}

impl Extent<'_> {
    fn line(&self) -> String {
        let word = |yes| if yes { "yes" } else { "no" };
        let depth = self.depth.map_or("-".into(), |depth| depth.to_string());
        format!(
            "{:>16} {:>16} {depth:>5}  {:<4}  {:<4}  {}",
            self.offset,
            self.length,
            word(self.zero),
            word(self.data),
            self.layer.unwrap_or("-")
        )
    }
}

impl Map {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.show.file)?;
        let chain = place.chain(Access::Read, self.show.layers.layers()?)?;
        let names: Vec<String> =
            chain.paths().iter().map(|path| path.display().to_string()).collect();
        let mut output = Output::new();
        let walk = |put: &mut dyn FnMut(&Extent<'_>) -> Result<()>| {
            chain.walk(&mut |extent| {
                put(&Extent {
                    offset: extent.offset,
                    length: extent.length,
                    depth: extent.depth,
                    zero: extent.kind != Kind::Data,
                    data: extent.kind == Kind::Data,
                    layer: extent.depth.and_then(|depth| names.get(depth)).map(String::as_str),
                })
            })
        };
        if self.show.json {
            let disk =
                Disk { file: place.path().display().to_string(), virtual_size: chain.size() };
            let mut list = output.begin_list(&disk, "extents")?;
            walk(&mut |extent| list.item(extent))?;
            list.end()?;
        } else {
            output.line("          offset           length depth  zero  data  layer")?;
            walk(&mut |extent| output.line(extent.line()))?;
        }
        output.print()?;
        Ok(Answer::Yes)
    }
}

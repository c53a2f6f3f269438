//! `thinply diff`

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use thinply::chain::{Chain, MapExtent};
use thinply::derive::{Plan, Sink};
use thinply::device::Device;
use thinply::error::Result;
use thinply::storage::{Access, Share};

use crate::derive::{Form, Maker, sealed};
use crate::io::output::Output;
use crate::io::paths::Place;
use crate::io::progress;
use crate::options::LayersArg;
use crate::options::PackingArgs;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Columns: offset and length in bytes, in whole blocks; whether B has zeros there. Ranges come as far
as B reaches: what A has beyond its end is no part of the answer. Layers that both disks stand on are
not read.

With -o nothing is listed: OUT becomes a packed layer on A, which must be frozen or packed, and shows
exactly what B shows.

Examples:
  thinply diff monday.tply disk.tply
  thinply diff -o monday-to-tuesday.tply monday.tply tuesday.tply";

/// Show where two disks differ, or make a layer of it.
///
/// Both must keep still: one that is being written is refused.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Diff {
    /// Make OUT, a packed layer that holds what B changes in A; it must not exist
    #[arg(short, long = "output", value_name = "OUT")]
    out: Option<PathBuf>,
    #[command(flatten)]
    packing: PackingArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    layers: LayersArg,
    /// The disk to begin with
    a: PathBuf,
    /// The disk to end with
    b: PathBuf,
}

#[derive(Debug, Serialize)]
struct Disks {
    a: String,
    b: String,
    a_size: u64,
    b_size: u64,
}

#[derive(Debug, Serialize)]
struct Extent {
    offset: u64,
    length: u64,
    zero: bool,
}

/// Joins neighbours that say the same.
struct Extents<'a> {
    pending: Option<Extent>,
    put: &'a mut dyn FnMut(&Extent) -> Result<()>,
}

impl Extents<'_> {
    fn push(&mut self, offset: u64, length: u64, zero: bool) -> Result<()> {
        match &mut self.pending {
            Some(last) if last.offset + last.length == offset && last.zero == zero => {
                last.length += length;
                Ok(())
            }
            pending => match pending.replace(Extent { offset, length, zero }) {
                Some(done) => (self.put)(&done),
                None => Ok(()),
            },
        }
    }

    fn finish(self) -> Result<()> {
        self.pending.as_ref().map_or(Ok(()), self.put)
    }
}

impl Sink for Extents<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.push(offset, bytes.len() as u64, false)
    }

    fn share(&mut self, _: &MapExtent) -> Result<Share> {
        Ok(Share::Refused)
    }

    fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        self.push(offset, length, true)
    }
}

impl Diff {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let [a, b] = [Place::existing(&self.a)?, Place::existing(&self.b)?];
        match &self.out {
            Some(out) => self.make(&a, &b, &Place::vacant(out)?)?,
            None => self.list(&a, &b)?,
        }
        Ok(Answer::Yes)
    }

    fn make(&self, a: &Place, b: &Place, out: &Place) -> Result<()> {
        let parent = sealed(a)?;
        let chain = b.chain(Access::Read, self.layers.layers()?)?;
        let form = Form::Packed(self.packing.compression());
        let (layers, json) = (&self.layers, self.json);
        Maker { out, form, layers, depth: usize::MAX, json }
            .make(&chain, &Plan::rebase(&chain, &parent))
    }

    fn list(&self, a: &Place, b: &Place) -> Result<()> {
        let layers = self.layers.layers()?;
        let one = a.chain(Access::Read, layers.clone())?;
        let other = b.chain(Access::Read, layers)?;
        let mut output = Output::new();
        if self.json {
            let disks = Disks {
                a: a.path().display().to_string(),
                b: b.path().display().to_string(),
                a_size: one.size(),
                b_size: other.size(),
            };
            let mut list = output.begin_list(&disks, "extents")?;
            extents(&one, &other, &mut |extent| list.item(extent))?;
            list.end()?;
        } else {
            output.line("          offset           length  zero")?;
            extents(&one, &other, &mut |Extent { offset, length, zero }| {
                let zero = if *zero { "yes" } else { "no" };
                output.line(format_args!("{offset:>16} {length:>16}  {zero}"))
            })?;
        }
        output.print()
    }
}

fn extents(a: &Chain, b: &Chain, put: &mut dyn FnMut(&Extent) -> Result<()>) -> Result<()> {
    let bar = progress::bar(Some(b.size()));
    let mut extents = Extents { pending: None, put };
    b.changes_from(a, &mut extents, &mut |done| bar.set_position(done))?;
    bar.finish_and_clear();
    extents.finish()
}

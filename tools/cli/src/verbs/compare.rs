//! `thinply compare`

use std::path::{Path, PathBuf};

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use serde::Serialize;
use thinply::derive::{Content, Mismatch, Raw, Rule, compare};
use thinply::error::Result;
use thinply::storage::Access;

use crate::import::{Format, Opener};
use crate::io::output::Output;
use crate::io::paths::Place;
use crate::io::progress;
use crate::options::LayersArg;
use crate::options::share::ShareArg;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Disks of different sizes are the same if all that the longer one has beyond the end of the other is
zeros. With --strict the sizes must be the same too, and so must the ranges that some layer owns (in
a raw file: that are no holes).

Nothing is guessed of what A and B are, since a guest may write anything to a raw disk.

Exit codes:
  0  the same
  1  different
  2  an error

Examples:
  thinply compare disk.tply packed.tply
  thinply compare -F raw disk.tply disk.img
  thinply compare -F qcow2 --with base.qcow2 disk.tply disk.qcow2";

/// Compare what two disks show.
///
/// Both must keep still: one that is being written is refused. Layers that both stand on are not
/// read.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Compare {
    /// What A is
    #[arg(short = 'f', long, value_name = "FORMAT", default_value = "layer")]
    format: Kind,
    /// What B is
    #[arg(short = 'F', long, value_name = "FORMAT", default_value = "layer")]
    second_format: Kind,
    /// Let an image refer to FILE, as in `thinply import` (repeatable)
    #[arg(long = "with", value_name = "[NAME=]FILE")]
    named: Vec<PathBuf>,
    /// Compare sizes and ownership too
    #[arg(short, long)]
    strict: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    layers: LayersArg,
    #[command(flatten)]
    share: ShareArg,
    /// A disk
    a: PathBuf,
    /// The other one
    b: PathBuf,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Layer,
    Image(Format),
}

impl ValueEnum for Kind {
    fn value_variants<'a>() -> &'a [Self] {
        use Format::*;
        const KINDS: [Kind; 7] = [
            Kind::Layer,
            Kind::Image(Raw),
            Kind::Image(Qcow2),
            Kind::Image(Vmdk),
            Kind::Image(Vhd),
            Kind::Image(Vhdx),
            Kind::Image(Vdi),
        ];
        &KINDS
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::Layer => {
                Some(PossibleValue::new("layer").help("A layer, with those that it stands on"))
            }
            Self::Image(format) => format.to_possible_value(),
        }
    }
}

#[derive(Debug, Serialize)]
struct Verdict {
    a: String,
    b: String,
    a_size: u64,
    b_size: u64,
    same: bool,
    /// "content", "allocation" or "size".
    differs_in: Option<&'static str>,
    offset: Option<u64>,
}

impl Compare {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let a = self.open(&self.a, self.format)?;
        let b = self.open(&self.b, self.second_format)?;
        let sizes = [a.length(), b.length()];
        let rule = if self.strict { Rule::Strict } else { Rule::Content };
        let bar = progress::bar(sizes.into_iter().max());
        let found = compare(&*a, &*b, rule, &|done| bar.set_position(done));
        bar.finish_and_clear();
        let (differs_in, offset) = match found? {
            None => (None, None),
            Some(Mismatch::Content(offset)) => (Some("content"), Some(offset)),
            Some(Mismatch::Allocation(offset)) => (Some("allocation"), Some(offset)),
            Some(Mismatch::Size) => (Some("size"), None),
        };
        let verdict = Verdict {
            a: self.a.display().to_string(),
            b: self.b.display().to_string(),
            a_size: sizes[0],
            b_size: sizes[1],
            same: differs_in.is_none(),
            differs_in,
            offset,
        };
        let mut output = Output::new();
        if self.json {
            output.json(&verdict)?;
        } else {
            output.line(verdict.line())?;
        }
        output.print()?;
        Ok(if verdict.same { Answer::Yes } else { Answer::No })
    }

    fn open(&self, path: &Path, kind: Kind) -> Result<Box<dyn Content>> {
        Ok(match kind {
            Kind::Layer => {
                let place = Place::existing(path)?;
                Box::new(place.chain(Access::Read, self.layers.layers()?)?)
            }
            Kind::Image(Format::Raw) => {
                let file = Place::existing(path)?.open(Access::Read)?;
                if let Some(descriptor) = file.descriptor() {
                    self.share.check_source(descriptor, path)?;
                }
                Box::new(Raw::new(file)?)
            }
            Kind::Image(format) => {
                Box::new(Opener::new(&self.named, self.share).flat(path, format)?)
            }
        })
    }
}

impl Verdict {
    fn line(&self) -> String {
        let [a, b] = [self.a_size, self.b_size];
        match (self.differs_in, self.offset) {
            (None, _) if a == b => "the same".into(),
            (None, _) => format!("the same, but for zeros at the end: {a} and {b} bytes"),
            (Some("allocation"), Some(offset)) => {
                format!("different: byte {offset} is owned in one disk only")
            }
            (_, Some(offset)) => format!("different from byte {offset} on"),
            (_, None) => format!("different: {a} and {b} bytes"),
        }
    }
}

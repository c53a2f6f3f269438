//! `thinply dump`

mod packed;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value};
use thinply::error::{Error, Result};
use thinply::format::bitmap::Sector;
use thinply::inspect::{self, BitmapPage, Part, RingPlace, RingRecord, Slot, Standing, Verdict};
use thinply::packed::Packed;
use thinply::storage::Access;
use thinply::types::{BLOCK_SIZE, SECTOR_SIZE};

use crate::io::output::Output;
use crate::io::paths::Place;
use crate::io::still::Stillness;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
Fields have the names that format-spec.md gives them; bytes are in hexadecimal.

Examples:
  thinply dump disk.tply
  thinply dump --json disk.tply";

/// Show every on-disk structure of a layer with its offset.
///
/// Of a live layer these are the headers, journal records and bitmap pages; of a packed one the
/// header, frames, maps, directory and the footer with the root.
///
/// Works on damaged files too. A layer that is being written is read without a lock, and the output
/// says so.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Dump {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The layer
    file: PathBuf,
}

#[derive(Debug, Serialize)]
struct Head {
    file: String,
    length: u64,
    note: Option<String>,
}

/// One structure.
#[derive(Debug, Serialize)]
#[serde(tag = "kind")]
enum Structure {
    #[serde(rename = "header slot")]
    Header(HeaderSlot),
    #[serde(rename = "journal record")]
    Record(JournalRecord),
    #[serde(rename = "bitmap page")]
    Bitmap(Bitmap),
}

#[derive(Debug, Serialize)]
struct HeaderSlot {
    offset: u64,
    slot: usize,
    state: String,
    counts: bool,
    fields: Map<String, Value>,
}

#[derive(Debug, Serialize)]
struct JournalRecord {
    offset: u64,
    place: u64,
    state: String,
    epoch: Option<u64>,
    sequence: Option<u64>,
    entries: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Entry {
    block: u64,
    crc: u32,
}

#[derive(Debug, Serialize)]
struct Bitmap {
    offset: u64,
    group: u64,
    owned: u64,
    damaged: Vec<Damaged>,
    runs: Vec<Run>,
}

#[derive(Debug, Serialize)]
struct Damaged {
    offset: u64,
    sector: u64,
    found: u32,
    expected: u32,
}

#[derive(Debug, Serialize)]
struct Run {
    block: u64,
    count: u64,
}

impl Dump {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let file = place.open(Access::Read)?;
        let is_packed = Packed::is_packed(&*file)?;
        let still = Stillness::of(&*file)?;
        let length =
            file.length().map_err(|error| Error::io(error, "asking for the file's length"))?;
        let head = Head { file: place.path().display().to_string(), length, note: still.note() };
        let mut output = Output::new();
        if self.json {
            let mut list = output.begin_list(&head, "structures")?;
            if is_packed {
                let visit = &mut |part| list.item(&packed::Structure::from(part));
                inspect::dump_packed(&file, visit)?;
            } else {
                inspect::dump(&*file, &mut |part| list.item(&Structure::from(part)))?;
            }
            list.end()?;
        } else {
            output.facts(&head)?;
            if is_packed {
                let visit = &mut |part| packed::Structure::from(part).lines(&mut output);
                inspect::dump_packed(&file, visit)?;
            } else {
                inspect::dump(&*file, &mut |part| Structure::from(part).lines(&mut output))?;
            }
        }
        output.print()?;
        Ok(Answer::Yes)
    }
}

impl From<Part> for Structure {
    fn from(part: Part) -> Self {
        match part {
            Part::Slot(slot, counts) => Self::Header(HeaderSlot::new(&slot, counts)),
            Part::Ring(place) => Self::Record(place.into()),
            Part::Bitmap(page) => Self::Bitmap(page.into()),
        }
    }
}

impl HeaderSlot {
    fn new(slot: &Slot, counts: bool) -> Self {
        let state = match &slot.verdict {
            Verdict::Valid(_) => "valid".into(),
            Verdict::BeyondTheEnd => "beyond the end of the file".into(),
            Verdict::NoMagic => "no magic".into(),
            Verdict::BadChecksum => "bad checksum".into(),
            Verdict::Refused(error) => format!("refused: {error}"),
        };
        let fields = slot.fields().into_iter().map(named).collect();
        Self { offset: slot.offset, slot: slot.number, state, counts, fields }
    }
}

/// A field by its name.
fn named(field: inspect::FieldValue<'_>) -> (String, Value) {
    let value = match field.value {
        inspect::Value::Number(number) => number.into(),
        inspect::Value::Bytes(bytes) => text(field.name, bytes).into(),
    };
    (field.name.to_owned(), value)
}

fn field_lines(fields: &Map<String, Value>, output: &mut Output) -> Result<()> {
    for (name, value) in fields {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        output.line(format!("  {name:<21} {value}").trim_end())?;
    }
    Ok(())
}

/// Bytes as text where they are text, else in hexadecimal; of padded fields without the padding.
fn text(name: &str, bytes: &[u8]) -> String {
    let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    match name {
        "magic" | "hint" => String::from_utf8_lossy(&bytes[..used]).into_owned(),
        "reserved" | "extensions" => hex(&bytes[..used]),
        _ => hex(bytes),
    }
}

impl From<RingPlace> for JournalRecord {
    fn from(place: RingPlace) -> Self {
        let state = match &place.content {
            RingRecord::Valid(_, Standing::Live) => "live".into(),
            RingRecord::Valid(_, Standing::Stale) => "stale".into(),
            RingRecord::Valid(_, Standing::Unreachable) => "unreachable".into(),
            RingRecord::Valid(_, Standing::Misplaced) => "in the wrong place".into(),
            RingRecord::Valid(_, Standing::Unknown) => "unknown, without a valid header".into(),
            RingRecord::Torn => "torn".into(),
            RingRecord::Damaged => "damaged: one bit is wrong".into(),
            RingRecord::Refused(error) => format!("refused: {error}"),
        };
        let record = match place.content {
            RingRecord::Valid(record, _) => Some(record),
            _ => None,
        };
        let entries = record.iter().flat_map(|record| &record.entries);
        Self {
            offset: place.offset,
            place: place.number,
            state,
            epoch: record.as_ref().map(|record| record.epoch),
            sequence: record.as_ref().map(|record| record.sequence),
            entries: entries.map(|entry| Entry { block: entry.block.0, crc: entry.crc }).collect(),
        }
    }
}

impl From<BitmapPage> for Bitmap {
    fn from(page: BitmapPage) -> Self {
        let damaged = (0..).zip(&page.sectors).filter_map(|(sector, state)| match *state {
            Sector::Damaged { found, expected } => Some(Damaged {
                offset: page.offset + sector * SECTOR_SIZE,
                sector,
                found,
                expected,
            }),
            Sector::Empty | Sector::Valid => None,
        });
        let runs = page.runs().into_iter().map(|(block, count)| Run { block: block.0, count });
        Self {
            offset: page.offset,
            group: page.group.0,
            owned: page.owned(),
            damaged: damaged.collect(),
            runs: runs.collect(),
        }
    }
}

impl Structure {
    fn lines(&self, output: &mut Output) -> Result<()> {
        output.line("")?;
        match self {
            Self::Header(slot) => slot.lines(output),
            Self::Record(record) => record.lines(output),
            Self::Bitmap(page) => page.lines(output),
        }
    }
}

impl HeaderSlot {
    fn lines(&self, output: &mut Output) -> Result<()> {
        let Self { offset, slot, state, .. } = self;
        let counts = if self.counts { ", counts" } else { "" };
        output.line(format_args!("{offset}: header slot {slot}, {state}{counts}"))?;
        field_lines(&self.fields, output)
    }
}

impl JournalRecord {
    fn lines(&self, output: &mut Output) -> Result<()> {
        let Self { offset, place, state, .. } = self;
        let numbers = match (self.epoch, self.sequence) {
            (Some(epoch), Some(sequence)) => format!(", epoch {epoch}, sequence {sequence}"),
            _ => String::new(),
        };
        output.line(format_args!("{offset}: journal record in place {place}, {state}{numbers}"))?;
        for Entry { block, crc } in &self.entries {
            output.line(format_args!("  block {block}, crc {crc:#010x}"))?;
        }
        Ok(())
    }
}

impl Bitmap {
    fn lines(&self, output: &mut Output) -> Result<()> {
        let Self { offset, group, owned, .. } = self;
        output
            .line(format_args!("{offset}: bitmap page of group {group}, {owned} blocks owned"))?;
        for Damaged { offset, sector, found, expected } in &self.damaged {
            output.line(format_args!(
                "  {offset}: sector {sector} damaged, checksum {found:#010x}, expected \
                 {expected:#010x}"
            ))?;
        }
        for Run { block, count } in &self.runs {
            output.line(format_args!(
                "  blocks {block} to {}, {} bytes",
                block + count - 1,
                count * BLOCK_SIZE
            ))?;
        }
        Ok(())
    }
}

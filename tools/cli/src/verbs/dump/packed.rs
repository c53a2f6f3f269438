//! The structures of a packed layer as `thinply dump` shows them.

use serde::Serialize;
use serde_json::{Map, Value};
use thinply::error::Result;
use thinply::inspect::{ChunkPart, FramePlace, MapPart, PackedPart, RawPart};
use thinply::types::{BLOCK_SIZE, Block};

use super::{Run, field_lines, named};
use crate::io::output::Output;

/// One structure.
#[derive(Debug, Serialize)]
#[serde(tag = "kind")]
pub enum Structure {
    #[serde(rename = "packed header")]
    Header(Fields),
    #[serde(rename = "chunk")]
    Chunk(Chunk),
    #[serde(rename = "group map")]
    Map(GroupMap),
    #[serde(rename = "directory entry")]
    Entry(Entry),
    #[serde(rename = "directory")]
    Directory { state: String },
    #[serde(rename = "footer")]
    Footer(Fields),
}

#[derive(Debug, Serialize)]
pub struct Fields {
    offset: u64,
    state: String,
    fields: Map<String, Value>,
}

#[derive(Debug, Serialize)]
pub struct Chunk {
    offset: u64,
    group: u64,
    chunk: u32,
    state: String,
    frames: Vec<Frame>,
    block_crcs: Vec<u32>,
}

#[derive(Debug, Serialize)]
struct Frame {
    frame: u32,
    offset: Option<u64>,
    end: u64,
    decoded: u64,
    hash: String,
    crc: u32,
}

#[derive(Debug, Serialize)]
pub struct GroupMap {
    offset: u64,
    group: u64,
    state: String,
    frames_offset: Option<u64>,
    chunks_offset: Option<u64>,
    chunk_hashes: Vec<String>,
    present: Vec<Run>,
    data: Vec<Run>,
}

#[derive(Debug, Serialize)]
pub struct Entry {
    offset: u64,
    group: u64,
    map_offset: u64,
    map_length: u32,
    data_blocks: u32,
    hash: String,
}

fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn state<T>(content: &Result<T>) -> String {
    content.as_ref().map_or_else(ToString::to_string, |_| "valid".into())
}

impl From<RawPart> for Fields {
    fn from(part: RawPart) -> Self {
        let state = part.error.as_ref().map_or_else(|| "valid".into(), ToString::to_string);
        let fields = part.fields().into_iter().map(named).collect();
        Self { offset: part.offset, state, fields }
    }
}

impl From<FramePlace> for Frame {
    fn from(place: FramePlace) -> Self {
        let FramePlace { number, offset, end, decoded, entry } = place;
        Self { frame: number, offset, end, decoded, hash: hex(&entry.hash), crc: entry.checksum }
    }
}

impl From<ChunkPart> for Chunk {
    fn from(part: ChunkPart) -> Self {
        let (offset, group, chunk) = (part.offset, part.group.0, part.number);
        let state = state(&part.content);
        let (frames, block_crcs) = part.content.unwrap_or_default();
        let frames = frames.into_iter().map(Frame::from).collect();
        Self { offset, group, chunk, state, frames, block_crcs }
    }
}

impl From<MapPart> for GroupMap {
    fn from(part: MapPart) -> Self {
        let run = |(block, count): (Block, u64)| Run { block: block.0, count };
        let [present, data] = part.runs().map(|runs| runs.into_iter().map(run).collect());
        let map = part.content.as_deref().ok();
        let hashes = map.iter().flat_map(|map| &map.chunks);
        Self {
            offset: part.offset,
            group: part.group.0,
            state: state(&part.content),
            frames_offset: map.map(|map| map.frames_offset),
            chunks_offset: map.map(|map| map.chunks_offset),
            chunk_hashes: hashes.map(|hash| hex(hash)).collect(),
            present,
            data,
        }
    }
}

impl From<PackedPart> for Structure {
    fn from(part: PackedPart) -> Self {
        match part {
            PackedPart::Header(part) => Self::Header(part.into()),
            PackedPart::Chunk(part) => Self::Chunk(part.into()),
            PackedPart::Map(part) => Self::Map(part.into()),
            PackedPart::Entry(offset, entry) => Self::Entry(Entry {
                offset,
                group: entry.group.0,
                map_offset: entry.map_offset,
                map_length: entry.map_length,
                data_blocks: entry.data_blocks,
                hash: hex(&entry.hash),
            }),
            PackedPart::Directory(error) => Self::Directory { state: error.to_string() },
            PackedPart::Footer(part) => Self::Footer(part.into()),
        }
    }
}

impl Structure {
    /// Appends it as lines for people.
    pub fn lines(&self, output: &mut Output) -> Result<()> {
        output.line("")?;
        match self {
            Self::Header(part) => part.lines("packed header", output),
            Self::Chunk(part) => part.lines(output),
            Self::Map(part) => part.lines(output),
            Self::Entry(part) => part.lines(output),
            Self::Directory { state } => output.line(format_args!("directory, {state}")),
            Self::Footer(part) => part.lines("footer", output),
        }
    }
}

impl Fields {
    fn lines(&self, kind: &str, output: &mut Output) -> Result<()> {
        output.line(format_args!("{}: {kind}, {}", self.offset, self.state))?;
        field_lines(&self.fields, output)
    }
}

impl Chunk {
    fn lines(&self, output: &mut Output) -> Result<()> {
        let Self { offset, group, chunk, state, .. } = self;
        output.line(format_args!("{offset}: chunk {chunk} of group {group}, {state}"))?;
        for Frame { frame, offset, end, decoded, hash, crc } in &self.frames {
            let begin = offset.map_or_else(|| "?".into(), |offset| offset.to_string());
            output.line(format_args!(
                "  frame {frame} at {begin} to {end}, {decoded} bytes decoded, crc {crc:#010x}, hash \
                 {hash}"
            ))?;
        }
        let crcs = self.block_crcs.iter().map(|crc| format!("{crc:#010x}")).collect::<Vec<_>>();
        for some in crcs.chunks(8) {
            output.line(format_args!("  block crcs {}", some.join(" ")))?;
        }
        Ok(())
    }
}

impl GroupMap {
    fn lines(&self, output: &mut Output) -> Result<()> {
        let Self { offset, group, state, .. } = self;
        output.line(format_args!("{offset}: group map of group {group}, {state}"))?;
        if let (Some(frames), Some(chunks)) = (self.frames_offset, self.chunks_offset) {
            output.line(format_args!("  frames from {frames}, chunks from {chunks}"))?;
        }
        for (name, runs) in [("present", &self.present), ("data", &self.data)] {
            for Run { block, count } in runs {
                let (last, bytes) = (block + count - 1, count * BLOCK_SIZE);
                output.line(format_args!("  {name} blocks {block} to {last}, {bytes} bytes"))?;
            }
        }
        for (number, hash) in self.chunk_hashes.iter().enumerate() {
            output.line(format_args!("  chunk {number}, hash {hash}"))?;
        }
        Ok(())
    }
}

impl Entry {
    fn lines(&self, output: &mut Output) -> Result<()> {
        let Self { offset, group, map_offset, map_length, data_blocks, hash } = self;
        output.line(format_args!("{offset}: directory entry of group {group}"))?;
        output.line(format_args!(
            "  map at {map_offset}, {map_length} bytes, {data_blocks} data blocks, hash {hash}"
        ))
    }
}

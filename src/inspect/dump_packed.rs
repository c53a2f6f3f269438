//! All structures of a packed layer's file, in the order in which they stand there.

use std::sync::Arc;

use super::parts::{FieldValue, block_runs, fields, read_padded};
use crate::error::{Error, ErrorKind, Result};
use crate::format::packed::{
    CHUNK_FRAMES, Chunk, ChunkPlace, ENTRY_SIZE, Entry, FOOTER_SIZE, Footer, Frame, HEADER_SIZE,
    Map, PackedHeader,
};
use crate::packed::Packed;
use crate::storage::{Storage, failed};
use crate::types::{BLOCK_SIZE, Block, Group};

/// One structure of a packed layer's file. What is damaged has an error instead of its content.
#[derive(Debug)]
pub enum PackedPart {
    /// The header.
    Header(RawPart),
    /// The entries of up to 64 frames.
    Chunk(ChunkPart),
    /// The map of a group.
    Map(MapPart),
    /// What the directory says of a group, and where.
    Entry(u64, Entry),
    /// The directory, where it can't be read.
    Directory(Error),
    /// The footer, with the root.
    Footer(RawPart),
}

/// A structure of named fields.
#[derive(Debug)]
pub struct RawPart {
    /// Where it stands in the file.
    pub offset: u64,
    /// What is wrong with it.
    pub error: Option<Error>,
    name: &'static str,
    bytes: Vec<u8>,
}

impl RawPart {
    /// All fields, whatever they are worth.
    pub fn fields(&self) -> Vec<FieldValue<'_>> {
        fields(self.name, self.offset, &self.bytes)
    }
}

/// A chunk of a group.
#[derive(Debug)]
pub struct ChunkPart {
    /// Where it stands in the file.
    pub offset: u64,
    /// The group.
    pub group: Group,
    /// The chunk's number in it.
    pub number: u32,
    /// The frames, with the CRC-32 of each block.
    pub content: Result<(Vec<FramePlace>, Vec<u32>)>,
}

/// A frame.
#[derive(Clone, Copy, Debug)]
pub struct FramePlace {
    /// Its number in its group.
    pub number: u32,
    /// Where it begins in the file; unknown where the chunk before is damaged.
    pub offset: Option<u64>,
    /// Where it ends in the file.
    pub end: u64,
    /// Bytes when decoded. It is stored as it is if that is as long.
    pub decoded: u64,
    /// Hash and checksum.
    pub entry: Frame,
}

/// The map of a group.
#[derive(Debug)]
pub struct MapPart {
    /// Where it stands in the file.
    pub offset: u64,
    /// The group.
    pub group: Group,
    /// What it says.
    pub content: Result<Box<Map>>,
}

impl MapPart {
    /// The runs of present blocks, and those of data blocks.
    pub fn runs(&self) -> [Vec<(Block, u64)>; 2] {
        let map = self.content.as_deref().ok();
        let runs = |map: &Map| [&map.present, &map.data].map(|bits| block_runs(self.group, bits));
        map.map(runs).unwrap_or_default()
    }
}

/// Hands every structure of a packed layer's file to `visit`, one at a time. What hangs on a damaged
/// one is left out.
///
/// # Errors
/// Host errors; those of `visit`.
pub fn dump_packed(
    file: &Arc<dyn Storage>,
    visit: &mut dyn FnMut(PackedPart) -> Result<()>,
) -> Result<()> {
    let length = file.length().map_err(failed(&**file, "reading the length", 0))?;
    let mut header = Box::new([0; HEADER_SIZE as usize]);
    read_padded(&**file, &mut *header, 0)?;
    let mut footer = [0; FOOTER_SIZE as usize];
    let at = length.saturating_sub(FOOTER_SIZE).max(HEADER_SIZE);
    read_padded(&**file, &mut footer, at)?;
    let part =
        |name, offset, bytes: &[u8], error| RawPart { offset, error, name, bytes: bytes.to_vec() };
    let header_error = PackedHeader::decode(&header).err();
    let footer_error = Footer::decode(&footer, length, &*header).err();
    let whole = header_error.is_none() && footer_error.is_none();
    visit(PackedPart::Header(part("Packed header", 0, &*header, header_error)))?;
    match Packed::open(file.clone()) {
        Ok(layer) => dump_groups(&layer, visit)?,
        Err(error) if error.kind() == ErrorKind::Io => return Err(error),
        Err(error) if whole => visit(PackedPart::Directory(error))?,
        Err(_) => {}
    }
    visit(PackedPart::Footer(part("Footer", at, &footer, footer_error)))
}

fn dump_groups(layer: &Packed, visit: &mut dyn FnMut(PackedPart) -> Result<()>) -> Result<()> {
    for (place, entry) in layer.entries().iter().enumerate() {
        let content = unless_host(layer.read_map(place, entry))?;
        if let Ok(map) = &content {
            dump_chunks(layer, place, map, visit)?;
        }
        let (offset, group) = (entry.map_offset, entry.group);
        visit(PackedPart::Map(MapPart { offset, group, content: content.map(Box::new) }))?;
    }
    let places = (layer.footer().directory_offset..).step_by(ENTRY_SIZE as usize);
    for (at, entry) in places.zip(layer.entries()) {
        visit(PackedPart::Entry(at, *entry))?;
    }
    Ok(())
}

fn dump_chunks(
    layer: &Packed,
    group: usize,
    map: &Map,
    visit: &mut dyn FnMut(PackedPart) -> Result<()>,
) -> Result<()> {
    let in_frame = layer.header().frame_blocks;
    let mut begin = Some(map.frames_offset);
    for number in (0..).take(map.chunks.len()) {
        let place = ChunkPlace::new(number, map.data_blocks, in_frame);
        let chunk = unless_host(layer.read_chunk(group, map, number))?;
        let end = |chunk: &Chunk| chunk.frames.last().map(|frame| frame.end);
        let next = chunk.as_ref().ok().and_then(end);
        let frames = |chunk: Chunk| {
            let frame = |(number, entry): (u32, Frame)| {
                let end = map.frames_offset + u64::from(entry.end);
                let blocks = in_frame.min(map.data_blocks - number * in_frame);
                let decoded = u64::from(blocks) * BLOCK_SIZE;
                FramePlace { number, offset: begin.replace(end), end, decoded, entry }
            };
            let frames = (number * CHUNK_FRAMES..).zip(chunk.frames).map(frame).collect();
            (frames, chunk.checksums)
        };
        let offset = map.chunks_offset + u64::from(place.offset);
        let content = chunk.map(frames);
        begin = next.map(|end| map.frames_offset + u64::from(end));
        visit(PackedPart::Chunk(ChunkPart { offset, group: map.group, number, content }))?;
    }
    Ok(())
}

/// Host errors end a dump, others are a part of it.
fn unless_host<T>(result: Result<T>) -> Result<Result<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::Io => Err(error),
        other => Ok(other),
    }
}

//! Writing a packed layer in one pass.

use std::io::{self, Write};
use std::ops::ControlFlow;

use super::press::{BATCH, Press};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::Bits;
use crate::format::geometry::{block_count, is_virtual_size};
use crate::format::header::ParentLink;
use crate::format::packed::{
    CHUNK_FRAMES, Chunk, Entry, FOOTER_SIZE, FRAME_BLOCKS, Footer, Frame, HEADER_SIZE, Map,
    PackedHeader, encode_directory,
};
use crate::types::{BLOCK_SIZE, Block, GROUP_WORDS, Group, Root};

/// How frames are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// As they are, contiguous and aligned to blocks within a group.
    None,
    /// By zstd at this level, where that makes them smaller.
    Zstd(i32),
}

/// Zstd, at a level that is no slower than its own default on frames of this size, and smaller.
impl Default for Compression {
    fn default() -> Self {
        Self::Zstd(4)
    }
}

/// What a finished packed layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its identity.
    pub root: Root,
    /// Blocks with data.
    pub data_blocks: u64,
    /// Blocks that are present and zero.
    pub zero_blocks: u64,
    /// Bytes of the file.
    pub length: u64,
}

/// The group that is being written. Its tables are what a writer keeps in memory: 0.4 MiB for a
/// full group.
struct Open {
    group: Group,
    frames_offset: u64,
    present: Box<Bits>,
    data: Box<Bits>,
    frames: Vec<Frame>,
    checksums: Vec<u32>,
    /// Blocks of the batch that is not full yet.
    pending: Vec<u8>,
}

/// Writes a packed layer to a file or a pipe. Blocks come in ascending order; what is not pushed is
/// absent. Without [`Writer::finish`] the output is no layer.
///
/// Frames are made on all processors, and the output is the same however many there are. Memory is
/// bounded by one group's tables, 2 MiB for each processor, and 56 bytes for each group that has been
/// written.
pub struct Writer<W> {
    out: W,
    at: u64,
    header: PackedHeader,
    compression: Compression,
    press: Press,
    open: Option<Open>,
    /// Blocks below this one have been passed.
    next: u64,
    entries: Vec<Entry>,
    zero_blocks: u64,
}

fn failed(at: u64) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::io(error, "writing a packed layer").at(at)
}

impl<W: Write> Writer<W> {
    /// Begins a layer.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for sizes that cannot be or an unknown compression level; host
    /// errors.
    pub fn new(
        mut out: W,
        virtual_size: u64,
        parent: Option<(ParentLink, u64)>,
        compression: Compression,
    ) -> Result<Self> {
        let (parent, visible_parent_size) = parent.unzip();
        let visible_parent_size = visible_parent_size.unwrap_or(0);
        if !is_virtual_size(virtual_size) || visible_parent_size > virtual_size {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("a layer of {virtual_size} bytes that shows {visible_parent_size}"),
            ));
        }
        let levels = zstd::compression_level_range();
        if let Compression::Zstd(level) = compression
            && !levels.contains(&level)
        {
            let detail = format!("zstd level {level}, expected {levels:?}");
            return Err(Error::new(ErrorKind::InvalidInput, detail));
        }
        let header = PackedHeader {
            virtual_size,
            visible_parent_size,
            frame_blocks: FRAME_BLOCKS,
            parent,
            compatible: 0,
            extensions: Vec::new(),
        };
        out.write_all(&*header.encode()).map_err(failed(0))?;
        Ok(Self {
            out,
            at: HEADER_SIZE,
            header,
            compression,
            press: Press::new(compression),
            open: None,
            next: 0,
            entries: Vec::new(),
            zero_blocks: 0,
        })
    }

    /// The block is present with these bytes. Zeros cost no data, and neither do those beyond the
    /// virtual size.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a block that is not above the last one or beyond the end;
    /// host errors.
    pub fn data(&mut self, block: Block, bytes: &[u8; BLOCK_SIZE as usize]) -> Result<()> {
        let mut bytes = *bytes;
        let inside = self.header.virtual_size.saturating_sub(block.0 * BLOCK_SIZE);
        bytes.iter_mut().skip(inside as usize).for_each(|byte| *byte = 0);
        if bytes == [0; BLOCK_SIZE as usize] {
            return self.zero(block);
        }
        let open = self.enter(block)?;
        set(&mut open.data, block);
        open.pending.extend_from_slice(&bytes);
        if open.pending.len() == BATCH {
            self.send()?;
        }
        Ok(())
    }

    /// The block is present and zero; errors as [`Writer::data`].
    pub fn zero(&mut self, block: Block) -> Result<()> {
        self.enter(block)?;
        self.zero_blocks += 1;
        Ok(())
    }

    /// Marks the block as present, in its group.
    fn enter(&mut self, block: Block) -> Result<&mut Open> {
        if block.0 < self.next || block.0 >= block_count(self.header.virtual_size) {
            let detail = format!("block {} after block {}, or beyond the end", block.0, self.next);
            return Err(Error::new(ErrorKind::InvalidInput, detail));
        }
        self.next = block.0 + 1;
        let group = block.word().group();
        if self.open.as_ref().is_some_and(|open| open.group != group) {
            self.close_group()?;
        }
        if self.open.is_none() && self.compression == Compression::None {
            let gap = self.at.next_multiple_of(BLOCK_SIZE) - self.at;
            self.write(&vec![0; gap as usize])?;
        }
        let frames_offset = self.at;
        let open = self.open.get_or_insert_with(|| Open {
            group,
            frames_offset,
            present: Box::new([0; GROUP_WORDS as usize]),
            data: Box::new([0; GROUP_WORDS as usize]),
            frames: Vec::new(),
            checksums: Vec::new(),
            pending: Vec::new(),
        });
        set(&mut open.present, block);
        Ok(open)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(failed(self.at))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Hands the pending blocks over, to become frames.
    fn send(&mut self) -> Result<()> {
        let Some(open) = self.open.as_mut().filter(|open| !open.pending.is_empty()) else {
            return Ok(());
        };
        let blocks = std::mem::take(&mut open.pending);
        if self.press.is_full() {
            let _ = self.store()?;
        }
        self.press.send(blocks)
    }

    /// Writes the next frames that are ready; breaks off where there are none left.
    fn store(&mut self) -> Result<ControlFlow<()>> {
        let (Some(batch), Some(open)) = (self.press.take()?, &mut self.open) else {
            return Ok(ControlFlow::Break(()));
        };
        let begin = (self.at - open.frames_offset) as u32;
        open.frames.extend(
            batch.frames.into_iter().map(|frame| Frame { end: begin + frame.end, ..frame }),
        );
        open.checksums.extend(batch.checksums);
        self.write(&batch.stored)?;
        Ok(ControlFlow::Continue(()))
    }

    /// Writes the chunks and the map of the group that is open.
    fn close_group(&mut self) -> Result<()> {
        self.send()?;
        while self.store()?.is_continue() {}
        let Some(open) = self.open.take() else { return Ok(()) };
        let chunks_offset = self.at;
        let blocks = (CHUNK_FRAMES * FRAME_BLOCKS) as usize;
        let mut hashes = Vec::new();
        let parts = open.frames.chunks(CHUNK_FRAMES as usize).zip(open.checksums.chunks(blocks));
        for (number, (frames, checksums)) in (0..).zip(parts) {
            let chunk = Chunk { frames: frames.to_vec(), checksums: checksums.to_vec() };
            hashes.push(chunk.hash());
            self.write(&chunk.encode(open.group, number))?;
        }
        let map = Map::new(
            open.group,
            open.frames_offset,
            chunks_offset,
            open.present,
            open.data,
            hashes,
        );
        let bytes = map.encode();
        self.entries.push(Entry {
            group: open.group,
            map_offset: self.at,
            map_length: bytes.len() as u32,
            data_blocks: map.data_blocks,
            hash: map.hash(),
        });
        self.write(&bytes)
    }

    /// Writes directory and footer, and flushes. The output is the caller's to sync.
    ///
    /// # Errors
    /// Host errors.
    pub fn finish(mut self) -> Result<(Summary, W)> {
        self.close_group()?;
        let directory = encode_directory(&self.entries);
        let summary = Summary {
            root: self.header.root(&self.entries),
            data_blocks: self.entries.iter().map(|entry| u64::from(entry.data_blocks)).sum(),
            zero_blocks: self.zero_blocks,
            length: self.at + directory.len() as u64 + FOOTER_SIZE,
        };
        let footer = Footer {
            directory_offset: self.at,
            group_count: self.entries.len() as u64,
            data_blocks: summary.data_blocks,
            zero_blocks: summary.zero_blocks,
            root: summary.root,
        };
        let footer = footer.encode(&*self.header.encode(), &directory);
        self.write(&directory)?;
        self.write(&footer)?;
        self.out.flush().map_err(failed(self.at))?;
        Ok((summary, self.out))
    }
}

fn set(bits: &mut Bits, block: Block) {
    if let Some(word) = bits.get_mut(block.word().index()) {
        *word |= block.mask();
    }
}

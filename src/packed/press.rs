//! Frames made of blocks, on all processors. They come back in the order in which the blocks came,
//! so how many processors there are doesn't show.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, available_parallelism};

use zstd::bulk::Compressor;

use super::Compression;
use crate::error::{Error, ErrorKind, Result};
use crate::format::packed::{FRAME_BLOCKS, Frame, frame_hash};
use crate::types::BLOCK_SIZE;

const FRAME_BYTES: usize = FRAME_BLOCKS as usize * BLOCK_SIZE as usize;
/// Bytes of a full batch, a whole number of frames: so many that handing it over costs next to
/// nothing.
pub(super) const BATCH: usize = 8 * FRAME_BYTES;
/// Batches for each thread: the one that it has, and the next one.
const AHEAD: usize = 2;

/// Frames that stand one behind the other.
pub(super) struct Batch {
    /// Their stored bytes.
    pub stored: Vec<u8>,
    /// Where they end is counted from the batch's begin.
    pub frames: Vec<Frame>,
    /// CRC-32 of each block.
    pub checksums: Vec<u32>,
}

/// The ends of a thread's channels: blocks in, frames out.
type Thread = (SyncSender<Vec<u8>>, Receiver<Result<Batch>>);

/// Threads that make frames. They start as they are needed, and end when this is dropped.
pub(super) struct Press {
    compression: Compression,
    /// Batch `k` is that of thread `k % most`.
    threads: Vec<Thread>,
    most: usize,
    sent: usize,
    taken: usize,
}

impl Press {
    pub fn new(compression: Compression) -> Self {
        let most = available_parallelism().map_or(1, usize::from);
        Self { compression, threads: Vec::new(), most, sent: 0, taken: 0 }
    }

    /// Whether a batch has to be taken before the next one can be sent.
    pub fn is_full(&self) -> bool {
        self.sent - self.taken == self.most * AHEAD
    }

    /// Hands over blocks that become frames of their own, at most [`BATCH`] bytes.
    ///
    /// # Errors
    /// Host errors.
    pub fn send(&mut self, blocks: Vec<u8>) -> Result<()> {
        if self.threads.len() < self.most.min(self.sent + 1) {
            self.threads.push(start(self.compression)?);
        }
        let (thread, _) = self.threads.get(self.sent % self.most).ok_or_else(gone)?;
        thread.send(blocks).map_err(|_| gone())?;
        self.sent += 1;
        Ok(())
    }

    /// The oldest batch that was not taken yet, if there is one.
    ///
    /// # Errors
    /// Those of compressing.
    pub fn take(&mut self) -> Result<Option<Batch>> {
        if self.taken == self.sent {
            return Ok(None);
        }
        let (_, thread) = self.threads.get(self.taken % self.most).ok_or_else(gone)?;
        self.taken += 1;
        thread.recv().map_err(|_| gone())?.map(Some)
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Io, "a compressing thread is gone")
}

fn start(compression: Compression) -> Result<Thread> {
    let mut compressor = match compression {
        Compression::None => None,
        Compression::Zstd(level) => Some(Compressor::new(level)),
    }
    .transpose()
    .map_err(|error| Error::io(error, "starting zstd"))?;
    let (blocks, to_press) = sync_channel(AHEAD);
    let (pressed, batches) = sync_channel(AHEAD);
    let work = move || {
        let press = |blocks: Vec<u8>| press(&blocks, compressor.as_mut());
        // The other end is dropped without taking all of them after an error.
        let _ = to_press.iter().map(press).try_for_each(|batch| pressed.send(batch));
    };
    let thread = Builder::new().name("pack".into()).spawn(work);
    thread.map_err(|error| Error::io(error, "starting a thread"))?;
    Ok((blocks, batches))
}

/// Makes frames of blocks.
fn press(blocks: &[u8], mut compressor: Option<&mut Compressor<'_>>) -> Result<Batch> {
    let checksums = blocks.chunks(BLOCK_SIZE as usize).map(crc32fast::hash).collect();
    let mut batch =
        Batch { stored: Vec::with_capacity(blocks.len()), frames: Vec::new(), checksums };
    for decoded in blocks.chunks(FRAME_BYTES) {
        let compressed = compressor
            .as_mut()
            .map(|compressor| compressor.compress(decoded))
            .transpose()
            .map_err(|error| Error::io(error, "compressing a frame"))?;
        let smaller = compressed.as_deref().filter(|bytes| bytes.len() < decoded.len());
        let stored = smaller.unwrap_or(decoded);
        batch.stored.extend_from_slice(stored);
        batch.frames.push(Frame {
            hash: frame_hash(decoded),
            end: batch.stored.len() as u32,
            checksum: crc32fast::hash(stored),
        });
    }
    Ok(batch)
}

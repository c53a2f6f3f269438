//! Folding: finding what a layer has to hold so that over its base it reads as a chain does.

use std::ops::ControlFlow;

use super::pair::{BUFFER, Content, PIECE, Pair, Run, fill};
use crate::chain::{Kind, MapExtent};
use crate::error::Result;
use crate::storage::{Buffer, Share};
use crate::types::BLOCK_SIZE;

/// Which blocks a new layer takes from the chain that it is made of. What both stand on is never
/// read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// Those that layers own which the base hasn't got, whatever they hold.
    Owned,
    /// Those that read differently from the base.
    Differing,
    /// Those that the newest layer owns, although the rest may read differently.
    Newest,
}

/// What is done with the blocks of the new layer. They come in order, whole but for the end of the
/// device.
pub trait Sink {
    /// The blocks from `offset` on hold these bytes.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Takes the data of an extent of whole blocks over by sharing its space, if that can be done;
    /// refused, all of it is still to come.
    fn share(&mut self, extent: &MapExtent) -> Result<Share>;

    /// The blocks of a range are zeros, but what lies under them is not.
    fn zero(&mut self, offset: u64, length: u64) -> Result<()>;
}

/// Hands to `sink` what a layer over `base` has to hold to read as `source`.
pub(super) fn fold(
    source: &dyn Content,
    base: &dyn Content,
    take: Take,
    sink: &mut dyn Sink,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let pair = Pair::new(source, base);
    let size = source.length();
    let mut fold =
        Fold { pair: &pair, take, size, sink, progress, done: 0, buffers: Default::default() };
    let mut at = 0;
    while at < size {
        let from = pair.next(at)?.min(size);
        let to = size.min((from / PIECE + 1) * PIECE);
        pair.runs(from, to, false, &mut |run| fold.run(run).map(ControlFlow::Continue))?;
        at = to;
        (fold.progress)(at);
    }
    Ok(())
}

struct Fold<'a> {
    pair: &'a Pair<'a>,
    take: Take,
    size: u64,
    sink: &'a mut dyn Sink,
    progress: &'a mut dyn FnMut(u64),
    /// Blocks before this byte have been decided.
    done: u64,
    buffers: [Buffer; 2],
}

impl Fold<'_> {
    /// Takes the whole blocks of a run as the maps have them. What a layer shows of its parent may
    /// end inside a block: then the block's bytes decide.
    fn run(&mut self, run: Run) -> Result<()> {
        if self.take == Take::Newest && run.a == Kind::Absent {
            return Ok(());
        }
        let to = run.offset + run.length;
        let from = run.offset.next_multiple_of(BLOCK_SIZE);
        let end = if to == self.size { to } else { to / BLOCK_SIZE * BLOCK_SIZE };
        if run.offset < from {
            self.mixed(run.offset)?;
        }
        if from < end {
            self.whole(from, end, run)?;
            self.done = end;
        }
        if end.max(run.offset) < to {
            self.mixed(to - 1)?;
        }
        Ok(())
    }

    fn mixed(&mut self, inside: u64) -> Result<()> {
        let from = inside / BLOCK_SIZE * BLOCK_SIZE;
        if from >= self.done {
            let end = (from + BLOCK_SIZE).min(self.size);
            self.compare(from, end, Kind::Data, Kind::Data)?;
            self.done = end;
        }
        Ok(())
    }

    fn whole(&mut self, from: u64, to: u64, run: Run) -> Result<()> {
        if self.take == Take::Differing {
            return self.compare(from, to, run.a, run.b);
        }
        if run.a != Kind::Data {
            return self.sink.zero(from, to - from);
        }
        // The device may end inside its last block.
        let whole = to / BLOCK_SIZE * BLOCK_SIZE;
        let extent =
            MapExtent { offset: from, length: whole - from, depth: run.depth, kind: run.a };
        let rest = match self.sink.share(&extent)? {
            Share::Done => whole,
            Share::Refused => from,
        };
        self.pieces(rest, to, |fold, at, [bytes, _]| {
            fill(fold.pair.a, run.a, at, bytes)?;
            fold.sink.data(at, bytes)
        })
    }

    /// Takes the blocks that differ.
    fn compare(&mut self, from: u64, to: u64, a: Kind, b: Kind) -> Result<()> {
        self.pieces(from, to, |fold, at, [bytes, below]| {
            fill(fold.pair.a, a, at, bytes)?;
            fill(fold.pair.b, b, at, below)?;
            if bytes == below {
                return Ok(());
            }
            for (change, from, to) in changes(bytes, below) {
                let (offset, bytes) = (at + from as u64, &bytes[from..to]);
                match change {
                    Change::None => {}
                    Change::Data => fold.sink.data(offset, bytes)?,
                    Change::Zero => fold.sink.zero(offset, bytes.len() as u64)?,
                }
            }
            Ok(())
        })
    }

    /// Cuts a range into pieces, each with a buffer for either side.
    fn pieces(
        &mut self,
        from: u64,
        to: u64,
        mut each: impl FnMut(&mut Self, u64, [&mut [u8]; 2]) -> Result<()>,
    ) -> Result<()> {
        let mut buffers = std::mem::take(&mut self.buffers);
        let mut at = from;
        while at < to {
            let length = (to - at).min(BUFFER) as usize;
            let parts = buffers.each_mut().map(|buffer| {
                buffer.set_length(length);
                &mut **buffer
            });
            each(self, at, parts)?;
            at += length as u64;
            (self.progress)(at);
        }
        self.buffers = buffers;
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Data,
    Zero,
}

/// The runs of blocks with one answer, as `(answer, from, to)`.
fn changes<'a>(
    bytes: &'a [u8],
    below: &'a [u8],
) -> impl Iterator<Item = (Change, usize, usize)> + 'a {
    const BLOCK: usize = BLOCK_SIZE as usize;
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    let answer = move |at: usize| {
        let end = bytes.len().min(at + BLOCK);
        match &bytes[at..end] {
            block if block == &below[at..end] => Change::None,
            block if block == &ZEROS[..end - at] => Change::Zero,
            _ => Change::Data,
        }
    };
    let mut next = (!bytes.is_empty()).then(|| (answer(0), 0));
    std::iter::from_fn(move || {
        let (change, from) = next.take()?;
        let mut rest = (from + BLOCK..bytes.len()).step_by(BLOCK).map(|at| (answer(at), at));
        next = rest.find(|&(other, _)| other != change);
        Some((change, from, next.map_or(bytes.len(), |(_, to)| to)))
    })
}

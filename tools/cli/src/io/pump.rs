//! Copying with one thread that reads ahead of the one that writes.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Buffer;

/// Bytes in a buffer; a multiple of a block.
pub const BUFFER: usize = 1 << 20;
/// Buffers on their way.
const BUFFERS: usize = 4;

/// A part of a disk.
#[derive(Debug)]
pub enum Piece {
    /// Bytes from an offset on, at most [`BUFFER`] of them.
    Data(u64, Buffer),
    /// Offset and length of zeros.
    Zeros(u64, u64),
}

/// The reading end.
#[derive(Debug)]
pub struct Feeder {
    empty: Receiver<Buffer>,
    full: SyncSender<Piece>,
}

impl Feeder {
    /// A buffer of that many bytes, at most [`BUFFER`], to read into; `None` once the writing end has
    /// given up.
    pub fn buffer(&self, length: usize) -> Option<Buffer> {
        let mut buffer = self.empty.recv().ok()?;
        buffer.set_length(length);
        Some(buffer)
    }

    /// Passes a piece on; false once the writing end has given up.
    pub fn send(&self, piece: Piece) -> bool {
        self.full.send(piece).is_ok()
    }
}

/// Runs `read` in a thread of its own, and `write` here on each piece that it sends. The first error
/// of either ends both.
pub fn pump(
    read: impl FnOnce(&Feeder) -> Result<()> + Send,
    mut write: impl FnMut(&Piece) -> Result<()>,
) -> Result<()> {
    let (give_back, empty) = sync_channel(BUFFERS);
    let (full, pieces) = sync_channel(BUFFERS);
    for _ in 0..BUFFERS {
        // There is room for all of them.
        let _ = give_back.send(Buffer::default());
    }
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || read(&Feeder { empty, full }));
        let written = pieces.iter().try_for_each(|piece| {
            write(&piece)?;
            if let Piece::Data(_, buffer) = piece {
                // The reader may be done already.
                let _ = give_back.send(buffer);
            }
            Ok(())
        });
        // Wakes a reader that waits for either.
        drop((pieces, give_back));
        let read = reader
            .join()
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "the reading thread panicked")));
        written.and(read)
    })
}

/// The runs of blocks of `data` for which `choose` answers the same, as `(answer, from, to)` in
/// bytes. The last block may be a part of one.
pub fn block_runs<T: Copy + PartialEq>(
    data: &[u8],
    choose: impl Fn(usize, &[u8]) -> T,
) -> impl Iterator<Item = (T, usize, usize)> {
    const BLOCK: usize = thinply::types::BLOCK_SIZE as usize;
    let answer = move |at: usize| choose(at, &data[at..data.len().min(at + BLOCK)]);
    let mut next = (!data.is_empty()).then(|| answer(0)).map(|first| (first, 0));
    std::iter::from_fn(move || {
        let (choice, from) = next.take()?;
        let mut to = from + BLOCK;
        while to < data.len() {
            let other = answer(to);
            if other != choice {
                next = Some((other, to));
                break;
            }
            to += BLOCK;
        }
        Some((choice, from, to.min(data.len())))
    })
}

/// Whether there is nothing but zeros.
pub fn is_zero(block: &[u8]) -> bool {
    static ZEROS: [u8; thinply::types::BLOCK_SIZE as usize] = [0; _];
    block == &ZEROS[..block.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_at_either_end_ends_both() {
        let endless = |feeder: &Feeder| {
            while let Some(buffer) = feeder.buffer(BUFFER) {
                if !feeder.send(Piece::Data(0, buffer)) {
                    break;
                }
            }
            Ok(())
        };
        let mut left = 10;
        let result = pump(endless, |_| {
            left -= 1;
            if left == 0 { Err(Error::new(ErrorKind::NoSpace, "full")) } else { Ok(()) }
        });
        assert_eq!(result.unwrap_err().kind(), ErrorKind::NoSpace);
        let result = pump(|_| Err(Error::new(ErrorKind::Io, "broken")), |_| Ok(()));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Io);
    }

    #[test]
    fn runs_of_blocks_cover_the_data() {
        let mut data = vec![0; 4 * 4096 + 100];
        data[4096] = 1;
        data[4 * 4096] = 1;
        let runs: Vec<_> = block_runs(&data, |_, block| is_zero(block)).collect();
        assert_eq!(
            runs,
            [(true, 0, 4096), (false, 4096, 8192), (true, 8192, 16384), (false, 16384, 16484)]
        );
        assert_eq!(block_runs(&[], |_, block| is_zero(block)).count(), 0);
    }
}

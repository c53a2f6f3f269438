//! The two buffers of a connection. Both keep their memory initialised beyond what is in use, so
//! that reusing them never clears it again, and both start empty and grow with what arrives.

/// Bytes received and not yet taken.
#[derive(Default)]
pub(super) struct Received {
    data: Vec<u8>,
    start: usize,
    end: usize,
}

impl Received {
    const FIRST: usize = 4 << 10;
    /// Room for dozens of small writes, little enough to stay in the processor's cache.
    pub(super) const MAX: usize = 128 << 10;

    pub(super) fn bytes(&self) -> &[u8] {
        &self.data[self.start..self.end]
    }

    pub(super) fn take(&mut self, length: usize) {
        debug_assert!(length <= self.end - self.start);
        self.start += length;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Where to receive more; grows once it has been filled, up to [`Received::MAX`]. Empty only
    /// if that many bytes wait to be taken.
    pub(super) fn spare(&mut self) -> &mut [u8] {
        if self.end == self.data.len() {
            if self.start > 0 {
                self.data.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            if self.end > self.data.len() / 2 || self.data.is_empty() {
                let grown = (self.data.len() * 2).clamp(Self::FIRST, Self::MAX);
                self.data.resize(grown, 0);
            }
        }
        &mut self.data[self.end..]
    }

    /// Counts `length` bytes written to [`Received::spare`] as received.
    pub(super) fn received(&mut self, length: usize) {
        self.end += length;
        // A full buffer was too small: have twice the room next time.
        if self.start == 0 && self.end == self.data.len() && self.end < Self::MAX {
            self.data.resize(self.end * 2, 0);
        }
    }

    /// Gives the memory back if nothing is kept in it.
    pub(super) fn release(&mut self) {
        if self.start == self.end {
            *self = Self::default();
        }
    }
}

/// Replies being built.
#[derive(Default)]
pub(super) struct Replies {
    data: Vec<u8>,
    length: usize,
}

impl Replies {
    /// More memory than this is given back after use.
    const KEEP: usize = 4 << 20;

    pub(super) fn bytes(&self) -> &[u8] {
        &self.data[..self.length]
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.spare(bytes.len()).copy_from_slice(bytes);
        self.length += bytes.len();
    }

    /// Where `length` bytes may be built; they hold anything until then and count once
    /// [`Replies::built`] says so.
    pub(super) fn spare(&mut self, length: usize) -> &mut [u8] {
        let needed = self.length + length;
        if needed > self.data.len() {
            if self.length == 0 {
                // Fresh zero pages instead of clearing old ones by hand.
                self.data = vec![0; needed.next_multiple_of(4096)];
            } else {
                let doubled = (self.data.len() * 2).min(Self::KEEP);
                self.data.resize(needed.max(doubled), 0);
            }
        }
        &mut self.data[self.length..needed]
    }

    pub(super) fn built(&mut self, length: usize) {
        self.length += length;
    }

    /// Drops everything behind the first `length` bytes.
    pub(super) fn truncate(&mut self, length: usize) {
        self.length = length;
    }

    pub(super) fn clear(&mut self) {
        self.length = 0;
        if self.data.len() > Self::KEEP {
            self.release();
        }
    }

    pub(super) fn release(&mut self) {
        *self = Self::default();
    }

    pub(super) fn into_bytes(mut self) -> Vec<u8> {
        self.data.truncate(self.length);
        self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn received_bytes_come_out_in_order_however_they_arrive() {
        let (mut buffer, mut sent, mut seen) = (Received::default(), 0u32, 0u32);
        for round in 1..2000usize {
            let spare = buffer.spare();
            assert!(!spare.is_empty());
            let filled = spare.len().min(round * 7);
            for byte in &mut spare[..filled] {
                *byte = sent as u8;
                sent += 1;
            }
            buffer.received(filled);
            let taken = buffer.bytes().len() * (round % 3) / 2;
            let taken = taken.min(buffer.bytes().len());
            for &byte in &buffer.bytes()[..taken] {
                assert_eq!(byte, seen as u8);
                seen += 1;
            }
            buffer.take(taken);
        }
        assert!(buffer.data.len() <= Received::MAX);
    }

    #[test]
    fn replies_keep_what_was_built_and_forget_what_was_cut() {
        let mut replies = Replies::default();
        replies.push(b"head");
        replies.spare(10_000)[9_999] = 7;
        replies.built(10_000);
        replies.push(b"tail");
        assert_eq!(replies.bytes()[10_003], 7);
        replies.truncate(4);
        replies.push(b"!");
        assert_eq!(replies.into_bytes(), b"head!");
    }
}

//! The one walk over a range of a chain: who answers for which bytes.

use super::layer::Layer;
use super::owners::{NOBODY, WordOwners};
use super::stack::View;
use crate::live::Writable;
use crate::memory::Scatter;
use crate::types::{BLOCK_SIZE, WORD_BLOCKS, WORD_BYTES, Word};
use crate::wait::{Attempt, Wait};

/// Bytes of one word that one layer answers for, or nobody.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    pub word: Word,
    /// First byte, counted from the word's start.
    pub from: u64,
    /// End, likewise.
    pub to: u64,
    pub owner: Owner<'a>,
}

/// Who answers for a piece.
#[derive(Clone, Copy, Debug)]
pub(super) enum Owner<'a> {
    /// The layer that takes writes.
    Top(&'a Writable),
    /// A sealed layer, and its place in the stack.
    Layer(usize, &'a Layer),
    /// No layer that shows there: zeros.
    Nobody,
}

impl Piece<'_> {
    /// Guest offset of the first byte.
    pub fn offset(&self) -> u64 {
        self.word.guest_offset() + self.from
    }

    /// Length in bytes, never zero.
    pub fn length(&self) -> u64 {
        self.to - self.from
    }

    #[inline]
    fn read(&self, mut into: Scatter<'_>, wait: Wait) -> Attempt {
        match self.owner {
            Owner::Top(top) => top.read(self.word, self.from, into, wait),
            Owner::Layer(_, layer) => layer.read(self.word, self.from, into, wait),
            Owner::Nobody => {
                into.clear();
                Ok(())
            }
        }
    }
}

/// The pieces of a range, in order. After the first one that is not to be had there are no more.
pub(super) struct Walk<'a> {
    top: Option<&'a Writable>,
    view: View<'a>,
    wait: Wait,
    at: u64,
    end: u64,
    /// The word that `at` is in, once it was looked up.
    word: Option<Word>,
    /// Its blocks that the top owns.
    owned: u64,
    /// Who owns its blocks below, once that was asked.
    below: Option<WordOwners<'a>>,
}

impl<'a> Walk<'a> {
    /// `offset + length` must not overflow.
    #[inline]
    pub fn new(
        top: Option<&'a Writable>,
        view: View<'a>,
        offset: u64,
        length: u64,
        wait: Wait,
    ) -> Self {
        let end = offset + length;
        Self { top, view, wait, at: offset, end, word: None, owned: 0, below: None }
    }

    /// Fills `into`, as long as the range.
    pub fn read(mut self, into: Scatter<'_>) -> Attempt {
        let mut rest = into;
        loop {
            let left = self.end - self.at;
            if left == 0 {
                return Ok(());
            }
            let piece = self.piece()?;
            let length = piece.length();
            // The common case: nothing else is needed.
            if length == left {
                return piece.read(rest, self.wait);
            }
            let (part, after) = rest.split_at(length as usize);
            piece.read(part, self.wait)?;
            self.at += length;
            rest = after;
        }
    }

    /// The piece that begins at `at`.
    #[inline(always)]
    fn piece(&mut self) -> Attempt<Piece<'a>> {
        let word = Word(self.at / WORD_BYTES);
        if self.word != Some(word) {
            self.owned = self.top.map_or(Ok(0), |top| top.owned(word, self.wait))?;
            (self.word, self.below) = (Some(word), None);
        }
        let start = word.guest_offset();
        let (from, to) = (self.at - start, WORD_BYTES.min(self.end - start));
        let bit = (from / BLOCK_SIZE) as u32;
        let owned = self.owned >> bit;
        if let Some(top) = self.top.filter(|_| owned & 1 == 1) {
            let end = u64::from(bit + owned.trailing_ones()) * BLOCK_SIZE;
            return Ok(Piece { word, from, to: to.min(end), owner: Owner::Top(top) });
        }
        let end = u64::from(bit + owned.trailing_zeros()).min(WORD_BLOCKS) * BLOCK_SIZE;
        let (to, owner) = self.below(word, from, to.min(end))?;
        Ok(Piece { word, from, to, owner })
    }

    /// Who below the top answers from byte `from` of a word on, and up to where, `to` at most.
    fn below(&mut self, word: Word, from: u64, to: u64) -> Attempt<(u64, Owner<'a>)> {
        // Bytes of the word that a layer shows of which `clip` bytes show.
        let shows = |clip: u64| clip.saturating_sub(word.guest_offset());
        let Some(stack) = self.view.stack.filter(|_| shows(self.view.clip) > from) else {
            return Ok((to, Owner::Nobody));
        };
        let owners = match self.below {
            Some(owners) => owners,
            None => *self.below.insert(stack.owners(word, self.wait)?),
        };
        let (place, end) = owners.run((from / BLOCK_SIZE) as u32, to.div_ceil(BLOCK_SIZE) as u32);
        let to = to.min(u64::from(end) * BLOCK_SIZE);
        if place == NOBODY {
            return Ok((to, Owner::Nobody));
        }
        let place = usize::from(place);
        let (layer, clip) = stack.layer(place);
        match shows(clip.min(self.view.clip)) {
            shown if shown > from => Ok((to.min(shown), Owner::Layer(place, layer))),
            _ => Ok((to, Owner::Nobody)),
        }
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Attempt<Piece<'a>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let piece = self.piece();
        self.at = piece.as_ref().map_or(self.end, |piece| piece.offset() + piece.length());
        Some(piece)
    }
}

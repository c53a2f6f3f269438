//! Writes, zeros, trims and allocation of the top layer, one word of blocks at a time.

use std::io;

use super::Under;
use super::pages::Page;
use super::pending::Standing;
use super::writable::Writable;
use crate::error::Result;
use crate::format::geometry::{block_offset, word_offset};
use crate::format::is_zero;
use crate::memory::Gather;
use crate::planted::{Bug, planted};
use crate::storage::{Share, Storage, failed, write_all_at};
use crate::sync::guard;
use crate::types::{
    BLOCK_SIZE, Block, GROUP_BLOCKS, Group, WORD_BYTES, Word, covered, runs, touched,
};
use crate::wait::{Attempt, NotDone, Wait, waited};

/// Most words in the fresh set; bounds its memory to a few MiB. Beyond, a writer commits first.
const FRESH_WORDS: usize = 1 << 18;

/// How a range shall come to read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroKind {
    /// Give the space back.
    Punch,
    /// Keep, or get, space for it.
    Allocate,
}

impl Writable {
    /// Writes `from` at a guest offset inside the device. Answers how many bytes went in before it
    /// would have had to wait: all of them with [`Wait::Allowed`].
    pub fn write(
        &self,
        offset: u64,
        from: Gather<'_>,
        under: &dyn Under,
        wait: Wait,
    ) -> Result<u64> {
        self.check_poison()?;
        let mut done = 0;
        for (word, start, to) in words(offset, from.len() as u64) {
            let part = from.range(done as usize, (done + to - start) as usize);
            match self.write_word(word, start, part, under, wait) {
                Ok(()) => done += to - start,
                Err(NotDone::WouldWait) => break,
                Err(NotDone::Failed(error)) => return Err(error),
            }
        }
        self.writeback.count(&self.file, done);
        Ok(done)
    }

    fn write_word(
        &self,
        word: Word,
        from: u64,
        data: Gather<'_>,
        under: &dyn Under,
        wait: Wait,
    ) -> Attempt {
        let to = from + data.len() as u64;
        let mask = touched(from, to);
        let page = self.pages.get(&*self.file, word.group(), wait)?;
        loop {
            if page.word(word) & mask == mask
                && guard(&self.pending).standing(word, mask) == Standing::Settled
            {
                self.bring_ends(word, from, to, wait)?;
                return Ok(self.write_data(word, from, data)?);
            }
            let stripe = guard(self.stripe(word));
            if !self.must_wait(word, mask) {
                let absent = mask & !page.word(word);
                if planted(Bug::BitBeforeItsWrite) {
                    self.own(page, word, absent);
                }
                self.write_absent(word, from, data, absent, under, wait)?;
                if absent != 0 {
                    self.allocate(page, word.group())?;
                }
                self.own(page, word, absent);
                return Ok(());
            }
            drop(stripe);
            if wait != Wait::Allowed {
                return Err(NotDone::WouldWait);
            }
            self.confirm()?;
        }
    }

    /// Whether a commit has to come before the blocks may be written: they are named by the last
    /// record, or the fresh set is full.
    fn must_wait(&self, word: Word, mask: u64) -> bool {
        let pending = guard(&self.pending);
        !planted(Bug::ConfirmSkipped) && pending.standing(word, mask) == Standing::Unconfirmed
            || pending.fresh.words() >= FRESH_WORDS
    }

    /// Sees to it that the kernel need not read from the disk for a write that covers the blocks at
    /// its ends only partly.
    fn bring_ends(&self, word: Word, from: u64, to: u64, wait: Wait) -> Attempt {
        if wait == Wait::Allowed {
            return Ok(());
        }
        for end in [from, to].into_iter().filter(|end| end % BLOCK_SIZE != 0) {
            self.read(word, end, (&mut [0]).into(), wait)?;
        }
        Ok(())
    }

    /// Writes data whose first or last block may be absent and only partly covered: such a block is
    /// written whole, with what shows below around the data.
    fn write_absent(
        &self,
        word: Word,
        from: u64,
        data: Gather<'_>,
        absent: u64,
        under: &dyn Under,
        wait: Wait,
    ) -> Attempt {
        let to = from + data.len() as u64;
        let part = |a: u64, b: u64| data.range((a - from) as usize, (b - from) as usize);
        let partial = absent & !covered(from, to);
        let mut copied = 0;
        for (bit, end) in runs(partial).flat_map(|(first, end)| (first..end).map(|b| (b, b + 1))) {
            let (start, end) = (u64::from(bit) * BLOCK_SIZE, u64::from(end) * BLOCK_SIZE);
            let mut block = [0; BLOCK_SIZE as usize];
            under.read(word.guest_offset() + start, (&mut block).into(), wait)?;
            let (a, b) = (from.max(start), to.min(end));
            part(a, b).copy_to(&mut block[(a - start) as usize..(b - start) as usize]);
            self.write_data(word, start, (&block).into())?;
            copied |= touched(start, end);
        }
        for (first, end) in runs(touched(from, to) & !copied) {
            let a = from.max(u64::from(first) * BLOCK_SIZE);
            let b = to.min(u64::from(end) * BLOCK_SIZE);
            self.write_data(word, a, part(a, b))?;
        }
        Ok(())
    }

    /// Takes all space that a group needs beside its blocks.
    fn allocate(&self, page: &Page, group: Group) -> Result<()> {
        page.allocate(&*self.file, group)?;
        self.kept.as_ref().map_or(Ok(()), |kept| kept.reserve(group)).map_err(failed(
            &*self.file,
            "taking memory for the map of fresh blocks",
            0,
        ))
    }

    fn write_data(&self, word: Word, from: u64, data: Gather<'_>) -> Result<()> {
        let offset = word_offset(word).0 + from;
        write_all_at(&*self.file, data, offset).map_err(failed(
            &*self.file,
            "writing blocks",
            offset,
        ))
    }

    /// Makes the whole blocks inside a guest range read as zeros. Those that nobody owns already
    /// do, and stay absent unless space is to be allocated. The range's end may lie in the last
    /// block behind the device's end, which counts as whole.
    pub fn zero_blocks(
        &self,
        offset: u64,
        length: u64,
        kind: ZeroKind,
        under: &dyn Under,
    ) -> Result<()> {
        self.check_poison()?;
        for (word, from, to) in words(offset, length) {
            let mask = covered(from, to);
            if mask != 0 {
                self.zero_word(word, mask, kind, under)?;
            }
        }
        Ok(())
    }

    fn zero_word(&self, word: Word, mask: u64, kind: ZeroKind, under: &dyn Under) -> Result<()> {
        let page = self.page(word.group())?;
        loop {
            let stripe = guard(self.stripe(word));
            if !self.must_wait(word, mask) {
                let absent = mask & !page.word(word);
                let newly = match kind {
                    ZeroKind::Punch if absent == 0 => 0,
                    ZeroKind::Punch => absent & waited(under.owned(word, Wait::Allowed))?,
                    ZeroKind::Allocate => absent,
                };
                if newly != 0 {
                    self.allocate(page, word.group())?;
                }
                let punched = mask & page.word(word) | newly;
                let late = planted(Bug::PunchAfterItsBit);
                if late {
                    self.own(page, word, newly);
                    drop(stripe);
                }
                self.in_file(word, punched, "zeroing blocks", |at, length| match kind {
                    ZeroKind::Punch => self.file.punch(at, length),
                    ZeroKind::Allocate => self.file.zero(at, length),
                })?;
                if !late {
                    self.own(page, word, newly);
                }
                return Ok(());
            }
            drop(stripe);
            self.confirm()?;
        }
    }

    /// Takes space for the blocks that a guest range touches, those at its ends as wholes, and owns them.
    /// What they show stays. Needs [`Writable::settle_blocks`] before anything is promised of them.
    pub fn allocate_blocks(&self, offset: u64, length: u64, under: &dyn Under) -> Result<()> {
        self.check_poison()?;
        words(offset, length)
            .try_for_each(|(word, from, to)| self.allocate_word(word, touched(from, to), under))
    }

    /// Returns once the blocks that were owned before may be overwritten without a commit, which could
    /// want space of its own: by then each is in a record, and in the commit behind it.
    pub fn settle_blocks(&self) -> Result<()> {
        self.flush()?;
        self.confirm()
    }

    fn allocate_word(&self, word: Word, mask: u64, under: &dyn Under) -> Result<()> {
        let page = self.page(word.group())?;
        loop {
            let stripe = (!planted(Bug::CopyUpWithoutStripe)).then(|| guard(self.stripe(word)));
            if !self.must_wait(word, mask) {
                let absent = mask & !page.word(word);
                // First: where there is no space, or no way to have it, nothing has changed.
                self.in_file(word, mask, "allocating blocks", |at, length| {
                    self.file.allocate(at, length)
                })?;
                if absent != 0 {
                    self.allocate(page, word.group())?;
                    self.copy_up(word, absent, under)?;
                    self.own(page, word, absent);
                }
                return Ok(());
            }
            drop(stripe);
            self.confirm()?;
        }
    }

    /// Writes absent blocks as they show below. What shows zeros takes space and no bytes.
    fn copy_up(&self, word: Word, absent: u64, under: &dyn Under) -> Result<()> {
        let below = absent & waited(under.owned(word, Wait::Allowed))?;
        let mut bytes = vec![0; if below == 0 { 0 } else { WORD_BYTES as usize }];
        let place = |bit: u32| bit as usize * BLOCK_SIZE as usize;
        for (first, end) in runs(below) {
            let offset = word.guest_offset() + u64::from(first) * BLOCK_SIZE;
            let into = &mut bytes[place(first)..place(end)];
            waited(under.read(offset, into.into(), Wait::Allowed))?;
        }
        let blocks = (0..).zip(bytes.chunks_exact(BLOCK_SIZE as usize));
        let shown =
            blocks.filter(|(_, block)| !is_zero(block)).fold(0, |all, (bit, _)| all | 1 << bit);
        for (first, end) in runs(shown) {
            let data = &bytes[place(first)..place(end)];
            self.write_data(word, u64::from(first) * BLOCK_SIZE, data.into())?;
        }
        self.writeback.count(&self.file, u64::from(shown.count_ones()) * BLOCK_SIZE);
        self.in_file(word, absent & !shown, "zeroing blocks", |at, length| {
            self.file.zero(at, length)
        })
    }

    /// Does something to the place of each run of blocks in the file.
    fn in_file(
        &self,
        word: Word,
        blocks: u64,
        what: &'static str,
        act: impl Fn(u64, u64) -> io::Result<()>,
    ) -> Result<()> {
        runs(blocks).try_for_each(|(first, end)| {
            let offset = word_offset(word).0 + u64::from(first) * BLOCK_SIZE;
            let length = u64::from(end - first) * BLOCK_SIZE;
            act(offset, length).map_err(failed(&*self.file, what, offset))
        })
    }

    /// Makes whole blocks hold what stands in `source` from `from` on, by sharing its space, and owns
    /// them. Refused where that can't be done, or the layer owns one of them already; a part may be
    /// shared then.
    pub fn share(
        &mut self,
        first: Block,
        end: Block,
        source: &dyn Storage,
        from: u64,
    ) -> Result<Share> {
        self.check_poison()?;
        let mut at = first;
        while at.0 < end.0 {
            let group = at.word().group();
            let stop = Block(end.0.min((group.0 + 1) * GROUP_BLOCKS));
            let from = from + (at.0 - first.0) * BLOCK_SIZE;
            if self.share_in_group(group, at, stop, source, from)? == Share::Refused {
                return Ok(Share::Refused);
            }
            at = stop;
        }
        Ok(Share::Done)
    }

    /// [`Writable::share`] of blocks that stand side by side.
    fn share_in_group(
        &mut self,
        group: Group,
        first: Block,
        end: Block,
        source: &dyn Storage,
        from: u64,
    ) -> Result<Share> {
        let length = (end.0 - first.0) * BLOCK_SIZE;
        let page = self.page(group)?;
        let parts =
            || words(first.0 * BLOCK_SIZE, length).map(|(w, from, to)| (w, touched(from, to)));
        if parts().any(|(word, mask)| page.word(word) & mask != 0) {
            return Ok(Share::Refused);
        }
        self.allocate(page, group)?;
        let offset = block_offset(first).0;
        let shared = self.file.clone_range(offset, length, source, from);
        if shared.map_err(failed(&*self.file, "sharing blocks", offset))? == Share::Refused {
            return Ok(Share::Refused);
        }
        if guard(&self.pending).fresh.words() >= FRESH_WORDS {
            self.confirm()?;
        }
        parts().for_each(|(word, mask)| self.own(page, word, mask));
        Ok(Share::Done)
    }
}

/// Cuts a guest range at words: each with the range's bytes inside it, counted from its start.
pub fn words(offset: u64, length: u64) -> impl Iterator<Item = (Word, u64, u64)> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let word = Word(at / WORD_BYTES);
        let from = at - word.guest_offset();
        let to = WORD_BYTES.min(end - word.guest_offset());
        at = word.guest_offset() + to;
        Some((word, from, to))
    })
}

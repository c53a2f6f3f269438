//! Packing the top layer of a chain (`format-spec.md`, "Packed layout").

use std::io::Write;

use super::Chain;
use super::layer::Layer;
use super::owners::shown;
use super::stack::View;
use crate::error::{Error, ErrorKind, Result};
use crate::packed::{Compression, Summary, Writer};
use crate::storage::Wait;
use crate::types::{BLOCK_SIZE, Group, WORD_BYTES, Word, runs};

/// How a layer is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackOptions {
    /// How frames are stored.
    pub compression: Compression,
    /// Leave out blocks that are equal to what lies under them.
    pub drop_equal: bool,
}

impl Chain {
    /// Writes the newest layer, what it owns and nothing of those below, as a packed layer with the
    /// same size and parent. `progress` gets the owned blocks done so far.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a chain that is open for writing; those of [`Writer`] and of
    /// reading.
    pub fn pack<W: Write>(
        &self,
        out: W,
        options: &PackOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(Summary, W)> {
        let levels = self.levels();
        let Some((stack, layer)) =
            levels.sealed().and_then(|stack| Some((stack, stack.layers().next()?)))
        else {
            let detail = "a layer is packed from a chain that is open for reading";
            return Err(Error::new(ErrorKind::InvalidInput, detail));
        };
        let parent = layer.parent().cloned().zip(Some(layer.visible_parent_size()));
        let below = match layer.parent() {
            Some(link) if options.drop_equal => {
                Some(self.layers.stack(link, &stack.found()[0].folder)?)
            }
            _ => None,
        };
        let under = options
            .drop_equal
            .then(|| View { stack: below.as_deref(), clip: layer.visible_parent_size() });
        let writer = Writer::new(out, layer.virtual_size(), parent, options.compression)?;
        let room = || vec![0; WORD_BYTES as usize];
        let mut packer = Packer { layer, under, writer, bytes: room(), below: room() };
        let (mut from, mut done) = (Group(0), 0);
        while let Some(group) = layer.next_group(from)? {
            from = Group(group.0 + 1);
            let Some(bits) = layer.bits(group)? else { continue };
            for (word, &owned) in (group.first_word().0..).map(Word).zip(bits.iter()) {
                packer.word(word, owned)?;
                done += u64::from(owned.count_ones());
            }
            progress(done);
        }
        packer.writer.finish()
    }
}

/// Packs a layer word by word, with room for the bytes of one.
struct Packer<'a, W> {
    layer: &'a Layer,
    /// What blocks are compared with.
    under: Option<View<'a>>,
    writer: Writer<W>,
    bytes: Vec<u8>,
    below: Vec<u8>,
}

impl<W: Write> Packer<'_, W> {
    fn word(&mut self, word: Word, owned: u64) -> Result<()> {
        // A live layer may own blocks beyond its end, if it was shrunk.
        let owned = owned & shown(word, self.layer.virtual_size());
        for (first, end) in runs(owned) {
            let from = u64::from(first) * BLOCK_SIZE;
            let length = (end - first) as usize * BLOCK_SIZE as usize;
            let (bytes, below) = (&mut self.bytes[..length], &mut self.below[..length]);
            self.layer.read(word, from, bytes, Wait::Yes)?;
            if let Some(under) = &self.under {
                under.read_word(word, from, below, Wait::Yes)?;
            }
            let blocks = bytes.as_chunks::<{ BLOCK_SIZE as usize }>().0;
            let others = below.as_chunks::<{ BLOCK_SIZE as usize }>().0;
            for (bit, (block, other)) in (first..end).zip(blocks.iter().zip(others)) {
                if self.under.is_none() || block != other {
                    self.writer.data(word.block(bit), block)?;
                }
            }
        }
        Ok(())
    }
}

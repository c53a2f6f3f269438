//! Packing the top layer of a chain (`format-spec.md`, "Packed layout").

use std::io::Write;

use super::Chain;
use super::layer::Layer;
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
        let stack = levels.stack.as_ref().filter(|_| levels.top.is_none());
        let Some((stack, layer)) = stack.and_then(|stack| Some((stack, stack.layers().next()?)))
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
        let mut writer = Writer::new(out, layer.virtual_size(), parent, options.compression)?;
        let (mut from, mut done) = (Group(0), 0);
        while let Some(group) = layer.next_group(from)? {
            from = Group(group.0 + 1);
            let Some(bits) = layer.bits(group)? else { continue };
            for (word, &owned) in (group.first_word().0..).map(Word).zip(bits.iter()) {
                pack_word(layer, word, shown(layer, word, owned), under.as_ref(), &mut writer)?;
                done += u64::from(owned.count_ones());
            }
            progress(done);
        }
        writer.finish()
    }
}

/// A live layer may own blocks beyond its end, if it was shrunk.
fn shown(layer: &Layer, word: Word, owned: u64) -> u64 {
    owned & super::owners::shown(word, layer.virtual_size())
}

fn pack_word<W: Write>(
    layer: &Layer,
    word: Word,
    owned: u64,
    under: Option<&View<'_>>,
    writer: &mut Writer<W>,
) -> Result<()> {
    let mut bytes = [0; WORD_BYTES as usize];
    let mut below = [0; BLOCK_SIZE as usize];
    for (first, end) in runs(owned) {
        let run = &mut bytes[..(end - first) as usize * BLOCK_SIZE as usize];
        layer.read(word, u64::from(first) * BLOCK_SIZE, run, Wait::Yes)?;
        let (blocks, _) = run.as_chunks::<{ BLOCK_SIZE as usize }>();
        for (bit, block) in (first..end).zip(blocks) {
            if let Some(under) = under {
                under.read_word(word, u64::from(bit) * BLOCK_SIZE, &mut below, Wait::Yes)?;
                if below == *block {
                    continue;
                }
            }
            writer.data(word.block(bit), block)?;
        }
    }
    Ok(())
}

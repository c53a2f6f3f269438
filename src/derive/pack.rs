//! Packing the top layer of a chain (`format-spec.md`, "Packed layout").

use std::io::Write;

use super::Plan;
use crate::chain::{Chain, Layer, shown};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Scatter;
use crate::packed::{Compression, Summary, Writer};
use crate::types::{BLOCK_SIZE, Group, WORD_BYTES, Word, runs};
use crate::wait::{Wait, waited};

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
    /// same size and parent. `progress` is told how many bytes are done: of what the layer owns, or,
    /// with `drop_equal`, of the device.
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
        if options.drop_equal {
            let (plan, (folder, layers)) = (Plan::compact(self), self.found_in());
            let compression = options.compression;
            return self.derive_packed(&plan, folder, out, layers.clone(), compression, progress);
        }
        let stack = self.sealed();
        let Some(layer) = stack.as_ref().and_then(|stack| stack.layers().next()) else {
            let detail = "a layer is packed from a chain that is open for reading";
            return Err(Error::new(ErrorKind::InvalidInput, detail));
        };
        let parent = layer.parent().cloned().zip(Some(layer.visible_parent_size()));
        let mut writer = Writer::new(out, layer.virtual_size(), parent, options.compression)?;
        let mut bytes = vec![0; WORD_BYTES as usize];
        let (mut from, mut done) = (Group(0), 0);
        while let Some(group) = layer.next_group(from)? {
            from = Group(group.0 + 1);
            let Some(bits) = waited(layer.bits(group, Wait::Allowed))? else { continue };
            for (word, &owned) in (group.first_word().0..).map(Word).zip(bits.iter()) {
                pack_word(layer, word, owned, &mut bytes, &mut writer)?;
                done += u64::from(owned.count_ones()) * BLOCK_SIZE;
            }
            progress(done);
        }
        writer.finish()
    }
}

/// Packs the owned blocks of a word, with room for the bytes of one.
fn pack_word<W: Write>(
    layer: &Layer,
    word: Word,
    owned: u64,
    room: &mut [u8],
    writer: &mut Writer<W>,
) -> Result<()> {
    // A live layer may own blocks beyond its end, if it was shrunk.
    for (first, end) in runs(owned & shown(word, layer.virtual_size())) {
        let bytes = &mut room[..(end - first) as usize * BLOCK_SIZE as usize];
        let from = u64::from(first) * BLOCK_SIZE;
        waited(layer.read(word, from, Scatter::from(&mut *bytes), Wait::Allowed))?;
        for (bit, block) in (first..end).zip(bytes.as_chunks().0) {
            writer.data(word.block(bit), block)?;
        }
    }
    Ok(())
}

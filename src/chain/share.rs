//! Sharing space between files instead of copying bytes, where the host's file system can do that.

use std::sync::PoisonError;

use super::{Chain, Kind, Layer, MapExtent};
use crate::device::check_range;
use crate::error::Result;
use crate::format::geometry::block_offset;
use crate::storage::{Share, Storage};
use crate::types::{BLOCK_SIZE, Block, GROUP_BLOCKS};

/// Bytes of a disk that stand in a file as they are.
#[derive(Debug)]
pub struct Stored<'a> {
    /// The file.
    pub file: &'a dyn Storage,
    /// Where they stand in it.
    pub at: u64,
    /// Guest offset in bytes, at a block's begin.
    pub offset: u64,
    /// Length in bytes, whole blocks.
    pub length: u64,
}

impl Chain {
    /// Makes the whole blocks of a range hold what stands in `source` from `from` on, by sharing its
    /// space. Refused where that can't be done, or where the top owns one of them; a part may be shared
    /// then, and all of it may be written. Waits for operations under way, and holds up those that
    /// come.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::ReadOnly`], [`crate::error::ErrorKind::OutOfRange`]; host errors.
    pub fn share(
        &self,
        offset: u64,
        length: u64,
        source: &dyn Storage,
        from: u64,
    ) -> Result<Share> {
        let mut levels = self.state.write().unwrap_or_else(PoisonError::into_inner);
        levels.top()?;
        check_range(levels.size, offset, length)?;
        if !offset.is_multiple_of(BLOCK_SIZE) || !length.is_multiple_of(BLOCK_SIZE) {
            return Ok(Share::Refused);
        }
        let Some(top) = levels.top.as_mut() else { return Ok(Share::Refused) };
        let end = (offset + length) / BLOCK_SIZE;
        top.share(Block(offset / BLOCK_SIZE), Block(end), source, from)
    }

    /// Hands the whole blocks of a data extent of [`Chain::walk`] to `visit`, in order, as they stand
    /// side by side in the file of a live layer, until it refuses one. Refused too where they don't
    /// stand so.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn stored(
        &self,
        extent: &MapExtent,
        visit: &mut dyn FnMut(&Stored<'_>) -> Result<Share>,
    ) -> Result<Share> {
        let levels = self.levels();
        let layer = levels.sealed().zip(extent.depth).and_then(|(s, depth)| s.layers().nth(depth));
        let Some(Layer::Live(layer)) = layer.filter(|_| extent.kind == Kind::Data) else {
            return Ok(Share::Refused);
        };
        let end = (extent.offset + extent.length) / BLOCK_SIZE;
        let mut block = extent.offset.div_ceil(BLOCK_SIZE);
        while block < end {
            let stop = end.min((block / GROUP_BLOCKS + 1) * GROUP_BLOCKS);
            let stored = Stored {
                file: layer.file(),
                at: block_offset(Block(block)).0,
                offset: block * BLOCK_SIZE,
                length: (stop - block) * BLOCK_SIZE,
            };
            if visit(&stored)? == Share::Refused {
                return Ok(Share::Refused);
            }
            block = stop;
        }
        Ok(Share::Done)
    }
}

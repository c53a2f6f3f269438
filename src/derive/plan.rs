//! New layers made of a chain: flattened, rebased, compacted, or the difference of two disks. Each
//! is a [`Plan`] of what the new layer stands on and holds, and one way to carry it out.

use std::io::Write;
use std::sync::Arc;

use super::fold::{Sink, Take, fold};
use crate::chain::{Chain, Gate, MapExtent, Parent};
use crate::device::{Device, ZeroMode};
use crate::error::Result;
use crate::format::header::ParentLink;
use crate::live::{self, NewLayer};
use crate::packed::{Compression, Summary, Writer};
use crate::storage::{Access, Folder, Share};
use crate::types::{BLOCK_SIZE, Block};

/// What a new layer shall be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The layer below, and how many bytes of it show.
    parent: Option<(ParentLink, u64)>,
    take: Take,
}

impl Plan {
    /// The layer below.
    pub fn parent(&self) -> Option<&ParentLink> {
        self.parent.as_ref().map(|(link, _)| link)
    }

    /// Reads as the chain over any parent; where that reads the same already, it holds nothing.
    pub fn rebase(chain: &Chain, parent: &Parent) -> Self {
        let visible = parent.virtual_size.min(chain.size());
        Self { parent: Some((parent.link.clone(), visible)), take: Take::Differing }
    }

    /// Holds what the chain's newest layer holds, over another parent. It reads the same if the
    /// parents do.
    pub fn relink(chain: &Chain, parent: &Parent) -> Self {
        let newest = chain.newest();
        let shown = newest.filter(|(parent, _)| parent.is_some()).map(|(_, visible)| visible);
        let most = parent.virtual_size.min(chain.size());
        let visible = shown.map_or(most, |shown| shown.min(most));
        Self { parent: Some((parent.link.clone(), visible)), take: Take::Newest }
    }

    /// Stands on what the chain's newest layer stands on, and holds only what reads differently.
    pub fn compact(chain: &Chain) -> Self {
        let parent = chain.newest().and_then(|(parent, visible)| parent.zip(Some(visible)));
        Self { parent, take: Take::Differing }
    }

    /// Holds what all layers hold, or those above the ancestor that `onto` names.
    ///
    /// A block that a folded layer gave up stays present over data of the ancestor, so that it goes
    /// on reading as zeros; elsewhere it becomes absent.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::InvalidInput`] where `onto` is no ancestor.
    pub fn flatten(chain: &Chain, onto: Option<&ParentLink>) -> Result<Self> {
        let parent = onto.map(|link| Ok((link.clone(), chain.shown_of(link)?))).transpose()?;
        Ok(Self { parent, take: Take::Owned })
    }
}

impl Chain {
    /// The parent link of the newest layer, and how many bytes of the parent it shows; none for a
    /// chain that is open for writing.
    fn newest(&self) -> Option<(Option<ParentLink>, u64)> {
        let stack = self.sealed()?;
        let newest = stack.layers().next()?;
        Some((newest.parent().cloned(), newest.visible_parent_size()))
    }

    /// What a new layer in `folder` stands on, as a disk of this one's size.
    fn base(&self, plan: &Plan, folder: &Arc<dyn Folder>, layers: Arc<Gate>) -> Result<Self> {
        let visible = plan.parent.as_ref().map_or(0, |(_, visible)| *visible);
        self.below(plan.parent(), visible, folder, layers)
    }

    /// Hands to `sink` the blocks in which this disk reads differently from another one, as far as
    /// this one reaches. `progress` is told how many bytes are done.
    ///
    /// # Errors
    /// Those of `sink`; host errors.
    pub fn changes_from(
        &self,
        other: &Self,
        sink: &mut dyn Sink,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        fold(self, other, Take::Differing, sink, progress)
    }

    /// Writes to `new`, which has none of it yet, what this disk's layers own and those of `base`
    /// below them do not.
    #[cfg(feature = "store")]
    pub(crate) fn copy_above(&self, base: &Self, new: &Self) -> Result<()> {
        fold(self, base, Take::Owned, &mut LiveSink { source: self, new }, &mut |_| {})
    }

    /// Makes the planned layer as the live layer `name` in `folder`, cleanly closed. The folder is
    /// not synced. `layers` must know no layer yet: the parent has to be found from `folder`, as a
    /// later open will look for it. `progress` is told how many bytes of the device are done.
    ///
    /// # Errors
    /// Before anything is made, [`crate::error::ErrorKind::InvalidInput`] for a chain that is open for writing and
    /// what [`Gate::stack`] refuses; those of [`live::create`]. After any other error the file may
    /// be there, half-made: it is the caller's to remove.
    pub fn derive_live(
        &self,
        plan: &Plan,
        folder: &Arc<dyn Folder>,
        name: &str,
        layers: Arc<Gate>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let base = self.base(plan, folder, layers.clone())?;
        let parent = plan.parent.clone();
        live::create(&**folder, name, &NewLayer { virtual_size: self.size(), parent })?;
        let new = Self::open(folder.clone(), name, Access::Write, layers)?;
        fold(self, &base, plan.take, &mut LiveSink { source: self, new: &new }, progress)?;
        new.close()
    }

    /// Writes the planned layer as a packed one to `out`; its parent must be found from `folder`.
    /// Else as [`Chain::derive_live`].
    ///
    /// # Errors
    /// As there, and those of [`Writer`].
    pub fn derive_packed<W: Write>(
        &self,
        plan: &Plan,
        folder: &Arc<dyn Folder>,
        out: W,
        layers: Arc<Gate>,
        compression: Compression,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(Summary, W)> {
        let base = self.base(plan, folder, layers)?;
        let writer = Writer::new(out, self.size(), plan.parent.clone(), compression)?;
        let mut sink = PackedSink(writer);
        fold(self, &base, plan.take, &mut sink, progress)?;
        sink.0.finish()
    }
}

struct LiveSink<'a> {
    source: &'a Chain,
    new: &'a Chain,
}

impl Sink for LiveSink<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.new.write(offset, bytes)
    }

    fn share(&mut self, extent: &MapExtent) -> Result<Share> {
        self.source.stored(extent, &mut |part| {
            self.new.share(part.offset, part.length, part.file, part.at)
        })
    }

    fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        self.new.zero(offset, length, ZeroMode::default())
    }
}

struct PackedSink<W>(Writer<W>);

impl<W: Write> Sink for PackedSink<W> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let (blocks, rest) = bytes.as_chunks();
        let mut block = Block(offset / BLOCK_SIZE);
        for bytes in blocks {
            self.0.data(block, bytes)?;
            block.0 += 1;
        }
        // The device ends inside its last block.
        if !rest.is_empty() {
            let mut padded = [0; BLOCK_SIZE as usize];
            padded[..rest.len()].copy_from_slice(rest);
            self.0.data(block, &padded)?;
        }
        Ok(())
    }

    fn share(&mut self, _: &MapExtent) -> Result<Share> {
        Ok(Share::Refused)
    }

    fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        let blocks = offset / BLOCK_SIZE..(offset + length).div_ceil(BLOCK_SIZE);
        blocks.map(Block).try_for_each(|block| self.0.zero(block))
    }
}

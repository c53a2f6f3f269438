//! Flatten: several layers of a chain folded into one new layer.

use std::sync::Arc;

use super::{Chain, Kind, Layers, MapExtent, Parent, seal};
use crate::device::{Device, ZeroMode};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::ParentLink;
use crate::live::{self, NewLayer};
use crate::storage::{Access, Folder};
use crate::types::BLOCK_SIZE;

/// Bytes copied at a time.
const BUFFER: u64 = 1 << 20;

impl Chain {
    /// Makes the frozen layer `name` in `folder`, which shows what this chain shows: all layers in
    /// one, or those above the ancestor that `onto` names, over that ancestor. `layers` must know no
    /// layer yet: the ancestor has to be found from `folder`, as a later open will look for it.
    /// `progress` is told how many bytes of the device are done.
    ///
    /// A block that a folded layer gave up stays present over an ancestor that owns it, so that it
    /// goes on reading as zeros; where nobody owns it, it becomes absent.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a chain that is open for writing, and where `onto` is no
    /// ancestor; what [`Layers::stack`] and [`live::create`] refuse; host errors. After an error
    /// the file may be there, half-made: it is the caller's to remove.
    pub fn flatten(
        &self,
        folder: &Arc<dyn Folder>,
        name: &str,
        onto: Option<&ParentLink>,
        layers: Arc<Layers>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Parent> {
        let (above, visible) = self.folded(onto)?;
        if let Some(link) = onto {
            layers.stack(link, folder)?;
        }
        let parent = onto.map(|link| (link.clone(), visible));
        live::create(&**folder, name, &NewLayer { virtual_size: self.size(), parent })?;
        let new = Self::open(folder.clone(), name, Access::Write, layers)?;
        self.copy_layers(&new, above, progress)?;
        new.close()?;
        drop(new);
        seal(&**folder, name)
    }

    /// How many layers are above the ancestor, and how much of it they show.
    fn folded(&self, onto: Option<&ParentLink>) -> Result<(usize, u64)> {
        let invalid = |detail: &str| {
            let path = self.folder.path().join(&self.name);
            Error::new(ErrorKind::InvalidInput, detail).in_file(path)
        };
        let levels = self.levels();
        let Some(stack) = levels.sealed() else {
            return Err(invalid("a disk must not be open for writing while it is flattened"));
        };
        let Some(link) = onto else { return Ok((stack.layers().len(), 0)) };
        let is_ancestor = |parent: &ParentLink| parent.identity == link.identity;
        let child = stack.layers().position(|layer| layer.parent().is_some_and(is_ancestor));
        let Some(child) = child else {
            return Err(invalid(&format!("does not stand on {}", link.identity)));
        };
        let shows = stack.layers().take(child + 1).map(|layer| layer.visible_parent_size());
        Ok((child + 1, shows.min().unwrap_or(0)))
    }

    /// Writes what the newest `above` layers own to `new`, which has none of it yet.
    pub(crate) fn copy_layers(
        &self,
        new: &Self,
        above: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let mut buffer = vec![0; BUFFER as usize];
        self.walk(&mut |extent| {
            if extent.depth.is_some_and(|depth| depth < above) {
                self.copy_extent(new, extent, &mut buffer, progress)?;
            }
            progress(extent.offset + extent.length);
            Ok(())
        })
    }

    fn copy_extent(
        &self,
        new: &Self,
        extent: MapExtent,
        buffer: &mut [u8],
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        if extent.kind != Kind::Data {
            return new.zero(extent.offset, extent.length, ZeroMode::default());
        }
        let shared = self
            .stored(&extent, &mut |part| new.share(part.offset, part.length, part.file, part.at))?;
        let end = extent.offset + extent.length;
        if !shared {
            return self.copy_range(new, extent.offset, end, buffer, progress);
        }
        // The parts of blocks at either end.
        let (first, last) =
            (extent.offset.next_multiple_of(BLOCK_SIZE), end / BLOCK_SIZE * BLOCK_SIZE);
        self.copy_range(new, extent.offset, first.min(end), buffer, progress)?;
        self.copy_range(new, last.max(first).min(end), end, buffer, progress)
    }

    fn copy_range(
        &self,
        new: &Self,
        from: u64,
        end: u64,
        buffer: &mut [u8],
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let mut at = from;
        while at < end {
            let part = &mut buffer[..(end - at).min(BUFFER) as usize];
            self.read(at, part)?;
            new.write(at, part)?;
            at += part.len() as u64;
            progress(at);
        }
        Ok(())
    }
}

//! Chains that only stand still, and what is to be known of one by those who make layers of it.

use std::sync::Arc;

use super::{Chain, Gate, Levels, Stack, sealed_levels, stack_below};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::ParentLink;
use crate::storage::Folder;
use crate::types::Identity;

impl Chain {
    /// Opens a layer without those below it, which need not be there: what it doesn't own reads as
    /// zeros.
    ///
    /// # Errors
    /// Those of [`super::Layer::open`].
    pub fn open_alone(folder: Arc<dyn Folder>, name: &str, layers: Arc<Gate>) -> Result<Self> {
        let levels = sealed_levels(&folder, name, None)?;
        Ok(Self::new(folder, name, layers, levels, None))
    }

    /// What a layer in `folder` would show of the parent with this link, `visible` bytes of it, as a
    /// disk of this one's size; zeros without a parent.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where this chain is open for writing; those of [`Gate::stack`].
    pub(crate) fn below(
        &self,
        parent: Option<&ParentLink>,
        visible: u64,
        folder: &Arc<dyn Folder>,
        layers: Arc<Gate>,
    ) -> Result<Self> {
        let (open, size) = {
            let levels = self.levels();
            (levels.top.is_some(), levels.size)
        };
        if open {
            let detail = "a disk must not be open for writing while a layer is made of it";
            return Err(self.refused(detail));
        }
        let stack = stack_below(parent, visible, folder, &layers)?;
        let levels = Levels { top: None, stack, clip: visible, size };
        Ok(Self::new(folder.clone(), &self.name, layers, levels, None))
    }

    /// The stack of a chain that nobody writes.
    pub(crate) fn sealed(&self) -> Option<Arc<Stack>> {
        let levels = self.levels();
        levels.stack.clone().filter(|_| levels.top.is_none())
    }

    /// Where it was found, and the gate that it was opened through.
    pub(crate) fn found_in(&self) -> (&Arc<dyn Folder>, &Arc<Gate>) {
        (&self.folder, &self.layers)
    }

    /// The layers' identities by depth, none for one that may change.
    pub(crate) fn identities(&self) -> Vec<Option<Identity>> {
        let levels = self.levels();
        let sealed = levels.stack.iter().flat_map(|stack| stack.layers());
        levels.top.iter().map(|_| None).chain(sealed.map(|layer| layer.identity())).collect()
    }

    /// How many bytes show of an ancestor.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is none.
    pub(crate) fn shown_of(&self, ancestor: &ParentLink) -> Result<u64> {
        let levels = self.levels();
        let layers = || levels.stack.iter().flat_map(|stack| stack.layers());
        let is_ancestor = |parent: &ParentLink| parent.identity == ancestor.identity;
        let child = layers().position(|layer| layer.parent().is_some_and(is_ancestor));
        let Some(child) = child else {
            return Err(self.refused(format!("does not stand on {}", ancestor.identity)));
        };
        let shows = layers().take(child + 1).map(|layer| layer.visible_parent_size());
        Ok(shows.min().unwrap_or(0))
    }

    fn refused(&self, detail: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidInput, detail).in_file(self.folder.path().join(&self.name))
    }
}

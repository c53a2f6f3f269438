//! All structures of a file, in the order in which they stand there.

use super::parts::{BitmapPage, RingPlace, Slot, Slots, read_ring};
use crate::error::Result;
use crate::live::next_group;
use crate::storage::Storage;
use crate::types::Group;

/// One structure of a layer's file.
#[derive(Clone, Debug)]
pub enum Part {
    /// A header slot, and whether it is the one that counts.
    Slot(Slot, bool),
    /// A place of the journal ring that holds anything.
    Ring(RingPlace),
    /// The bitmap page of a group that has anything on disk.
    Bitmap(BitmapPage),
}

/// Hands every structure of a layer's file to `visit`, one at a time.
///
/// # Errors
/// [`crate::error::ErrorKind::NotAnImage`]; host errors; those of `visit`.
pub fn dump(file: &dyn Storage, visit: &mut dyn FnMut(Part) -> Result<()>) -> Result<()> {
    let slots = Slots::read(file)?;
    let newest = slots.newest().map(|slot| slot.number);
    for slot in &slots.0 {
        visit(Part::Slot(slot.clone(), newest == Some(slot.number)))?;
    }
    for place in read_ring(file, slots.uuid(), slots.header())? {
        visit(Part::Ring(place))?;
    }
    let mut from = Group(0);
    while let Some(group) = next_group(file, from)? {
        visit(Part::Bitmap(BitmapPage::read(file, slots.uuid(), group)?))?;
        from = Group(group.0 + 1);
    }
    Ok(())
}

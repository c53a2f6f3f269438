//! Where the bytes of a disk come from, whatever they are stored as.

use thinply::chain::Chain;
use thinply::error::Result;
use thinply::storage::Rights;
use thinply::types::SECTOR_SIZE;

use super::sink::{Sink, check_fits};
use crate::io::progress;
use crate::io::pump::{Feeder, pump};

/// First size of a disk whose source doesn't tell its length.
const FIRST_SIZE: u64 = 1 << 30;

/// A disk to read once, in order.
pub trait Disk: Send + Sync {
    /// Length in bytes; unknown for what can only be read from beginning to end.
    fn length(&self) -> Option<u64>;

    /// The rights of a file that holds these bytes.
    fn rights(&self) -> Rights;

    /// Sends the disk's bytes in order. What is left out reads as what lies under the layer, or is
    /// in `shares`, a layer without a parent that may have them without copying.
    fn read(&self, feeder: &Feeder, shares: Option<&Chain>) -> Result<()>;
}

/// Where the bytes come from.
pub struct Source(Box<dyn Disk>);

impl Source {
    /// A source that is this disk.
    pub fn new(disk: impl Disk + 'static) -> Self {
        Self(Box::new(disk))
    }

    /// The rights of a file that holds these bytes.
    pub fn rights(&self) -> Rights {
        self.0.rights()
    }

    /// Refuses a size that is too small for it.
    pub fn check_fits(&self, size: Option<u64>) -> Result<()> {
        match (self.0.length(), size) {
            (Some(length), Some(size)) => check_fits(length, size),
            _ => Ok(()),
        }
    }

    /// The length in whole sectors, if it is known.
    fn padded(&self) -> Option<u64> {
        self.0.length().map(|length| length.max(1).next_multiple_of(SECTOR_SIZE))
    }

    /// The size that a disk shall have before [`Source::copy_to`] fills it, where `fixed` is the
    /// size that was asked for and `visible` bytes of a parent show.
    pub fn first_size(&self, fixed: Option<u64>, visible: u64) -> u64 {
        fixed.or(self.padded()).unwrap_or(FIRST_SIZE.max(visible))
    }

    /// Makes the disk hold these bytes and nothing else.
    pub fn copy_to(&self, chain: &Chain, fixed: Option<u64>, visible: u64) -> Result<()> {
        let bar = progress::bar(self.0.length());
        let mut sink = Sink::new(chain, fixed, visible);
        // Over a parent only what differs is stored, which takes reading.
        let shares = (visible == 0).then_some(chain);
        let copied = pump(|feeder| self.0.read(feeder, shares), |piece| sink.put(piece, &bar))
            .and_then(|()| sink.finish(self.padded()));
        bar.finish_and_clear();
        copied
    }
}

//! Where the bytes of a disk come from, whatever they are stored as.

use std::path::{Path, PathBuf};

use clap::Args;
use thinply::chain::Chain;
use thinply::error::{Error, ErrorKind, Result};
use thinply::types::SECTOR_SIZE;

use super::foreign::Opener;
use super::format::Format;
use super::nbd::{self, NbdDisk};
use super::raw::RawDisk;
use super::sink::{Sink, check_fits};
use crate::io::progress;
use crate::io::pump::{Feeder, pump};

/// First size of a disk whose source doesn't tell its length.
const FIRST_SIZE: u64 = 1 << 30;

/// What a source is, and what it may refer to.
#[derive(Args, Debug)]
pub struct SourceArgs {
    /// What SRC is [default: qcow2 or vmdk where its name ends so, else raw]
    #[arg(long, value_name = "F", value_enum)]
    format: Option<Format>,
    /// Let SRC refer to FILE: a backing file, data file or extent of that name (repeatable)
    #[arg(long = "with", value_name = "FILE")]
    named: Vec<PathBuf>,
}

/// A disk to read once, in order.
pub trait Disk: Send + Sync {
    /// Length in bytes; unknown for what can only be read from beginning to end.
    fn length(&self) -> Option<u64>;

    /// Sends the disk's bytes in order. What is left out reads as what lies under the layer, or is
    /// in `shares`, a layer without a parent that may have them without copying.
    fn read(&self, feeder: &Feeder, shares: Option<&Chain>) -> Result<()>;
}

/// Where the bytes come from.
pub struct Source(Box<dyn Disk>);

impl Source {
    /// A raw file or block device.
    pub fn raw(path: &Path) -> Result<Self> {
        RawDisk::open(path, Some(Format::Raw)).map(Self::new)
    }

    /// An image file, block device, NBD URI, or `-` for standard input.
    pub fn open(path: &Path, args: &SourceArgs) -> Result<Self> {
        if let Some(uri) = nbd::uri(path) {
            return NbdDisk::connect(uri).map(Self::new);
        }
        match Format::of(path, args.format) {
            Some(format @ (Format::Qcow2 | Format::Vmdk)) => {
                Opener::new(&args.named).flat(path, format).map(Self::new)
            }
            format => RawDisk::open(path, format).map(Self::new),
        }
    }

    /// A qcow2 image and the backing files under it, base first, each alone and with its path.
    pub fn open_chain(path: &Path, args: &SourceArgs) -> Result<Vec<(PathBuf, Self)>> {
        if nbd::uri(path).is_some() || Format::of(path, args.format) != Some(Format::Qcow2) {
            let detail = "only a qcow2 image is a chain of layers";
            return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(path));
        }
        Opener::new(&args.named).chain(path)
    }

    /// A source that is this disk.
    pub fn new(disk: impl Disk + 'static) -> Self {
        Self(Box::new(disk))
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

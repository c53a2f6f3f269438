//! `thinply attach` and `detach`

use std::path::PathBuf;

use clap::Args;
use thinply::error::{Error, ErrorKind};

use crate::io::output::Output;
use crate::mounting::served::{self, Purpose};
use crate::mounting::target::Target;
use crate::mounting::{loops, trust, uses};
use crate::options::{LayersArg, StoreArg};
use crate::verbs::{Answer, Outcome};

/// Sectors of a device whose content nobody knows.
const SECTOR: u32 = 512;

/// Make a block device of a disk, and print its path.
///
/// TARGET is a layer, or container/NAME, volume/NAME, container/NAME@SNAP or image/NAME:TAG of the
/// store. The device stays until `detach`. As with `mount`, its server is started where there is none.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  thinply attach volume/data
  mkfs.xfs /dev/loop0
  thinply detach volume/data")]
pub struct Attach {
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// Attach the partition of this number.
    #[arg(long, value_name = "N")]
    partition: Option<usize>,
    #[command(flatten)]
    store: StoreArg,
    #[command(flatten)]
    layers: LayersArg,
    /// The disk.
    target: PathBuf,
}

impl Attach {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let target = Target::find(&self.target, &self.store)?;
        let read_only = self.read_only || target.read_only();
        let purpose = if read_only { Purpose::Read } else { Purpose::Write };
        if !read_only {
            trust::is_attached(&target)?;
        }
        let disk = served::open(&target, purpose, &self.layers)?;
        let (offset, length) = disk.part(self.partition)?;
        let options = loops::Options { offset, length, sector: SECTOR, read_only, passing: false };
        disk.check_free(&options)?;
        let device = disk.attach(&options, self.partition)?;
        let mut output = Output::new();
        output.line(device.path.display())?;
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// Take the block device of a disk away.
///
/// One that is mounted is refused.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply detach volume/data\n  thinply detach /dev/loop0")]
pub struct Detach {
    #[command(flatten)]
    store: StoreArg,
    /// The disk, or its device.
    target: PathBuf,
}

impl Detach {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let found = uses::of(&self.target, &self.store)?.into_iter();
        let mut found = found.filter(|one| one.device.is_some()).peekable();
        if found.peek().is_none() {
            let detail = "is not attached";
            return Err(Error::new(ErrorKind::NotFound, detail).in_file(&self.target));
        }
        for one in found {
            if let Some(folder) = one.folders.first() {
                let detail = format!("is mounted at {}: umount it", folder.display());
                return Err(Error::new(ErrorKind::InUse, detail).in_file(&self.target));
            }
            one.device.iter().try_for_each(|device| loops::detach(device))?;
            uses::await_end(&one)?;
        }
        Ok(Answer::Yes)
    }
}

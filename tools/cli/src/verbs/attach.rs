//! `thinply attach` and `detach`

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use clap::Args;
use rustix::process::getuid;
use thinply::error::{Error, ErrorKind, Result};

use crate::io::output::Output;
use crate::io::table;
use crate::mounting::loops::{self, Attached, Device};
use crate::mounting::partitions;
use crate::mounting::room::Note;
use crate::mounting::served::{self, DiskFile, Purpose};
use crate::mounting::target::Target;
use crate::mounting::uses;
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
        let disk = served::open(&target, purpose, &self.layers)?;
        let (offset, length) = part_of(&disk, self.partition)?;
        let options = loops::Options { offset, length, sector: SECTOR, read_only, passing: false };
        let device = attached(&disk, &options)?;
        let mut output = Output::new();
        output.line(device.path.display())?;
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// A block device over a disk's file, with a note of who made it. No two are over the same bytes where
/// one of them is for writing: what is mounted through one would not see what the other changes.
pub fn attached(disk: &DiskFile, options: &loops::Options) -> Result<Device> {
    let mut others = loops::over(&disk.path)?.into_iter();
    let stands =
        |other: &Attached| other.overlaps(options) && !(other.read_only && options.read_only);
    if let Some(other) = others.find(stands) {
        let detail = format!("is in use as {}", other.path.display());
        return Err(Error::new(ErrorKind::InUse, detail).in_file(&disk.path));
    }
    let device = loops::attach(disk.file.as_fd(), options)?;
    if let (Some(sequence), Some(shown)) = (device.sequence(), disk.path.ancestors().nth(1)) {
        let note = Note { user: getuid().as_raw(), since: table::now() };
        let devices = loops::over(shown).unwrap_or_default();
        disk.room
            .note(&sequence, &note, |known| devices.iter().any(|device| device.sequence == known));
    }
    Ok(device)
}

/// Offset and length of a part of a disk; all of it where none is named.
pub fn part_of(disk: &DiskFile, partition: Option<usize>) -> Result<(u64, u64)> {
    let Some(number) = partition else { return Ok((0, 0)) };
    let read = |sector: u64| read_sector(&disk.file, sector);
    let size = disk.file.metadata().map_err(|error| Error::io(error, "looking at the disk"))?.len();
    let found = partitions::find(number, size, &read);
    found.map(|part| (part.offset, part.length)).map_err(|error| error.in_file(&disk.path))
}

/// A sector of a disk; zeros beyond its end.
fn read_sector(disk: &File, sector: u64) -> Result<[u8; 512]> {
    let (mut bytes, mut done) = ([0; 512], 0);
    let Some(offset) = sector.checked_mul(512) else { return Ok(bytes) };
    let fail = |error| Error::io(error, "reading the partition table").at(offset);
    while done < bytes.len() {
        match disk.read_at(&mut bytes[done..], offset + done as u64).map_err(fail)? {
            0 => break,
            more => done += more,
        }
    }
    Ok(bytes)
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
        let all = uses::known()?;
        let is_device = self.target.starts_with("/dev");
        let served = match is_device {
            true => None,
            false => {
                let target = Target::find(&self.target, &self.store)?;
                Some((target.served()?, target.shown()))
            }
        };
        let wanted = |one: &&uses::Use| match &served {
            None => one.device.as_ref() == Some(&self.target),
            Some((served, shown)) => {
                one.target == *shown && one.store.as_ref().is_none_or(|store| store == served)
            }
        };
        let mut found = all.iter().filter(wanted).filter(|one| one.device.is_some()).peekable();
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
            uses::await_end(one)?;
        }
        Ok(Answer::Yes)
    }
}

//! `thinply mount` and `umount`

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use thinply::error::{Error, ErrorKind, Result, shown};

use crate::io::output;
use crate::mounting::content::{self, FileSystem};
use crate::mounting::filesystem::{self, Options, Place};
use crate::mounting::loops;
use crate::mounting::served::{self, DiskFile, Purpose};
use crate::mounting::target::Target;
use crate::mounting::uses::{self, Use};
use crate::options::{LayersArg, StoreArg};
use crate::verbs::attach::{attached, part_of};
use crate::verbs::{Answer, Outcome};

const FUSE2FS: &str = "fuse2fs";
/// How long an end that was insisted on may take.
const END: Duration = Duration::from_secs(10);

const AFTER_HELP: &str = "\
As root the kernel mounts, over a loop device on the file that a server shows the disk as. That
server is started where there is none, ends with the last mount, and may die and come back meanwhile
without anybody noticing. The kernel is told the type of file system and trusts its bytes: what
this host did not make itself takes --trust. Programs with set-user-ID and device files mean nothing
in it without -o suid,dev. Other options of -o are those of the file system.

Examples:
  thinply mount container/web /mnt
  thinply mount --read-only image/debian:12 /mnt
  thinply mount --trust --partition 1 -o noatime vm.tply /mnt
  thinply umount /mnt";

/// Mount the file system of a disk.
///
/// TARGET is a layer, or container/NAME, volume/NAME, container/NAME@SNAP or image/NAME:TAG of the
/// store. All that was written is there after `umount`, which may be the system's own.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Mount {
    /// Change nothing.
    #[arg(long)]
    read_only: bool,
    /// Options, as in -o noatime,discard.
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Mount the partition of this number.
    #[arg(long, value_name = "N")]
    partition: Option<usize>,
    /// Have the kernel read a file system that this host did not make.
    #[arg(long, conflicts_with = "user")]
    trust: bool,
    /// Mount by fuse2fs, as whoever may not mount: ext4 only, and for this user alone.
    #[arg(long, conflicts_with = "partition")]
    user: bool,
    #[command(flatten)]
    store: StoreArg,
    #[command(flatten)]
    layers: LayersArg,
    /// The disk.
    target: PathBuf,
    /// The folder to mount on.
    dir: PathBuf,
}

impl Mount {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let mut options = Options::parse(self.options.iter().map(String::as_str));
        let target = Target::find(&self.target, &self.store)?;
        if self.read_only || target.read_only() {
            options = options.reading();
        }
        let place = Place::of(&self.dir)?;
        if !self.user && !geteuid().is_root() {
            let detail = "only root may mount (CAP_SYS_ADMIN); --user mounts by fuse2fs";
            return Err(Error::new(ErrorKind::PermissionDenied, detail));
        }
        let read_only = options.read_only();
        let purpose = match read_only {
            true => Purpose::Read,
            false if self.user => Purpose::Look,
            false => Purpose::Write,
        };
        let disk = served::open(&target, purpose, &self.layers)?;
        let (offset, length) = part_of(&disk, self.partition)?;
        let found = content::find(&disk.file, offset)?;
        let found = found.ok_or_else(|| {
            let detail =
                "holds no file system that is known (ext4, xfs, btrfs, erofs, squashfs, vfat)";
            Error::new(ErrorKind::Unsupported, detail).in_file(target.shown())
        })?;
        if self.user {
            return by_fuse2fs(&disk, found, read_only, &place);
        }
        if !self.trust {
            check_trust(&target)?;
        }
        check_clean(&target, found, read_only)?;
        let device = attached(
            &disk,
            &loops::Options { offset, length, sector: found.sector, read_only, passing: true },
        )?;
        filesystem::mount(&device.path, found.kind, &options, &place)?;
        Ok(Answer::Yes)
    }
}

/// Refuses what this host did not make.
fn check_trust(target: &Target) -> Result<()> {
    let made_here = match target {
        Target::Layer(_) => false,
        Target::Disk { store, name } => is_own(store.path())? && store.is_made_here(name)?,
    };
    if made_here {
        return Ok(());
    }
    let detail = "this host did not make its file system, and the kernel trusts what it mounts: \
                  --trust has it mounted all the same, --user mounts it by fuse2fs";
    Err(Error::new(ErrorKind::PermissionDenied, detail).in_file(target.shown()))
}

/// Whether nobody but this user can have written what the store says of itself.
fn is_own(store: &Path) -> Result<bool> {
    let found =
        std::fs::metadata(store).map_err(|error| Error::io(error, "looking at the store"))?;
    Ok(found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0)
}

/// Refuses to read what only writing makes readable.
fn check_clean(target: &Target, found: FileSystem, read_only: bool) -> Result<()> {
    if !(read_only && found.unclean) {
        return Ok(());
    }
    let detail = "its journal has to be replayed, which writes: mount it writable once, or a container of it";
    Err(Error::new(ErrorKind::ReadOnly, detail).in_file(target.shown()))
}

/// Mounts a disk's file without the kernel's reading it.
fn by_fuse2fs(disk: &DiskFile, found: FileSystem, read_only: bool, place: &Place) -> Outcome {
    if found.kind != "ext4" {
        let detail = format!("fuse2fs mounts ext4, and this is {}", found.kind);
        return Err(Error::new(ErrorKind::Unsupported, detail));
    }
    let mut command = Command::new(FUSE2FS);
    command.args(["-o", if read_only { "ro,norecovery" } else { "rw" }, "-o", "fakeroot"]);
    let done = command.arg(&disk.path).arg(&place.path).output().map_err(|error| {
        let detail = "fuse2fs (package fuse2fs) is not installed";
        match error.kind() {
            std::io::ErrorKind::NotFound => Error::new(ErrorKind::Unsupported, detail),
            _ => Error::io(error, "running fuse2fs"),
        }
    })?;
    if done.status.success() {
        return Ok(Answer::Yes);
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let detail = format!("fuse2fs failed ({}): {}", done.status, shown(said.trim()));
    Err(Error::new(ErrorKind::Io, detail).in_file(&place.path))
}

/// Unmount what `mount` mounted.
///
/// All that was written is durable then. What the system's own umount unmounts is as safe.
#[derive(Args, Debug)]
#[command(after_help = "\
--force ends the file system at once, whoever uses it and whatever hangs: what it had not written
yet is lost, and its users get errors from then on.

Example:
  thinply umount /mnt")]
pub struct Umount {
    /// End it at once, whoever uses it.
    #[arg(long)]
    force: bool,
    /// The folder.
    dir: PathBuf,
}

impl Umount {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let (used, mounted) = uses::at(&self.dir)?;
        if self.force {
            force(&used);
        } else if used.device.is_none() && !geteuid().is_root() {
            by_fusermount(&mounted.folder)?;
        } else {
            filesystem::unmount_at(&mounted.folder, mounted.id, false)?;
        }
        uses::await_end(&used)?;
        Ok(Answer::Yes)
    }
}

fn by_fusermount(folder: &Path) -> Result<()> {
    let fail = |error| Error::io(error, "running fusermount3");
    let done = Command::new("fusermount3").args(["-u", "--"]).arg(folder).output().map_err(fail)?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let detail = format!("fusermount3 failed: {}", shown(said.trim()));
    Err(Error::new(ErrorKind::InUse, detail).in_file(folder))
}

/// Ends the file system of a use, wherever it is mounted.
fn force(used: &Use) {
    if let Some(mounted) = used.mounts.last() {
        // Whoever asks one that hangs would hang.
        let folder = mounted.folder.clone();
        let ended = thread::spawn(move || filesystem::shut_down(&folder));
        let deadline = Instant::now() + END;
        while !ended.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        if !ended.is_finished() {
            // Its server doesn't answer, and nothing of it can end while that is so.
            used.pid.iter().for_each(|pid| kill_all(*pid));
        }
    }
    for mounted in used.mounts.iter().rev() {
        if let Err(error) = filesystem::unmount_at(&mounted.folder, mounted.id, true) {
            output::say(error);
        }
    }
    if let Some(Err(error)) = used.device.as_deref().map(loops::detach) {
        output::say(error);
    }
}

/// Kills a server's holder and the server, which others can't follow then.
fn kill_all(holder: u32) {
    let children = format!("/proc/{holder}/task/{holder}/children");
    let children = std::fs::read_to_string(children).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    for pid in std::iter::once(holder).chain(children) {
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            // It may have ended.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

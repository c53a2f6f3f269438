//! `thinply mount` and `umount`

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use thinply::error::{Error, ErrorKind, Result, shown};
use thinply::fuse;

use crate::io::mountinfo::Mounted;
use crate::io::output;
use crate::mounting::content::{self, FileSystem};
use crate::mounting::filesystem::{self, Options, Place};
use crate::mounting::loops;
use crate::mounting::served::{self, DiskFile, Purpose, State};
use crate::mounting::target::Target;
use crate::mounting::uses::{self, Use};
use crate::mounting::{trust, within};
use crate::options::{LayersArg, StoreArg};
use crate::verbs::{Answer, Outcome};

const FUSE2FS: &str = "fuse2fs";
/// How long an end that was insisted on may take.
const END: Duration = Duration::from_secs(10);
/// How long it may take before it is done in another way.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

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
        if options.again {
            return remount(&self.dir, &self.store, &options);
        }
        let target = Target::find(&self.target, &self.store)?;
        if self.read_only || target.read_only() {
            options = options.reading();
        }
        let place = Place::of(&self.dir)?;
        if !self.user && !geteuid().is_root() {
            return Err(filesystem::not_root());
        }
        let purpose = match options.read_only() {
            true => Purpose::Read,
            false if self.user => Purpose::Look,
            false => Purpose::Write,
        };
        let disk = served::open(&target, purpose, &self.layers)?;
        match self.mount(&target, &disk, &options, &place) {
            Err(error) => {
                // What was refused stands in nobody's way afterwards.
                disk.leave(&target)?;
                Err(error)
            }
            Ok(()) => Ok(Answer::Yes),
        }
    }

    fn mount(
        &self,
        target: &Target,
        disk: &DiskFile,
        options: &Options,
        place: &Place,
    ) -> Result<()> {
        let read_only = options.read_only();
        let (offset, length) = disk.part(self.partition)?;
        let mut device = loops::Options { offset, length, sector: 0, read_only, passing: true };
        disk.check_free(&device)?;
        let found = content::find(&disk.file, offset)?;
        let found = found.ok_or_else(|| unknown(target, disk, self.partition))?;
        if self.user {
            if !read_only {
                trust::is_attached(target)?;
            }
            return by_fuse2fs(disk, found, read_only, place);
        }
        if !self.trust {
            // Now that it is open, nobody else writes it.
            trust::check(target, disk)?;
        }
        check_clean(target, found, read_only)?;
        device.sector = found.sector;
        let device = disk.attach(&device, self.partition)?;
        filesystem::mount(&device.path, found.kind, options, place)
    }
}

/// Why nothing can be mounted of a disk.
fn unknown(target: &Target, disk: &DiskFile, partition: Option<usize>) -> Error {
    let parts =
        if partition.is_some() { Vec::new() } else { disk.partitions().unwrap_or_default() };
    let detail = if parts.is_empty() {
        "holds no file system that is known (ext4, xfs, btrfs, erofs, squashfs, vfat)".to_owned()
    } else {
        let parts: Vec<_> = parts.iter().map(usize::to_string).collect();
        let parts = parts.join(", ");
        format!("holds no file system that is known, but partitions: --partition {parts}")
    };
    Error::new(ErrorKind::Unsupported, detail).in_file(target.shown())
}

/// Changes the options of what is mounted.
fn remount(dir: &Path, store: &StoreArg, options: &Options) -> Outcome {
    let (_, mounts) = uses::named(dir, store)?;
    let nothing = || Error::new(ErrorKind::NotFound, "nothing is mounted there").in_file(dir);
    let mounted = mounts.last().ok_or_else(nothing)?;
    filesystem::remount(&mounted.folder, mounted.id, options)?;
    Ok(Answer::Yes)
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
fn by_fuse2fs(disk: &DiskFile, found: FileSystem, read_only: bool, place: &Place) -> Result<()> {
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
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let detail = format!("fuse2fs failed ({}): {}", done.status, shown(said.trim()));
    Err(Error::new(ErrorKind::Io, detail).in_file(&place.path))
}

/// Unmount what `mount` mounted.
///
/// WHAT is the folder, or the disk or its device. All that was written is durable then, or else an error
/// says that it isn't. What the system's own umount unmounts is as safe.
#[derive(Args, Debug)]
#[command(after_help = "\
--force ends the file system at once, whoever uses it and whatever hangs: what it had not written
yet is lost, and its users get errors from then on. A server that does not answer is ended too, with
all that it serves.

Examples:
  thinply umount /mnt
  thinply umount --force container/web")]
pub struct Umount {
    /// End it at once, whoever uses it.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    store: StoreArg,
    /// The folder, the disk or its device.
    what: PathBuf,
}

impl Umount {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let (used, mounts) = uses::named(&self.what, &self.store)?;
        if self.force {
            force(&used)?;
        } else if mounts.is_empty() {
            let detail = "is attached, and not mounted: detach it";
            return Err(Error::new(ErrorKind::NotFound, detail).in_file(&self.what));
        } else {
            end(&used, &mounts)?;
        }
        Ok(Answer::Yes)
    }
}

/// Unmounts some of the mounts of a use. After the last one it waits until all is written and the layer
/// is free.
fn end(used: &Use, mounts: &[Mounted]) -> Result<()> {
    let state = served::state(&used.shows);
    if state == State::Hangs {
        return Err(served::hangs(used.target.clone()));
    }
    let mut written = Ok(());
    for mounted in mounts.iter().rev() {
        if state == State::Dead {
            thaw(mounted);
        }
        // The kernel tells nobody else of what it could not write.
        if !mounted.read_only {
            written = written.and(filesystem::sync(mounted));
        }
        if used.device.is_none() && !geteuid().is_root() {
            by_fusermount(&mounted.folder)?;
        } else {
            unmount(mounted, state)?;
        }
    }
    let is_last = mounts.len() == used.mounts.len();
    if is_last {
        if state == State::Dead {
            fuse::Mount::listed(&used.shows.folder, used.shows.id).remove()?;
        }
        uses::await_end(used)?;
    }
    let lost = "is unmounted, but what was written since it was synced last may be lost";
    match written {
        Err(error) => Err(Error::io(error, lost).in_file(&used.target)),
        Ok(()) if state == State::Dead && !used.read_only => {
            let detail = format!("{lost}: its server was killed");
            Err(Error::new(ErrorKind::Io, detail).in_file(&used.target))
        }
        Ok(()) => Ok(()),
    }
}

/// Takes a mount away. What holds it still for a server that was killed has it open until it notices.
fn unmount(mounted: &Mounted, state: State) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match filesystem::unmount_at(&mounted.folder, mounted.id, false) {
            Err(error)
                if error.kind() == ErrorKind::InUse
                    && state == State::Dead
                    && Instant::now() < deadline =>
            {
                thread::sleep(PAUSE);
            }
            done => return done,
        }
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
fn force(used: &Use) -> Result<()> {
    let ended = match used.mounts.last() {
        Some(mounted) => {
            // Whoever asks one that hangs would hang. What can't be ended is only taken away.
            let mounted = mounted.clone();
            within(PATIENCE, move || filesystem::shut_down(&mounted)).is_some()
        }
        None => served::state(&used.shows) == State::Serves,
    };
    if !ended {
        // Its server doesn't answer, and nothing of it can end while that is so.
        abort(used);
        used.pid.iter().for_each(|pid| kill_all(*pid));
    }
    used.mounts.iter().for_each(thaw);
    let unmounted = used.mounts.iter().rev();
    let unmounted: Vec<_> = unmounted
        .map(|mounted| filesystem::unmount_at(&mounted.folder, mounted.id, true))
        .collect();
    used.device.as_deref().map_or(Ok(()), loops::detach)?;
    // What something else hides is still there.
    unmounted.into_iter().collect::<Result<()>>()?;
    let Some(layer) = used.layer()? else { return Ok(()) };
    if layer.await_free(PATIENCE)? {
        return Ok(());
    }
    // Whoever has files of it open keeps the device, and so its server the layer.
    if used.has_server_alone()? {
        abort(used);
        if layer.await_free(END)? {
            return Ok(());
        }
    }
    output::say("its layer stays in use until all who have files of it open close them");
    Ok(())
}

/// Has a file system go on that a server left frozen when all were killed: it would never go otherwise.
fn thaw(mounted: &Mounted) {
    // Fails where it isn't.
    let _ = filesystem::root_of(mounted).map(|folder| filesystem::thaw(&folder));
}

/// Has all who wait for the server of a use go on, with an error.
fn abort(used: &Use) {
    let number = used.shows.device.split_once(':').and_then(|(_, minor)| minor.parse().ok());
    if let Some(Err(error)) = number.map(fuse::abort) {
        output::say(format!("ending its server's connection: {error}"));
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

//! How a file system of ours comes to be mounted, and goes.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, open, openat, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags, fsconfig_create, fsmount,
    fsopen, mount, unmount,
};
use rustix::process::{getegid, geteuid};

use super::proto::MAX_IO;
use crate::error::{Error, ErrorKind, Result};
use crate::serve::socket::receive_descriptors;

const DEVICE: &str = "/dev/fuse";
const CONNECTIONS: &str = "/sys/fs/fuse/connections";
const HELPER: &str = "fusermount3";
/// What lists of mounts tell ours by.
pub const KIND: &str = "fuse.thinply";
/// Its part that `fusermount3` is told.
const SUBTYPE: &str = "thinply";

/// Begin of the keys of what is kept of mounts, before the mount's id and its folder, a line each.
/// With it are the devices, and behind them the memory of what is open and of tries.
pub const KEPT: &str = "fuse\n";

/// A mounted folder.
#[derive(Clone, Debug)]
pub struct Mount {
    /// Without links.
    folder: PathBuf,
    /// What tells it from another one at the same place.
    id: u64,
}

impl Mount {
    /// Mounts on a folder, for its own user alone; lists of mounts name `source` with it. Answers the
    /// device that its requests come from.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] where the kernel has no FUSE, or there is no
    /// `fusermount3` for a user who may not mount; host errors.
    pub fn make(folder: &Path, source: &Path) -> Result<(Self, OwnedFd)> {
        let fail = |error| Error::io(error, "mounting").in_file(folder);
        let folder = folder.canonicalize().map_err(fail)?;
        // What is mounted on is what was looked at, whatever its path leads to by then.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let place = open(&folder, flags, Mode::empty()).map_err(|error| fail(error.into()))?;
        let device = match mount_on(&place, source) {
            Err(Errno::PERM | Errno::ACCESS) if !geteuid().is_root() => helped(&folder, source)?,
            Err(Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
                let detail = "this kernel has no FUSE: there is no /dev/fuse (modprobe fuse)";
                return Err(Error::new(ErrorKind::Unsupported, detail));
            }
            made => made.map_err(|error| fail(error.into()))?,
        };
        let id = mount_id(&folder).map_err(fail)?;
        Ok((Self { folder, id }, device))
    }

    /// The mount of this id at a folder, as lists of mounts tell of it.
    pub fn listed(folder: &Path, id: u64) -> Self {
        Self { folder: folder.into(), id }
    }

    /// What it is kept under.
    pub fn key(&self) -> String {
        format!("{KEPT}{}\n{}", self.id, self.folder.display())
    }

    /// The mount that is kept under a key.
    pub fn of_key(key: &str) -> Option<Self> {
        let (id, folder) = key.strip_prefix(KEPT)?.split_once('\n')?;
        Some(Self { folder: folder.into(), id: id.parse().ok()? })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether it is still there.
    fn is_there(&self) -> bool {
        mount_id(&self.folder).is_ok_and(|id| id == self.id)
    }

    /// Takes it away, even from those who have files in it open: they keep those. Nothing happens
    /// where it is gone.
    ///
    /// # Errors
    /// Host errors.
    pub fn remove(&self) -> Result<()> {
        if !self.is_there() {
            return Ok(());
        }
        let gone = unmount(&self.folder, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        match gone {
            Err(Errno::PERM) if !geteuid().is_root() => {
                let mut command = Command::new(HELPER);
                run(command.args(["-u", "-z", "-q", "--"]).arg(&self.folder), &self.folder)
            }
            other => other.map_err(|error| {
                Error::io(error.into(), "taking the mount away").in_file(&self.folder)
            }),
        }
    }
}

/// The id of the mount that a path is in. Asks no file system: one may hang.
///
/// # Errors
/// Host errors.
pub fn mount_id(folder: &Path) -> io::Result<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
    Ok(statx(rustix::fs::CWD, folder, flags, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// Ends a connection by force: whoever waits for the server of a mount, or asks it later, gets an error.
/// Its number is the minor one of the mount's device.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] where there is no such connection; host errors.
pub fn abort(connection: u32) -> io::Result<()> {
    let name = format!("{connection}/abort");
    let found = match OpenOptions::new().write(true).open(Path::new(CONNECTIONS).join(&name)) {
        // Not mounted on this host.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_create(&context)?;
            let all = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
            File::from(openat(all, &name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?)
        }
        found => found?,
    };
    (&found).write_all(b"1")
}

fn options(device: &str) -> String {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    format!(
        "{device}rootmode=40000,user_id={user},group_id={group},default_permissions,max_read={MAX_IO}"
    )
}

fn mount_on(place: &OwnedFd, source: &Path) -> rustix::io::Result<OwnedFd> {
    let device = open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let options = options(&format!("fd={},", device.as_raw_fd()));
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    let target = format!("/proc/self/fd/{}", place.as_raw_fd());
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    mount(source, target, KIND, flags, options.as_c_str())?;
    Ok(device)
}

/// Mounts by the helper that whoever may not mount has for it, which hands the device over.
fn helped(folder: &Path, source: &Path) -> Result<OwnedFd> {
    let fail = |error: io::Error| Error::io(error, "mounting by fusermount3").in_file(folder);
    let (ours, theirs) = UnixStream::pair().map_err(fail)?;
    let mut command = Command::new(HELPER);
    let mut options = OsString::from(format!("default_permissions,subtype={SUBTYPE},fsname="));
    // What would end the name there is escaped.
    for &byte in source.as_os_str().as_bytes() {
        options.push(if matches!(byte, b',' | b'\\') { "\\" } else { "" });
        options.push(OsStr::from_bytes(&[byte]));
    }
    // Its own end is standard input, which needs no descriptor to stay open that others inherit too.
    command.env("_FUSE_COMMFD", "0").arg("-o").arg(&options).arg("--").arg(folder);
    command.stdin(Stdio::from(OwnedFd::from(theirs)));
    run(&mut command, folder)?;
    drop(command);
    received(&ours).map_err(fail)
}

fn run(command: &mut Command, folder: &Path) -> Result<()> {
    let done = command.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            let detail = "only root may mount, and fusermount3 (package fuse3) is not installed";
            Error::new(ErrorKind::Unsupported, detail)
        }
        _ => Error::io(error, "running fusermount3"),
    })?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let detail = format!("fusermount3 failed: {}", crate::error::shown(said.trim()));
    Err(Error::new(ErrorKind::PermissionDenied, detail).in_file(folder))
}

/// The descriptor that comes with a byte.
fn received(stream: &UnixStream) -> io::Result<OwnedFd> {
    let (_, descriptors) = receive_descriptors(stream, &mut [0])?;
    descriptors.into_iter().next().ok_or_else(|| io::Error::other("no descriptor came"))
}

/// Another descriptor of the same device, with requests of its own.
///
/// # Errors
/// Host errors.
pub fn another(device: &OwnedFd) -> io::Result<OwnedFd> {
    let clone = open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    clone_of(&clone, device)?;
    Ok(clone)
}

fn clone_of(clone: &OwnedFd, device: &OwnedFd) -> io::Result<()> {
    use rustix::ioctl::{Setter, ioctl, opcode};
    /// `FUSE_DEV_IOC_CLONE`.
    const CLONE: rustix::ioctl::Opcode = opcode::read::<u32>(229, 0);
    // The kernel reads it as unsigned.
    let number = device.as_raw_fd() as u32;
    // SAFETY: the ioctl reads a number of this size, and changes nothing in this process.
    let set = unsafe { Setter::<CLONE, u32>::new(number) };
    // SAFETY: as above; both descriptors live as long as the call.
    unsafe { ioctl(clone.as_fd(), set) }?;
    Ok(())
}

//! Mounting and unmounting, by the kernel.

use std::ffi::{CString, c_int};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, open, statx, syncfs};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_remount,
    move_mount, unmount,
};
use thinply::error::{Error, ErrorKind, Result, shown};
use thinply::fuse::mount_id;

use crate::io::mountinfo::Mounted;

/// Options of the mount itself, with what they set and clear.
const ATTRIBUTES: [(&str, MountAttrFlags, MountAttrFlags); 14] = [
    ("ro", MountAttrFlags::MOUNT_ATTR_RDONLY, NONE),
    ("rw", NONE, MountAttrFlags::MOUNT_ATTR_RDONLY),
    ("nosuid", MountAttrFlags::MOUNT_ATTR_NOSUID, NONE),
    ("suid", NONE, MountAttrFlags::MOUNT_ATTR_NOSUID),
    ("nodev", MountAttrFlags::MOUNT_ATTR_NODEV, NONE),
    ("dev", NONE, MountAttrFlags::MOUNT_ATTR_NODEV),
    ("noexec", MountAttrFlags::MOUNT_ATTR_NOEXEC, NONE),
    ("exec", NONE, MountAttrFlags::MOUNT_ATTR_NOEXEC),
    ("nodiratime", MountAttrFlags::MOUNT_ATTR_NODIRATIME, NONE),
    ("diratime", NONE, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
    ("noatime", MountAttrFlags::MOUNT_ATTR_NOATIME, TIMES),
    ("strictatime", MountAttrFlags::MOUNT_ATTR_STRICTATIME, TIMES),
    ("relatime", NONE, TIMES),
    ("defaults", NONE, NONE),
];
/// What mount(2) calls them.
const FLAGS: [(MountAttrFlags, MountFlags); 6] = [
    (MountAttrFlags::MOUNT_ATTR_RDONLY, MountFlags::RDONLY),
    (MountAttrFlags::MOUNT_ATTR_NOSUID, MountFlags::NOSUID),
    (MountAttrFlags::MOUNT_ATTR_NODEV, MountFlags::NODEV),
    (MountAttrFlags::MOUNT_ATTR_NOEXEC, MountFlags::NOEXEC),
    (MountAttrFlags::MOUNT_ATTR_NOATIME, MountFlags::NOATIME),
    (MountAttrFlags::MOUNT_ATTR_STRICTATIME, MountFlags::STRICTATIME),
];
const NONE: MountAttrFlags = MountAttrFlags::empty();
const TIMES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR__ATIME;

/// What a file system is mounted with.
#[derive(Clone, Debug)]
pub struct Options {
    attributes: MountAttrFlags,
    /// Those of the file system.
    own: Vec<String>,
    /// Whether they are for what is mounted already.
    pub again: bool,
}

impl Options {
    /// From texts as `mount -o` takes them. Set-user-ID programs and devices mean nothing unless they
    /// are asked for.
    pub fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let usual = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let mut options = Self { attributes: usual, own: Vec::new(), again: false };
        for word in texts.into_iter().flat_map(|text| text.split(',')) {
            match ATTRIBUTES.iter().find(|(name, ..)| *name == word) {
                Some((_, set, clear)) => {
                    options.attributes = (options.attributes - *clear) | *set;
                }
                None if word.is_empty() => {}
                None if word == "remount" => options.again = true,
                None => options.own.push(word.to_owned()),
            }
        }
        options
    }

    /// Whether nothing may be changed.
    pub fn read_only(&self) -> bool {
        self.attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    /// The same, for reading only.
    #[must_use]
    pub fn reading(mut self) -> Self {
        self.attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        self
    }
}

/// A folder to mount on: what was looked at, whatever its path leads to later.
#[derive(Debug)]
pub struct Place {
    folder: OwnedFd,
    /// Without links.
    pub path: PathBuf,
}

impl Place {
    /// A folder that is there.
    ///
    /// # Errors
    /// Host errors.
    pub fn of(folder: &Path) -> Result<Self> {
        let fail = |error| Error::io(error, "looking at the folder to mount on").in_file(folder);
        let path = folder.canonicalize().map_err(fail)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder_fd = open(&path, flags, Mode::empty()).map_err(|error| fail(error.into()))?;
        Ok(Self { folder: folder_fd, path })
    }
}

/// Why whoever may not mount is refused.
pub fn not_root() -> Error {
    let detail = "only root may mount (CAP_SYS_ADMIN); --user mounts by fuse2fs";
    Error::new(ErrorKind::PermissionDenied, detail)
}

/// Mounts the file system of type `kind` on a block device.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a file system that the kernel hasn't; host errors, with what the kernel
/// says of them.
pub fn mount(device: &Path, kind: &str, options: &Options, place: &Place) -> Result<()> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| match error {
        Errno::NODEV => {
            let detail = format!("the kernel has no file system {kind} (modprobe {kind})");
            Error::new(ErrorKind::Unsupported, detail)
        }
        Errno::PERM => not_root(),
        _ => Error::io(error.into(), format!("preparing to mount {kind}")),
    })?;
    let made = || {
        fsconfig_set_string(&context, "source", device)?;
        if options.read_only() {
            fsconfig_set_flag(&context, "ro")?;
        }
        for option in &options.own {
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(&context, key, value)?,
                None => fsconfig_set_flag(&context, option.as_str())?,
            }
        }
        fsconfig_create(&context)?;
        let made = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, options.attributes)?;
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(made.as_fd(), "", place.folder.as_fd(), "", flags)
    };
    made().map_err(|error: Errno| {
        let said = said(&context);
        let said = said.map_or_else(String::new, |said| format!(" ({})", shown(&said)));
        Error::io(error.into(), format!("mounting {kind}{said}")).in_file(&place.path)
    })
}

/// What the kernel says of a mount that failed: lines, each with a letter before it.
fn said(context: &OwnedFd) -> Option<String> {
    let mut line = [0; 512];
    let mut lines = Vec::new();
    while let Ok(length @ 1..) = rustix::io::read(context, &mut line) {
        let text = String::from_utf8_lossy(&line[..length]).trim_end().to_owned();
        lines.push(text.split_once(' ').map_or(text.clone(), |(_, said)| said.to_owned()));
    }
    (!lines.is_empty()).then(|| lines.join("; "))
}

/// Takes away the mount of this id at a folder, which no link leads to; even from those who use it where
/// `detach` says so: they keep it.
///
/// # Errors
/// [`ErrorKind::InUse`]; [`ErrorKind::NotFound`] where another mount is there by now; host errors.
pub fn unmount_at(folder: &Path, id: u64, detach: bool) -> Result<()> {
    check_id(folder, id)?;
    let flags = if detach { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match unmount(folder, flags | UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => {
            let detail = "somebody has files open in it, or stands in it; --force unmounts it";
            Err(Error::new(ErrorKind::InUse, detail).in_file(folder))
        }
        done => done.map_err(|error| Error::io(error.into(), "unmounting").in_file(folder)),
    }
}

fn check_id(folder: &Path, id: u64) -> Result<()> {
    let fail = |error: io::Error| Error::io(error, "looking at the mount").in_file(folder);
    if mount_id(folder).map_err(fail)? != id {
        let detail = "another file system is mounted over it";
        return Err(Error::new(ErrorKind::NotFound, detail).in_file(folder));
    }
    Ok(())
}

/// Changes the options of the mount of this id at a folder, and of its file system.
///
/// # Errors
/// [`ErrorKind::NotFound`] where another mount is there by now; host errors.
pub fn remount(folder: &Path, id: u64, options: &Options) -> Result<()> {
    check_id(folder, id)?;
    let fail = |error: Errno| Error::io(error.into(), "remounting").in_file(folder);
    let flags = FLAGS.into_iter().filter(|(attribute, _)| options.attributes.contains(*attribute));
    let flags = flags.fold(MountFlags::empty(), |flags, (_, flag)| flags | flag);
    let own = CString::new(options.own.join(",")).map_err(|_| fail(Errno::INVAL))?;
    mount_remount(folder, flags, own.as_c_str()).map_err(fail)
}

/// Has all that was written to a file system be durable. Fails where some of it could not be written
/// since it was mounted, and nobody was told.
///
/// # Errors
/// Host errors.
pub fn sync(mounted: &Mounted) -> io::Result<()> {
    Ok(syncfs(root_of(mounted)?)?)
}

/// The folder that a mount shows, which its path doesn't lead to where another mount hides it.
///
/// # Errors
/// Host errors.
pub fn root_of(mounted: &Mounted) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = open(&mounted.folder, flags, Mode::empty())?;
    let found = statx(&folder, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    if found.stx_mnt_id == mounted.id {
        Ok(folder)
    } else {
        Err(io::Error::other("another file system is mounted over it"))
    }
}

/// Has the file system of a folder hold still, all that was written to it written out.
///
/// # Errors
/// [`Errno::BUSY`] where it does already; host errors.
pub fn freeze(folder: &OwnedFd) -> rustix::io::Result<()> {
    const FREEZE: Opcode = opcode::read_write::<c_int>(b'X', 119);
    let mut unused = 0;
    // SAFETY: the ioctl takes a number of this size, which it leaves alone.
    let call = unsafe { Updater::<FREEZE, c_int>::new(&mut unused) };
    // SAFETY: as above.
    unsafe { ioctl(folder, call) }
}

/// Has the file system of a folder go on that holds still.
///
/// # Errors
/// [`Errno::INVAL`] where it doesn't; host errors.
pub fn thaw(folder: &OwnedFd) -> rustix::io::Result<()> {
    const THAW: Opcode = opcode::read_write::<c_int>(b'X', 120);
    let mut unused = 0;
    // SAFETY: the ioctl takes a number of this size, which it leaves alone.
    let call = unsafe { Updater::<THAW, c_int>::new(&mut unused) };
    // SAFETY: as above.
    unsafe { ioctl(folder, call) }
}

/// Has a file system end at once: what it holds back is lost, and whoever uses it gets errors.
///
/// # Errors
/// Host errors; not every file system can.
pub fn shut_down(mounted: &Mounted) -> io::Result<()> {
    /// `EXT4_IOC_SHUTDOWN`, which others have too.
    const SHUTDOWN: Opcode = opcode::read::<u32>(b'X', 125);
    /// Without writing the journal.
    const AT_ONCE: u32 = 2;
    let folder = root_of(mounted)?;
    // SAFETY: the ioctl reads a number of this size, and changes nothing in this process.
    let set = unsafe { Setter::<SHUTDOWN, u32>::new(AT_ONCE) };
    // SAFETY: as above.
    unsafe { ioctl(&folder, set) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_those_of_the_mount_or_of_the_file_system() {
        let usual = Options::parse([""]);
        assert!(!usual.read_only());
        assert_eq!(
            usual.attributes,
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV
        );
        let options = Options::parse(["suid,ro,noatime", "data=journal,dev,discard"]);
        assert_eq!(
            options.attributes,
            MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOATIME
        );
        assert_eq!(options.own, ["data=journal", "discard"]);
        // The last one holds.
        assert!(!Options::parse(["ro,rw"]).read_only());
        assert_eq!(Options::parse(["noatime,relatime"]).attributes, usual.attributes);
        assert!(Options::parse(["rw"]).reading().read_only());
    }
}

//! Who may use a new file. One that takes another's place gets all of that one's rights, and one
//! that holds another's bytes lets in nobody whom that one keeps out: before it holds anything, and
//! before anybody could have opened it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{
    Gid, Mode, OFlags, Stat, Uid, XattrFlags, fchmod, fchown, fgetxattr, flistxattr, fremovexattr,
    fsetxattr, fstat,
};
use rustix::io::Errno;

use super::Storage;

/// Read and write for everybody, which the umask narrows.
const EVERYBODY: u32 = 0o666;
/// What its owner may do with a file that is being made.
const OWNER: u32 = 0o600;
const GROUP_AND_OTHERS: u32 = 0o077;
const ACL: &str = "system.posix_acl_access";
/// Attributes that tell of a file's content, or of its place on a disk, and are wrong for another.
const OWN: [&str; 4] = ["security.ima", "security.evm", "trusted.overlay.", "user.overlay."];

/// Who may use a new file.
#[derive(Clone, Debug, Default)]
pub enum Rights {
    /// Whoever the umask lets.
    #[default]
    Usual,
    /// As `cp` gives them to a copy: of those whom the umask lets, the ones that this mode lets.
    /// Its owner may always read and write it.
    Copy(u32),
    /// Those of this file, whose place the new one will take: owner, group, mode, ACL and extended
    /// attributes. What the process may not give is given to nobody instead.
    Successor(Arc<OwnedFd>),
}

impl Rights {
    /// Those of a copy of all these files; the usual ones for a copy of none.
    ///
    /// # Errors
    /// Host errors.
    pub fn of_copy<'a>(files: impl IntoIterator<Item = &'a dyn Storage>) -> io::Result<Self> {
        let mut mode = EVERYBODY;
        for descriptor in files.into_iter().filter_map(Storage::descriptor) {
            mode &= fstat(descriptor)?.st_mode;
        }
        Ok(Self::Copy(mode))
    }

    /// Those of a file that takes the place of this one.
    ///
    /// # Errors
    /// Host errors.
    pub fn of_successor(file: &dyn Storage) -> io::Result<Self> {
        let descriptor = file.descriptor().map(|old| old.try_clone_to_owned()).transpose()?;
        Ok(descriptor.map_or(Self::Usual, |old| Self::Successor(Arc::new(old))))
    }

    /// Those of a copy that holds bytes of `other` too.
    #[must_use]
    pub fn and(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Copy(one), Self::Copy(other)) => Self::Copy(one & other),
            (Self::Usual, other) => other.clone(),
            (one, _) => one,
        }
    }

    /// Creates a file that must not exist, with these rights; it can be read and written.
    ///
    /// # Errors
    /// Host errors. No file stays then.
    pub fn create(&self, path: &Path) -> io::Result<File> {
        let mode = match self {
            Self::Usual => EVERYBODY,
            Self::Copy(mode) => mode & EVERYBODY | OWNER,
            Self::Successor(_) => OWNER,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(path)?;
        if let Self::Successor(old) = self {
            give(&file, old.as_fd()).inspect_err(|_| drop(fs::remove_file(path)))?;
        }
        Ok(file)
    }
}

/// Gives `new`, which only its owner can open yet, the rights of `old`.
fn give(new: &File, old: BorrowedFd<'_>) -> io::Result<()> {
    let wanted = fstat(old)?;
    let mut mode = wanted.st_mode & 0o777;
    let group_kept = give_owner(new, &wanted)?;
    if new.metadata()?.uid() != wanted.st_uid {
        // Whoever stands in for the owner can do so again.
        mode |= OWNER;
    }
    let acl_kept = give_attributes(new.as_fd(), old, group_kept)?;
    if !group_kept {
        // Another group has the group's rights now, and the old one those of others.
        let both = (mode >> 3) & mode & 0o007;
        mode = mode & 0o700 | both << 3 | both;
    }
    if !acl_kept {
        // The bits of the group said what the ACL gives at most.
        mode &= !0o070;
    }
    // Some file systems have one mode for all files, and then the old one had it too.
    let refused = fchmod(new, Mode::from_raw_mode(mode)).err();
    let got = new.metadata()?.mode();
    match refused {
        Some(error) if got & GROUP_AND_OTHERS & !wanted.st_mode != 0 => Err(error.into()),
        // Not the mode alone: a crash must not keep the data and lose this.
        _ => new.sync_all(),
    }
}

/// Gives a file its owner and group as far as this process may; whether it has that group.
fn give_owner(new: &File, wanted: &Stat) -> io::Result<bool> {
    let (uid, gid) = (Uid::from_raw(wanted.st_uid), Gid::from_raw(wanted.st_gid));
    let got = new.metadata()?;
    if (got.uid(), got.gid()) == (wanted.st_uid, wanted.st_gid)
        || fchown(new, Some(uid), Some(gid)).is_ok()
    {
        return Ok(true);
    }
    Ok(got.gid() == wanted.st_gid || fchown(new, None, Some(gid)).is_ok())
}

/// Copies the extended attributes, ACLs among them, as far as this process may. Whether no ACL was
/// lost.
fn give_attributes(new: BorrowedFd<'_>, old: BorrowedFd<'_>, group_kept: bool) -> io::Result<bool> {
    let names = match grown(|buffer| flistxattr(old, buffer)) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(true),
        // So rclone says that it has none; another may have had an ACL.
        Err(Errno::IO) => return Ok(false),
        other => other?,
    };
    let names = names.split(|&byte| byte == 0).filter_map(|name| str::from_utf8(name).ok());
    let (mut acl, mut kept) = (None, true);
    for name in
        names.filter(|name| !name.is_empty() && !OWN.iter().any(|own| name.starts_with(own)))
    {
        // One that went meanwhile, or that this process must not see.
        let Ok(value) = grown(|buffer| fgetxattr(old, name, buffer)) else { continue };
        if name == ACL {
            acl = Some(value);
        } else if fsetxattr(new, name, &value, XattrFlags::empty()).is_err() {
            // The kernel's own are ACLs of other kinds. Labels that only others may set are the
            // host's to give.
            kept &= !name.starts_with("system.");
        }
    }
    match acl {
        // Its entry for the group would be that of another group.
        Some(_) if !group_kept => {
            let _ = fremovexattr(new, ACL);
            Ok(false)
        }
        Some(value) => Ok(kept && fsetxattr(new, ACL, &value, XattrFlags::empty()).is_ok()),
        None => {
            // One that the folder gives to new files.
            let _ = fremovexattr(new, ACL);
            Ok(kept)
        }
    }
}

/// Calls until the buffer is large enough for the answer.
fn grown(
    mut call: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 1 << 10];
    loop {
        match call(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            // 64 KiB is the most that Linux has.
            Err(Errno::RANGE) if buffer.len() < 1 << 20 => buffer.resize(buffer.len() * 4, 0),
            Err(error) => return Err(error),
        }
    }
}

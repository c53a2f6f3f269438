//! Names in a folder of the host, on file systems that can do less than the kernel's own.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, fsync, open, renameat_with, syncfs};
use rustix::io::Errno;

/// Gives a file a second name, which must not exist; [`io::ErrorKind::Unsupported`] where a file has
/// one name only.
pub(super) fn link(from: &Path, to: &Path) -> io::Result<()> {
    fs::hard_link(from, to).map_err(|error| match Errno::from_io_error(&error) {
        // FAT and most of FUSE say that it is not permitted, and rclone that the disk is broken.
        Some(Errno::PERM | Errno::NOSYS | Errno::OPNOTSUPP | Errno::MLINK | Errno::IO) => {
            io::Error::new(io::ErrorKind::Unsupported, error)
        }
        _ => error,
    })
}

/// Renames to a name that must not exist. Whatever the file system can do, no name of somebody
/// else's is taken, and nobody else can take this one meanwhile.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`]; host errors.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        other => return Ok(other?),
    }
    match link(from, to) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => take(from, to),
        other => {
            other?;
            // It has its name. Whoever makes such drafts clears those that stay, too.
            let _ = fs::remove_file(from);
            Ok(())
        }
    }
}

/// Renames over an empty file of one's own. A kill in between leaves that file.
fn take(from: &Path, to: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).open(to)?;
    fs::rename(from, to).inspect_err(|_| drop(fs::remove_file(to)))
}

/// Returns once all changes of names in a folder survive a power loss, as far as there is a way to
/// ask for that.
pub(super) fn sync(folder: &Path) -> io::Result<()> {
    let synced = match File::open(folder) {
        Ok(folder) => fsync(folder),
        // One that can't be listed (mode 1733) can't be opened, but files can be made in it: one
        // without a name leads to the file system, of which everything is synced then.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let unnamed = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            let Ok(file) = open(folder, unnamed, Mode::RUSR) else { return Ok(()) };
            syncfs(file)
        }
        Err(error) => return Err(error),
    };
    match synced {
        // What a file system says that has no such thing for folders.
        Err(Errno::INVAL | Errno::BADF | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_name_is_taken_by_every_way_and_never_from_somebody_else() {
        let dir = tempfile::tempdir().unwrap();
        let (draft, taken, new) =
            (dir.path().join("draft"), dir.path().join("taken"), dir.path().join("new"));
        for way in [rename_new, take] {
            fs::write(&draft, "mine").unwrap();
            fs::write(&taken, "yours").unwrap();
            let refused = way(&draft, &taken).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(&taken).unwrap(), b"yours");
            way(&draft, &new).unwrap();
            assert_eq!(fs::read(&new).unwrap(), b"mine");
            fs::remove_file(&new).unwrap();
            // Nothing to rename any more: the name is free again.
            assert_eq!(way(&draft, &new).unwrap_err().kind(), io::ErrorKind::NotFound);
            assert!(!new.exists());
        }
    }
}

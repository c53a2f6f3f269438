//! The mounts that this process sees, as the kernel lists them (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use thinply::error::{Error, Result};

const LIST: &str = "/proc/self/mountinfo";

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Its id, which statx(2) tells too.
    pub id: u64,
    /// Major and minor number of its device, as in `7:0`.
    pub device: String,
    /// The folder of its file system that it shows.
    pub root: PathBuf,
    /// Where it is.
    pub folder: PathBuf,
    /// Its type of file system.
    pub kind: String,
    /// What is mounted.
    pub source: PathBuf,
    /// Whether it may only be read.
    pub read_only: bool,
    /// Whether its file system may only be read, by whatever mount.
    pub all_read_only: bool,
    /// Whose it is, of those that users may mount.
    pub user: Option<u32>,
}

/// All mounts, those that hide others behind them.
pub fn all() -> Result<Vec<Mounted>> {
    let list = fs::read(LIST).map_err(|error| Error::io(error, "reading the mounts"))?;
    Ok(parse_all(&list))
}

/// A process that sees a device mounted which this one doesn't, as far as this one may ask.
pub fn elsewhere(device: &str) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.find(|process: &u32| {
        let list = fs::read(format!("/proc/{process}/mountinfo")).unwrap_or_default();
        parse_all(&list).iter().any(|mounted| mounted.device == device)
    })
}

fn parse_all(list: &[u8]) -> Vec<Mounted> {
    list.split(|&byte| byte == b'\n').filter_map(parse).collect()
}

/// The mount that a path shows, where one is just there.
pub fn at(folder: &Path) -> Result<Option<Mounted>> {
    Ok(all()?.into_iter().rfind(|mounted| mounted.folder == folder))
}

/// A line of the list. (Its fields are bytes, which no library takes.)
fn parse(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|&byte| byte == b' ');
    let text = |field: &[u8]| String::from_utf8(field.to_vec()).ok();
    let id = text(fields.next()?)?.parse().ok()?;
    let device = text(fields.nth(1)?)?;
    let (root, folder) = (path(fields.next()?), path(fields.next()?));
    let read_only = fields.next()?.split(|&byte| byte == b',').any(|option| option == b"ro");
    // Optional fields end with a dash.
    fields.find(|field| *field == b"-")?;
    let kind = text(fields.next()?)?;
    let source = path(fields.next()?);
    let options = text(fields.next()?)?;
    let all_read_only = options.split(',').any(|option| option == "ro");
    let user = options.split(',').find_map(|option| option.strip_prefix("user_id=")?.parse().ok());
    Some(Mounted { id, device, root, folder, kind, source, read_only, all_read_only, user })
}

/// A path whose white space and backslashes are octal numbers behind a backslash.
fn path(field: &[u8]) -> PathBuf {
    let (mut out, mut rest) = (Vec::new(), field);
    while let Some((&byte, behind)) = rest.split_first() {
        let octal = behind.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped.filter(|_| byte == b'\\') {
            Some(escaped) => {
                out.push(escaped);
                rest = &behind[3..];
            }
            None => {
                out.push(byte);
                rest = behind;
            }
        }
    }
    OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let line =
            br"36 35 7:0 / /mnt/a\040b\134c ro,nosuid shared:1 master:2 - ext4 /dev/loop0 rw";
        let found = parse(line).unwrap();
        let wanted = Mounted {
            id: 36,
            device: "7:0".into(),
            root: "/".into(),
            folder: r"/mnt/a b\c".into(),
            kind: "ext4".into(),
            source: "/dev/loop0".into(),
            read_only: true,
            all_read_only: false,
            user: None,
        };
        assert_eq!(found, wanted);
        let line = b"5 1 0:9 / /m rw - fuse.thinply /s rw,user_id=7,group_id=8";
        assert_eq!(parse(line).unwrap().user, Some(7));
        // No optional fields, and a file system that lists no source.
        assert_eq!(parse(b"1 0 0:5 /x /y rw - tmpfs  rw").unwrap().source, Path::new(""));
        for bad in [&b""[..], b"36", b"x 35 7:0 / /m ro - ext4 s o", b"36 35 7:0 / /m ro ext4 s"] {
            assert_eq!(parse(bad), None, "{}", String::from_utf8_lossy(bad));
        }
        assert_eq!(path(br"\04"), Path::new(r"\04"));
    }

    #[test]
    fn there_is_a_mount_at_the_root() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert_eq!(at(Path::new("/proc/self/nothing")).unwrap(), None);
    }
}

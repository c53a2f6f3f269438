//! ext4 images of file trees: the same image of the same tree, at any time and place.
//!
//! mke2fs copies the tree (`-d`), in the order of the names' bytes. What it would take from elsewhere
//! it is told: features and block size, which a configuration file may change; the UUID and the
//! directories' hash seed, which come from what is in the tree; the time. What it can't keep is mended
//! in the image afterwards (`mend`).

mod attributes;
mod inodes;
mod mend;
mod tree;

use std::fs;
use std::io;
use std::path::{Path, absolute};
use std::process::{Command, Stdio};

use tempfile::NamedTempFile;
use thinply::error::{Error, ErrorKind, Result};

use self::inodes::Inodes;
use self::tree::Tree;

pub const BLOCK: u64 = 4096;
/// Room for what is written to the image later, beside half of what is there.
const ROOM: u64 = 64 << 20;
/// Bytes of the device for each inode that is spare, as mke2fs has it.
const BYTES_PER_SPARE: u64 = 16 << 10;
/// With fewer bytes of the device for an inode, groups of blocks would have to be small.
const BYTES_PER_INODE: u64 = 4096;
const INODE_SIZE: u64 = 256;
/// Those that Debian's mke2fs.conf names for ext4.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,\
                        flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
/// How many of mke2fs's last lines are shown when it fails.
const LAST_LINES: usize = 4;

/// Fills `raw` with an ext4 image of a tree. No time in it is later than `latest`, in seconds since
/// 1970. Returns what could not be kept, for people.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if mke2fs is missing, or something can't be in an ext4 file system;
/// [`ErrorKind::InUse`] if the tree changed meanwhile; what can't be read.
pub fn make_ext4(raw: &Path, path: &Path, latest: Option<i64>) -> Result<Vec<String>> {
    // Where it is a symlink, mke2fs would take the attributes of that.
    let found = fs::canonicalize(path);
    let path = &found.map_err(|error| Error::io(error, "looking for the tree").in_file(path))?;
    let tree = Tree::read(path, latest)?;
    // A tree that changed explains more than what mke2fs met in it.
    let made = run_mke2fs(raw, path, &tree);
    tree.check_unchanged()?;
    made?;
    mend::mend(Inodes::open(raw)?, &tree).map_err(|error| error.in_file(raw))?;
    Ok(tree.lost())
}

/// A file without content in a store's folder, where there is room for what comes to be stored there. It
/// goes when it is dropped, and `gc` takes what a kill leaves of it.
///
/// # Errors
/// Host errors.
pub fn temporary(store: &Path) -> Result<NamedTempFile> {
    let made = tempfile::Builder::new().prefix(".draft-").tempfile_in(store);
    made.map_err(|error| Error::io(error, "making a temporary file"))
}

/// Makes an empty ext4 file system of a sparse file, with little in it: tables that are zeros are left as
/// holes, and there is none for a later growth.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if mke2fs is missing or too old; host errors.
pub fn make_empty_ext4(raw: &Path) -> Result<()> {
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-J", "size=8"]);
    command.args(["-O", &format!("{FEATURES},^resize_inode,^sparse_super,sparse_super2")]);
    let extended = "lazy_itable_init=0,lazy_journal_init=0,assume_storage_prezeroed=1,nodiscard";
    command.args(["-E", extended]).arg(raw);
    run(&mut command, raw)
}

/// How many blocks and inodes the file system gets.
fn plan(tree: &Tree) -> (u64, u64) {
    let bytes = tree.blocks * BLOCK * 3 / 2 + ROOM;
    let inodes = tree.entries * 3 / 2 + bytes / BYTES_PER_SPARE;
    let bytes = (bytes + inodes * INODE_SIZE).max(inodes * BYTES_PER_INODE);
    (bytes.next_multiple_of(1 << 20) / BLOCK, inodes)
}

fn run_mke2fs(raw: &Path, path: &Path, tree: &Tree) -> Result<()> {
    let host = |error| Error::io(error, "starting mke2fs");
    let (blocks, inodes) = plan(tree);
    let [uuid, seed] = tree.uuids();
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "5", "-O", FEATURES]);
    command.arg("-I").arg(INODE_SIZE.to_string()).arg("-N").arg(inodes.to_string());
    // Tables and journal are made whole, so that no kernel does it later, in each container.
    let extended = format!("hash_seed={seed},lazy_itable_init=0,lazy_journal_init=0");
    command.arg("-U").arg(uuid).arg("-E").arg(extended);
    command.arg("-d").arg(path).arg(absolute(raw).map_err(host)?).arg(blocks.to_string());
    // Zero would mean the present time.
    command.env("E2FSPROGS_FAKE_TIME", tree.time().clamp(1, u32::MAX.into()).to_string());
    run(&mut command, path)
}

/// Runs mke2fs, which takes nothing from its configuration.
fn run(command: &mut Command, about: &Path) -> Result<()> {
    let host = |error| Error::io(error, "starting mke2fs");
    // From 1.47.1 on mke2fs would take that, and not for all times.
    command.env_remove("SOURCE_DATE_EPOCH");
    command.env("MKE2FS_CONFIG", "/dev/null").env("LC_ALL", "C");
    // Debian keeps it where ordinary users don't look.
    command.env("PATH", std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin");
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let detail = "mke2fs is missing (Debian: e2fsprogs)";
            return Err(Error::new(ErrorKind::Unsupported, detail));
        }
        Err(error) => return Err(host(error)),
    };
    if output.status.success() {
        return Ok(());
    }
    let text = shown(&output.stderr, "\n");
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("; ");
    let detail = format!("mke2fs failed ({}): {last}", output.status);
    Err(Error::new(ErrorKind::Io, detail).in_file(about))
}

/// Bytes of others for people; what controls a terminal is not among them, but what `kept` has.
fn shown(bytes: &[u8], kept: &str) -> String {
    let hidden = |c: char| c.is_control() && !kept.contains(c);
    String::from_utf8_lossy(bytes).replace(hidden, "?")
}

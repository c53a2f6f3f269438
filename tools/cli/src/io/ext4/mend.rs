//! What mke2fs loses of a tree, put into its image: all of its root but what is in it, fractions of
//! seconds, times after 2038, and that attributes come in one order everywhere. On the way everything
//! is compared with the tree.
//!
//! The time of the last change of content is the one time that a tree has on another machine too: a
//! file's others are those of copying it and of looking at it. So it stands for them all.

use std::os::unix::ffi::OsStrExt;

use thinply::error::{Error, ErrorKind, Result};

use super::attributes;
use super::inodes::{Inode, Inodes, ROOT, unexpected};
use super::shown;
use super::tree::{MOST_LINKS, Node, Stat, Tree};

/// What each ext4 file system has in its root.
const FOUND: &[u8] = b"lost+found";
/// Where the times of last access, change and content and of making are, each with the place of its
/// fraction and upper bits.
const TIMES: [(usize, usize); 4] = [(8, 140), (12, 132), (16, 136), (144, 148)];

/// Mends the image of a tree.
pub fn mend(image: Inodes, tree: &Tree) -> Result<()> {
    Mend { image, tree }.node(&tree.root, ROOT)
}

struct Mend<'a> {
    image: Inodes,
    tree: &'a Tree,
}

impl Mend<'_> {
    fn node(&self, node: &Node, number: u32) -> Result<()> {
        let (old, stat) = (self.image.read(number)?, &node.stat);
        let mut inode = old.clone();
        if number == ROOT {
            set_owner(&mut inode, stat);
        }
        if !is_same(&inode, stat) {
            let name = shown(node.name.as_bytes(), "");
            return Err(unexpected(format!(
                "another mode, owner or size of {name} than the tree's"
            )));
        }
        set_times(&mut inode, self.tree.modified(stat))?;
        attributes::sort(&self.image, &mut inode)?;
        if stat.is_dir() {
            let folders = node.children.iter().filter(|child| child.stat.is_dir()).count() as u64;
            // mke2fs counts on and over the end of the field.
            if folders + 2 >= MOST_LINKS {
                inode.put_u16(26, 1);
            }
        }
        if inode != old {
            self.image.write(number, &inode)?;
        }
        if stat.is_dir() { self.children(node, number, &inode) } else { Ok(()) }
    }

    fn children(&self, node: &Node, number: u32, inode: &Inode) -> Result<()> {
        let mut entries = self.image.folder(inode)?;
        let names = || node.children.iter().map(|child| child.name.as_bytes());
        if number == ROOT && !names().any(|name| name == FOUND) {
            entries.retain(|(name, _)| name != FOUND);
        }
        if !names().eq(entries.iter().map(|(name, _)| &name[..])) {
            let name = shown(node.name.as_bytes(), "");
            return Err(unexpected(format!("other names in the folder {name} than the tree's")));
        }
        let mut both = node.children.iter().zip(entries);
        both.try_for_each(|(child, (_, number))| self.node(child, number))
    }
}

fn set_owner(inode: &mut Inode, stat: &Stat) {
    inode.put_u16(0, stat.mode as u16);
    for (id, low, high) in [(stat.uid, 2, 120), (stat.gid, 24, 122)] {
        inode.put_u16(low, id as u16);
        inode.put_u16(high, (id >> 16) as u16);
    }
}

/// Whether an inode is the one of a file, by what mke2fs must have kept.
fn is_same(inode: &Inode, stat: &Stat) -> bool {
    let mut owned = inode.clone();
    set_owner(&mut owned, stat);
    owned == *inode && (!stat.is_file() || inode.size() == stat.size)
}

/// Sets all times: 32 bits of seconds, which have a sign, and two more above them beside the
/// nanoseconds.
fn set_times(inode: &mut Inode, (seconds, nanoseconds): (i64, i64)) -> Result<()> {
    let low = seconds as i32;
    let upper = (seconds - i64::from(low)) >> 32;
    let extra = u32::try_from(nanoseconds << 2 | upper);
    let extra = extra.ok().filter(|_| (0..4).contains(&upper));
    let extra = extra.ok_or_else(|| {
        Error::new(ErrorKind::OutOfRange, format!("{seconds} is no time of ext4"))
    })?;
    for (at, more) in TIMES {
        inode.put_u32(at, low as u32);
        inode.put_u32(more, extra);
    }
    Ok(())
}

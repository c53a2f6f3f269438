//! The extended attributes of an inode, in the order of their names.
//!
//! mke2fs writes them as the host lists them, which differs from one file system to the next, and with
//! it which of them are in the inode and which in a block. There is a block wherever not all of them
//! fit into the inode, so no block comes or goes here.

use thinply::error::Result;

use super::inodes::{EXTRA, Inode, Inodes, u16_at, u32_at, unexpected};
use super::{BLOCK, INODE_SIZE};

const MAGIC: u32 = 0xea02_0000;
const ENTRY: usize = 16;
/// Entries of a block begin behind its header.
const HEADER: usize = 32;
/// Behind the last entry.
const END: usize = 4;

/// Sorted by the kind of attribute, then as the kernel sorts those in a block.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Attribute {
    index: u8,
    length: usize,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Attribute {
    fn room(&self) -> usize {
        (ENTRY + self.name.len()).next_multiple_of(4) + self.value.len().next_multiple_of(4)
    }

    /// What the kernel compares a block's entries by.
    fn hash(&self) -> u32 {
        let name =
            self.name.iter().fold(0_u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
        self.value.chunks(4).fold(name, |hash, word| {
            let mut bytes = [0; 4];
            bytes[..word.len()].copy_from_slice(word);
            hash.rotate_left(16) ^ u32::from_le_bytes(bytes)
        })
    }
}

/// Sorts the attributes of an inode, and those of its block in the image.
pub fn sort(image: &Inodes, inode: &mut Inode) -> Result<()> {
    let start = EXTRA + usize::from(inode.u16(EXTRA)) + size_of_val(&MAGIC);
    let mut all = match u32_at(&inode.0, start - size_of_val(&MAGIC)) {
        Ok(MAGIC) => parse(&inode.0[start..], 0)?,
        _ => Vec::new(),
    };
    let block = inode.attribute_block();
    let mut bytes = block.map(|block| image.read_block(block)).transpose()?.unwrap_or_default();
    if block.is_some() {
        all.extend(parse(&bytes, HEADER)?);
    }
    if all.len() < 2 {
        return Ok(());
    }
    all.sort_unstable();
    let (mut own, mut others, mut left) =
        (Vec::new(), Vec::new(), INODE_SIZE as usize - start - END);
    for attribute in all {
        match left.checked_sub(attribute.room()) {
            Some(rest) => {
                left = rest;
                own.push(attribute);
            }
            None => others.push(attribute),
        }
    }
    let room: usize = others.iter().map(Attribute::room).sum();
    // Where it takes another order to fit them in, that of mke2fs remains.
    if room + HEADER + END > BLOCK as usize {
        return Ok(());
    }
    if block.is_none() && !others.is_empty() {
        return Err(unexpected("attributes that don't fit where they are"));
    }
    inode.0[start..].copy_from_slice(&laid(&own, INODE_SIZE as usize - start, 0));
    if let Some(block) = block {
        let laid = laid(&others, bytes.len(), HEADER);
        bytes[HEADER..].copy_from_slice(&laid[HEADER..]);
        image.write_attributes(block, &mut bytes)?;
    }
    Ok(())
}

/// The attributes whose entries begin at `first`.
fn parse(bytes: &[u8], first: usize) -> Result<Vec<Attribute>> {
    let mut found = Vec::new();
    let mut at = first;
    let bad = || unexpected("bad attributes");
    while u32_at(bytes, at)? != 0 {
        let [length, index] = u16_at(bytes, at)?.to_le_bytes();
        let (offset, size) = (usize::from(u16_at(bytes, at + 2)?), u32_at(bytes, at + 8)? as usize);
        let length = usize::from(length);
        let name = bytes.get(at + ENTRY..at + ENTRY + length).ok_or_else(bad)?.to_vec();
        let value =
            bytes.get(offset..).and_then(|value| value.get(..size)).ok_or_else(bad)?.to_vec();
        found.push(Attribute { index, length, name, value });
        at += (ENTRY + length).next_multiple_of(4);
    }
    Ok(found)
}

/// Attributes in so many bytes, the entries from `first` on, the values from the end back. Only
/// entries of a block carry their hashes.
fn laid(attributes: &[Attribute], size: usize, first: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let (mut at, mut end) = (first, size);
    for attribute in attributes {
        let value = &attribute.value;
        let mut offset = 0;
        if !value.is_empty() {
            end -= value.len().next_multiple_of(4);
            bytes[end..end + value.len()].copy_from_slice(value);
            offset = end;
        }
        let mut entry = vec![attribute.length as u8, attribute.index];
        entry.extend((offset as u16).to_le_bytes());
        entry.extend([0; 4]);
        entry.extend((value.len() as u32).to_le_bytes());
        entry.extend(if first == 0 { 0 } else { attribute.hash() }.to_le_bytes());
        entry.extend(&attribute.name);
        bytes[at..at + entry.len()].copy_from_slice(&entry);
        at += entry.len().next_multiple_of(4);
    }
    bytes
}

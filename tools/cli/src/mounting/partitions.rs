//! Partitions of a disk: MBR with logical ones, and GPT (UEFI specification, chapter 5).
//!
//! Read here and not by the kernel, which would look at every disk, nor by a library: those that there
//! are follow as many entries as a table names.

use thinply::error::{Error, ErrorKind, Result};

/// Sectors as both tables count them. (A disk with larger ones is read as one of these.)
const SECTOR: u64 = 512;
/// Most partitions that are looked for.
const MOST: usize = 256;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// Types of an entry that stands for all of a GPT, and for a chain of logical partitions.
const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// Reads a sector of the disk by its number.
pub type Sectors<'a> = dyn Fn(u64) -> Result<[u8; SECTOR as usize]> + 'a;

/// Where a partition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// As the kernel numbers it, from 1.
    pub number: usize,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
}

/// An entry of an MBR.
struct Slot {
    kind: u8,
    first: u64,
    count: u64,
}

/// The partition of a number, which must lie on a disk of `size` bytes.
///
/// # Errors
/// [`ErrorKind::NotFound`], with those that there are.
pub fn find(number: usize, size: u64, read: &Sectors<'_>) -> Result<Partition> {
    let all = all(read)?;
    let fits = |part: &Partition| {
        let end = part.offset.checked_add(part.length);
        part.length > 0 && end.is_some_and(|end| end <= size)
    };
    match all.iter().find(|part| part.number == number) {
        Some(part) if fits(part) => Ok(*part),
        Some(part) => {
            let Partition { offset, length, .. } = part;
            let detail = format!(
                "partition {number} has {length} bytes from {offset} on, the disk {size} in all"
            );
            Err(Error::new(ErrorKind::Corrupt, detail))
        }
        None => {
            let there: Vec<_> = all.iter().map(|part| part.number.to_string()).collect();
            let there = if there.is_empty() { "none".into() } else { there.join(", ") };
            let detail = format!("there is no partition {number} on the disk; there are: {there}");
            Err(Error::new(ErrorKind::NotFound, detail))
        }
    }
}

/// All partitions; none where there is no table.
pub fn all(read: &Sectors<'_>) -> Result<Vec<Partition>> {
    let Some(slots) = slots(&read(0)?) else { return Ok(Vec::new()) };
    if slots.iter().any(|slot| slot.kind == PROTECTIVE) {
        return guided(read);
    }
    let mut found = Vec::new();
    for (number, slot) in (1..).zip(&slots) {
        if slot.kind != 0 && slot.count != 0 {
            found.push(partition(number, slot.first, slot.count));
        }
    }
    if let Some(extended) = slots.iter().find(|slot| EXTENDED.contains(&slot.kind)) {
        logical(extended.first, read, &mut found)?;
    }
    Ok(found)
}

fn partition(number: usize, first: u64, count: u64) -> Partition {
    let bytes = |sectors: u64| sectors.saturating_mul(SECTOR);
    Partition { number, offset: bytes(first), length: bytes(count) }
}

/// The four entries of an MBR, if the sector is one.
fn slots(sector: &[u8; SECTOR as usize]) -> Option<[Slot; 4]> {
    if !sector.ends_with(&SIGNATURE) {
        return None;
    }
    let slot = |index: usize| {
        let entry = &sector[446 + index * 16..];
        Slot { kind: entry[4], first: number(entry, 8, 4), count: number(entry, 12, 4) }
    };
    Some([slot(0), slot(1), slot(2), slot(3)])
}

/// Follows the chain of logical partitions, each in a table that names the next one.
fn logical(start: u64, read: &Sectors<'_>, found: &mut Vec<Partition>) -> Result<()> {
    let mut table = start;
    for number in 5..MOST {
        let Some([own, next, ..]) = slots(&read(table)?) else { return Ok(()) };
        if own.kind != 0 && own.count != 0 {
            found.push(partition(number, table + own.first, own.count));
        }
        if !EXTENDED.contains(&next.kind) || next.first == 0 {
            return Ok(());
        }
        table = start + next.first;
    }
    Ok(())
}

/// The partitions of a GPT.
fn guided(read: &Sectors<'_>) -> Result<Vec<Partition>> {
    let header = read(1)?;
    if !header.starts_with(b"EFI PART") {
        let detail = "the disk's MBR names a GPT that is not there";
        return Err(Error::new(ErrorKind::Corrupt, detail));
    }
    let table = number(&header, 72, 8);
    let [count, size] = [80, 84].map(|at| number(&header, at, 4) as usize);
    if !matches!(size, 128 | 256 | 512) {
        let detail = format!("a GPT with entries of {size} bytes, expected 128, 256 or 512");
        return Err(Error::new(ErrorKind::Unsupported, detail));
    }
    let mut found = Vec::new();
    for index in 0..count.min(MOST) {
        let at = index * size;
        let sector = table.saturating_add((at / SECTOR as usize) as u64);
        let sector = read(sector)?;
        let entry = &sector[at % SECTOR as usize..];
        let (first, last) = (number(entry, 32, 8), number(entry, 40, 8));
        if entry[..16] != [0; 16] {
            let count = last.saturating_add(1).saturating_sub(first);
            found.push(partition(index + 1, first, count));
        }
    }
    Ok(found)
}

/// A number of a sector, in little-endian order.
fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads from a disk of some sectors, zeros beyond.
    fn reader(disk: &[u8]) -> impl Fn(u64) -> Result<[u8; 512]> + '_ {
        move |sector| {
            let mut out = [0; 512];
            let from = (sector as usize).saturating_mul(512).min(disk.len());
            let part = &disk[from..disk.len().min(from.saturating_add(512))];
            out[..part.len()].copy_from_slice(part);
            Ok(out)
        }
    }

    fn put(disk: &mut [u8], table: usize, slot: usize, kind: u8, first: u32, count: u32) {
        let at = table * 512 + 446 + slot * 16;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
        disk[table * 512 + 510..][..2].copy_from_slice(&SIGNATURE);
    }

    #[test]
    fn primary_and_logical_partitions_are_numbered_as_the_kernel_does() {
        let mut disk = vec![0; 64 * 512];
        put(&mut disk, 0, 1, 0x83, 2, 6);
        put(&mut disk, 0, 3, 0x05, 10, 40);
        put(&mut disk, 10, 0, 0x83, 2, 4);
        put(&mut disk, 10, 1, 0x05, 20, 10);
        put(&mut disk, 30, 0, 0x83, 1, 3);
        let found = all(&reader(&disk)).unwrap();
        let sectors: Vec<_> =
            found.iter().map(|part| (part.number, part.offset / 512, part.length / 512)).collect();
        assert_eq!(sectors, [(2, 2, 6), (4, 10, 40), (5, 12, 4), (6, 31, 3)]);
        let size = disk.len() as u64;
        assert_eq!(find(6, size, &reader(&disk)).unwrap().offset, 31 * 512);
        assert_eq!(find(1, size, &reader(&disk)).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(find(6, 33 * 512, &reader(&disk)).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_chain_that_bites_its_tail_ends() {
        let mut disk = vec![0; 16 * 512];
        put(&mut disk, 0, 0, 0x05, 1, 14);
        put(&mut disk, 1, 0, 0x83, 1, 1);
        put(&mut disk, 1, 1, 0x05, 4, 1);
        put(&mut disk, 5, 0, 0x83, 1, 1);
        put(&mut disk, 5, 1, 0x05, 4, 1);
        assert!(all(&reader(&disk)).unwrap().len() < MOST);
    }

    #[test]
    fn the_entries_of_a_gpt_are_found_however_many_it_names() {
        let mut disk = vec![0; 64 * 512];
        put(&mut disk, 0, 0, PROTECTIVE, 1, 63);
        assert_eq!(all(&reader(&disk)).unwrap_err().kind(), ErrorKind::Corrupt);
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[512 + 72..][..8].copy_from_slice(&2u64.to_le_bytes());
        disk[512 + 80..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        disk[512 + 84..][..4].copy_from_slice(&128u32.to_le_bytes());
        let entry = 1024 + 2 * 128;
        disk[entry..entry + 16].fill(7);
        disk[entry + 32..][..8].copy_from_slice(&34u64.to_le_bytes());
        disk[entry + 40..][..8].copy_from_slice(&40u64.to_le_bytes());
        let found = all(&reader(&disk)).unwrap();
        assert_eq!(found, [Partition { number: 3, offset: 34 * 512, length: 7 * 512 }]);
        // Its end before its beginning, and beyond all numbers.
        disk[entry + 40..][..8].copy_from_slice(&3u64.to_le_bytes());
        assert!(find(3, 1 << 20, &reader(&disk)).is_err());
        disk[entry + 40..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(find(3, 1 << 20, &reader(&disk)).is_err());
        disk[512 + 84..][..4].copy_from_slice(&7u32.to_le_bytes());
        assert_eq!(all(&reader(&disk)).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_disk_without_a_table_has_none() {
        assert_eq!(all(&reader(&[])).unwrap(), []);
    }
}

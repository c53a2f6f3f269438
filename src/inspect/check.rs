//! Judging a layer's file by `format-spec.md`, read-only.
//!
//! What only damage, or a program that breaks the rules, can bring about is a finding. What a crash
//! may leave behind is a note, and so is what the format allows but a person may want to know. Every
//! flipped bit of metadata is a finding, but for one in a record of a layer that was not closed, where
//! a torn record is nothing unusual.

use super::parts::{
    BitmapPage, RingPlace, RingRecord, Slots, Standing, Verdict, each_data, read_padded, read_ring,
};
use super::torn::is_torn;
use crate::error::{ErrorKind, Result};
use crate::format::bitmap::Sector;
use crate::format::geometry::{
    GROUP_SLOT_SIZE, JOURNAL_OFFSET, SLOT_OFFSETS, bitmap_offset, block_count, file_length,
    group_count,
};
use crate::format::header::{Header, State};
use crate::live::next_group;
use crate::storage::{Storage, failed};
use crate::types::{BLOCK_SIZE, Group, SECTOR_SIZE};

/// Most findings, and most notes, that a report holds.
pub const MAX_FINDINGS: usize = 1000;

/// Something about a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Byte offset in the file.
    pub offset: u64,
    /// What is there, and what should be.
    pub what: String,
}

/// What [`check`] has to say about a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What must not be.
    pub findings: Vec<Finding>,
    /// What may be, but is worth knowing.
    pub notes: Vec<Finding>,
    /// Findings and notes beyond [`MAX_FINDINGS`], counted only.
    pub left_out: u64,
}

impl Report {
    /// Nothing was found.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    pub(super) fn finding(&mut self, offset: u64, what: impl Into<String>) {
        keep(&mut self.findings, &mut self.left_out, offset, what.into());
    }

    fn note(&mut self, offset: u64, what: impl Into<String>) {
        keep(&mut self.notes, &mut self.left_out, offset, what.into());
    }

    /// A finding in a layer that is closed or frozen, a note in one that was not closed.
    fn unless_open(&mut self, open: bool, offset: u64, what: impl Into<String>) {
        if open { self.note(offset, what) } else { self.finding(offset, what) }
    }
}

fn keep(list: &mut Vec<Finding>, left_out: &mut u64, offset: u64, what: String) {
    if list.len() < MAX_FINDINGS {
        list.push(Finding { offset, what });
    } else {
        *left_out += 1;
    }
}

/// Checks the file of one layer, which nobody may be writing. Parents are not looked at.
///
/// # Errors
/// [`ErrorKind::NotAnImage`]; [`ErrorKind::Unsupported`] for what only a later version can judge;
/// host errors.
pub fn check(file: &dyn Storage) -> Result<Report> {
    let mut report = Report::default();
    let slots = Slots::read(file)?;
    check_slots(&slots, &mut report).map_err(|error| error.in_file(file.path()))?;
    let Some(header) = slots.header() else { return Ok(report) };
    let length = file.length().map_err(failed(file, "reading the length", 0))?;
    check_length(header, length, &mut report);
    check_gaps(file, &mut report)?;
    check_ring(&read_ring(file, slots.uuid(), Some(header))?, header, &mut report);
    let end = length.min(file_length(header.virtual_size));
    let mut from = Group(0);
    while let Some(group) = next_group(file, from)? {
        if group.0 >= group_count(header.virtual_size) {
            break;
        }
        check_group(file, header, group, end, &mut report)?;
        from = Group(group.0 + 1);
    }
    Ok(report)
}

fn check_slots(slots: &Slots, report: &mut Report) -> Result<()> {
    let open = slots.header().is_some_and(|header| header.state == State::InUse);
    for slot in &slots.0 {
        let (at, number) = (slot.offset, slot.number);
        let bad = match &slot.verdict {
            Verdict::Valid(_) => continue,
            Verdict::Refused(error) if error.kind() == ErrorKind::Unsupported => {
                return Err(error.clone().at(at));
            }
            Verdict::Refused(error) => {
                report.finding(at, format!("slot {number}: {error}"));
                continue;
            }
            Verdict::BeyondTheEnd => {
                report.finding(at, format!("header slot {number} lies beyond the end of the file"));
                continue;
            }
            Verdict::NoMagic => "does not begin with the magic",
            Verdict::BadChecksum
                if slots.header().is_some_and(|other| is_torn(number, &slot.bytes, other)) =>
            {
                let what = format!("header slot {number} is torn: its write was cut off");
                report.note(at, what);
                continue;
            }
            Verdict::BadChecksum => "does not have its checksum",
        };
        report.finding(at, format!("header slot {number} {bad}"));
    }
    if let [Some(a), Some(b)] = slots.0.each_ref().map(super::Slot::header) {
        let (newer, older) = if a.generation > b.generation { (a, b) } else { (b, a) };
        check_pair(newer, older, slots.newest().map_or(0, |slot| slot.offset), report);
    }
    if open {
        let at = slots.newest().map_or(0, |slot| slot.offset);
        report.note(at, "the layer was not closed; the next open for writing recovers it");
    }
    Ok(())
}

/// Two valid slots against each other (`format-spec.md`, invariants I8 and I10).
fn check_pair(newer: &Header, older: &Header, at: u64, report: &mut Report) {
    if newer.uuid != older.uuid {
        let what = format!("the slots name two layers: {} and {}", newer.uuid, older.uuid);
        return report.finding(at, what);
    }
    if newer.generation != older.generation + 1 {
        report.finding(
            at,
            format!(
                "the slots have the generations {} and {}, expected neighbours",
                newer.generation, older.generation
            ),
        );
    }
    if (newer.epoch, newer.journal_tail) < (older.epoch, older.journal_tail) {
        report.finding(at, "the newer slot has an older epoch or journal tail than the other");
    }
    match (newer.state, older.state) {
        (State::Frozen(a), State::Frozen(b)) if a == b => {}
        (State::Frozen(_), State::InUse) => {
            report.note(at, "one slot alone says that the layer is frozen: its freeze was cut off");
        }
        (State::Frozen(_), _) | (_, State::Frozen(_)) => {
            report.finding(at, "the slots don't agree on how the layer was frozen");
        }
        _ => {}
    }
    let varying = Header {
        generation: newer.generation,
        state: newer.state,
        epoch: newer.epoch,
        journal_tail: newer.journal_tail,
        ..older.clone()
    };
    let resized = Header {
        virtual_size: newer.virtual_size,
        visible_parent_size: newer.visible_parent_size,
        ..varying.clone()
    };
    let relinked = Header { parent: newer.parent.clone(), ..varying.clone() };
    if varying == *newer {
        return;
    }
    let what = match newer {
        newer if *newer == resized => "virtual size",
        newer if *newer == relinked => "parent",
        _ => "features",
    };
    // Both a resize and a relinking may be cut off between the two slots.
    let interrupted = what != "features" && newer.state == State::InUse;
    report.unless_open(interrupted, at, format!("the slots have not the same {what}"));
}

fn check_length(header: &Header, length: u64, report: &mut Report) {
    let expected = file_length(header.virtual_size);
    if length < expected {
        report.finding(length, format!("file of {length} bytes, expected {expected}"));
    } else if length > expected {
        let more = length - expected;
        report.note(expected, format!("{more} bytes behind the layer's end, which mean nothing"));
    }
}

/// What lies between the structures below the first group.
fn check_gaps(file: &dyn Storage, report: &mut Report) -> Result<()> {
    let [first, second] = SLOT_OFFSETS;
    check_zeros(file, first.0 + BLOCK_SIZE, second.0, report)?;
    check_zeros(file, second.0 + BLOCK_SIZE, JOURNAL_OFFSET.0, report)
}

/// A reserved range: one finding for each stretch of data that is not all zeros.
fn check_zeros(file: &dyn Storage, from: u64, to: u64, report: &mut Report) -> Result<()> {
    each_data(file, from, to, &mut |from, to| {
        let mut buf = vec![0; BLOCK_SIZE as usize];
        let mut at = from;
        while at < to {
            let part = buf.get_mut(..(to - at).min(BLOCK_SIZE) as usize).unwrap_or_default();
            read_padded(file, part, at)?;
            if let Some(place) = part.iter().position(|&byte| byte != 0) {
                report.finding(at + place as u64, "bytes in a reserved area, expected zeros");
                break;
            }
            at += part.len() as u64;
        }
        Ok(())
    })
}

fn check_ring(places: &[RingPlace], header: &Header, report: &mut Report) {
    let open = header.state == State::InUse;
    let blocks = block_count(header.virtual_size);
    let (mut live, mut stale) = (0, 0);
    for place in places {
        let at = place.offset;
        match &place.content {
            RingRecord::Valid(record, Standing::Live) => {
                live += 1;
                if record.entries.last().is_some_and(|entry| entry.block.0 >= blocks) {
                    let what = format!("record {} names a block beyond the end", record.sequence);
                    report.finding(at, what);
                }
                if !open {
                    let what = format!("record {} in a layer that was closed", record.sequence);
                    report.finding(at, what);
                }
            }
            RingRecord::Valid(_, Standing::Stale | Standing::Unknown) => stale += 1,
            RingRecord::Valid(record, Standing::Unreachable) => report.finding(
                at,
                format!(
                    "record {} of epoch {} can't be reached: what leads to it is lost",
                    record.sequence, record.epoch
                ),
            ),
            RingRecord::Refused(error) => report.finding(at, error.to_string()),
            RingRecord::Torn => report.note(at, "a torn record: a commit or a close was cut off"),
            RingRecord::Damaged | RingRecord::Valid(_, Standing::Misplaced) => {
                let what = "a damaged record, or one that stands in another one's place";
                report.unless_open(open, at, what);
            }
        }
    }
    if live > 0 {
        report.note(JOURNAL_OFFSET.0, format!("{live} journal records to recover"));
    }
    if stale > 0 {
        report.note(JOURNAL_OFFSET.0, format!("{stale} journal records that no longer count"));
    }
}

/// A group's bitmap page and the rest of its slot. `end` is where the file's meaning ends.
fn check_group(
    file: &dyn Storage,
    header: &Header,
    group: Group,
    end: u64,
    report: &mut Report,
) -> Result<()> {
    let page = BitmapPage::read(file, header.uuid, group)?;
    for (number, sector) in (0..).zip(&page.sectors) {
        if let Sector::Damaged { found, expected } = sector {
            report.finding(
                page.offset + number * SECTOR_SIZE,
                format!(
                    "bitmap sector {number} of group {} has checksum {found:#010x}, expected \
                     {expected:#010x}",
                    group.0
                ),
            );
        }
    }
    let blocks = block_count(header.virtual_size);
    let beyond: u64 = page
        .runs()
        .iter()
        .map(|&(first, count)| (first.0 + count).saturating_sub(blocks.max(first.0)))
        .sum();
    if beyond > 0 {
        let what = format!("{beyond} blocks beyond the end are owned: the layer was shrunk");
        report.note(page.offset, what);
    }
    let start = bitmap_offset(group).0;
    check_zeros(file, start + BLOCK_SIZE, end.min(start + GROUP_SLOT_SIZE), report)
}

//! Requests about names, attributes, and opening and closing. All may wait for a disk, and so have
//! threads of their own.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::statvfs;
use rustix::io::Errno;

use super::handles::Open;
use super::proto::{self, Access, Space};
use super::server::{Shared, Ticket};
use super::tree::Entry;
use super::work;
use crate::device::{Device, ZeroMode};
use crate::serve::{Lease, guard};

/// Handles of folders, which no file has.
const FOLDER: u64 = 1 << 62;
/// Offset of what stands behind a folder's own two entries, `.` and `..`.
const OWN: u64 = 2;

/// Has a request carried out by a thread for names.
fn handed_on(ticket: Ticket, act: impl FnOnce(Ticket) + Send + 'static) {
    let names = ticket.shared.names.clone();
    names.add(Box::new(move |thread| match thread {
        Ok(()) => act(ticket),
        Err(error) => ticket.fail_with("a request about names", &error),
    }));
}

/// Has a request answered by a thread for names.
fn later(ticket: Ticket, act: impl FnOnce(&Arc<Shared>, u64) -> Outcome + Send + 'static) {
    handed_on(ticket, |ticket| {
        let (shared, unique) = (ticket.shared.clone(), ticket.unique);
        ticket.give(act(&shared, unique));
    });
}

type Outcome = Result<Vec<u8>, Errno>;

pub(super) fn lookup(ticket: Ticket, folder: u64, name: Vec<u8>) {
    later(ticket, move |shared, _| {
        shared.tree.find(folder, &name).map(|found| proto::entry(&found))
    });
}

pub(super) fn attributes(ticket: Ticket, node: u64) {
    later(ticket, move |shared, _| {
        shared.tree.attributes(node).map(|found| proto::attributes(&found))
    });
}

/// Makes what lies behind `size` read as zeros.
pub(super) fn cut(ticket: Ticket, node: u64, handle: Option<u64>, size: u64) {
    handed_on(ticket, move |ticket| {
        let open = handle.and_then(|handle| ticket.shared.handles.get(handle));
        let disk = match open.filter(|open| open.writes) {
            Some(open) => Ok(open.disk.clone()),
            None => leased(&ticket.shared, node, true),
        };
        match disk {
            Err(errno) => ticket.fail(errno),
            Ok(disk) if disk.read_only() => ticket.fail(Errno::ROFS),
            // `thinply resize` does that.
            Ok(disk) if size > disk.size() => ticket.fail(Errno::PERM),
            Ok(disk) => work::cut(ticket, node, &disk, size),
        }
    });
}

/// The disk of a node.
pub(super) fn leased(shared: &Shared, node: u64, writes: bool) -> Result<Lease, Errno> {
    let name = shared.tree.disk_of(node)?;
    let disk = shared.tree.open(&name, writes).map_err(|error| {
        let name = if name.is_empty() { "the disk" } else { &name };
        shared.told(&format!("opening {name}"), &error)
    })?;
    shared.used.note(&disk);
    Ok(disk)
}

pub(super) fn open(ticket: Ticket, node: u64, access: Access) {
    let Access { writes, durable, cut } = access;
    later(ticket, move |shared, unique| {
        let disk = leased(shared, node, writes)?;
        if writes && disk.read_only() {
            return Err(Errno::ROFS);
        }
        if cut {
            disk.zero(0, disk.size(), ZeroMode::default())
                .map_err(|error| shared.told("cutting", &error))?;
        }
        let handle = shared.handles.add(unique, node, Open { disk, writes, durable });
        handle.map(proto::opened).map_err(|error| {
            if error.kind() == ErrorKind::NotConnected {
                return Errno::NOTCONN;
            }
            shared.log(&format!("noting an open file: {error}"));
            Errno::IO
        })
    });
}

/// Whoever had the file open is gone, whatever comes of this.
pub(super) fn release(ticket: Ticket, handle: u64) {
    later(ticket, move |shared, _| {
        if let Err(error) = shared.handles.release(handle).map(drop) {
            shared.log(&format!("noting a closed file: {error}"));
        }
        shared.file_closed();
        Ok(Vec::new())
    });
}

pub(super) fn open_folder(ticket: Ticket) {
    let handle = FOLDER | ticket.shared.next_folder.fetch_add(1, Ordering::Relaxed);
    ticket.succeed(&proto::opened_folder(handle));
}

pub(super) fn release_folder(ticket: Ticket, handle: u64) {
    guard(&ticket.shared.folders).remove(&handle);
    ticket.succeed(&[]);
}

pub(super) fn read_folder(ticket: Ticket, node: u64, handle: u64, offset: u64, length: usize) {
    later(ticket, move |shared, _| {
        let entries = listed(shared, node, handle, offset)?;
        let mut out = Vec::new();
        let own = [(".", 1), ("..", OWN)].into_iter().filter(|(_, place)| *place > offset);
        for (name, next) in own {
            proto::list(&mut out, length, node, next, true, name);
        }
        let from = entries.partition_point(|entry| entry.node <= offset);
        for Entry { node, folder, name } in entries.iter().skip(from) {
            if !proto::list(&mut out, length, *node, *node, *folder, name) {
                break;
            }
        }
        Ok(out)
    });
}

/// What is in a folder, listed once for whoever reads it from its beginning.
fn listed(shared: &Shared, node: u64, handle: u64, offset: u64) -> Result<Arc<Vec<Entry>>, Errno> {
    if offset > 0
        && let Some(entries) = guard(&shared.folders).get(&handle)
    {
        return Ok(entries.clone());
    }
    let entries = Arc::new(shared.tree.entries(node)?);
    guard(&shared.folders).insert(handle, entries.clone());
    Ok(entries)
}

/// The space of the file system that the layers are in.
pub(super) fn space(ticket: Ticket) {
    later(ticket, move |shared, _| {
        let found = statvfs(&shared.config.source)?;
        let blocks = |count: u64| (u128::from(count) * u128::from(found.f_frsize) / 4096) as u64;
        Ok(proto::space(&Space {
            blocks: blocks(found.f_blocks),
            free: blocks(found.f_bfree),
            available: blocks(found.f_bavail),
        }))
    });
}

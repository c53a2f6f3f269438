//! Drives a [`Negotiation`] over a socket, within the time allowed for it.

use std::time::{Duration, Instant};

use rustix::io::Errno as Host;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags};

use super::Shared;
use super::buffer::Received;
use super::link::{Gone, Link};
use crate::device::Device;
use crate::error::{Error, ErrorKind};
use crate::nbd::proto::{Catalog, Description, Negotiation, Refused, Session, Step};
use crate::serve::Lease;

/// The server's disks as one client sees them.
struct View<'a> {
    shared: &'a Shared,
    link: &'a Link,
}

impl View<'_> {
    /// What the client hears of an export that it can't have; the log hears why.
    fn refused(&self, name: &str, error: &Error) -> Refused {
        let kind = error.kind();
        if kind != ErrorKind::NotFound {
            self.link.log(&format!("export {name:?} is not to be had: {error}"));
        }
        let policy = matches!(kind, ErrorKind::PermissionDenied | ErrorKind::InUse);
        if policy { Refused::Policy } else { Refused::Unknown }
    }
}

impl Catalog for View<'_> {
    type Export = Lease;

    fn find(&self, name: &str) -> Result<Self::Export, Refused> {
        self.shared.leases.lease(name).map_err(|error| self.refused(name, &error))
    }

    fn look(&self, name: &str) -> Result<Description, Refused> {
        let looked = self.shared.leases.look(name);
        looked.map(|disk| self.describe(&disk)).map_err(|error| self.refused(name, &error))
    }

    fn describe(&self, export: &Self::Export) -> Description {
        Description {
            name: export.name().into(),
            description: export.description().into(),
            size: export.size(),
            read_only: export.read_only(),
            multi_conn: export.shared(),
        }
    }

    fn list(&self) -> Vec<(String, String)> {
        let listed = self.shared.leases.list().into_iter();
        listed.map(|disk| (disk.name, disk.description)).collect()
    }
}

/// Negotiates until the client starts the transmission phase; `None` if it leaves before. Bytes
/// that follow the handshake stay in `received`.
pub(super) fn negotiate(
    shared: &Shared,
    link: &Link,
    received: &mut Received,
) -> Result<Option<Session<Lease>>, Gone> {
    let mut deadline = Instant::now() + shared.config.handshake_timeout;
    let (mut negotiation, mut out) = (Negotiation::new(), Negotiation::greeting());
    loop {
        let begun = Instant::now();
        let (taken, step) = negotiation.feed(received.bytes(), &View { shared, link }, &mut out);
        // An export may keep the server waiting, which is not the client's doing.
        deadline += begun.elapsed();
        received.take(taken);
        if !out.is_empty() {
            limit(link, Timeout::Send, deadline)?;
            link.send_all(&out, SendFlags::empty())?;
            out.clear();
        }
        match step {
            Step::Again => {}
            Step::NeedMore => receive(link, received, deadline)?,
            Step::Transmit(session) => {
                set_socket_timeout(link.socket(), Timeout::Send, None).map_err(|_| Gone)?;
                return Ok(Some(session));
            }
            Step::Close(reason) => {
                if !reason.is_empty() {
                    link.log(&format!("hanging up: {reason}"));
                }
                return Ok(None);
            }
        }
    }
}

fn receive(link: &Link, received: &mut Received, deadline: Instant) -> Result<(), Gone> {
    limit(link, Timeout::Recv, deadline)?;
    match link.receive(received.spare(), RecvFlags::empty()) {
        Ok(0) => Err(Gone),
        Ok(length) => {
            received.received(length);
            Ok(())
        }
        // The deadline is looked at before the next try.
        Err(Host::INTR | Host::AGAIN) => Ok(()),
        Err(_) => Err(Gone),
    }
}

/// Has the next call in one direction return when the handshake's time is over.
fn limit(link: &Link, direction: Timeout, deadline: Instant) -> Result<(), Gone> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        link.log("hanging up: the handshake took too long");
        return Err(Gone);
    }
    let left = left.max(Duration::from_millis(1));
    set_socket_timeout(link.socket(), direction, Some(left)).map_err(|_| Gone)
}

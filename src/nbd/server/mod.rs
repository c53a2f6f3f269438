//! An NBD server: sockets, threads and buffers around the pure [`proto`](super::proto).
//!
//! It owns the listeners and a thread for each connection, which has its disk by a
//! [`Lease`](crate::serve::Lease); what has to wait is done by the disk's own threads. Invariants: a
//! client can hold up only its own connection, whatever it sends or doesn't; a device that hangs holds
//! up only its own export; a FLUSH covers every write that was replied to before it, on any connection
//! of the export; [`Server::run`] returns within the drain time and the flush time after
//! [`Handle::shutdown`].

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno as Host;

mod buffer;
mod connection;
mod handshake;
mod link;
mod listen;
mod work;

pub use listen::Listener;

use crate::error::{Error, ErrorKind, Result};
use crate::serve::{Leases, Log, Used, guard, spawn};
use connection::Lookouts;
use link::Link;

/// Tells a line to whoever hears, and goes on whatever comes of that.
fn tell(log: &Log, line: &str) {
    let _ = catch_unwind(AssertUnwindSafe(|| log(line)));
}

/// How long a server without descriptors or memory waits before it accepts again.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long connections have to end after they were cut.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// Limits and habits of a server.
#[derive(Clone)]
pub struct ServerConfig {
    /// Clients served at a time; more are hung up on at once. Default 1024.
    pub max_connections: usize,
    /// How long a client may take to negotiate. Default 10 seconds.
    pub handshake_timeout: Duration,
    /// Whether a change that finds no space on the host waits until there is some, for as long as the
    /// client is there. Default no.
    pub wait_for_space: bool,
    /// How long running requests have to finish at shutdown. Default 10 seconds.
    pub drain_timeout: Duration,
    /// How long the flushes at the end may take. Default 60 seconds.
    pub flush_timeout: Duration,
    /// Shut down when the last client hangs up. Default no.
    pub stop_with_last_client: bool,
    /// Hears of errors. Default nobody.
    pub log: Log,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            handshake_timeout: Duration::from_secs(10),
            wait_for_space: false,
            drain_timeout: Duration::from_secs(10),
            flush_timeout: Duration::from_secs(60),
            stop_with_last_client: false,
            log: Arc::new(|_| {}),
        }
    }
}

/// A server that listens. [`Server::run`] serves.
pub struct Server {
    listeners: Vec<Listener>,
    shared: Arc<Shared>,
}

/// Stops a server from another thread.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

/// What all threads of a server know.
struct Shared {
    config: ServerConfig,
    leases: Arc<dyn Leases>,
    stopping: AtomicBool,
    /// Readable once `stopping` is set.
    stop: OwnedFd,
    clients: Mutex<Clients>,
    left: Condvar,
    lookouts: Lookouts,
    /// Disks that clients have had, to be flushed at the end.
    used: Used,
}

#[derive(Default)]
struct Clients {
    links: HashMap<u64, Arc<Link>>,
    next: u64,
}

impl Server {
    /// A server of the disks that `leases` gives out on `listeners`, which may be clients' first sight of it: they can
    /// connect from now on and are answered once [`Server::run`] is called.
    pub fn new(
        listeners: Vec<Listener>,
        leases: Arc<dyn Leases>,
        config: ServerConfig,
    ) -> Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io(error.into(), "making an eventfd"))?;
        let shared = Arc::new(Shared {
            config,
            leases,
            stopping: AtomicBool::new(false),
            stop,
            clients: Mutex::default(),
            left: Condvar::new(),
            lookouts: Lookouts::default(),
            used: Used::default(),
        });
        Ok(Self { listeners, shared })
    }

    /// The listeners, to ask for their URIs.
    pub fn listeners(&self) -> &[Listener] {
        &self.listeners
    }

    /// What stops this server.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    /// Serves until [`Handle::shutdown`]. Then it stops listening and removes its socket files,
    /// gives running requests `drain_timeout` to finish, ends the connections, and flushes every
    /// export that was used. Fails with the first flush's error, or with [`ErrorKind::Io`] if
    /// requests or flushes were still running at the end; then threads may go on using devices.
    pub fn run(self) -> Result<()> {
        let Self { listeners, shared } = self;
        let accepted = shared.accept_until_stopped(&listeners);
        drop(listeners);
        let drained = shared.drain();
        let flushed = shared.used.flush(shared.config.flush_timeout);
        accepted.and(flushed).and(drained)
    }
}

impl Handle {
    /// Has [`Server::run`] come to its end; doesn't wait for it. From now on clients' requests
    /// fail with `NBD_ESHUTDOWN`. Only stores a flag and writes to an eventfd, which a signal
    /// handler may do.
    pub fn shutdown(&self) {
        self.0.shut_down();
    }
}

impl Shared {
    fn shut_down(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        // Fails only if the counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }

    fn accept_until_stopped(self: &Arc<Self>, listeners: &[Listener]) -> Result<()> {
        while !self.stopping.load(Ordering::Relaxed) {
            let mut fds = vec![PollFd::new(&self.stop, PollFlags::IN)];
            fds.extend(listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(Host::INTR) => {}
                Err(error) => {
                    self.shut_down();
                    return Err(Error::io(error.into(), "waiting for clients"));
                }
            }
            for (listener, fd) in listeners.iter().zip(&fds[1..]) {
                if !fd.revents().is_empty() {
                    self.accept(listener);
                }
            }
        }
        Ok(())
    }

    fn accept(self: &Arc<Self>, listener: &Listener) {
        match listener.accept() {
            Ok(socket) => self.welcome(socket),
            // Gone again, or taken by another process that shares the socket.
            Err(Host::AGAIN | Host::INTR | Host::CONNABORTED) => {}
            Err(error) => {
                // The client stays in the backlog and would be reported again at once.
                tell(&self.config.log, &format!("cannot accept clients for now: {error}"));
                let _ = poll(&mut [PollFd::new(&self.stop, PollFlags::IN)], Some(&ACCEPT_PAUSE));
            }
        }
    }

    fn welcome(self: &Arc<Self>, socket: OwnedFd) {
        let mut clients = guard(&self.clients);
        if clients.links.len() >= self.config.max_connections {
            drop(clients);
            tell(&self.config.log, "hanging up on a client: too many connections");
            return;
        }
        let id = clients.next;
        clients.next += 1;
        let waits = self.config.wait_for_space;
        let peer = format!("client {id}");
        let link = Arc::new(Link::new(socket, peer, self.config.log.clone(), waits));
        clients.links.insert(id, Arc::clone(&link));
        drop(clients);
        let guard = Registered { shared: Arc::clone(self), id };
        if let Err(error) = spawn("nbd-client", move || connection::serve(&guard.shared, &link)) {
            let line = format!("hanging up on client {id}: no thread for it: {error}");
            tell(&self.config.log, &line);
        }
    }

    /// Waits until all connections have ended, and ends those that don't.
    fn drain(&self) -> Result<()> {
        guard(&self.clients).links.values().for_each(|link| link.stop_reading());
        if self.wait_for_clients(self.config.drain_timeout) > 0 {
            guard(&self.clients).links.values().for_each(|link| link.hang_up());
            let left = self.wait_for_clients(LAST_WAIT);
            if left > 0 {
                let detail = format!("requests of {left} clients were still running at shutdown");
                return Err(Error::new(ErrorKind::Io, detail));
            }
        }
        Ok(())
    }

    fn wait_for_clients(&self, limit: Duration) -> usize {
        let clients = guard(&self.clients);
        let waited =
            self.left.wait_timeout_while(clients, limit, |clients| !clients.links.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.links.len()
    }
}

/// Takes a connection off the list when its thread ends, even by a panic.
struct Registered {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut clients = guard(&self.shared.clients);
        clients.links.remove(&self.id);
        if clients.links.is_empty() && self.shared.config.stop_with_last_client {
            self.shared.shut_down();
        }
        self.shared.left.notify_all();
    }
}

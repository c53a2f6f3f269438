//! Listening sockets: made here or inherited, and where to find them.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, fs, io, process};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_nodelay,
    set_tcp_user_timeout, socket_acceptconn, socket_domain,
};
use rustix::net::{AddressFamily, SocketFlags, accept_with};

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::address::{Address, Place};

/// The first descriptor that systemd hands over (`SD_LISTEN_FDS_START`).
const FIRST_ACTIVATED: RawFd = 3;
/// How long a TCP client may be silent before its host is asked whether it is there, how often, and
/// how many times it may leave that unanswered.
const HOST_SILENT: Duration = Duration::from_secs(30);
const HOST_PROBE: Duration = Duration::from_secs(10);
const HOST_PROBES: u32 = 3;

/// A socket that clients connect to. Removes its socket file, if it made one, when dropped.
pub struct Listener {
    socket: Socket,
    /// The socket file made here, with its device and inode numbers.
    made: Option<(PathBuf, u64, u64)>,
}

enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens on a Unix socket. A socket file on which nobody listens any more is replaced; one
    /// in use fails with [`ErrorKind::InUse`], any other file with [`ErrorKind::Exists`].
    pub fn unix(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let fail = |error| Error::io(error, "listening on a Unix socket").in_file(path);
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path)
            }
            result => result,
        };
        let listener = listener.map_err(fail)?;
        let file = fs::symlink_metadata(path).map_err(fail)?;
        let made = Some((path.to_owned(), file.dev(), file.ino()));
        Self::new(Socket::Unix(listener), made)
    }

    /// Listens on `address`, such as `localhost:10809` or `[::1]:0`; port 0 takes a free one.
    pub fn tcp(address: &str) -> Result<Self> {
        // std sets SO_REUSEADDR, so a restarted server gets its port back at once.
        let listener = TcpListener::bind(address)
            .map_err(|error| Error::io(error, format!("listening on {address}")))?;
        Self::new(Socket::Tcp(listener), None)
    }

    /// Takes over a socket that listens already. Fails with [`ErrorKind::InvalidInput`] if it is
    /// neither a Unix nor a TCP socket or doesn't listen.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let invalid = || Error::new(ErrorKind::InvalidInput, "not a listening socket");
        if !socket_acceptconn(&fd).map_err(|_| invalid())? {
            return Err(invalid());
        }
        match socket_domain(&fd).map_err(|_| invalid())? {
            AddressFamily::UNIX => Self::new(Socket::Unix(fd.into()), None),
            AddressFamily::INET | AddressFamily::INET6 => Self::new(Socket::Tcp(fd.into()), None),
            _ => Err(invalid()),
        }
    }

    /// The sockets that systemd (or `systemd-socket-activate`) opened for this process, as
    /// `LISTEN_PID` and `LISTEN_FDS` say; none if it wasn't started that way. They can be taken
    /// once.
    pub fn activated() -> Result<Vec<Self>> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let number = |name| env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
        let count = number("LISTEN_FDS").unwrap_or(0).min(1024) as RawFd;
        let ours = number("LISTEN_PID") == Some(process::id());
        if !ours || count == 0 || TAKEN.swap(true, Ordering::Relaxed) {
            return Ok(Vec::new());
        }
        let fds = (FIRST_ACTIVATED..FIRST_ACTIVATED + count).map(|fd| {
            // SAFETY: whoever set LISTEN_PID to this process opened these descriptors for it to
            // own; TAKEN makes sure that nothing else of this process takes them too.
            unsafe { OwnedFd::from_raw_fd(fd) }
        });
        // All of them first: an error must not leave some without an owner.
        let fds: Vec<_> = fds.collect();
        let close_on_exec = |fd: OwnedFd| {
            fcntl_setfd(&fd, FdFlags::CLOEXEC)
                .map_err(|error| Error::io(error.into(), "taking over an activated socket"))?;
            Self::from_fd(fd)
        };
        fds.into_iter().map(close_on_exec).collect()
    }

    fn new(socket: Socket, made: Option<(PathBuf, u64, u64)>) -> Result<Self> {
        let this = Self { socket, made };
        let nonblocking = match &this.socket {
            Socket::Unix(listener) => listener.set_nonblocking(true),
            Socket::Tcp(listener) => listener.set_nonblocking(true),
        };
        nonblocking.map_err(|error| Error::io(error, "preparing a listening socket"))?;
        Ok(this)
    }

    /// The NBD URI of `export` on this socket, percent-encoded, to be used from any folder. A socket
    /// bound to all addresses shows as `localhost`.
    pub fn uri(&self, export: &str) -> String {
        let place = match &self.socket {
            Socket::Unix(listener) => {
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                let path = path.unwrap_or(Path::new(""));
                Place::Unix(std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
            }
            Socket::Tcp(listener) => {
                Place::Tcp(listener.local_addr().map_or_else(|_| String::new(), host_and_port))
            }
        };
        Address { place, export: export.to_owned() }.to_string()
    }

    /// The address of a TCP socket, with the port that was taken.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Unix(_) => None,
            Socket::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    /// The next client, if one waits.
    pub(super) fn accept(&self) -> rustix::io::Result<OwnedFd> {
        let client = accept_with(self.as_fd(), SocketFlags::CLOEXEC)?;
        if matches!(self.socket, Socket::Tcp(_)) {
            // Replies are sent in batches already.
            set_tcp_nodelay(&client, true)?;
            notice_lost_host(&client)?;
        }
        Ok(client)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix(listener) => listener.as_fd(),
            Socket::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, device, inode)) = &self.made else { return };
        // Somebody may have put another socket there meanwhile.
        let file = fs::symlink_metadata(path);
        if file.is_ok_and(|file| (file.dev(), file.ino()) == (*device, *inode)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes a socket file if it refuses connections.
fn remove_stale(path: &Path) -> Result<()> {
    let fail = |error| Error::io(error, "looking at an old socket file").in_file(path);
    if !fs::symlink_metadata(path).map_err(fail)?.file_type().is_socket() {
        let detail = "exists and is not a socket";
        return Err(Error::new(ErrorKind::Exists, detail).in_file(path));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(fail)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => {
            let detail = "another server listens on this socket";
            Err(Error::new(ErrorKind::InUse, detail).in_file(path))
        }
    }
}

/// Ends a connection about a minute after the other host has gone, whether it was idle or had replies
/// under way. The kernel's own settings take over two hours, for which nobody else gets the export.
fn notice_lost_host(client: &OwnedFd) -> rustix::io::Result<()> {
    set_socket_keepalive(client, true)?;
    set_tcp_keepidle(client, HOST_SILENT)?;
    set_tcp_keepintvl(client, HOST_PROBE)?;
    set_tcp_keepcnt(client, HOST_PROBES)?;
    let most = HOST_SILENT + HOST_PROBE * HOST_PROBES;
    set_tcp_user_timeout(client, most.as_millis() as u32)
}

fn host_and_port(address: SocketAddr) -> String {
    let port = address.port();
    match address.ip() {
        ip if ip.is_unspecified() => format!("localhost:{port}"),
        IpAddr::V4(ip) => format!("{ip}:{port}"),
        IpAddr::V6(ip) => format!("[{ip}]:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_percent_encoded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a b?.sock");
        let listener = Listener::unix(&path).unwrap();
        let uri = listener.uri("disk & ü");
        assert!(uri.starts_with("nbd+unix:///disk%20%26%20%C3%BC?socket=/"), "{uri}");
        assert!(uri.ends_with("/a%20b%3F.sock"), "{uri}");

        let listener = Listener::tcp("127.0.0.1:0").unwrap();
        let port = listener.tcp_address().unwrap().port();
        assert_eq!(listener.uri("x"), format!("nbd://127.0.0.1:{port}/x"));
        assert_eq!(host_and_port("[::1]:7".parse().unwrap()), "[::1]:7");
        assert_eq!(host_and_port("0.0.0.0:7".parse().unwrap()), "localhost:7");
    }

    #[test]
    fn stale_sockets_are_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::unix(&path).unwrap();
        assert_eq!(Listener::unix(&path).err().unwrap().kind(), ErrorKind::InUse);
        drop(listener);
        assert!(!path.exists());

        fs::write(&path, "precious").unwrap();
        assert_eq!(Listener::unix(&path).err().unwrap().kind(), ErrorKind::Exists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_file_that_was_replaced_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = Listener::unix(&path).unwrap();
        fs::rename(&path, folder.path().join("away")).unwrap();
        let _second = Listener::unix(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[test]
    fn a_host_that_is_gone_is_noticed_within_a_minute() {
        use rustix::net::sockopt::{
            socket_keepalive, tcp_keepcnt, tcp_keepidle, tcp_keepintvl, tcp_user_timeout,
        };
        let listener = Listener::tcp("127.0.0.1:0").unwrap();
        let _client = std::net::TcpStream::connect(listener.tcp_address().unwrap()).unwrap();
        let accepted = listener.accept().unwrap();
        assert!(socket_keepalive(&accepted).unwrap());
        let probes = tcp_keepintvl(&accepted).unwrap() * tcp_keepcnt(&accepted).unwrap();
        assert_eq!(tcp_keepidle(&accepted).unwrap() + probes, Duration::from_secs(60));
        assert_eq!(tcp_user_timeout(&accepted).unwrap(), 60_000);
    }

    #[test]
    fn only_listening_sockets_are_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let listening = UnixListener::bind(folder.path().join("socket")).unwrap();
        assert!(Listener::from_fd(listening.into()).is_ok());
        let (one, _other) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        for fd in [OwnedFd::from(one), OwnedFd::from(file)] {
            assert_eq!(Listener::from_fd(fd).err().unwrap().kind(), ErrorKind::InvalidInput);
        }
    }
}

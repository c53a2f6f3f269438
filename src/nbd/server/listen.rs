//! Listening sockets: made here or inherited, and where to find them.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::{env, fs, io};

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::sockopt::{set_tcp_nodelay, socket_acceptconn, socket_domain};
use rustix::net::{AddressFamily, SocketFlags, accept_with};

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::address::{Address, Place};
use crate::serve::socket::{MAX_PATH, bind, connect, notice_lost_host};

/// The first descriptor that systemd hands over (`SD_LISTEN_FDS_START`).
const FIRST_ACTIVATED: RawFd = 3;

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
        let listener = match bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                bind(path)
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

    /// The sockets that systemd (or `systemd-socket-activate`) opened for the process `pid`, which is
    /// this one or the one that started it, as `LISTEN_PID` and `LISTEN_FDS` say; none if it wasn't
    /// started that way. They can be taken once.
    pub fn activated(pid: u32) -> Result<Vec<Self>> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let number = |name| env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
        let count = number("LISTEN_FDS").unwrap_or(0).min(1024) as RawFd;
        let ours = number("LISTEN_PID") == Some(pid);
        if !ours || count == 0 || TAKEN.swap(true, Ordering::Relaxed) {
            return Ok(Vec::new());
        }
        let fds = (FIRST_ACTIVATED..FIRST_ACTIVATED + count).map(|fd| {
            // SAFETY: whoever set LISTEN_PID to this process, or to the one that started it, opened these
            // descriptors for it to own; TAKEN makes sure that nothing else of this process takes them too.
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
            Socket::Unix(listener) => Place::Unix(self.path(listener)),
            Socket::Tcp(listener) => {
                Place::Tcp(listener.local_addr().map_or_else(|_| String::new(), host_and_port))
            }
        };
        Address { place, export: export.to_owned() }.to_string()
    }

    /// Where a Unix socket is, from any folder. One made here may have been bound by another path.
    fn path(&self, listener: &UnixListener) -> PathBuf {
        let address = listener.local_addr().ok();
        let bound = address.as_ref().and_then(|address| address.as_pathname());
        let made = self.made.as_ref().map(|(path, ..)| &**path);
        let path = made.or(bound).unwrap_or(Path::new(""));
        std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
    }

    /// The length in bytes of a Unix socket's path, where it is more than what most programs can
    /// connect to: they have to be given another one, by way of a symbolic link or of the folder
    /// that they run in. The client here takes it as it is.
    pub fn overlong_path(&self) -> Option<usize> {
        match &self.socket {
            Socket::Unix(listener) => {
                Some(self.path(listener).as_os_str().len()).filter(|length| *length > MAX_PATH)
            }
            Socket::Tcp(_) => None,
        }
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
            notice_lost_host(&client).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
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
    match connect(path) {
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
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

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
    fn a_long_path_shows_as_it_is_and_is_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("d".repeat(100));
        fs::create_dir(&deep).unwrap();
        drop(bind(&deep.join("socket")).unwrap());
        let listener = Listener::unix(deep.join("socket")).unwrap();
        let address: Address = listener.uri("x").parse().unwrap();
        assert_eq!(address.place, Place::Unix(deep.join("socket")));
        assert_eq!(listener.overlong_path(), Some(deep.join("socket").as_os_str().len()));
        assert_eq!(Listener::unix(deep.join("socket")).err().unwrap().kind(), ErrorKind::InUse);
        drop(listener);
        assert!(!deep.join("socket").exists());
        let short = Listener::unix(folder.path().join("s")).unwrap();
        assert_eq!(short.overlong_path(), None);
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

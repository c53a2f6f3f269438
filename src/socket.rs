//! What all sockets here have in common, whoever connects to them.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
    set_tcp_user_timeout,
};

#[cfg(not(simulation))]
mod descriptors;
#[cfg(not(simulation))]
pub use descriptors::{receive_descriptors, send_descriptors};

/// Longest path of a Unix socket that the kernel takes, in bytes.
pub const MAX_PATH: usize = 107;

/// How long a TCP connection may be silent before the other host is asked whether it is there, how
/// often, and how many times it may leave that unanswered.
const HOST_SILENT: Duration = Duration::from_secs(30);
const HOST_PROBE: Duration = Duration::from_secs(10);
const HOST_PROBES: u32 = 3;

/// Listens on a Unix socket, however long its path is.
///
/// # Errors
/// Host errors; one of a name that has more than some 80 bytes itself, in a path of more than
/// [`MAX_PATH`].
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    through(path, |path| UnixListener::bind(path))
}

/// Connects to a Unix socket, however long its path is.
///
/// # Errors
/// As [`bind`].
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    through(path, |path| UnixStream::connect(path))
}

/// Does something with a path that the kernel takes for this one: a long one goes through a
/// descriptor of its folder.
fn through<T>(path: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let name = path.file_name();
    let (Some(name), true) = (name, path.as_os_str().as_bytes().len() > MAX_PATH) else {
        return act(path);
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(parent.unwrap_or(Path::new(".")))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name);
    act(&short)
}

/// Ends a TCP connection about a minute after the other host has gone, whether it was idle or had
/// something under way. The kernel's own settings take over two hours, for which nobody else gets an
/// export.
pub fn notice_lost_host(connection: impl AsFd) -> io::Result<()> {
    set_socket_keepalive(&connection, true)?;
    set_tcp_keepidle(&connection, HOST_SILENT)?;
    set_tcp_keepintvl(&connection, HOST_PROBE)?;
    set_tcp_keepcnt(&connection, HOST_PROBES)?;
    let most = HOST_SILENT + HOST_PROBE * HOST_PROBES;
    Ok(set_tcp_user_timeout(&connection, most.as_millis() as u32)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_path_of_any_length_is_listened_on_and_found() {
        let folder = tempfile::tempdir().unwrap();
        let mut deep = folder.path().to_owned();
        for _ in 0..6 {
            deep.push("a-folder-with-a-name-of-forty-bytes-here");
        }
        std::fs::create_dir_all(&deep).unwrap();
        for path in [folder.path().join("s"), deep.join("s"), deep.join("s".repeat(80))] {
            let listener = bind(&path).unwrap();
            let mut client = connect(&path).unwrap();
            client.write_all(b"!").unwrap();
            let mut byte = [0];
            listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
            assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        }
        assert_eq!(connect(&deep.join("t")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(bind(&deep.join("s".repeat(120))).is_err());
    }

    #[test]
    fn a_host_that_is_gone_is_noticed_within_a_minute() {
        use rustix::net::sockopt::{
            socket_keepalive, tcp_keepcnt, tcp_keepidle, tcp_keepintvl, tcp_user_timeout,
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        notice_lost_host(&client).unwrap();
        assert!(socket_keepalive(&client).unwrap());
        let probes = tcp_keepintvl(&client).unwrap() * tcp_keepcnt(&client).unwrap();
        assert_eq!(tcp_keepidle(&client).unwrap() + probes, Duration::from_secs(60));
        assert_eq!(tcp_user_timeout(&client).unwrap(), 60_000);
    }
}

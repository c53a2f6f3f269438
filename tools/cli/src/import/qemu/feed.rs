//! The files of an image as QEMU gets them: exports of a server of ours, over connections that are made
//! here and handed on. So it opens no file, needs no right to any, and sees what was checked.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use thinply::device::{
    Attempt, Detail, Device, Disk, Extent, Gather, NotDone, Prefetch, Scatter, Wait, ZeroMode,
    check_range, push_extent,
};
use thinply::error::{Error, ErrorKind, Result};
use thinply::nbd::server::{Handle, Listener, Server, ServerConfig};
use thinply::serve::{Opened, Served, Table};

use crate::import::file::ImageFile;

/// How long QEMU may take to start on a busy machine.
const HANDSHAKE: Duration = Duration::from_secs(60);

/// A file, of which the first bytes stay what they were when they were looked at.
#[derive(Debug)]
pub struct Feed {
    file: ImageFile,
    first: Vec<u8>,
}

impl Feed {
    /// A file that begins with `first`, whatever it begins with.
    pub fn new(file: ImageFile, first: &[u8]) -> Self {
        let there = first.len().min(usize::try_from(file.length).unwrap_or(usize::MAX));
        Self { file, first: first[..there].to_vec() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.fill(offset, buf)?;
        if let Some(first) = usize::try_from(offset).ok().and_then(|at| self.first.get(at..)) {
            let count = first.len().min(buf.len());
            buf[..count].copy_from_slice(&first[..count]);
        }
        Ok(())
    }
}

fn read_only<T>() -> Result<T> {
    Err(Error::new(ErrorKind::ReadOnly, "an image is only read"))
}

impl Device for Feed {
    fn size(&self) -> u64 {
        self.file.length
    }

    fn read_only(&self) -> bool {
        true
    }

    fn try_read(&self, offset: u64, mut into: Scatter<'_>, wait: Wait) -> Attempt {
        check_range(self.size(), offset, into.len() as u64)?;
        if wait != Wait::Allowed {
            return Err(NotDone::WouldWait);
        }
        if let Some(buf) = into.own() {
            return Ok(self.fill(offset, buf)?);
        }
        let mut buf = vec![0; into.len()];
        self.fill(offset, &mut buf)?;
        into.copy_from(&buf);
        Ok(())
    }

    fn try_write(&self, _: u64, _: Gather<'_>, _: Wait) -> Result<u64> {
        read_only()
    }

    fn zero(&self, _: u64, _: u64, _: ZeroMode) -> Result<()> {
        read_only()
    }

    fn trim(&self, _: u64, _: u64) -> Result<()> {
        read_only()
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn try_extents(
        &self,
        offset: u64,
        length: u64,
        _: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
        wait: Wait,
    ) -> Attempt {
        check_range(self.size(), offset, length)?;
        if wait != Wait::Allowed {
            return Err(NotDone::WouldWait);
        }
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let (hole, length) = if at < self.first.len() as u64 {
                (false, self.first.len() as u64 - at)
            } else {
                self.file.hole(at)?
            };
            let length = length.min(end - at);
            if !push_extent(out, limit, Extent { length, hole }) {
                break;
            }
            at += length;
        }
        Ok(())
    }

    fn prefetch(&self, _: u64, _: u64) -> Result<Prefetch> {
        Ok(Prefetch::InPart)
    }
}

impl Disk for Feed {}

/// Serves files until their user is gone, or until this is dropped.
pub struct Feeding {
    handle: Handle,
    serving: Option<JoinHandle<Result<()>>>,
}

impl Feeding {
    /// Serves these files as exports `0`, `1` and so on; answers a connection for each. The server's
    /// socket has a name in `folder` until the connections are made.
    pub fn start(files: &[Arc<Feed>], folder: &Path) -> Result<(Self, Vec<OwnedFd>)> {
        let table = Table::new();
        for (number, feed) in files.iter().enumerate() {
            table.insert(Arc::new(Served::new(
                number.to_string(),
                Opened::new(Arc::clone(feed)),
            )?))?;
        }
        let path = folder.join("feed");
        let listener = Listener::unix(&path)?;
        let connect = |_| UnixStream::connect(&path).map(OwnedFd::from);
        let connections: std::io::Result<Vec<_>> = files.iter().map(connect).collect();
        let connections =
            connections.map_err(|error| Error::io(error, "connecting to a server of ours"))?;
        let config = ServerConfig {
            max_connections: files.len(),
            handshake_timeout: HANDSHAKE,
            drain_timeout: Duration::from_secs(1),
            stop_with_last_client: true,
            ..ServerConfig::default()
        };
        let server = Server::new(vec![listener], Arc::new(table), config)?;
        let handle = server.handle();
        let serving = std::thread::Builder::new()
            .name("image-files".into())
            .spawn(|| server.run())
            .map_err(|error| Error::io(error, "starting a thread"))?;
        Ok((Self { handle, serving: Some(serving) }, connections))
    }
}

impl Drop for Feeding {
    fn drop(&mut self) {
        self.handle.shutdown();
        if let Some(serving) = self.serving.take() {
            // What it could not serve, its user has told of.
            let _ = serving.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::share::ShareArg;

    #[test]
    fn what_was_checked_is_what_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [7; 10_000]).unwrap();
        let feed = Feed::new(ImageFile::open(&path, ShareArg::default()).unwrap(), &[1, 2, 3, 4]);
        // Whatever becomes of it meanwhile.
        std::fs::write(&path, [9; 10_000]).unwrap();
        let read = |offset, length| {
            let mut buf = vec![0; length];
            feed.read(offset, &mut buf).map(|()| buf)
        };
        assert_eq!(read(0, 6).unwrap(), [1, 2, 3, 4, 9, 9]);
        assert_eq!(read(2, 1).unwrap(), [3]);
        assert_eq!(read(4, 2).unwrap(), [9, 9]);
        assert_eq!(read(9_999, 2).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(feed.write(0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
        let never = feed.try_read(0, (&mut [0; 4]).into(), Wait::Never);
        assert!(matches!(never, Err(NotDone::WouldWait)));
        let short = Feed::new(ImageFile::open(&path, ShareArg::default()).unwrap(), &[0; 20_000]);
        assert_eq!(short.first.len(), 10_000);
    }
}

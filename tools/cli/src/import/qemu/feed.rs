//! The files of an image as QEMU gets them: exports of a server of ours, over connections that are made
//! here and handed on. So it opens no file, needs no right to any, and sees what was checked.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use thinply::device::{
    Attempt, Detail, Device, Disk, Extent, Gather, NotDone, Prefetch, Scatter, Wait, ZeroMode,
    check_range, push_extent,
};
use thinply::error::{Error, ErrorKind, Result};
use thinply::nbd::server::{Handle, Listener, Server, ServerConfig};
use thinply::serve::{Opened, Served, Table};
use thinply::types::SECTOR_SIZE;

use crate::import::file::ImageFile;

/// How long QEMU may take to start on a busy machine.
const HANDSHAKE: Duration = Duration::from_secs(60);

/// The size of a file that is shown without its end: more than any format has places for in one.
const ENDLESS: u64 = 1 << 60;

/// A file, of which the first bytes stay what they were when they were looked at.
#[derive(Debug)]
pub struct Feed {
    file: ImageFile,
    first: Vec<u8>,
    /// As it is shown.
    size: u64,
    /// Length of a look at the beginning, which may go beyond the end.
    glance: u64,
    /// The furthest end of what was asked for and isn't there; 0 if all was.
    missed: AtomicU64,
}

impl Feed {
    /// A file that begins with `first`, whatever it begins with.
    pub fn new(file: ImageFile, first: &[u8]) -> Self {
        let there = first.len().min(usize::try_from(file.length).unwrap_or(usize::MAX));
        let (first, size) = (first[..there].to_vec(), file.length);
        Self { file, first, size, glance: 0, missed: AtomicU64::default() }
    }

    /// Shows the file without its end. QEMU takes what lies beyond the end of a file for zeros and
    /// doesn't ask for it; so it asks, and a file that was cut off is found out. Not for formats that
    /// look for something at the end; of those QEMU itself checks where things lie. `glance` is the
    /// length of a first look from the beginning on, which is not meant to be all there.
    #[must_use]
    pub fn endless(mut self, glance: u64) -> Self {
        (self.size, self.glance) = (ENDLESS, glance);
        self
    }

    /// Why the file can't be all of it, if more was asked for than there is.
    pub fn cut_off(&self) -> Option<Error> {
        let (end, length) = (self.missed.load(Ordering::Relaxed), self.file.length);
        let detail = format!(
            "the image is cut off: its reader asked for bytes up to {end}, the file has {length}"
        );
        let error = || Error::new(ErrorKind::Corrupt, detail).in_file(self.path());
        (end > 0).then(error)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    fn is_glance(&self, offset: u64, end: u64) -> bool {
        offset == 0 && end <= self.glance
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset + buf.len() as u64;
        // The rest of a last sector that was begun is nobody's.
        let whole = self.file.length.next_multiple_of(SECTOR_SIZE);
        if end > whole && !self.is_glance(offset, end) {
            self.missed.fetch_max(end, Ordering::Relaxed);
            return Err(Error::new(ErrorKind::Corrupt, "the file is cut off").in_file(self.path()));
        }
        let there = self.file.length.saturating_sub(offset).min(buf.len() as u64);
        let (stored, rest) = buf.split_at_mut(there as usize);
        rest.fill(0);
        self.file.fill(offset, stored)?;
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
        self.size
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
            } else if at < self.file.length && !self.is_glance(offset, end) {
                self.file.hole(at)?
            } else {
                // Not to be passed over, or to be read at once.
                (false, end - at)
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

    #[test]
    fn what_is_asked_for_beyond_the_end_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [7; 10_000]).unwrap();
        let file = ImageFile::open(&path, ShareArg::default()).unwrap();
        let feed = Feed::new(file, &[]).endless(20_000);
        let mut buf = [1; 1000];
        feed.read(9_500, &mut buf[..740]).unwrap();
        assert!(buf[..500] == [7; 500] && buf[500..740] == [0; 240]);
        assert!(feed.cut_off().is_none());
        let mut extents = Vec::new();
        feed.extents(9_000, 4_000, Detail::Bitmaps, 9, &mut extents).unwrap();
        assert!(extents.iter().all(|extent| !extent.hole));
        feed.read(0, &mut [0; 20_000]).unwrap();
        assert!(feed.cut_off().is_none());
        extents.clear();
        feed.extents(0, 20_000, Detail::Bitmaps, 9, &mut extents).unwrap();
        assert_eq!(extents, [Extent { length: 20_000, hole: false }]);
        assert!(feed.read(0, &mut [0; 20_001]).is_err());
        assert!(feed.read(9_500, &mut buf[..741]).is_err());
        assert!(feed.read(30_000, &mut buf).is_err());
        assert!(feed.read(20_000, &mut buf).is_err());
        let message = feed.cut_off().unwrap().to_string();
        assert!(message.contains("bytes up to 31000, the file has 10000"), "{message}");
    }
}

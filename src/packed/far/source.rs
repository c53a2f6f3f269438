//! Where the bytes of a layer can be had from.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;
use crate::storage::{Storage, failed, read_exact_at};

/// Ranges of bytes on request: a file, or an object of a registry. It is not trusted; what it sends
/// is verified.
pub trait ByteSource: Send + Sync + Debug {
    /// What it is called in messages.
    fn name(&self) -> &Path;

    /// How many bytes there are. Memory for the layer's directory follows what is really sent, up
    /// to this length.
    ///
    /// # Errors
    /// Whatever keeps it from being known; it is asked again by the next open.
    fn length(&self) -> Result<u64>;

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// Whatever keeps all of them from being had. Nothing remembers it: the next read asks again, so
    /// how often to try and how long to wait is the source's own affair.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
}

/// A file as a source.
#[derive(Clone, Debug)]
pub struct FileSource(pub Arc<dyn Storage>);

impl ByteSource for FileSource {
    fn name(&self) -> &Path {
        self.0.path()
    }

    fn length(&self) -> Result<u64> {
        self.0.length().map_err(failed(&*self.0, "reading the length", 0))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        read_exact_at(&*self.0, buf, offset).map_err(failed(&*self.0, "reading", offset))
    }
}

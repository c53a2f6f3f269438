//! What a container changed: the extents of its disk, and the files on it.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thinply::chain::{Chain, Kind};
use thinply::device::{Detail, Device};
use thinply::error::Result;
use thinply::storage::Access;
use thinply::store::{Disk, DiskKind, Store};

use crate::serving::files::{self, FileChange};

/// What a container changed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Changes {
    /// The ranges that its own layers hold.
    pub extents: Vec<Extent>,
    /// None where the content is no ext4 file system.
    pub files: Option<Vec<FileChange>>,
}

/// A range that a container's own layers hold.
#[derive(Debug, Serialize, Deserialize)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How many bytes it has.
    pub length: u64,
    /// Whether it was zeroed.
    pub zero: bool,
}

impl Changes {
    /// Those of a container that nobody writes.
    pub fn of(store: &Store, container: &str) -> Result<Self> {
        let disk = Disk::new(DiskKind::Container, container)?;
        let chain = Arc::new(store.open_disk(&disk, Access::Read)?);
        Self::between(store, container, &chain, chain.clone())
    }

    /// Those of a container whose chain is open; `still` is what its disk holds.
    pub fn between(
        store: &Store,
        container: &str,
        chain: &Chain,
        still: Arc<dyn files::Still>,
    ) -> Result<Self> {
        let extents = changed(chain, store.own_depth(container)?)?;
        let files = files::changed(Arc::new(store.open_base(container)?), still)?;
        Ok(Self { extents, files })
    }
}

/// The extents that the newest `own` layers hold, neighbours of different layers joined.
fn changed(chain: &Chain, own: usize) -> Result<Vec<Extent>> {
    let mut extents: Vec<Extent> = Vec::new();
    chain.map(0, chain.size(), Detail::Files, &mut |extent| {
        if extent.depth.is_some_and(|depth| depth < own) {
            let zero = extent.kind != Kind::Data;
            match extents.last_mut() {
                Some(last) if last.offset + last.length == extent.offset && last.zero == zero => {
                    last.length += extent.length;
                }
                _ => extents.push(Extent { offset: extent.offset, length: extent.length, zero }),
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(extents)
}

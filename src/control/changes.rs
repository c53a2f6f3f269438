//! What a container changed.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::files::{self, FileChange};
use crate::chain::{Chain, Kind};
use crate::device::{Detail, Device};
use crate::error::Result;
use crate::store::OpenDisk;

/// What a container changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// The ranges that its own layers hold, in order.
    pub extents: Vec<Extent>,
    /// The files that differ from its image's, by path; none where the content is no ext4 file
    /// system.
    pub files: Option<Vec<FileChange>>,
}

/// A range that a container's own layers hold. Offset and length are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each name says it")]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
    /// Whether it was zeroed.
    pub zero: bool,
}

impl Changes {
    /// Those of a container; `still` is what its disk holds.
    pub(super) fn of(container: &OpenDisk, still: Arc<dyn files::Still>) -> Result<Self> {
        let extents = extents(container, container.own_depth()?)?;
        let files = files::changed(Arc::new(container.open_base()?), still)?;
        Ok(Self { extents, files })
    }
}

/// The extents that the newest `own` layers hold, neighbours of different layers joined.
fn extents(chain: &Chain, own: usize) -> Result<Vec<Extent>> {
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

//! The extents of a whole still chain, however much of it is empty.

use thinply::chain::{Chain, Kind, MapExtent};
use thinply::device::{Detail, Device};
use thinply::error::Result;
use thinply::types::GROUP_BYTES;

/// Hands all extents to `visit`, in order, neighbours that say the same joined.
pub fn walk(chain: &Chain, visit: &mut dyn FnMut(MapExtent) -> Result<()>) -> Result<()> {
    let mut joined = Joined { pending: None, visit };
    let (size, mut at) = (chain.size(), 0);
    while at < size {
        let next = chain.skip_absent(at)?;
        joined.push(MapExtent {
            offset: at,
            length: next - at,
            depth: None,
            kind: Kind::Absent,
        })?;
        let end = size.min((next / GROUP_BYTES + 1) * GROUP_BYTES);
        let mut pushed = Ok(());
        chain.map(next, end - next, Detail::Files, &mut |extent| {
            pushed = joined.push(extent);
            pushed.is_ok()
        })?;
        pushed?;
        at = end;
    }
    joined.pending.take().map_or(Ok(()), joined.visit)
}

struct Joined<'a> {
    pending: Option<MapExtent>,
    visit: &'a mut dyn FnMut(MapExtent) -> Result<()>,
}

impl Joined<'_> {
    fn push(&mut self, extent: MapExtent) -> Result<()> {
        match &mut self.pending {
            _ if extent.length == 0 => Ok(()),
            Some(last) if last.depth == extent.depth && last.kind == extent.kind => {
                last.length += extent.length;
                Ok(())
            }
            pending => pending.replace(extent).map_or(Ok(()), &mut self.visit),
        }
    }
}

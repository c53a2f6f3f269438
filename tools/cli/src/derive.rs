//! New layers made of a chain, in a file of their own: what `flatten`, `rebase`, `compact` and `diff`
//! have in common.

use serde::Serialize;
use thinply::chain::{Chain, Layer, Parent, seal};
use thinply::derive::Plan;
use thinply::device::Device;
use thinply::error::{Error, ErrorKind, Result};
use thinply::format::header::{ParentLink, check_hint};
use thinply::packed::Compression;
use thinply::storage::Access;
use thinply::types::Identity;

use crate::io::draft::Draft;
use crate::io::output::Output;
use crate::io::paths::Place;
use crate::io::progress;
use crate::options::LayersArg;
use crate::options::PackingArgs;

/// What a layer is made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Live layout, writable.
    Writable,
    /// Live layout, frozen.
    Frozen,
    /// Packed, with its frames stored like that.
    Packed(Compression),
}

impl Form {
    /// The form of a layer that is there.
    pub fn of(place: &Place, packing: &PackingArgs) -> Result<Self> {
        Ok(match Layer::open(place.open(Access::Read)?)? {
            Layer::Packed(_) => Self::Packed(packing.compression()),
            Layer::Live(layer) if layer.header().is_frozen() => Self::Frozen,
            Layer::Live(_) => Self::Writable,
        })
    }
}

/// What was made.
#[derive(Debug, Serialize)]
struct Made<'a> {
    file: String,
    virtual_size: u64,
    identity: Option<String>,
    parent: Option<&'a str>,
}

/// A layer to be made.
#[derive(Debug)]
pub struct Maker<'a> {
    /// Where.
    pub out: &'a Place,
    /// As what.
    pub form: Form,
    /// Where its parent is looked for.
    pub layers: &'a LayersArg,
    /// How many of the chain's newest layers it holds bytes of.
    pub depth: usize,
    /// Whether to say in JSON what was made.
    pub json: bool,
}

impl Maker<'_> {
    /// Makes the planned layer of a chain, durable and whole before it has its name.
    pub fn make(&self, chain: &Chain, plan: &Plan) -> Result<()> {
        let draft = Draft::new(&self.out.directory, chain.copy_rights(self.depth)?);
        let bar = progress::bar(Some(chain.size()));
        let identity = self.fill(&draft, chain, plan, &mut |done| bar.set_position(done));
        bar.finish_and_clear();
        let identity = identity?;
        draft.publish_at(self.out)?;
        if self.json {
            let mut output = Output::new();
            output.json(&Made {
                file: self.out.path().display().to_string(),
                virtual_size: chain.size(),
                identity: identity.map(|identity| identity.to_string()),
                parent: plan.parent().map(|link| &*link.hint),
            })?;
            output.print()?;
        }
        Ok(())
    }

    fn fill(
        &self,
        draft: &Draft,
        chain: &Chain,
        plan: &Plan,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Option<Identity>> {
        let (folder, layers) = (&draft.folder(), self.layers.layers()?);
        if let Form::Packed(compression) = self.form {
            let summary = draft.packed(|file| {
                chain.derive_packed(plan, folder, file, layers, compression, progress)
            })?;
            return Ok(Some(Identity::Packed(summary.root)));
        }
        chain.derive_live(plan, folder, draft.name(), layers, progress)?;
        if self.form == Form::Writable {
            return Ok(None);
        }
        seal(&**folder, draft.name()).map(|sealed| Some(sealed.link.identity))
    }
}

/// A layer that others can stand on already.
pub fn sealed(place: &Place) -> Result<Parent> {
    let path = place.path();
    check_hint(&place.name)
        .map_err(|error| Error::new(ErrorKind::InvalidInput, error.to_string()).in_file(&path))?;
    let layer = Layer::open(place.open(Access::Read)?)?;
    let identity = layer.identity().ok_or_else(|| {
        let detail = "is not frozen, so nothing stands on it";
        Error::new(ErrorKind::InvalidInput, detail).in_file(path)
    })?;
    let link = ParentLink { identity, hint: place.name.clone() };
    Ok(Parent { link, virtual_size: layer.virtual_size(), newly_frozen: false })
}

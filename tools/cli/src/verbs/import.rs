//! `thinply import`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use thinply::chain::{Gate, Parent, create, seal};
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Access;

use crate::import::{Source, SourceArgs};
use crate::io::draft::{Draft, Unkept};
use crate::io::paths::{Place, closing};
use crate::io::size;
use crate::options::parent::ParentArg;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
FILE appears when it is whole. What SRC is goes by its bytes, unless --format says it. A device, or
what is called .raw, is refused if it begins like an image: whoever can write a raw disk can make
it look like one. Nothing is opened because an image refers to it.

Some images are read by qemu-nbd, if it is installed, which thinply starts without any rights: VHD,
VHDX, VDI, sparse VMDK, and qcow2 with zstd or extended L2 entries. Other formats that QEMU reads
come in over NBD:

  qemu-nbd --read-only --socket=/tmp/nbd.sock --format=qed disk.qed &
  thinply import 'nbd+unix:///?socket=/tmp/nbd.sock' disk.tply

Examples:
  thinply import disk.raw base.tply
  thinply import --parent base.tply changed.raw layer.tply
  thinply import --with base.qcow2 disk.qcow2 disk.tply
  thinply import --with vm-s001.vmdk --with vm-s002.vmdk vm.vmdk disk.tply
  thinply import --chain --with base.qcow2 disk.qcow2 disk.tply
  zstdcat disk.raw.zst | thinply import --writable - disk.tply";

/// Make a layer from a disk: raw, qcow2, VMDK, VHD, VHDX, VDI, or from an NBD server.
///
/// Zeros take no space, and with a parent only the blocks that differ from it do. The size is
/// rounded up to a whole sector of 512 bytes.
///
/// A raw file on a file system that can share space (XFS, btrfs) is not copied: the layer shares its
/// space with it, zeros included.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Import {
    #[command(flatten)]
    parent: ParentArg,
    /// Leave the layer writable instead of frozen
    #[arg(long)]
    writable: bool,
    /// Size of the disk, at least the source's; the rest is zeros
    #[arg(long, value_name = "S", value_parser = size::parse)]
    size: Option<u64>,
    #[command(flatten)]
    source: SourceArgs,
    /// Make each backing file or parent of an image a layer too: base.qcow2 becomes base.tply beside
    /// FILE
    #[arg(long, conflicts_with = "parent")]
    chain: bool,
    /// An image, a block device, an NBD URI, or - for standard input
    src: PathBuf,
    /// The file to make; it must not exist
    file: PathBuf,
}

impl Import {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::vacant(&self.file)?;
        size::check(self.size)?;
        if self.chain {
            self.import_chain(&place)?;
            return Ok(Answer::Yes);
        }
        let source = self.source.open(&self.src)?;
        source.check_fits(self.size)?;
        let (parent, layers) = self.parent.prepare(&place)?;
        let draft = make(&place, &source, self.size, parent.as_ref(), &layers)?;
        if !self.writable {
            seal(&*place.folder, draft.name())?;
        }
        draft.publish_at(&place)?;
        Ok(Answer::Yes)
    }

    /// Makes the layers from the base up, each under its name before the next one looks for it.
    /// None of them stays unless all do.
    fn import_chain(&self, place: &Place) -> Result<()> {
        let mut sources = self.source.open_chain(&self.src)?;
        let Some((_, top)) = sources.pop() else { return Ok(()) };
        top.check_fits(self.size)?;
        let mut lower = Vec::new();
        for (path, source) in sources {
            let place = lower_place(place, &path)?;
            if lower.iter().any(|(other, _): &(Place, _)| other.name == place.name) {
                let detail = "two backing files would become one layer";
                return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(place.path()));
            }
            lower.push((place, source));
        }
        let (_, layers) = self.parent.prepare(place)?;
        let mut made: Vec<Unkept> = Vec::new();
        let mut parent: Option<Parent> = None;
        for (place, source) in &lower {
            let draft = make(place, source, None, parent.as_ref(), &layers)?;
            let mut sealed = seal(&*place.folder, draft.name())?;
            sealed.link.hint = place.name.clone();
            made.push(draft.publish_unkept(place)?);
            parent = Some(sealed);
        }
        let draft = make(place, &top, self.size, parent.as_ref(), &layers)?;
        if !self.writable {
            seal(&*place.folder, draft.name())?;
        }
        draft.publish_at(place)?;
        made.into_iter().for_each(Unkept::keep);
        Ok(())
    }
}

/// The layer of a source, closed but not frozen, under a temporary name.
fn make(
    place: &Place,
    source: &Source,
    size: Option<u64>,
    parent: Option<&Parent>,
    layers: &Arc<Gate>,
) -> Result<Draft> {
    let visible = parent.map_or(0, |parent| parent.virtual_size);
    let draft = Draft::new(&place.directory, source.rights());
    let first_size = source.first_size(size, visible);
    create(&draft.folder(), draft.name(), Some(first_size), parent, layers)?;
    let made = Place { name: draft.name().to_owned(), ..place.clone() };
    closing(made.chain(Access::Write, layers.clone())?, |chain| {
        source.copy_to(chain, size, visible)
    })?;
    Ok(draft)
}

/// Where the layer of a backing file goes: beside the top, by the name that the user knows.
fn lower_place(top: &Place, path: &Path) -> Result<Place> {
    let name = path.with_extension("tply");
    let place = Place::vacant(&top.directory.join(name.file_name().unwrap_or_default()))?;
    if place.name == top.name {
        let detail = "the layer of a backing file would have this name";
        return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(top.path()));
    }
    Ok(place)
}

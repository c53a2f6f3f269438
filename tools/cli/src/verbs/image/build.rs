//! `thinply image import` and `thinply image build-from`

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use thinply::device::Device;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Rights;
use thinply::store::{Image, NewImage, Reference, Store};

use crate::import::{Source, SourceArgs, open_raw};
use crate::io::ext4::{make_ext4, temporary};
use crate::io::output::{Output, say};
use crate::io::size;
use crate::options::StoreArg;
use crate::verbs::{Answer, Outcome};

/// What images are made with, whatever they are made from.
#[derive(Args, Debug)]
struct New {
    #[command(flatten)]
    store: StoreArg,
    /// Stand on this image: only blocks that differ from it are stored
    #[arg(long, value_name = "IMAGE")]
    parent: Option<String>,
    /// A remark for the image's history
    #[arg(long, short, default_value = "", value_name = "TEXT", hide_default_value = true)]
    message: String,
}

/// Where an image comes from.
struct Origin {
    created_by: String,
    /// This host made its file system.
    made_here: bool,
}

/// The variable of <https://reproducible-builds.org/specs/source-date-epoch/>.
const EPOCH: &str = "SOURCE_DATE_EPOCH";
/// The end of the year 9999.
const LATEST: u64 = 253_402_300_799;

/// What stands for the present time, in seconds since 1970, where somebody wants the same image again.
fn source_date() -> Result<Option<u64>> {
    let Some(text) = std::env::var_os(EPOCH) else { return Ok(None) };
    let seconds = text.to_str().and_then(|text| text.parse().ok());
    match seconds.filter(|&seconds| seconds <= LATEST) {
        Some(seconds) => Ok(Some(seconds)),
        None => {
            let detail = format!("{EPOCH} is {text:?}, not seconds since 1970 (0 to {LATEST})");
            Err(Error::new(ErrorKind::InvalidInput, detail))
        }
    }
}

impl New {
    fn open(&self) -> Result<(Store, Option<Image>)> {
        let store = self.store.open_or_make()?;
        let base = self.parent.as_deref().map(|name| store.image(name)).transpose()?;
        Ok((store, base))
    }

    fn import(
        &self,
        (store, base): (Store, Option<Image>),
        source: &Source,
        size: Option<u64>,
        rights: Rights,
        name: &Reference,
        origin: Origin,
    ) -> Outcome {
        let Origin { created_by, made_here } = origin;
        let created = match source_date()? {
            Some(seconds) => UNIX_EPOCH + Duration::from_secs(seconds),
            None => SystemTime::now(),
        };
        source.check_fits(size)?;
        let visible = match &base {
            Some(base) => store.open_image(base)?.size(),
            None => 0,
        };
        let first = Some(source.first_size(size, visible));
        let draft = store.draft(first, base.as_ref(), rights)?;
        source.copy_to(draft.chain(), size, visible)?;
        let (reference, comment) = (name.clone(), self.message.clone());
        let new = NewImage { reference, created_by, comment, made_here, created };
        let image = store.publish(draft, base.as_ref(), &new)?;
        print_id(&image)?;
        Ok(Answer::Yes)
    }
}

/// Prints the id of a new image.
pub fn print_id(image: &Image) -> Result<()> {
    let mut output = Output::new();
    output.line(format_args!("sha256:{}", image.id))?;
    output.print()
}

/// Make an image of a disk: raw, qcow2, VMDK, VHD, VHDX, VDI, or from an NBD server.
///
/// Zeros take no space. The sources are those of `thinply import`. Prints the image's id.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  thinply image import disk.raw debian:12
  thinply image import --parent debian:12 changed.raw app")]
pub struct ImportImage {
    #[command(flatten)]
    new: New,
    /// Size of the disk, at least the source's; the rest is zeros
    #[arg(long, value_name = "S", value_parser = size::parse)]
    size: Option<u64>,
    #[command(flatten)]
    source: SourceArgs,
    /// An image, a block device, an NBD URI, or - for standard input
    src: PathBuf,
    /// The image's name
    #[arg(value_name = "NAME[:TAG]")]
    name: Reference,
}

impl ImportImage {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        size::check(self.size)?;
        let source = self.source.open(&self.src)?;
        let created_by = format!("import {}", self.src.display());
        let origin = Origin { created_by, made_here: false };
        let (opened, rights) = (self.new.open()?, source.rights());
        self.new.import(opened, &source, self.size, rights, &self.name, origin)
    }
}

/// Make an image of a file tree, as an ext4 file system (needs mke2fs).
///
/// The same tree makes the same layer. With SOURCE_DATE_EPOCH in the environment (seconds since
/// 1970), which no time in the image is later than, it makes the same image. Prints the image's id.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply image build-from rootfs debian:12")]
pub struct BuildImage {
    #[command(flatten)]
    new: New,
    /// The tree
    dir: PathBuf,
    /// The image's name
    #[arg(value_name = "NAME[:TAG]")]
    name: Reference,
}

impl BuildImage {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let meta = fs::metadata(&self.dir)
            .map_err(|error| Error::io(error, "looking for the tree").in_file(&self.dir))?;
        if !meta.is_dir() {
            return Err(Error::new(ErrorKind::InvalidInput, "not a folder").in_file(&self.dir));
        }
        let latest = source_date()?.and_then(|seconds| i64::try_from(seconds).ok());
        let opened = self.new.open()?;
        let raw = temporary(opened.0.path())?;
        make_ext4(raw.path(), &self.dir, latest)?.iter().for_each(say);
        let source = open_raw(raw.path())?;
        // Where the tree lies is no part of it. The temporary file is nobody's; who may read the tree
        // can't be said in one mode.
        let origin = Origin { created_by: "build-from".to_owned(), made_here: true };
        self.new.import(opened, &source, None, Rights::Usual, &self.name, origin)
    }
}

//! Which reader a source gets.

use std::path::{Path, PathBuf};

use clap::Args;
use thinply::error::{Error, ErrorKind, Result};

use super::foreign::{Opener, not_a_pipe};
use super::format::Format;
use super::nbd::{self, NbdDisk};
use super::raw::RawDisk;
use super::source::Source;
use crate::options::share::ShareArg;

/// What a source is, and what it may refer to.
#[derive(Args, Debug)]
pub struct SourceArgs {
    /// What SRC is [default: qcow2 or vmdk where its name ends so, else raw]
    #[arg(long, value_name = "F", value_enum)]
    format: Option<Format>,
    /// Let SRC refer to FILE: a backing file, data file or extent of that name, or that SRC calls
    /// NAME (repeatable)
    #[arg(long = "with", value_name = "[NAME=]FILE")]
    named: Vec<PathBuf>,
    #[command(flatten)]
    share: ShareArg,
}

impl SourceArgs {
    /// An image file, block device, NBD URI, or `-` for standard input.
    pub fn open(&self, path: &Path) -> Result<Source> {
        if let Some(uri) = nbd::uri(path) {
            return NbdDisk::connect(uri).map(Source::new);
        }
        match Format::of(path, self.format) {
            Some(Format::Qcow2 | Format::Vmdk) if path.as_os_str() == "-" => Err(not_a_pipe(path)),
            Some(format @ (Format::Qcow2 | Format::Vmdk)) => {
                Opener::new(&self.named, self.share).flat(path, format).map(Source::new)
            }
            format => RawDisk::open(path, format, self.share).map(Source::new),
        }
    }

    /// A qcow2 image and the backing files under it, base first, each alone and with its path.
    pub fn open_chain(&self, path: &Path) -> Result<Vec<(PathBuf, Source)>> {
        if nbd::uri(path).is_some() || Format::of(path, self.format) != Some(Format::Qcow2) {
            let detail = "only a qcow2 image is a chain of layers";
            return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(path));
        }
        Opener::new(&self.named, self.share).chain(path)
    }
}

/// A raw file or block device, whatever its name and its bytes look like.
pub fn open_raw(path: &Path) -> Result<Source> {
    RawDisk::open(path, Some(Format::Raw), ShareArg::default()).map(Source::new)
}

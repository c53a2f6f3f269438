//! Which reader a source gets.

use std::path::{Path, PathBuf};

use clap::Args;
use thinply::error::{Error, ErrorKind, Result};

use super::file::not_a_pipe;
use super::foreign::Opener;
use super::format::Format;
use super::nbd::{self, NbdDisk};
use super::raw::RawDisk;
use super::source::Source;
use crate::options::share::ShareArg;

/// What a source is, and what it may refer to.
#[derive(Args, Debug)]
pub struct SourceArgs {
    /// What SRC is [default: what its bytes say, or raw]
    #[arg(long, value_name = "F", value_enum)]
    format: Option<Format>,
    /// Let SRC refer to FILE: a backing file, parent, data file or extent of that name, or that SRC
    /// calls NAME (repeatable)
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
        match Format::of(path, self.format)? {
            None | Some(Format::Raw) => {
                RawDisk::open(path, self.format, self.share).map(Source::new)
            }
            Some(_) if path.as_os_str() == "-" => Err(not_a_pipe(path)),
            Some(format) => {
                Opener::new(&self.named, self.share).flat(path, format).map(Source::new)
            }
        }
    }

    /// An image and the backing files or parents under it, base first, each alone and with its path.
    pub fn open_chain(&self, path: &Path) -> Result<Vec<(PathBuf, Source)>> {
        let format = if nbd::uri(path).is_some() { None } else { Format::of(path, self.format)? };
        match format {
            Some(format @ (Format::Qcow2 | Format::Vmdk)) => {
                Opener::new(&self.named, self.share).chain(path, format)
            }
            _ => {
                let detail = "only a qcow2 or VMDK image is a chain of layers";
                Err(Error::new(ErrorKind::InvalidInput, detail).in_file(path))
            }
        }
    }
}

/// A raw file or block device, whatever its name and its bytes look like.
pub fn open_raw(path: &Path) -> Result<Source> {
    RawDisk::open(path, Some(Format::Raw), ShareArg::default()).map(Source::new)
}

//! Images of other formats, each opened alone and put over what lies under it, behind a gate: nothing
//! is opened because an image says so. What the user named may be referred to; a reference is matched
//! by its file name alone, or by what the user calls it.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};

use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Rights;

use super::file::ImageFile;
use super::format::{Format, VMDK_SPARSE, by_name, serve_it};
use super::image::{Image, ImageDisk, Room, Stack};
use super::library::Qcow2Image;
use super::qcow2;
use super::qemu::{Description, Feed, QemuImage};
use super::raw::RawDisk;
use super::reference::{Named, Reference};
use super::source::Source;
use super::vhd;
use super::vmdk::{Descriptor, Extent, Extents, HEADER_SIZE, Kind, Sparse};
use crate::options::share::ShareArg;

/// Largest ratios of compression: of deflate, and of what of zstd fits a cluster.
const DEFLATE: u64 = 1032;
const ZSTD: u64 = 1 << 15;

/// What QEMU reads of a VMDK at once in search of a descriptor.
const GLANCE: u64 = (1 << 20) - 1;

/// Opens images, and of the files that they refer to those that the user named.
pub struct Opener {
    named: Vec<Named>,
    share: ShareArg,
    /// What all files opened so far can hold.
    room: Cell<Room>,
    /// The rights of a copy of the files opened since the last disk was made.
    rights: RefCell<Rights>,
}

/// An image without what lies under it.
struct Opened {
    image: Box<dyn Image>,
    /// Changes with a VMDK image's content.
    id: Option<u32>,
    under: Option<Under>,
}

impl Opened {
    fn lowest(image: impl Image + 'static) -> Self {
        Self { image: Box::new(image), id: None, under: None }
    }
}

/// What lies under an image.
struct Under {
    path: PathBuf,
    format: Format,
    /// The id that it had when the image was made.
    id: Option<u32>,
}

impl Opener {
    /// An opener that lets images refer to these files, each `FILE` or `NAME=FILE`.
    pub fn new(named: &[PathBuf], share: ShareArg) -> Self {
        let named = named.iter().map(|argument| Named::of(argument)).collect();
        Self { named, share, room: Cell::default(), rights: RefCell::default() }
    }

    /// An image with all that lies under it, as one disk.
    pub fn flat(&self, path: &Path, format: Format) -> Result<ImageDisk> {
        let mut images = Vec::new();
        let top = Under { path: path.to_owned(), format, id: None };
        let mut next = Some(top);
        while let Some(under) = next.take() {
            let opened = self.next(&under, images.len())?;
            images.push(opened.image);
            next = opened.under;
        }
        Ok(self.disk(Box::new(Stack(images))))
    }

    /// An image and those under it, base first, each alone.
    pub fn chain(&self, path: &Path, format: Format) -> Result<Vec<(PathBuf, Source)>> {
        let mut chain = Vec::new();
        let mut next = Some(Under { path: path.to_owned(), format, id: None });
        while let Some(under) = next.take() {
            let source = if under.format == Format::Raw {
                self.check_depth(chain.len(), &under.path)?;
                Source::new(RawDisk::open(&under.path, Some(Format::Raw), self.share)?)
            } else {
                let opened = self.next(&under, chain.len())?;
                next = opened.under;
                Source::new(self.disk(opened.image))
            };
            chain.push((under.path, source));
        }
        chain.reverse();
        Ok(chain)
    }

    /// The image that lies under `depth` others.
    fn next(&self, under: &Under, depth: usize) -> Result<Opened> {
        self.check_depth(depth, &under.path)?;
        let opened = self.open(&under.path, under.format)?;
        match (under.id, opened.id) {
            (Some(wanted), Some(id)) if wanted != id => {
                let detail = format!(
                    "was written to since another image was made over it: its content id is \
                     {id:08x}, expected {wanted:08x}"
                );
                Err(Error::new(ErrorKind::Corrupt, detail).in_file(&under.path))
            }
            _ => Ok(opened),
        }
    }

    fn disk(&self, image: Box<dyn Image>) -> ImageDisk {
        ImageDisk { image, rights: self.rights.take(), room: self.room.get() }
    }

    /// Each image but the first one was named, so a longer chain goes round.
    fn check_depth(&self, depth: usize, path: &Path) -> Result<()> {
        if depth > self.named.len() {
            let detail = "a chain of backing files that goes round";
            return Err(Error::new(ErrorKind::Corrupt, detail).in_file(path));
        }
        Ok(())
    }

    /// A file that may hold so many times its own length.
    fn file(&self, path: &Path, ratio: u64) -> Result<ImageFile> {
        let file = ImageFile::open(path, self.share)?;
        let Room { stored, expanded } = self.room.get();
        self.room.set(Room {
            stored: stored.saturating_add(file.length),
            expanded: expanded.saturating_add(file.length.saturating_mul(ratio)),
        });
        self.rights.replace_with(|rights| file.rights.clone().and(rights));
        Ok(file)
    }

    fn open(&self, path: &Path, format: Format) -> Result<Opened> {
        match format {
            Format::Raw => Ok(Opened::lowest(self.file(path, 1)?)),
            Format::Qcow2 => self.qcow2(path),
            Format::Vmdk => self.vmdk(path),
            Format::Vhd => {
                let file = self.file(path, 1)?;
                vhd::check(&file)?;
                Self::alone(format, Feed::new(file, &[]))
            }
            Format::Vhdx => Self::alone(format, Feed::new(self.file(path, 1)?, &[])),
            Format::Vdi => Self::alone(format, Feed::new(self.file(path, 1)?, &[]).endless(0)),
        }
    }

    /// An image that is a file and refers to none, for QEMU.
    fn alone(format: Format, feed: Feed) -> Result<Opened> {
        let described = Description { format, files: vec![feed], over: false, compressed: false };
        QemuImage::open(described).map(Opened::lowest)
    }

    fn qcow2(&self, path: &Path) -> Result<Opened> {
        let file = self.file(path, ZSTD)?;
        let header = qcow2::Header::read(&file).map_err(|error| error.in_file(path))?;
        let data_file = header
            .data_file
            .as_deref()
            .map(|name| self.file(&self.find(&Reference::of(name), path)?, 1));
        let data_file = data_file.transpose()?;
        let under = self.backing(&header, path)?;
        let image: Box<dyn Image> = if header.for_qemu {
            // Its features say whether there is a data file.
            let first: [u8; qcow2::HEADER_SIZE] = file.bytes(0)?;
            let data_file = data_file.map(|file| Feed::new(file, &[]).endless(0));
            let files = [Feed::new(file, &first).endless(0)].into_iter().chain(data_file).collect();
            Box::new(QemuImage::open(Description {
                format: Format::Qcow2,
                files,
                over: under.is_some(),
                compressed: true,
            })?)
        } else {
            Box::new(Qcow2Image::open(file, data_file, header.cluster)?)
        };
        Ok(Opened { image, id: None, under })
    }

    fn backing(&self, header: &qcow2::Header, path: &Path) -> Result<Option<Under>> {
        let Some((reference, format)) = &header.backing else { return Ok(None) };
        let reference = Reference::of(reference);
        let found = self.find(&reference, path)?;
        let format = match format {
            Some(name) => Format::of_backing(name).ok_or_else(|| {
                let detail = format!("has a backing file of format {name:?}: {}", serve_it("qcow2"));
                Error::new(ErrorKind::Unsupported, detail).in_file(path)
            })?,
            // What qemu would find out by looking at the bytes.
            None => reference.format.or_else(|| by_name(&found)).ok_or_else(|| {
                let detail = "doesn't say what format its backing file has; `qemu-img rebase -u -F` \
                              writes it down";
                Error::new(ErrorKind::Unsupported, detail).in_file(path)
            })?,
        };
        Ok(Some(Under { path: found, format, id: None }))
    }

    /// A sparse extent that is a whole image, or a descriptor and its extents.
    fn vmdk(&self, path: &Path) -> Result<Opened> {
        let file = self.file(path, DEFLATE)?;
        let first: [u8; HEADER_SIZE] = file.bytes(0)?;
        let located =
            |error: Error| if error.path().is_some() { error } else { error.in_file(path) };
        if !first.starts_with(VMDK_SPARSE) {
            let descriptor = Descriptor::read(&file, 0, file.length).map_err(located)?;
            let under = self.parent(&descriptor, path)?;
            let image = self.extents(&descriptor, under.is_some(), path).map_err(located)?;
            return Ok(Opened { image: Box::new(image), id: Some(descriptor.id), under });
        }
        let sparse = Sparse::check(first).map_err(located)?;
        let (offset, length) = sparse.descriptor();
        let descriptor = Descriptor::read(&file, offset, length).map_err(|error| {
            let detail = "is a part of a VMDK image: import its descriptor, the small file of text";
            match error.kind() {
                ErrorKind::InvalidInput => Error::new(error.kind(), detail).in_file(path),
                _ => located(error),
            }
        })?;
        let under = self.parent(&descriptor, path)?;
        let image = Self::sparse(file, sparse.header(), &sparse, under.is_some());
        image.check()?;
        Ok(Opened { image: Box::new(image), id: Some(descriptor.id), under })
    }

    fn parent(&self, descriptor: &Descriptor, path: &Path) -> Result<Option<Under>> {
        let Some((name, id)) = &descriptor.parent else { return Ok(None) };
        let path = self.find(&Reference::of(name), path)?;
        Ok(Some(Under { path, format: Format::Vmdk, id: Some(*id) }))
    }

    fn extents(&self, descriptor: &Descriptor, over: bool, path: &Path) -> Result<Extents> {
        let open =
            |(length, kind): &(u64, Kind)| Ok((*length, self.extent(*length, kind, over, path)?));
        let extents: Result<Vec<_>> = descriptor.extents.iter().map(open).collect();
        Extents::new(extents?)
    }

    fn extent(&self, length: u64, kind: &Kind, over: bool, image: &Path) -> Result<Extent> {
        let find = |name: &str| self.find(&Reference::of(name), image);
        let short = |path: &Path, there: u64| {
            let detail = format!("an extent of {there} bytes, expected {length}");
            Error::new(ErrorKind::Corrupt, detail).in_file(path)
        };
        match kind {
            Kind::Zeros => Ok(Extent::Zeros),
            Kind::Flat(name, offset) => {
                let file = self.file(&find(name)?, 1)?;
                match file.length.checked_sub(*offset) {
                    Some(there) if there >= length => Ok(Extent::Flat(file, *offset)),
                    there => Err(short(&file.path, there.unwrap_or(0))),
                }
            }
            Kind::Sparse(name) => {
                let file = self.file(&find(name)?, DEFLATE)?;
                let sparse = Sparse::check(file.bytes(0)?);
                let sparse = sparse.map_err(|error| error.in_file(&file.path))?;
                if sparse.size != length {
                    return Err(short(&file.path, sparse.size));
                }
                let first = sparse.alone().map_err(|error| error.in_file(&file.path))?;
                let image = Self::sparse(file, &first, &sparse, over);
                image.check()?;
                Ok(Extent::Sparse(Box::new(image)))
            }
        }
    }

    fn sparse(file: ImageFile, first: &[u8], sparse: &Sparse, over: bool) -> QemuImage {
        let (feed, compressed) = (Feed::new(file, first), sparse.compressed);
        // One that is compressed may have its footer at the end, and its reader asks for more than a
        // grain takes.
        let files = vec![if compressed { feed } else { feed.endless(GLANCE) }];
        let described = Description { format: Format::Vmdk, files, over, compressed };
        QemuImage::of_size(described, sparse.size)
    }

    /// The file that the user named which is the one that an image refers to.
    fn find(&self, reference: &Reference<'_>, image: &Path) -> Result<PathBuf> {
        let text = reference.text;
        let refuse = |kind, detail| {
            Err(Error::new(kind, format!("refers to {text:?}{detail}")).in_file(image))
        };
        let fitting = |own| self.named.iter().filter(move |named| named.fits(reference, own));
        // What the user calls a file comes before what it is called.
        let mut fitting = fitting(false).chain(fitting(true));
        match (fitting.next(), fitting.next()) {
            (Some(named), None) => Ok(named.path.clone()),
            (Some(_), Some(_)) => {
                refuse(ErrorKind::InvalidInput, ", and more than one --with has that name")
            }
            (None, _) if text.is_empty() => refuse(ErrorKind::Corrupt, ", which names no file"),
            (None, _) if !reference.is_file() => refuse(
                ErrorKind::PermissionDenied,
                ", which is no file, or says more than where it is: if you have a file with these \
                 bytes, name it as --with 'NAME=FILE', where NAME is all of that text",
            ),
            (None, _) => refuse(
                ErrorKind::PermissionDenied,
                ": paths in an image are not followed; name the file, if you trust it, as --with \
                 FILE, or as --with NAME=FILE where it has another name by now",
            ),
        }
    }
}

//! Images of other formats, read through a library behind a gate: nothing is opened because an
//! image says so. What the user named may be referred to; a reference is matched by its file name
//! alone, or by what the user calls it.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::fs::File;
use std::io::{self, IoSliceMut, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::storage::drivers::CommonStorageHelper;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, Mapping, ShallowMapping, Storage, StorageOpenOptions};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::preadv;
use thinply::chain::Chain;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::Rights;

use super::format::{Format, serve_it};
use super::qcow2;
use super::raw::RawDisk;
use super::reference::{Named, Reference};
use super::source::{Disk, Source};
use super::vmdk;
use crate::io::pump::{BUFFER, Feeder, Piece};
use crate::options::share::ShareArg;

/// Largest descriptor of a VMDK image that is read.
const MAX_DESCRIPTOR: u64 = 1 << 20;
/// Largest ratio of deflate.
const MAX_RATIO: u64 = 1032;

/// A file of an image. It opens no other.
#[derive(Debug)]
struct ImageFile {
    path: PathBuf,
    file: File,
    length: u64,
    /// Where reads must end: the end of the last cluster, of which the file may have less.
    end: u64,
    rights: Rights,
    helper: CommonStorageHelper,
}

impl ImageFile {
    fn open(path: &Path, share: ShareArg) -> Result<Self> {
        let failed = |error: io::Error| Error::io(error, "opening the source").in_file(path);
        let mut file = File::open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if kind.is_dir() {
            return Err(Error::new(ErrorKind::InvalidInput, "is a folder").in_file(path));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(not_a_pipe(path));
        }
        share.check_source(file.as_fd(), path)?;
        let rights = Rights::Copy(file.metadata().map_err(failed)?.mode());
        let length = io::Seek::seek(&mut file, SeekFrom::End(0)).map_err(failed)?;
        let helper = CommonStorageHelper::default();
        Ok(Self { path: path.to_owned(), file, length, end: length, rights, helper })
    }

    /// The descriptor of a VMDK image, as the library reads it.
    fn descriptor(mut self) -> Result<Self> {
        let failed = |error| Error::io(error, "reading the descriptor").in_file(&self.path);
        if self.length > MAX_DESCRIPTOR {
            return Ok(self);
        }
        let mut bytes = vec![0; self.length as usize];
        self.file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        if bytes.starts_with(b"KDMV") {
            return Ok(self);
        }
        let text = vmdk::plain(&bytes);
        let memory = memfd_create("descriptor", MemfdFlags::CLOEXEC);
        let memory = File::from(memory.map_err(|error| failed(error.into()))?);
        memory.write_all_at(text.as_bytes(), 0).map_err(failed)?;
        (self.length, self.end) = (text.len() as u64, text.len() as u64);
        self.file = memory;
        Ok(self)
    }

    fn header(&self) -> Result<[u8; qcow2::HEADER_SIZE]> {
        let mut header = [0; qcow2::HEADER_SIZE];
        let there = self.length.min(header.len() as u64) as usize;
        self.file
            .read_exact_at(&mut header[..there], 0)
            .map_err(|error| Error::io(error, "reading the header").at(0).in_file(&self.path))?;
        Ok(header)
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

fn read_only<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Storage for ImageFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.length)
    }

    /// The gate looks at the file name alone.
    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        Ok(relative.as_ref().to_owned())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let length = bufv.len();
        if offset.checked_add(length).is_none_or(|end| end > self.end) {
            let detail = format!("{length} bytes at {offset} of a file of {} bytes", self.length);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, detail));
        }
        let mut slices = bufv.into_inner();
        let (mut rest, mut at) = (&mut slices[..], offset);
        IoSliceMut::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match preadv(&self.file, rest, at) {
                Ok(0) => {
                    rest.iter_mut().for_each(|slice| slice.fill(0));
                    break;
                }
                Ok(count) => {
                    IoSliceMut::advance_slices(&mut rest, count);
                    at += count as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, _: IoVector<'_>, _: u64) -> io::Result<()> {
        read_only()
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

/// Opens images, and of the files that they refer to those that the user named.
pub struct Opener {
    named: Vec<Named>,
    share: ShareArg,
    /// Bytes of all files opened so far.
    stored: Cell<u64>,
    /// The rights of a copy of the files opened since the last disk was made.
    rights: RefCell<Rights>,
}

/// Where an image says that its other bytes are.
struct Backing {
    path: PathBuf,
    format: Format,
}

impl Opener {
    /// An opener that lets images refer to these files, each `FILE` or `NAME=FILE`.
    pub fn new(named: &[PathBuf], share: ShareArg) -> Self {
        let named = named.iter().map(|argument| Named::of(argument)).collect();
        Self { named, share, stored: Cell::default(), rights: RefCell::default() }
    }

    /// An image with all that lies under it, as one disk.
    pub fn flat(&self, path: &Path, format: Format) -> Result<ImageDisk> {
        let access = self.access(path, format, 0)?;
        Ok(self.disk(path, access, false))
    }

    /// A qcow2 image and those under it, base first, each alone.
    pub fn chain(&self, path: &Path) -> Result<Vec<(PathBuf, Source)>> {
        let mut chain = Vec::new();
        let mut next = Some(Backing { path: path.to_owned(), format: Format::Qcow2 });
        while let Some(Backing { path, format }) = next.take() {
            self.check_depth(chain.len(), &path)?;
            let source = match format {
                Format::Raw => Source::new(RawDisk::open(&path, Some(format), self.share)?),
                Format::Vmdk => Source::new(self.flat(&path, format)?),
                Format::Qcow2 => {
                    let mut image = self.qcow2(&path)?;
                    next = self.backing(&image, &path)?;
                    image.set_backing(None);
                    Source::new(self.disk(&path, FormatAccess::new(image), true))
                }
            };
            chain.push((path, source));
        }
        chain.reverse();
        Ok(chain)
    }

    fn disk(&self, path: &Path, access: FormatAccess<ImageFile>, alone: bool) -> ImageDisk {
        let rights = self.rights.take();
        ImageDisk { path: path.to_owned(), access, alone, rights, stored: self.stored.get() }
    }

    /// Each image but the first one was named, so a longer chain goes round.
    fn check_depth(&self, depth: usize, path: &Path) -> Result<()> {
        if depth > self.named.len() {
            let detail = "a chain of backing files that goes round";
            return Err(Error::new(ErrorKind::Corrupt, detail).in_file(path));
        }
        Ok(())
    }

    fn access(&self, path: &Path, format: Format, depth: usize) -> Result<FormatAccess<ImageFile>> {
        self.check_depth(depth, path)?;
        let refused = |error| not_read(error, format, path);
        match format {
            Format::Raw => {
                let raw = Raw::open_image(self.open(path)?, false).map_err(refused)?;
                Ok(FormatAccess::new(raw))
            }
            Format::Vmdk => {
                let image = Vmdk::<_, FormatAccess<_>>::builder(self.open(path)?.descriptor()?);
                Ok(FormatAccess::new(image.open(Gate(self, path)).map_err(refused)?))
            }
            Format::Qcow2 => {
                let mut image = self.qcow2(path)?;
                let backing = self.backing(&image, path)?;
                let backing = backing.map(|b| self.access(&b.path, b.format, depth + 1));
                image.set_backing(backing.transpose()?);
                Ok(FormatAccess::new(image))
            }
        }
    }

    fn open(&self, path: &Path) -> Result<ImageFile> {
        let file = ImageFile::open(path, self.share)?;
        self.stored.set(self.stored.get().saturating_add(file.length));
        self.rights.replace_with(|rights| file.rights.clone().and(rights));
        Ok(file)
    }

    /// A qcow2 image with its data file, if it has one, and without a backing file.
    fn qcow2(&self, path: &Path) -> Result<Qcow2<ImageFile>> {
        let mut file = self.open(path)?;
        let checked = qcow2::check(&file.header()?, file.length);
        let cluster = checked.map_err(|error| error.in_file(path))?;
        file.end = file.length.next_multiple_of(cluster);
        let mut image =
            Qcow2::open_image(file, false).map_err(|error| not_read(error, Format::Qcow2, path))?;
        let data_file = if image.requires_external_data_file() {
            let name = image.implicit_external_data_file().map_or("", String::as_str);
            let mut file = self.open(&self.find(&Reference::of(name), path)?)?;
            file.end = file.length.next_multiple_of(cluster);
            Some(file)
        } else {
            None
        };
        image.set_data_file(data_file);
        Ok(image)
    }

    fn backing(&self, image: &Qcow2<ImageFile>, path: &Path) -> Result<Option<Backing>> {
        let Some(reference) = image.implicit_backing_file() else { return Ok(None) };
        let reference = Reference::of(reference);
        let found = self.find(&reference, path)?;
        let format = match image.implicit_backing_format() {
            Some(name) => Format::of_backing(name).ok_or_else(|| {
                let detail = format!("has a backing file of format {name:?}: {}", serve_it("qcow2"));
                Error::new(ErrorKind::Unsupported, detail).in_file(path)
            })?,
            // What qemu would find out by looking at the bytes.
            None => reference.format.or(Format::of(&found, None)).ok_or_else(|| {
                let detail = "doesn't say what format its backing file has; `qemu-img rebase -u -F` \
                              writes it down";
                Error::new(ErrorKind::Unsupported, detail).in_file(path)
            })?,
        };
        Ok(Some(Backing { path: found, format }))
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

/// Why an image in another format is no stream.
pub fn not_a_pipe(path: &Path) -> Error {
    let detail = "an image is read here and there, not from beginning to end as what comes through a \
                  pipe: save it as a file and import that";
    Error::new(ErrorKind::InvalidInput, detail).in_file(path)
}

fn not_read(error: io::Error, format: Format, path: &Path) -> Error {
    let name = format!("{format:?}").to_lowercase();
    let detail = format!("a {name} image that is not read here ({})", serve_it(&name));
    Error::io(error, detail).in_file(path)
}

/// Asks the opener for the extents of a VMDK image.
struct Gate<'a>(&'a Opener, &'a Path);

impl ImplicitOpenGate<ImageFile> for Gate<'_> {
    fn open_format<F: FormatDriverBuilder<ImageFile>>(
        &mut self,
        _: F,
    ) -> io::Result<FormatAccess<ImageFile>> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<ImageFile> {
        let name = options.get_filename().unwrap_or(Path::new(""));
        let opened = self
            .0
            .find(&Reference::of(&name.to_string_lossy()), self.1)
            .and_then(|path| self.0.open(&path));
        opened.map_err(|error| io::Error::other(error.to_string()))
    }
}

/// What stands at a place of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// What lies under the image.
    Below,
    Zeros,
    /// Bytes of a file, compressed or not.
    Data {
        compressed: bool,
    },
}

/// A disk image of another format.
pub struct ImageDisk {
    path: PathBuf,
    access: FormatAccess<ImageFile>,
    /// Whether it is read without what lies under it.
    alone: bool,
    rights: Rights,
    /// Bytes of all its files.
    stored: u64,
}

impl ImageDisk {
    fn failed(&self, error: io::Error, offset: u64) -> Error {
        Error::io(error, format!("reading the disk at {offset}")).in_file(&self.path)
    }

    fn part(&self, offset: u64, length: u64) -> Result<(Part, u64)> {
        let failed = |error| self.failed(error, offset);
        let (part, length) = if self.alone {
            let (mapping, length) =
                self.access.get_shallow_mapping(offset, length).map_err(failed)?;
            let part = match mapping {
                ShallowMapping::Zero { explicit: false, .. } => Part::Below,
                ShallowMapping::Zero { .. } => Part::Zeros,
                ShallowMapping::Special { .. } => Part::Data { compressed: true },
                _ => Part::Data { compressed: false },
            };
            (part, length)
        } else {
            let (mapping, length) = self.access.get_mapping(offset, length).map_err(failed)?;
            let part = match mapping {
                Mapping::Zero { .. } => Part::Zeros,
                Mapping::Special { .. } => Part::Data { compressed: true },
                _ => Part::Data { compressed: false },
            };
            (part, length)
        };
        if length == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok((part, length))
    }

    /// As much of a disk of `size` bytes as is alike from `offset` on; of data, a buffer at most.
    fn extent(&self, offset: u64, size: u64) -> Result<(Part, u64)> {
        let (part, mut length) = self.part(offset, size - offset)?;
        let most = if let Part::Data { .. } = part { BUFFER as u64 } else { u64::MAX };
        while offset + length < size && length < most {
            let (next, more) = self.part(offset + length, size - offset - length)?;
            if next != part {
                break;
            }
            length += more;
        }
        Ok((part, length.min(most)))
    }

    /// No two places of an image share their bytes, so its files limit what it can hold.
    fn check_held(&self, plain: u64, compressed: u64) -> Result<()> {
        // The last cluster may be cut short.
        let most = self.stored.saturating_add(4 << 20);
        if plain > most || compressed > most.saturating_mul(MAX_RATIO) {
            let detail = format!("holds more than its files of {} bytes can", self.stored);
            return Err(Error::new(ErrorKind::Corrupt, detail).in_file(&self.path));
        }
        Ok(())
    }
}

impl Disk for ImageDisk {
    fn length(&self) -> Option<u64> {
        Some(self.access.size())
    }

    fn rights(&self) -> Rights {
        self.rights.clone()
    }

    fn read(&self, feeder: &Feeder, _: Option<&Chain>) -> Result<()> {
        let size = self.access.size();
        let (mut at, mut plain, mut compressed) = (0, 0, 0);
        while at < size {
            let (part, length) = self.extent(at, size)?;
            let open = match part {
                Part::Below => true,
                Part::Zeros => feeder.send(Piece::Zeros(at, length)),
                Part::Data { compressed: packed } => {
                    *(if packed { &mut compressed } else { &mut plain }) += length;
                    self.check_held(plain, compressed)?;
                    let Some(mut buffer) = feeder.buffer(length as usize) else { return Ok(()) };
                    self.access.read(&mut buffer[..], at).map_err(|e| self.failed(e, at))?;
                    feeder.send(Piece::Data(at, buffer))
                }
            };
            if !open {
                return Ok(());
            }
            at += length;
        }
        Ok(())
    }
}

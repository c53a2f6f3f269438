//! qcow2 images as a library reads them.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::path::{Path, PathBuf};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::storage::drivers::CommonStorageHelper;
use imago::{FormatAccess, ShallowMapping, Storage};
use rustix::io::preadv;
use thinply::error::{Error, Result};

use super::file::ImageFile;
use super::image::{Image, Part};

/// A file of an image, for the library. It opens no other.
#[derive(Debug)]
struct Stored {
    file: ImageFile,
    /// Where reads must end: the end of the last cluster, of which the file may have less.
    end: u64,
    helper: CommonStorageHelper,
}

impl Stored {
    fn new(file: ImageFile, cluster: u64) -> Self {
        let end = file.length.next_multiple_of(cluster);
        Self { file, end, helper: CommonStorageHelper::default() }
    }
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.path.display().fmt(f)
    }
}

fn read_only<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Storage for Stored {
    fn size(&self) -> io::Result<u64> {
        Ok(self.file.length)
    }

    /// Nothing is opened by a path.
    fn resolve_relative_path<P: AsRef<Path>>(&self, _: P) -> io::Result<PathBuf> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let length = bufv.len();
        if offset.checked_add(length).is_none_or(|end| end > self.end) {
            let detail =
                format!("{length} bytes at {offset} of a file of {} bytes", self.file.length);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, detail));
        }
        let mut slices = bufv.into_inner();
        let (mut rest, mut at) = (&mut slices[..], offset);
        IoSliceMut::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match preadv(&self.file.file, rest, at) {
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

/// A qcow2 image, without what lies under it.
pub struct Qcow2Image {
    path: PathBuf,
    access: FormatAccess<Stored>,
}

impl Qcow2Image {
    /// An image whose header was checked, with clusters of that size; and its data file, if it has one.
    pub fn open(file: ImageFile, data_file: Option<ImageFile>, cluster: u64) -> Result<Self> {
        let path = file.path.clone();
        let opened = Qcow2::<_>::open_image(Stored::new(file, cluster), false);
        let mut image =
            opened.map_err(|error| Error::io(error, "reading the qcow2 image").in_file(&path))?;
        image.set_data_file(data_file.map(|file| Stored::new(file, cluster)));
        image.set_backing(None);
        Ok(Self { path, access: FormatAccess::new(image) })
    }

    fn failed(&self, error: io::Error, offset: u64) -> Error {
        Error::io(error, format!("reading the disk at {offset}")).in_file(&self.path)
    }
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.access.size()
    }

    fn part(&self, offset: u64, length: u64) -> Result<(Part, u64)> {
        let told = self.access.get_shallow_mapping(offset, length);
        let (mapping, length) = told.map_err(|error| self.failed(error, offset))?;
        if length == 0 {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into(), offset));
        }
        let part = match mapping {
            ShallowMapping::Zero { explicit: false, .. } => Part::Below,
            ShallowMapping::Zero { .. } => Part::Zeros,
            ShallowMapping::Special { .. } => Part::Data { compressed: true },
            _ => Part::PLAIN,
        };
        Ok((part, length))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.access.read(buf, offset).map_err(|error| self.failed(error, offset))
    }
}

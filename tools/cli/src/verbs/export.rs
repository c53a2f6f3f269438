//! `thinply export`

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek};
use thinply::chain::{Chain, Kind};
use thinply::device::Device;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::{Access, Buffer, Rights, Share, Storage, Writeback, opened};

use crate::io::crew::{Turns, spread};
use crate::io::draft::{Draft, Replace};
use crate::io::paths::{Place, same_file, vacant};
use crate::io::progress;
use crate::io::pump::{BUFFER, block_runs, is_zero};
use crate::io::stream;
use crate::options::LayersArg;
use crate::options::share::ShareArg;
use crate::verbs::{Answer, Outcome};

const AFTER_HELP: &str = "\
A new DST appears when it is whole. As with cp, it may still be on its way to the disk then; a block
device is synced.

Examples:
  thinply export disk.tply disk.raw
  thinply export disk.tply - | zstd > disk.raw.zst";

/// Write a disk out as raw bytes: to a sparse file, a block device, or standard output.
///
/// The disk must keep still: one that is being written is refused.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Export {
    /// Replace DST if it is there, or write over a block device that is mounted or otherwise in use
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    share: ShareArg,
    #[command(flatten)]
    layers: LayersArg,
    /// The disk
    file: PathBuf,
    /// A file to make, a block device or pipe to write to, or - for standard output
    dst: PathBuf,
}

impl Export {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let place = Place::existing(&self.file)?;
        let chain = place.chain(Access::Read, self.layers.layers()?)?;
        let kind = std::fs::metadata(&self.dst).map(|meta| meta.file_type());
        if self.dst.as_os_str() == "-" {
            self.copy(&chain, self.target(Ok(stream::output("disk")?), Form::Stream)?)?;
        } else if kind.as_ref().is_ok_and(FileTypeExt::is_block_device) {
            let device = self.target(Ok(self.open_device()?), Form::Device)?;
            device.check_size(chain.size())?;
            self.copy(&chain, device)?;
        } else if kind.is_ok_and(|kind| !kind.is_file() && !kind.is_dir()) {
            self.copy(&chain, self.target(open(&self.dst), Form::Stream)?)?;
        } else {
            self.export_file(&chain)?;
        }
        Ok(Answer::Yes)
    }

    fn export_file(&self, chain: &Chain) -> Result<()> {
        let (draft, name, replace) = match vacant(&self.dst) {
            Err(error) if error.kind() == ErrorKind::Exists && self.force => {
                let path = self.replaced(chain)?;
                let name = path.file_name().unwrap_or_default().to_owned();
                let draft = Draft::new(path.parent().unwrap_or(&path), self.rights_of(&path)?);
                (draft, name, Replace::Yes)
            }
            other => {
                let (directory, name) = other?;
                let rights = chain.copy_rights(usize::MAX)?;
                (Draft::new(&directory, rights), name, Replace::Never)
            }
        };
        let target = self.target(draft.file(), Form::Sparse)?;
        target.file.set_len(chain.size()).map_err(|error| target.failed(error, chain.size()))?;
        self.copy(chain, target)?;
        draft.publish(Path::new(&name), replace)
    }

    /// The canonical path of a file that may be replaced: no folder, and none of the layers.
    fn replaced(&self, chain: &Chain) -> Result<PathBuf> {
        let refuse = |detail| Err(Error::new(ErrorKind::InvalidInput, detail).in_file(&self.dst));
        if chain.paths().iter().any(|path| same_file(path, &self.dst)) {
            return refuse("is a layer of the disk that is exported");
        }
        let path = std::fs::canonicalize(&self.dst)
            .map_err(|error| Error::io(error, "opening the target").in_file(&self.dst))?;
        if path.is_dir() {
            return refuse("is a folder");
        }
        Ok(path)
    }

    /// Those of a file that is replaced.
    fn rights_of(&self, path: &Path) -> Result<Rights> {
        let failed = |error| Error::io(error, "opening the file to replace").in_file(&self.dst);
        match File::open(path) {
            Ok(file) => {
                self.share.check_target(file.as_fd(), &self.dst)?;
                Ok(Rights::Successor(Arc::new(file.into())))
            }
            // Who may not even look at it can't give them, but the new file needs no more.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Rights::Copy(0)),
            Err(error) => Err(failed(error)),
        }
    }

    /// A block device, unless something is mounted from it or made of it.
    fn open_device(&self) -> Result<File> {
        let mut options = OpenOptions::new();
        if !self.force {
            options.custom_flags(OFlags::EXCL.bits() as i32);
        }
        let device = options.write(true).open(&self.dst).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => {
                let detail = "is mounted, or a part of something else; --force writes over it";
                Error::new(ErrorKind::InUse, detail).in_file(&self.dst)
            }
            _ => Error::io(error, "opening the target").in_file(&self.dst),
        })?;
        self.share.check_target(device.as_fd(), &self.dst)?;
        Ok(device)
    }

    fn target(&self, file: io::Result<File>, form: Form) -> Result<Target> {
        let failed = |error| Error::io(error, "opening the target").in_file(&self.dst);
        let file = file.map_err(failed)?;
        let again = (form == Form::Sparse).then(|| file.try_clone()).transpose().map_err(failed)?;
        let storage = again.map(|file| opened(self.dst.clone(), file));
        let storage = storage.transpose().map_err(failed)?;
        let path = self.dst.clone();
        Ok(Target { path, file, form, storage, writeback: Writeback::default() })
    }

    fn copy(&self, chain: &Chain, target: Target) -> Result<()> {
        let bar = progress::bar(Some(chain.size()));
        let turns = Turns::default();
        let copied = spread(
            &turns,
            |give| list(chain, target.storage.as_deref(), give),
            |number, piece| {
                // A stream takes everything in order.
                let turn = (target.form == Form::Stream).then_some((&turns, number));
                target.put(chain, piece, turn)?;
                bar.inc(piece.length());
                Ok(())
            },
        );
        bar.finish_and_clear();
        copied?;
        match target.form {
            Form::Device => target.file.sync_data().map_err(|error| target.failed(error, 0)),
            Form::Sparse | Form::Stream => Ok(()),
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).open(path)
}

/// A part of a disk, as offset and length.
#[derive(Clone, Copy, Debug)]
enum Piece {
    /// At most [`BUFFER`] bytes to read.
    Data(u64, u64),
    /// Known to be zeros.
    Zeros(u64, u64),
}

impl Piece {
    fn length(self) -> u64 {
        match self {
            Self::Data(_, length) | Self::Zeros(_, length) => length,
        }
    }
}

/// Lists the whole disk in order, without what `shared` can have without copying.
fn list(
    chain: &Chain,
    shared: Option<&dyn Storage>,
    give: &mut dyn FnMut(Piece) -> bool,
) -> Result<()> {
    let mut open = true;
    let mut shares = shared.is_some();
    chain.walk(&mut |extent| {
        let end = extent.offset + extent.length;
        if open && extent.kind != Kind::Data {
            open = give(Piece::Zeros(extent.offset, extent.length));
        }
        if !open || extent.kind != Kind::Data {
            return Ok(());
        }
        let mut at = extent.offset;
        if let Some(shared) = shared.filter(|_| shares) {
            chain.stored(&extent, &mut |part| {
                let target = |error| Error::io(error, "sharing blocks").at(part.offset);
                let answer = shared
                    .clone_range(part.offset, part.length, part.file, part.at)
                    .map_err(|error| target(error).in_file(shared.path()))?;
                match answer {
                    Share::Done => at = part.offset + part.length,
                    Share::Refused => shares = false,
                }
                Ok(answer)
            })?;
        }
        while open && at < end {
            let length = (end - at).min(BUFFER as u64);
            open = give(Piece::Data(at, length));
            at += length;
        }
        Ok(())
    })
}

/// How zeros get to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// They are there already.
    Sparse,
    /// The device may know a short way.
    Device,
    /// As all other bytes.
    Stream,
}

struct Target {
    path: PathBuf,
    file: File,
    form: Form,
    /// The file once more, where it may share space with the layers.
    storage: Option<Arc<dyn Storage>>,
    writeback: Writeback,
}

impl Target {
    fn failed(&self, error: io::Error, offset: u64) -> Error {
        Error::io(error, "writing the target").at(offset).in_file(&self.path)
    }

    fn check_size(&self, size: u64) -> Result<()> {
        let length = seek(&self.file, SeekFrom::End(0)).map_err(|e| self.failed(e.into(), 0))?;
        if length < size {
            let detail = format!("a device of {length} bytes can't hold a disk of {size}");
            return Err(Error::new(ErrorKind::InvalidInput, detail).in_file(&self.path));
        }
        Ok(())
    }

    /// Copies a piece; what goes to a stream waits for its turn.
    fn put(&self, chain: &Chain, piece: Piece, turn: Option<(&Turns, u64)>) -> Result<()> {
        thread_local! {
            static BYTES: RefCell<Buffer> = RefCell::new(Buffer::default());
        }
        BYTES.with_borrow_mut(|bytes| {
            if let Piece::Data(offset, length) = piece {
                bytes.set_length(length as usize);
                chain.read(offset, bytes)?;
            }
            match turn {
                Some((turns, number)) => turns.take(number, || self.write(piece, bytes)),
                None => self.write(piece, bytes),
            }
        })
    }

    /// Writes a piece, of which `bytes` is the data.
    fn write(&self, piece: Piece, bytes: &[u8]) -> Result<()> {
        let (Piece::Data(offset, _) | Piece::Zeros(offset, _)) = piece;
        let written = match (piece, self.form) {
            (Piece::Data(..), Form::Sparse) => self.put_sparse(offset, bytes),
            (Piece::Data(..), Form::Device) => self.file.write_all_at(bytes, offset),
            (Piece::Data(..), Form::Stream) => (&self.file).write_all(bytes),
            (Piece::Zeros(..), Form::Sparse) => Ok(()),
            (Piece::Zeros(_, length), Form::Device) => self.zero_device(offset, length),
            (Piece::Zeros(_, length), Form::Stream) => {
                zeros(length, |part| (&self.file).write_all(part))
            }
        };
        written.map_err(|error| self.failed(error, offset))?;
        if let Some(storage) = &self.storage {
            self.writeback.count(storage, piece.length());
        }
        Ok(())
    }

    /// Leaves out blocks of zeros.
    fn put_sparse(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        block_runs(data, |_, block| is_zero(block)).filter(|&(zero, ..)| !zero).try_for_each(
            |(_, from, to)| self.file.write_all_at(&data[from..to], offset + from as u64),
        )
    }

    fn zero_device(&self, offset: u64, length: u64) -> io::Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, mode, offset, length).is_ok() {
            return Ok(());
        }
        let mut at = offset;
        zeros(length, |part| {
            self.file.write_all_at(part, at)?;
            at += part.len() as u64;
            Ok(())
        })
    }
}

/// Hands `length` zeros to `write`, a buffer at a time.
fn zeros(length: u64, mut write: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let buffer = vec![0; length.min(BUFFER as u64) as usize];
    let mut left = length;
    while left > 0 {
        let part = left.min(BUFFER as u64);
        write(&buffer[..part as usize])?;
        left -= part;
    }
    Ok(())
}

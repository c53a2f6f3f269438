//! `thinply image save` and `thinply image load`: OCI image layouts as folders and archives.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::{Rights, Storage};
use thinply::store::{Store, is_hex_digest};

use crate::import::{TELLING, compressed};
use crate::io::draft::{Draft, Replace};
use crate::io::output::Output;
use crate::io::paths::vacant;
use crate::io::stream;
use crate::options::StoreArg;
use crate::verbs::{Answer, Outcome};

const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
const BLOBS: &str = "blobs/sha256/";
/// Largest index that is read.
const MAX_INDEX: u64 = 40 << 20;

/// Write images to an OCI archive, which skopeo reads as oci-archive:FILE.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply image save --output debian.tar debian:12")]
pub struct Save {
    #[command(flatten)]
    store: StoreArg,
    /// The file to make, which must not exist, a pipe to write to, or - for standard output
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Names of images
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

/// Reads a blob from its beginning.
struct Blob {
    file: Arc<dyn Storage>,
    at: u64,
}

impl Read for Blob {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buf.into(), self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Save {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let fail = |error| self.failed(error);
        if self.output == Path::new("-") {
            let stdout = stream::output("archive")?;
            self.write(&self.contents()?, stdout)?;
            return Ok(Answer::Yes);
        }
        let kind = fs::metadata(&self.output).map(|meta| meta.file_type());
        if kind.is_ok_and(|kind| kind.is_fifo() || kind.is_char_device()) {
            let contents = self.contents()?;
            let file = File::options().write(true).open(&self.output).map_err(fail)?;
            self.write(&contents, file)?;
            return Ok(Answer::Yes);
        }
        let (directory, name) = vacant(&self.output)?;
        let contents = self.contents()?;
        let rights =
            Rights::of_copy(contents.blobs.iter().map(|(_, file)| &**file)).map_err(fail)?;
        let draft = Draft::new(&directory, rights);
        self.write(&contents, draft.file().map_err(fail)?)?.sync_all().map_err(fail)?;
        draft.publish(Path::new(&name), Replace::Never)?;
        Ok(Answer::Yes)
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::io(error, "writing the archive").in_file(&self.output)
    }

    fn contents(&self) -> Result<Contents> {
        let store = self.store.open()?;
        let images = self.images.iter().map(|name| store.image(name));
        let images = images.collect::<Result<Vec<_>>>()?;
        let mut digests = Vec::new();
        for image in &images {
            digests.extend(store.blobs_of(image)?);
        }
        digests.sort();
        digests.dedup();
        let index = store.index_of(&images)?;
        let open = |digest: String| store.blob(&digest).map(|file| (digest, file));
        Ok(Contents { index, blobs: digests.into_iter().map(open).collect::<Result<_>>()? })
    }

    fn write(&self, contents: &Contents, file: File) -> Result<File> {
        let fail = |error| self.failed(error);
        let mut archive = tar::Builder::new(io::BufWriter::new(file));
        let mut add = |path: String, length: u64, bytes: &mut dyn Read| {
            let mut header = tar::Header::new_gnu();
            header.set_size(length);
            header.set_mode(0o644);
            header.set_cksum();
            archive.append_data(&mut header, path, bytes).map_err(fail)
        };
        add("oci-layout".into(), LAYOUT.len() as u64, &mut &*LAYOUT)?;
        add("index.json".into(), contents.index.len() as u64, &mut &*contents.index)?;
        for (digest, file) in &contents.blobs {
            let length = file.length().map_err(fail)?;
            let mut blob = Blob { file: file.clone(), at: 0 }.take(length);
            add(format!("{BLOBS}{digest}"), length, &mut blob)?;
        }
        let file = archive.into_inner().map_err(fail)?;
        file.into_inner().map_err(|error| fail(error.into_error()))
    }
}

/// What an archive holds.
struct Contents {
    index: Vec<u8>,
    /// By digest.
    blobs: Vec<(String, Arc<dyn Storage>)>,
}

/// The rights of a copy of a file.
fn rights_of(file: &File) -> io::Result<Rights> {
    Ok(Rights::Copy(file.metadata()?.mode()))
}

/// Take images from an OCI archive, or from a folder with an OCI layout.
///
/// Every blob is compared with its digest, every image with its layers. Names that are taken here
/// go to the images that come. Prints their names, and the ids of those that have none: they are
/// there until `gc`, or for good once `image tag` has named them. What is no image of thinply is
/// left out.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  thinply image load debian.tar
  zstd -dc debian.tar.zst | thinply image load -
  skopeo copy docker://registry/debian:12 oci:folder:debian:12 && thinply image load folder")]
pub struct Load {
    #[command(flatten)]
    store: StoreArg,
    /// The archive or folder; - for an archive on standard input
    file: PathBuf,
}

/// Blobs on their way into a store.
struct Incoming<'a> {
    store: &'a Store,
    /// Those that were not there before.
    new: Vec<String>,
}

impl Incoming<'_> {
    fn take(&mut self, name: &str, bytes: &mut dyn Read, rights: &Rights) -> Result<()> {
        // Whatever else lies among the blobs is nobody's.
        if is_hex_digest(name) && self.store.add_blob(name, bytes, rights)? {
            self.new.push(name.to_owned());
        }
        Ok(())
    }
}

impl Load {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let store = self.store.open_or_make()?;
        let mut incoming = Incoming { store: &store, new: Vec::new() };
        let loaded = self.read(&mut incoming).and_then(|index| store.add_images(&index));
        // What no image here has, all of it where that failed, is not to stay.
        store.withdraw_blobs(incoming.new);
        let images = loaded.map_err(|error| error.in_file(self.label()))?;
        let mut output = Output::new();
        for image in images {
            match &image.reference {
                Some(name) => output.line(format_args!("Loaded image: {name}"))?,
                None => output.line(format_args!("Loaded image ID: sha256:{}", image.id))?,
            }
        }
        output.print()?;
        Ok(Answer::Yes)
    }

    fn is_stdin(&self) -> bool {
        self.file == Path::new("-")
    }

    fn label(&self) -> &Path {
        if self.is_stdin() { Path::new("standard input") } else { &self.file }
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::io(error, "reading the images").in_file(self.label())
    }

    fn refused(&self, detail: &str) -> Error {
        Error::new(ErrorKind::InvalidInput, detail).in_file(self.label())
    }

    fn read(&self, incoming: &mut Incoming<'_>) -> Result<Vec<u8>> {
        let fail = |error| self.failed(error);
        if self.is_stdin() {
            return self.read_archive(stream::input().map_err(fail)?, incoming);
        }
        if self.file.is_dir() {
            return self.read_folder(incoming);
        }
        self.read_archive(File::open(&self.file).map_err(fail)?, incoming)
    }

    fn read_folder(&self, incoming: &mut Incoming<'_>) -> Result<Vec<u8>> {
        let fail = |error| self.failed(error);
        let index = File::open(self.file.join("index.json")).map_err(fail)?;
        let index = self.read_index(&mut &index)?;
        for entry in fs::read_dir(self.file.join(BLOBS)).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| is_hex_digest(name)) else { continue };
            let mut file = File::open(entry.path()).map_err(fail)?;
            let rights = rights_of(&file).map_err(fail)?;
            incoming.take(name, &mut file, &rights)?;
        }
        Ok(index)
    }

    fn read_archive(&self, mut file: File, incoming: &mut Incoming<'_>) -> Result<Vec<u8>> {
        let fail = |error| self.failed(error);
        let is_file = file.metadata().map_err(fail)?.is_file();
        let rights = if is_file { rights_of(&file).map_err(fail)? } else { Rights::Usual };
        let mut head = Vec::new();
        file.by_ref().take(TELLING as u64).read_to_end(&mut head).map_err(fail)?;
        if let Some(kind) = compressed(&head) {
            let detail = format!("compressed with {kind}: decompress it into `image load -`");
            return Err(self.refused(&detail));
        }
        let mut archive = tar::Archive::new(io::Cursor::new(head).chain(file));
        let mut index = None;
        let mut begun = false;
        for entry in archive.entries().map_err(fail)? {
            let mut entry = entry.map_err(|error| match error.raw_os_error() {
                None if !begun => self.refused(&format!("no tar archive: {error}")),
                _ => fail(error),
            })?;
            begun = true;
            let path = entry.path().map_err(fail)?.to_string_lossy().into_owned();
            let path = path.strip_prefix("./").unwrap_or(&path).to_owned();
            let mut whole = Whole { left: entry.size(), inner: &mut entry };
            if path == "index.json" {
                index = Some(self.read_index(&mut whole)?);
            } else if let Some(digest) = path.strip_prefix(BLOBS) {
                incoming.take(digest, &mut whole, &rights)?;
            }
        }
        if self.is_stdin() {
            // Whoever writes an archive pads it, and must not find the pipe closed.
            io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(fail)?;
        }
        index.ok_or_else(|| self.refused("no OCI archive: there is no index.json in it"))
    }

    fn read_index(&self, reader: &mut dyn Read) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let count = reader.take(MAX_INDEX + 1).read_to_end(&mut bytes);
        if count.map_err(|error| self.failed(error))? as u64 > MAX_INDEX {
            let detail = "an index of more than 40 MiB";
            return Err(Error::new(ErrorKind::Limit, detail).in_file(self.label()));
        }
        Ok(bytes)
    }
}

/// Bytes of which so many are announced: fewer are an error.
struct Whole<'a> {
    inner: &'a mut dyn Read,
    left: u64,
}

impl Read for Whole<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buf)?;
        self.left = self.left.saturating_sub(count as u64);
        if count == 0 && self.left > 0 && !buf.is_empty() {
            let detail = format!("the archive was cut off, {} bytes are missing", self.left);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, detail));
        }
        Ok(count)
    }
}

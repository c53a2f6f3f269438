//! `thinply image save` and `thinply image load`: OCI image layouts as folders and archives.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use thinply::error::{Error, ErrorKind, Result};
use thinply::storage::{Rights, Storage};
use thinply::store::Store;

use crate::io::draft::{Draft, Replace};
use crate::io::output::Output;
use crate::io::paths::vacant;
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
    /// The file to make; it must not exist
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
        let (directory, name) = vacant(&self.output)?;
        let store = self.store.open()?;
        let images = self.images.iter().map(|name| store.image(name));
        let images = images.collect::<Result<Vec<_>>>()?;
        let mut blobs = Vec::new();
        for image in &images {
            blobs.extend(store.blobs_of(image)?);
        }
        blobs.sort();
        blobs.dedup();
        let index = store.index_of(&images)?;

        let fail = |error| Error::io(error, "writing the archive").in_file(&self.output);
        let files = blobs.iter().map(|digest| store.blob(digest)).collect::<Result<Vec<_>>>()?;
        let rights = Rights::of_copy(files.iter().map(|file| &**file)).map_err(fail)?;
        let draft = Draft::new(&directory, rights);
        let file = draft.file().map_err(fail)?;
        let mut archive = tar::Builder::new(io::BufWriter::new(file));
        let mut add = |path: String, length: u64, bytes: &mut dyn Read| {
            let mut header = tar::Header::new_gnu();
            header.set_size(length);
            header.set_mode(0o644);
            header.set_cksum();
            archive.append_data(&mut header, path, bytes).map_err(fail)
        };
        add("oci-layout".into(), LAYOUT.len() as u64, &mut &*LAYOUT)?;
        add("index.json".into(), index.len() as u64, &mut &*index)?;
        for (digest, file) in blobs.iter().zip(files) {
            let length = file.length().map_err(fail)?;
            add(format!("{BLOBS}{digest}"), length, &mut Blob { file, at: 0 }.take(length))?;
        }
        let mut file = archive.into_inner().map_err(fail)?;
        file.flush().map_err(fail)?;
        file.get_ref().sync_all().map_err(fail)?;
        draft.publish(Path::new(&name), Replace::Never)?;
        Ok(Answer::Yes)
    }
}

/// The rights of a copy of a file.
fn rights_of(file: &File) -> io::Result<Rights> {
    Ok(Rights::Copy(file.metadata()?.mode()))
}

/// Take images from an OCI archive, or from a folder with an OCI layout.
///
/// Every blob is compared with its digest, every image with its layers. Names that are taken here
/// go to the images that come. Prints their names.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  thinply image load debian.tar
  skopeo copy docker://registry/debian:12 oci:folder:debian:12 && thinply image load folder")]
pub struct Load {
    #[command(flatten)]
    store: StoreArg,
    /// The archive or folder
    file: PathBuf,
}

/// Stores the bytes of a reader under their digest.
type AddBlob<'a> = dyn FnMut(&str, &mut dyn Read, &Rights) -> Result<()> + 'a;

impl Load {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let mut added = Vec::new();
        let images = self
            .load(&store, &mut added)
            .and_then(|index| store.add_images(&index).map_err(|error| error.in_file(&self.file)))
            .inspect_err(|_| store.withdraw_blobs(std::mem::take(&mut added)))?;
        let mut output = Output::new();
        for image in images {
            output.line(format_args!("Loaded image: {}", image.name()))?;
        }
        output.print()?;
        Ok(Answer::Yes)
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::io(error, "reading the images").in_file(&self.file)
    }

    /// Stores all blobs, and notes them in `added`; the index that names what they are.
    fn load(&self, store: &Store, added: &mut Vec<String>) -> Result<Vec<u8>> {
        let mut add = |digest: &str, bytes: &mut dyn Read, rights: &Rights| {
            store.add_blob(digest, bytes, rights)?;
            added.push(digest.to_owned());
            Ok(())
        };
        if self.file.is_dir() { self.load_folder(&mut add) } else { self.load_archive(&mut add) }
    }

    fn load_folder(&self, add: &mut AddBlob<'_>) -> Result<Vec<u8>> {
        let fail = |error| self.failed(error);
        let index = File::open(self.file.join("index.json")).map_err(fail)?;
        let index = self.read_index(&mut &index)?;
        for entry in fs::read_dir(self.file.join(BLOBS)).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let mut file = File::open(entry.path()).map_err(fail)?;
            let rights = rights_of(&file).map_err(fail)?;
            add(&entry.file_name().to_string_lossy(), &mut file, &rights)?;
        }
        Ok(index)
    }

    fn load_archive(&self, add: &mut AddBlob<'_>) -> Result<Vec<u8>> {
        let fail = |error| self.failed(error);
        let file = File::open(&self.file).map_err(fail)?;
        let rights = rights_of(&file).map_err(fail)?;
        let mut archive = tar::Archive::new(file);
        let mut index = None;
        for entry in archive.entries().map_err(fail)? {
            let mut entry = entry.map_err(fail)?;
            let path = entry.path().map_err(fail)?.to_string_lossy().into_owned();
            let path = path.strip_prefix("./").unwrap_or(&path);
            if path == "index.json" {
                index = Some(self.read_index(&mut entry)?);
            } else if let Some(digest) = path.strip_prefix(BLOBS).filter(|name| !name.is_empty()) {
                add(digest, &mut entry, &rights)?;
            }
        }
        index.ok_or_else(|| {
            let detail = "no OCI archive: there is no index.json in it";
            Error::new(ErrorKind::InvalidInput, detail).in_file(&self.file)
        })
    }

    fn read_index(&self, reader: &mut dyn Read) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let count = reader.take(MAX_INDEX + 1).read_to_end(&mut bytes);
        if count.map_err(|error| self.failed(error))? as u64 > MAX_INDEX {
            let detail = "an index of more than 40 MiB";
            return Err(Error::new(ErrorKind::Limit, detail).in_file(&self.file));
        }
        Ok(bytes)
    }
}

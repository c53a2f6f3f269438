//! Images that come from other stores and go to them: their blobs, and the index that names them.

use std::io::{self, Read};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::digest::{hex_digest, is_hex_digest};
use super::image::{Manifest, bad, hex_of};
use super::index::Index;
use super::{Image, Store, digest, files, json};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Lock, Rights, sync_folder, write_all_at};

/// How much of a blob is held at a time.
const CHUNK: usize = 1 << 20;

impl Store {
    /// Stores the bytes of a reader if they have the digest, with these rights, and leaves them
    /// unreferenced. Answers whether they are new; a blob that was there before keeps its rights.
    pub fn add_blob(&self, digest: &str, reader: &mut dyn Read, rights: &Rights) -> Result<bool> {
        if !is_hex_digest(digest) {
            return Err(bad(format!("a blob called {digest:?}, expected a SHA-256")));
        }
        let name = files::draft_name()?;
        let folder = self.blobs();
        let fail = |error| Error::io(error, "storing a blob").in_file(folder.path().join(digest));
        let old = folder.open(digest, Access::Read).ok();
        let is_new = old.is_none();
        let rights = old.map_or(Ok(rights.clone()), |old| Rights::of_successor(&*old));
        let rights = rights.map_err(fail)?;
        let guard = self.lock()?;
        let file = folder.creating(rights).create(&name).map_err(fail)?;
        file.lock(Lock::Shared).map_err(fail)?;
        drop(guard);
        let mut store = || {
            let mut hasher = Sha256::new();
            let (mut buffer, mut at) = (vec![0; CHUNK], 0);
            loop {
                let count = read_full(reader, &mut buffer).map_err(fail)?;
                let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else { break };
                hasher.update(part);
                // What is zeros stays a hole.
                if part.iter().any(|&byte| byte != 0) {
                    write_all_at(&*file, part, at).map_err(fail)?;
                }
                at += count as u64;
            }
            file.set_length(at).map_err(fail)?;
            let found = digest::hex(&hasher.finalize());
            if found != digest {
                return Err(bad(format!("the SHA-256 of blob {digest} is {found}")));
            }
            file.sync_data().map_err(fail)?;
            let _guard = self.lock()?;
            folder.rename(&name, digest).map_err(fail)?;
            sync_folder(folder)
        };
        store().map(|()| is_new).inspect_err(|_| {
            let _ = folder.remove(&name);
        })
    }

    /// Takes manifests in whose blobs were added, under their names where they have any, after checking
    /// that all is there. What others keep beside them is left out.
    pub fn add_images(&self, index: &[u8]) -> Result<Vec<Image>> {
        let value: Value = json::parse(index)?;
        let _guard = self.lock()?;
        let mut own = Index::read(self)?;
        let (mut images, mut foreign) = (Vec::new(), None);
        let entries = value.get("manifests").and_then(Value::as_array);
        for entry in entries.into_iter().flatten() {
            let digest = entry.get("digest").and_then(Value::as_str).and_then(hex_digest);
            let digest = digest.ok_or_else(|| bad("an entry without a SHA-256 digest"))?;
            let name = entry.pointer("/annotations/org.opencontainers.image.ref.name");
            let reference = name.and_then(Value::as_str).map(str::parse).transpose()?;
            let image = match self.read_manifest(digest)? {
                Manifest::Image(image) => Image { reference: reference.clone(), ..image },
                Manifest::Missing => return Err(bad(format!("manifest {digest} is missing"))),
                Manifest::Foreign(why) => {
                    foreign.get_or_insert(why);
                    continue;
                }
            };
            self.check_layers(&image)?;
            match reference {
                Some(reference) => own.set(&reference, entry.clone()),
                None => own.add(entry.clone()),
            }
            images.push(image);
        }
        if let Some(why) = foreign.filter(|_| images.is_empty()) {
            return Err(why);
        }
        own.write(self)?;
        Ok(images)
    }

    /// The digests of all blobs of an image: manifest, configuration, layers.
    pub fn blobs_of(&self, image: &Image) -> Result<Vec<String>> {
        let mut blobs = vec![image.id.clone(), hex_of(image.manifest.config())?];
        blobs.extend(image.layers()?);
        Ok(blobs)
    }

    /// An index of these images alone, as a layout of its own has it.
    pub fn index_of(&self, images: &[Image]) -> Result<Vec<u8>> {
        let own = Index::read(self)?;
        let mut index = Index::default();
        for image in images {
            let descriptor = own.descriptor(&image.id).cloned();
            let descriptor = descriptor.ok_or_else(|| bad("the image was removed meanwhile"))?;
            let reference = image.reference.as_ref().ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, "an image without a name can't be saved")
            })?;
            index.set(reference, descriptor);
        }
        json::canonical(index.value())
    }

    /// Opens the whole chain, and compares it with the manifest.
    fn check_layers(&self, image: &Image) -> Result<()> {
        let layers = image.layers()?;
        let chain = self.open_image(image)?;
        let files: Vec<_> = chain
            .paths()
            .iter()
            .rev()
            .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
            .collect();
        if files != layers {
            return Err(bad("the layers of the manifest are not the chain of its newest layer"));
        }
        Ok(())
    }
}

fn read_full(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

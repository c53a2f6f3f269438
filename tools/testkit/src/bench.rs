//! A folder of layers to test in, and a byte array to compare with.

use std::collections::BTreeMap;
use std::sync::Arc;

use thinply::chain::{Chain, Gate, create, seal};
use thinply::derive::PackOptions;
use thinply::packed::Compression;
use thinply::storage::{Access, Folder, MemoryFolder, write_all_at};

pub const BLOCK: usize = 4096;

/// A sparse byte array that says what a device should hold.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub size: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl Disk {
    pub fn new(size: u64) -> Self {
        Self { size, blocks: BTreeMap::new() }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut at = 0;
        while at < data.len() {
            let position = offset + at as u64;
            let within = (position % BLOCK as u64) as usize;
            let length = (BLOCK - within).min(data.len() - at);
            let block =
                self.blocks.entry(position / BLOCK as u64).or_insert_with(|| vec![0; BLOCK]);
            block[within..within + length].copy_from_slice(&data[at..at + length]);
            at += length;
        }
    }

    pub fn zero(&mut self, offset: u64, length: u64) {
        self.write(offset, &vec![0; length as usize]);
    }

    /// Zeroes the whole blocks of a range, the device's last one counted as whole.
    pub fn trim(&mut self, offset: u64, length: u64) {
        let block = BLOCK as u64;
        let first = offset.next_multiple_of(block);
        let stop = offset + length;
        let end = if stop == self.size { stop } else { stop / block * block };
        if first < end {
            self.zero(first, end - first);
        }
    }

    pub fn resize(&mut self, size: u64) {
        if size < self.size {
            let tail = size.next_multiple_of(BLOCK as u64);
            self.blocks.retain(|&number, _| number * (BLOCK as u64) < tail);
            if tail != size {
                self.write(size, &vec![0; (tail - size) as usize]);
            }
        }
        self.size = size;
    }

    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        let mut at = 0;
        while at < length {
            let position = offset + at as u64;
            let within = (position % BLOCK as u64) as usize;
            let part = (BLOCK - within).min(length - at);
            if let Some(block) = self.blocks.get(&(position / BLOCK as u64)) {
                data[at..at + part].copy_from_slice(&block[within..within + part]);
            }
            at += part;
        }
        data
    }

    /// The first byte in which two disks differ; the shorter one goes on with zeros.
    pub fn first_difference(&self, other: &Self) -> Option<u64> {
        let mut blocks: Vec<_> = self.blocks().chain(other.blocks()).collect();
        blocks.sort_unstable();
        blocks.into_iter().find_map(|block| {
            let offset = block * BLOCK as u64;
            let (a, b) = (self.read(offset, BLOCK), other.read(offset, BLOCK));
            let place = a.iter().zip(&b).position(|(a, b)| a != b)?;
            Some(offset + place as u64)
        })
    }

    /// The numbers of the blocks that were ever written.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().copied()
    }
}

/// A folder of layers in memory.
pub struct Bench {
    pub folder: Arc<dyn Folder>,
    pub layers: Arc<Gate>,
}

impl Default for Bench {
    fn default() -> Self {
        Self::in_folder(Arc::new(MemoryFolder::new("memory")))
    }
}

impl Bench {
    pub fn in_folder(folder: Arc<dyn Folder>) -> Self {
        Self { folder, layers: Arc::default() }
    }

    pub fn create(&self, name: &str, size: u64) {
        create(&self.folder, name, Some(size), None, &self.layers).unwrap();
    }

    /// An overlay over `parent`, which is sealed first.
    pub fn overlay(&self, name: &str, parent: &str, size: Option<u64>) {
        let parent = seal(&*self.folder, parent).unwrap();
        create(&self.folder, name, size, Some(&parent), &self.layers).unwrap();
    }

    /// Opens a layer for writing, and closes it when `write` has written.
    pub fn change(&self, name: &str, write: impl FnOnce(&Chain)) {
        let chain = self.write(name);
        write(&chain);
        chain.close().unwrap();
    }

    /// Packs the newest layer of a chain under another name.
    pub fn pack(&self, chain: &Chain, name: &str, compression: Compression) {
        let options = PackOptions { compression, drop_equal: false };
        let (_, bytes) = chain.pack(Vec::new(), &options, &mut |_| {}).unwrap();
        write_all_at(&*self.folder.create(name).unwrap(), &bytes, 0).unwrap();
    }

    pub fn open(&self, name: &str, access: Access) -> thinply::error::Result<Chain> {
        Chain::open(self.folder.clone(), name, access, self.layers.clone())
    }

    pub fn write(&self, name: &str) -> Chain {
        self.open(name, Access::Write).unwrap()
    }

    pub fn read(&self, name: &str) -> Chain {
        self.open(name, Access::Read).unwrap()
    }
}

//! thinply: a kernel-free, userspace, block-level copy-on-write image format.
//!
//! An image is a chain of layers. Each layer is a file that holds an allocation bitmap over 4 KiB
//! blocks and the blocks themselves; a reader asks the newest layer first, a writer only ever
//! touches the top. `format-spec.md` is normative for the bytes and for the durability protocol.
//!
//! A disk, a snapshot of it, and a second disk over that:
//!
//! ```
//! use std::sync::Arc;
//!
//! use thinply::chain::{Chain, Gate, create, seal};
//! use thinply::device::Device;
//! use thinply::storage::{Access, FileFolder, Folder};
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path();
//! let folder: Arc<dyn Folder> = Arc::new(FileFolder::new(path));
//! let layers = Arc::new(Gate::default());
//! create(&folder, "disk.tply", Some(10 << 30), None, &layers)?;
//!
//! let disk = Chain::open(folder.clone(), "disk.tply", Access::Write, layers.clone())?;
//! disk.write(1 << 20, b"on monday")?;
//! disk.flush()?; // survives a power loss from here on
//! disk.snapshot("monday.tply")?;
//! disk.write(1 << 20, b"on tuesday")?;
//! disk.close()?;
//!
//! let monday = seal(&*folder, "monday.tply")?;
//! create(&folder, "other.tply", None, Some(&monday), &layers)?;
//! let other = Chain::open(folder, "other.tply", Access::Read, layers)?;
//! let mut found = [0; 9];
//! other.read(1 << 20, &mut found)?;
//! assert_eq!(&found, b"on monday");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The same layer packed, to be shared and shipped:
//!
//! ```
//! # use std::sync::Arc;
//! # use thinply::chain::{Chain, Gate, create};
//! # use thinply::device::Device;
//! # use thinply::storage::{Access, FileFolder, Folder};
//! use thinply::derive::PackOptions;
//! use thinply::packed::Compression;
//!
//! # let directory = tempfile::tempdir()?;
//! # let folder: Arc<dyn Folder> = Arc::new(FileFolder::new(directory.path()));
//! # let layers = Arc::new(Gate::default());
//! # create(&folder, "disk.tply", Some(1 << 30), None, &layers)?;
//! # let disk = Chain::open(folder.clone(), "disk.tply", Access::Write, layers.clone())?;
//! # disk.write(0, &[7; 8192])?;
//! # disk.close()?;
//! let disk = Chain::open(folder, "disk.tply", Access::Read, layers)?;
//! let options = PackOptions { compression: Compression::default(), drop_equal: true };
//! let (summary, packed) = disk.pack(Vec::new(), &options, &mut |_done| {})?;
//! assert_eq!(summary.data_blocks, 2);
//! assert_eq!(summary.length, packed.len() as u64);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Any [`device::Device`] can be served over NBD, one of your own too:
//!
//! ```
//! use std::sync::Arc;
//!
//! use thinply::device::*;
//! use thinply::error::Result;
//! use thinply::nbd::client::Client;
//! use thinply::nbd::server::{Listener, Server, ServerConfig};
//! use thinply::serve::{Opened, Served, Table};
//!
//! /// Reads as its own block numbers, and takes nothing.
//! struct Numbers;
//!
//! impl Device for Numbers {
//!     fn size(&self) -> u64 {
//!         1 << 20
//!     }
//!     fn read_only(&self) -> bool {
//!         true
//!     }
//!     fn try_read(&self, offset: u64, mut into: Scatter<'_>, _: Wait) -> Attempt {
//!         check_range(self.size(), offset, into.len() as u64)?;
//!         let end = offset + into.len() as u64;
//!         let bytes: Vec<u8> = (offset..end).map(|at| (at / 4096) as u8).collect();
//!         into.copy_from(&bytes);
//!         Ok(())
//!     }
//!     fn try_write(&self, _: u64, _: Gather<'_>, _: Wait) -> Result<u64> {
//!         unreachable!("it is read-only, and so nobody writes to it")
//!     }
//!     fn zero(&self, _: u64, _: u64, _: ZeroMode) -> Result<()> {
//!         unreachable!()
//!     }
//!     fn trim(&self, _: u64, _: u64) -> Result<()> {
//!         unreachable!()
//!     }
//!     fn flush(&self) -> Result<()> {
//!         Ok(())
//!     }
//!     fn try_extents(
//!         &self,
//!         _: u64,
//!         length: u64,
//!         _: Detail,
//!         limit: usize,
//!         out: &mut Vec<Extent>,
//!         _: Wait,
//!     ) -> Attempt {
//!         push_extent(out, limit, Extent { length, hole: false });
//!         Ok(())
//!     }
//!     fn prefetch(&self, _: u64, _: u64) -> Result<Prefetch> {
//!         Ok(Prefetch::All)
//!     }
//! }
//!
//! impl Disk for Numbers {
//!     fn close(&self) -> Result<()> {
//!         Ok(())
//!     }
//! }
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("socket");
//! let disks = Table::new();
//! disks.insert(Arc::new(Served::new("numbers", Opened::new(Numbers))?))?;
//! let listener = Listener::unix(&path)?;
//! let uri = listener.uri("numbers");
//! let server = Server::new(vec![listener], Arc::new(disks), ServerConfig::default())?;
//! let handle = server.handle();
//! let serving = std::thread::spawn(move || server.run());
//!
//! let mut client = Client::connect(&uri.parse()?)?;
//! let mut block = [0; 4096];
//! client.read(5 * 4096, &mut block)?;
//! assert_eq!(block, [5; 4096]);
//! client.disconnect()?;
//! handle.shutdown();
//! serving.join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Modules
//!
//! [`chain`] is where most programs begin; [`serve`] shows how a front end of one's own is made. From the
//! ground up, each line names only those before it:
//!
//! - [`error`], [`types`], [`wait`], [`memory`]: the error and its kinds; numbers that must not mix; whether a
//!   call may wait; memory that others may change meanwhile
//! - [`format`](mod@format), [`storage`], [`device`]: bytes to checked values and back; files and
//!   folders; what a block device can do
//! - [`live`], [`packed`]: one layer, as it is written or as it is shared
//! - [`serve`]: disks in use, for any protocol
//! - [`chain`]: layers as one device, and the gate through which parents come
//! - [`derive`](mod@derive), [`inspect`]: new layers made of chains; files that are looked at, judged and repaired
//! - [`nbd`]: server and client; `store` (with the feature of that name): images, containers and volumes in
//!   a folder
//! - `control` (likewise): what is done to a store's disks as a whole
//!
//! `ARCHITECTURE.md` follows a request through them, and says where a new thing goes.

pub mod chain;
#[cfg(feature = "store")]
pub mod control;
pub mod derive;
pub mod device;
pub mod error;
pub mod format;
#[cfg(not(simulation))]
pub mod fuse;
#[cfg(not(simulation))]
pub mod holder;
pub mod inspect;
pub mod live;
pub mod memory;
pub mod nbd;
pub mod packed;
#[doc(hidden)]
pub mod planted;
pub mod serve;
mod socket;
pub mod storage;
#[cfg(feature = "store")]
pub mod store;
mod sync;
pub mod types;
pub mod wait;

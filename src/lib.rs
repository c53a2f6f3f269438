//! thinply: a kernel-free, userspace, block-level copy-on-write image format.
//!
//! An image is a chain of layers. Each layer is a file that holds an allocation bitmap over 4 KiB
//! blocks and the blocks themselves; a reader asks the newest layer first, a writer only ever
//! touches the top. `format-spec.md` is normative for the bytes and for the durability protocol.

pub mod chain;
#[cfg(feature = "store")]
pub mod control;
pub mod derive;
pub mod device;
pub mod error;
pub mod format;
pub mod inspect;
pub mod live;
pub mod memory;
pub mod nbd;
pub mod packed;
#[doc(hidden)]
pub mod planted;
pub mod serve;
pub mod storage;
#[cfg(feature = "store")]
pub mod store;
mod sync;
pub mod types;
pub mod wait;

//! Exports block devices over the Network Block Device protocol, and uses those of others.
//!
//! [`proto`] turns bytes into checked values and back, without any I/O; [`server`] owns sockets,
//! threads and buffers and serves any [`Device`](crate::device::Device) through it; [`client`]
//! reads and writes what a server shows. Section names in the docs are those of the protocol
//! document (`doc/proto.md` of the NBD project).

mod address;
pub mod client;
pub mod proto;
#[cfg(not(simulation))]
pub mod server;

pub use address::{Address, Place};

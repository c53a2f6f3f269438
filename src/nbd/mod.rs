//! Exports block devices over the Network Block Device protocol.
//!
//! [`proto`] turns bytes into checked values and back, without any I/O; [`server`] owns sockets,
//! threads and buffers and serves any [`Device`](crate::device::Device) through it. Section names
//! in the docs are those of the protocol document (`doc/proto.md` of the NBD project).

pub mod proto;
pub mod server;

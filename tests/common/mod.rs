//! What several integration tests share. Each test program uses only part of it.
#![allow(dead_code)]

pub mod bench;
pub mod crash;
pub mod device;
pub mod hooked;
pub mod nbd;

//! A store whose disks others use while they are changed.

pub mod changes;
pub mod control;
pub mod files;
pub mod moment;
pub mod serve_all;

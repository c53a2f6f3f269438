//! What verbs read from and write to, and how it is put for people.

pub mod crew;
pub mod draft;
pub mod ext4;
pub mod log;
pub mod mountinfo;
pub mod output;
pub mod paths;
pub mod progress;
pub mod pump;
pub mod signals;
pub mod size;
pub mod still;
pub mod stream;
pub mod table;

//! Whether a layer keeps still while it is looked at.

use std::io;

use thinply::error::{Error, Result};
use thinply::storage::{Lock, Storage, holders};

/// Whether somebody may be writing the file.
#[derive(Debug)]
pub enum Stillness {
    /// A shared lock is held on the file, for as long as it is open.
    Locked,
    /// Somebody writes it; these processes have it open.
    Moving(Vec<String>),
}

impl Stillness {
    /// Takes a shared lock, or finds out who stands against it.
    pub fn of(file: &dyn Storage) -> Result<Self> {
        match file.lock(Lock::Shared) {
            Ok(()) => Ok(Self::Locked),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(Self::Moving(holders(file.path())))
            }
            Err(error) => Err(Error::io(error, "locking the file").in_file(file.path())),
        }
    }

    /// What to tell about a file that is read although it is being written.
    pub fn note(&self) -> Option<String> {
        match self {
            Self::Locked => None,
            Self::Moving(who) if who.is_empty() => {
                Some("being written; read without a lock, so this may be out of date".into())
            }
            Self::Moving(who) => Some(format!(
                "being written by {}; read without a lock, so this may be out of date",
                who.join(", ")
            )),
        }
    }
}

//! The holder's side.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::wire::{BEGIN, DONE, DROP, GREETING, KEEP, KEPT, READY, receive, send};

/// What servers have given to be kept, by key.
#[derive(Debug, Default)]
pub struct Vault(BTreeMap<String, Vec<OwnedFd>>);

/// How far a server has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// It has served.
    Served,
    /// It was gone before it did.
    Nowhere,
}

impl Vault {
    /// Gives a server all that is kept, and keeps for it from then on, until it hangs up. Calls `ready`
    /// once it serves, and answers how far it came.
    ///
    /// # Errors
    /// Host errors; [`io::ErrorKind::InvalidData`] for one that says what means nothing.
    pub fn attend(&mut self, server: impl AsFd, mut ready: impl FnMut()) -> io::Result<Came> {
        send(&server, GREETING, "", &[])?;
        for (key, descriptors) in &self.0 {
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            send(&server, KEPT, key, &descriptors)?;
        }
        send(&server, BEGIN, "", &[])?;
        let mut came = Came::Nowhere;
        while let Some(message) = receive(&server)? {
            match (message.word.as_str(), message.descriptors.is_empty()) {
                (KEEP, false) => drop(self.0.insert(message.key, message.descriptors)),
                (DROP, true) => drop(self.0.remove(&message.key)),
                (READY, true) => {
                    came = Came::Served;
                    ready();
                }
                _ => {
                    let detail = format!("a server says {:?}", message.word);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, detail));
                }
            }
            send(&server, DONE, "", &[])?;
        }
        Ok(came)
    }

    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

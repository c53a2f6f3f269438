//! A disk that an NBD server shows: how to get at formats that other programs read.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use thinply::chain::Chain;
use thinply::error::Result;
use thinply::nbd::client::Client;
use thinply::storage::Rights;

use super::source::Disk;
use crate::io::pump::{BUFFER, Feeder, Piece};

/// The URI that a source is, if it is one.
pub fn uri(source: &Path) -> Option<&str> {
    let text = source.to_str()?;
    let (scheme, _) = text.split_once("://")?;
    scheme.starts_with("nbd").then_some(text)
}

/// A disk that a server shows.
pub struct NbdDisk {
    size: u64,
    client: Mutex<Client>,
}

impl NbdDisk {
    /// Connects to the export that a URI names.
    pub fn connect(uri: &str) -> Result<Self> {
        let client = Client::connect(&uri.parse()?)?;
        Ok(Self { size: client.size(), client: Mutex::new(client) })
    }
}

impl Disk for NbdDisk {
    fn length(&self) -> Option<u64> {
        Some(self.size)
    }

    fn rights(&self) -> Rights {
        Rights::Usual
    }

    fn read(&self, feeder: &Feeder, _: Option<&Chain>) -> Result<()> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = 0;
        while at < self.size {
            for extent in client.extents(at, self.size - at)? {
                let end = at + extent.length;
                if extent.hole && !feeder.send(Piece::Zeros(at, extent.length)) {
                    return Ok(());
                }
                while !extent.hole && at < end {
                    let length = (end - at).min(BUFFER as u64) as usize;
                    let Some(mut buffer) = feeder.buffer(length) else { return Ok(()) };
                    client.read(at, &mut buffer)?;
                    if !feeder.send(Piece::Data(at, buffer)) {
                        return Ok(());
                    }
                    at += length as u64;
                }
                at = end;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_scheme_makes_a_uri() {
        assert_eq!(uri(Path::new("./nbd:/x")), None);
        assert_eq!(uri(Path::new("nbd://x")), Some("nbd://x"));
    }
}

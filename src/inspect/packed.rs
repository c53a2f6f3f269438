//! Judging a packed layer, which means verifying all of it.

use std::sync::Arc;

use super::check::Report;
use crate::error::{ErrorKind, Result};
use crate::packed::{Damage, Packed, Watch};
use crate::storage::Storage;

/// Checks the file of a packed layer: structures, checksums, hashes and root, data included.
///
/// # Errors
/// As [`super::check`].
pub fn check_packed(file: Arc<dyn Storage>) -> Result<Report> {
    match Packed::open(file) {
        Ok(layer) => verify(&layer),
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            let mut report = Report::default();
            report.finding(error.offset().unwrap_or(0), error.to_string());
            Ok(report)
        }
        Err(error) => Err(error),
    }
}

/// [`check_packed`] for a layer that is open.
///
/// # Errors
/// Host errors.
pub fn verify(layer: &Packed) -> Result<Report> {
    let mut report = Report::default();
    layer.verify(&mut report)?;
    Ok(report)
}

impl Watch for Report {
    fn found(&mut self, damage: Damage) {
        let offset = damage.error.offset().unwrap_or(0);
        match damage.guest {
            Some((guest, length)) => self.finding(
                offset,
                format!("{}: {length} bytes at guest offset {guest} are lost", damage.error),
            ),
            None => self.finding(offset, damage.error.to_string()),
        }
    }
}

//! What containers and volumes have in common.

use thinply::store::{DiskKind, DiskName};

use crate::io::output::Output;
use crate::options::StoreArg;
use crate::verbs::{Answer, Outcome, each};

/// Removes disks, and prints the names of those that went.
pub fn remove_disks(store: &StoreArg, kind: DiskKind, names: &[String]) -> Outcome {
    let store = store.open()?;
    let mut output = Output::new();
    let removed = each(names, |name| {
        store.remove_disk(&DiskName::new(kind, name)?)?;
        output.line(name)?;
        Ok(Answer::Yes)
    });
    output.print()?;
    removed
}

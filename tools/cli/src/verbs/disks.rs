//! What containers and volumes have in common.

use thinply::store::{DiskKind, DiskName};

use crate::io::output::Output;
use crate::options::StoreArg;
use crate::verbs::{Answer, Outcome};

/// Removes disks, and prints the names of those that went.
pub fn remove_disks(store: &StoreArg, kind: DiskKind, names: &[String]) -> Outcome {
    let store = store.open()?;
    let mut output = Output::new();
    let removed = names.iter().try_for_each(|name| {
        store.remove_disk(&DiskName::new(kind, name)?)?;
        output.line(name)
    });
    output.print()?;
    removed.map(|()| Answer::Yes)
}

//! What could be read of the store, and what could not: one thing that is damaged hides no other.

use std::fmt;

use super::Store;
use crate::error::Result;
use crate::storage::Lock;

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is about.
    pub subject: String,
    /// What was found.
    pub detail: String,
}

impl Finding {
    pub(super) fn new(subject: impl fmt::Display, detail: impl fmt::Display) -> Self {
        Self { subject: subject.to_string(), detail: detail.to_string() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.detail)
    }
}

/// An answer about the store as far as it can be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey<T> {
    /// What can be.
    pub good: T,
    /// What can't be, and why.
    pub bad: Vec<Finding>,
}

impl Store {
    /// A change under way may look like damage. So where something was found, `look` looks again with
    /// all changes kept out, if this process may do that.
    pub(super) fn settled<T>(&self, look: impl Fn() -> Result<Survey<T>>) -> Result<Survey<T>> {
        match look() {
            Ok(survey) if survey.bad.is_empty() => Ok(survey),
            first => match self.hold(Lock::Shared) {
                Ok(_hold) => look(),
                Err(_) => first,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Arc;

    use super::*;
    use crate::storage::{Access, Folder, MemoryFolder};
    use crate::store::{Folders, LOCK_FILE};

    #[test]
    fn what_looks_damaged_is_looked_at_again_with_changes_kept_out() {
        let folder = || Arc::new(MemoryFolder::new("m")) as Arc<dyn Folder>;
        let (root, blobs, containers, volumes) = (folder(), folder(), folder(), folder());
        let store = Store::over(Folders { root, blobs, containers, volumes }).unwrap();
        let may = |lock| store.root().open(LOCK_FILE, Access::Write).unwrap().lock(lock).is_ok();
        let looks = Cell::new(0);
        let look = |damaged: fn(u32) -> bool| {
            looks.set(0);
            let settled = store.settled(|| {
                looks.set(looks.get() + 1);
                // Others who look may do so at the same time, from the second look on nobody else.
                assert_eq!((may(Lock::Shared), may(Lock::Exclusive)), (true, looks.get() == 1));
                let bad = damaged(looks.get()).then(|| Finding::new("image a", "damaged"));
                Ok(Survey { good: (), bad: bad.into_iter().collect() })
            });
            (settled.unwrap().bad.len(), looks.get())
        };
        assert_eq!(look(|_| false), (0, 1));
        assert_eq!(look(|look| look == 1), (0, 2));
        assert_eq!(look(|_| true), (1, 2));
        assert!(may(Lock::Exclusive));
    }
}

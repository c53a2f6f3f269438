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

//! Lists of what is in a store, where some of it may be damaged.

use crate::error::Error;

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is about.
    pub subject: String,
    /// What was found.
    pub detail: String,
}

impl Finding {
    pub(super) fn new(subject: impl Into<String>, detail: impl ToString) -> Self {
        Self { subject: subject.into(), detail: detail.to_string() }
    }
}

/// What was found, and what is there but can't be read: one bad thing hides no good one.
#[derive(Clone, Debug)]
pub struct Listed<T> {
    /// What is good.
    pub found: Vec<T>,
    /// What is bad.
    pub bad: Vec<Finding>,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self { found: Vec::new(), bad: Vec::new() }
    }
}

impl<T> Listed<T> {
    /// Takes one more in, or what is wrong with it.
    pub(super) fn add(&mut self, subject: impl Into<String>, result: Result<T, Error>) {
        match result {
            Ok(value) => self.found.push(value),
            Err(error) => self.bad.push(Finding::new(subject, error)),
        }
    }
}

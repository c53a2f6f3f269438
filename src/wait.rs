//! May a call wait, and was it done without: the one answer to both.

use crate::error::{Error, ErrorKind, Result};

/// What a call may spend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// All that it takes: disks, commits, whatever is far away.
    Allowed,
    /// The processor's time to decompress what the page cache holds, and no wait.
    Decode,
    /// Copying, and no wait.
    Never,
}

/// Why something was not done.
#[derive(Clone, Debug)]
pub enum NotDone {
    /// It would have taken more than the [`Wait`] allows. Nothing that anybody can see was changed;
    /// memory that was to be filled is undefined.
    WouldWait,
    /// It was tried, and failed.
    Failed(Error),
}

/// Result of what may not wait.
pub type Attempt<T = ()> = std::result::Result<T, NotDone>;

impl From<Error> for NotDone {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The result of an attempt that was allowed to wait.
pub fn waited<T>(attempt: Attempt<T>) -> Result<T> {
    attempt.map_err(|not_done| match not_done {
        NotDone::Failed(error) => error,
        NotDone::WouldWait => Error::new(ErrorKind::Io, "gave up where it was allowed to wait"),
    })
}

/// The result of an attempt; none where it would have waited.
pub fn unless_waiting<T>(attempt: Attempt<T>) -> Result<Option<T>> {
    match attempt {
        Ok(value) => Ok(Some(value)),
        Err(NotDone::WouldWait) => Ok(None),
        Err(NotDone::Failed(error)) => Err(error),
    }
}

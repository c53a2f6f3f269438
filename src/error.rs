//! The one error type: a stable [`ErrorKind`] that callers match on, and the file, offset and
//! expectation that people read. And how text of others is shown in it and elsewhere.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host reported an error that has no kind of its own (`EIO` and the like).
    Io,
    /// The host file system is full, or a quota or file size limit is reached.
    NoSpace,
    /// A file, or the parent that a link names, is not there.
    NotFound,
    /// A file that should be created exists.
    Exists,
    /// The host refused access.
    PermissionDenied,
    /// Another process holds the file.
    InUse,
    /// A write to something that may not be written: a frozen layer, a read-only export.
    ReadOnly,
    /// An offset or length beyond the end of the device.
    OutOfRange,
    /// An argument that no state of the file could make right.
    InvalidInput,
    /// The file is not a thinply layer at all.
    NotAnImage,
    /// The file is a thinply layer with bytes that contradict `format-spec.md`.
    Corrupt,
    /// A feature, version or operation that this build or this file system does not have.
    Unsupported,
    /// A parent was found whose identity is not the one that the child names.
    ParentMismatch,
    /// Durable records are missing: writing could make the loss worse, so `repair` is needed.
    Loss,
    /// A sync failed earlier; nothing is known about the file until it is opened again.
    Poisoned,
    /// A limit of this implementation (chain depth, say) is exceeded.
    Limit,
}

/// Each kind and its stable name, for those who must tell of it elsewhere.
const NAMES: [(ErrorKind, &str); 16] = [
    (ErrorKind::Io, "io"),
    (ErrorKind::NoSpace, "no-space"),
    (ErrorKind::NotFound, "not-found"),
    (ErrorKind::Exists, "exists"),
    (ErrorKind::PermissionDenied, "permission-denied"),
    (ErrorKind::InUse, "in-use"),
    (ErrorKind::ReadOnly, "read-only"),
    (ErrorKind::OutOfRange, "out-of-range"),
    (ErrorKind::InvalidInput, "invalid-input"),
    (ErrorKind::NotAnImage, "not-an-image"),
    (ErrorKind::Corrupt, "corrupt"),
    (ErrorKind::Unsupported, "unsupported"),
    (ErrorKind::ParentMismatch, "parent-mismatch"),
    (ErrorKind::Loss, "loss"),
    (ErrorKind::Poisoned, "poisoned"),
    (ErrorKind::Limit, "limit"),
];

impl ErrorKind {
    /// Its name, which never changes.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(kind, _)| *kind == self).map_or("io", |(_, name)| name)
    }

    /// The kind of that name.
    pub fn named(name: &str) -> Option<Self> {
        NAMES.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind)
    }

    /// Whether it tells of something that this process may read, but not write.
    pub fn forbids_writing(self) -> bool {
        matches!(self, Self::ReadOnly | Self::PermissionDenied)
    }
}

/// Result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with its context. Cheap to clone, since one failed commit answers many callers.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    path: Option<PathBuf>,
    offset: Option<u64>,
    detail: String,
    source: Option<Arc<io::Error>>,
}

impl Error {
    /// An error of `kind`; `detail` says what was found and what was expected.
    pub fn new(kind: ErrorKind, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            path: None,
            offset: None,
            detail: detail.into(),
            source: None,
        }))
    }

    /// The host's error `source`, met while doing `operation` ("reading the header").
    pub fn io(source: io::Error, operation: impl Into<String>) -> Self {
        let mut error = Self::new(kind_of(&source), operation);
        error.0.source = Some(Arc::new(source));
        error
    }

    /// Adds the byte offset in the file, unless a deeper level has already named one.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Moves the offset, which counted from `base`, to count from the start of the file.
    #[must_use]
    pub fn relative_to(mut self, base: u64) -> Self {
        self.0.offset = Some(base + self.0.offset.unwrap_or(0));
        self
    }

    /// Adds the file, unless a deeper level has already named one.
    #[must_use]
    pub fn in_file(mut self, path: impl AsRef<Path>) -> Self {
        if self.0.path.is_none() {
            self.0.path = Some(path.as_ref().to_owned());
        }
        self
    }

    /// The stable kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the host had no space for it, and may have some later. (That a file may not become longer
    /// is of the same kind, and stays.)
    pub fn wants_space(&self) -> bool {
        let limit = |source: &Arc<io::Error>| source.kind() == io::ErrorKind::FileTooLarge;
        self.kind() == ErrorKind::NoSpace && !self.0.source.as_ref().is_some_and(limit)
    }

    /// The file concerned, if one is known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The byte offset in that file, if one is known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }
}

fn kind_of(error: &io::Error) -> ErrorKind {
    use io::ErrorKind as Host;
    match error.kind() {
        Host::StorageFull | Host::QuotaExceeded | Host::FileTooLarge => ErrorKind::NoSpace,
        Host::NotFound => ErrorKind::NotFound,
        Host::AlreadyExists => ErrorKind::Exists,
        Host::PermissionDenied => ErrorKind::PermissionDenied,
        Host::ResourceBusy => ErrorKind::InUse,
        Host::ReadOnlyFilesystem => ErrorKind::ReadOnly,
        Host::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}

/// What file names, files, servers and clients say goes into errors as it is; here it is made fit to be
/// shown.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        if let Some(path) = &inner.path {
            write!(f, "{}: ", shown(&path.display().to_string()))?;
        }
        write!(f, "{}", shown(&shortened(&inner.detail)))?;
        if let Some(offset) = inner.offset {
            write!(f, " (at byte {offset})")?;
        }
        if let Some(source) = &inner.source {
            write!(f, ": {}", shown(&shortened(&source.to_string())))?;
        }
        Ok(())
    }
}

/// Most characters that are shown of a detail: it may quote a word of megabytes.
const LONGEST: usize = 2000;

/// A text without its middle, if it is a long one.
fn shortened(text: &str) -> Cow<'_, str> {
    let half = LONGEST / 2;
    let beginning = text.char_indices().nth(half).map(|(at, _)| at);
    let end = text.char_indices().rev().nth(half - 1).map(|(at, _)| at);
    match beginning.zip(end).filter(|(beginning, end)| beginning < end) {
        Some((beginning, end)) => format!("{}…{}", &text[..beginning], &text[end..]).into(),
        None => text.into(),
    }
}

/// Text of others, as it may be shown to people in a line: what a terminal takes for a command, ends the
/// line or turns the direction of writing is escaped.
pub fn shown(text: &str) -> impl fmt::Display + '_ {
    Shown(text)
}

/// Whether a character is none that a person sees, and does something to those that are.
pub fn is_unfit(c: char) -> bool {
    let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}');
    let isolates = matches!(c, '\u{2066}'..='\u{2069}');
    c.is_control() || turns || isolates || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
}

struct Shown<'a>(&'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in self.0.split_inclusive(is_unfit) {
            let last = part.chars().next_back().filter(|last| is_unfit(*last));
            f.write_str(part.trim_end_matches(is_unfit))?;
            last.map_or(Ok(()), |last| write!(f, "{}", last.escape_debug()))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_name_of_its_own() {
        // Kinds count from zero, and the last one is this.
        assert_eq!(NAMES.len(), ErrorKind::Limit as usize + 1);
        for (number, (kind, name)) in NAMES.into_iter().enumerate() {
            assert_eq!((kind as usize, kind.name()), (number, name));
            assert_eq!(ErrorKind::named(name), Some(kind));
        }
        assert_eq!(ErrorKind::named("later"), None);
    }

    #[test]
    fn the_deepest_context_wins_and_all_of_it_is_shown() {
        let host = io::Error::from_raw_os_error(28);
        let error = Error::io(host, "writing a block").at(4096).in_file("a.tply");
        let error = error.at(1).in_file("b.tply");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.offset(), Some(4096));
        let text = error.to_string();
        assert!(text.starts_with("a.tply: writing a block (at byte 4096): "), "{text}");
    }

    #[test]
    fn only_space_can_come_back() {
        let error = |number| Error::io(io::Error::from_raw_os_error(number), "writing");
        let (full, quota, too_long, broken) = (error(28), error(122), error(27), error(5));
        for error in [&full, &quota, &too_long] {
            assert_eq!(error.kind(), ErrorKind::NoSpace);
        }
        let wants = [full, quota, too_long, broken].map(|error| error.wants_space());
        assert_eq!(wants, [true, true, false, false]);
        assert!(Error::new(ErrorKind::NoSpace, "full").wants_space());
    }

    #[test]
    fn text_of_others_is_shown_without_what_a_terminal_obeys() {
        let hostile = "a\x1b[31mb\n\u{9b}2J\u{202e}\u{2066}\u{feff}\u{7f}";
        let seen = r"a\u{1b}[31mb\n\u{9b}2J\u{202e}\u{2066}\u{feff}\u{7f}";
        assert_eq!(shown(hostile).to_string(), seen);
        // Once more is once.
        assert_eq!(shown(seen).to_string(), seen);
        for plain in ["", "\"it's\" C:\\x, 100%", "naïve e\u{301} 日本 \u{1f469}\u{200d}\u{1f52c}"]
        {
            assert_eq!(shown(plain).to_string(), plain);
        }
        let error = Error::io(io::Error::other(hostile), hostile).in_file(hostile);
        assert_eq!(error.to_string(), format!("{seen}: {seen}: {seen}"));
        assert_eq!(format!("{error:?}"), format!("Io: {error}"));
    }

    #[test]
    fn a_long_detail_loses_its_middle() {
        let whole = "ä".repeat(LONGEST);
        assert_eq!(Error::new(ErrorKind::Io, &*whole).to_string(), whole);
        let long = format!("word {} expected a name", "ä".repeat(4 << 20));
        for error in [Error::new(ErrorKind::Io, &*long), Error::io(io::Error::other(long), "x")] {
            let text = error.to_string();
            assert!(text.contains("word ä") && text.ends_with("ä expected a name"), "{text}");
            assert!(text.chars().count() < LONGEST + 10 && text.contains('…'), "{text}");
        }
    }
}

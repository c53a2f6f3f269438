//! Names that people give: of containers and volumes, and references to images.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

/// Longest name of a container, volume or snapshot.
pub const MAX_NAME: usize = 100;
/// Longest tag of an image, as registries have it.
const MAX_TAG: usize = 128;
/// Longest repository of an image.
const MAX_REPOSITORY: usize = 255;
const DEFAULT_TAG: &str = "latest";

fn refuse(what: &str, name: &str, rule: &str) -> Error {
    let shown: String = name.chars().take(40).collect();
    Error::new(ErrorKind::InvalidInput, format!("{shown:?} is no name for {what}: {rule}"))
}

/// Refuses what can't name a container, volume or snapshot.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if first && name.chars().all(inside) && name.len() <= MAX_NAME {
        return Ok(());
    }
    Err(refuse(
        what,
        name,
        "expected at most 100 of the characters a-z, A-Z, 0-9, _, . and -, the first a letter or \
         digit",
    ))
}

/// The name and tag of an image: `debian`, `debian:12`, `localhost:5000/tools/perl:5`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// All before the tag.
    pub repository: String,
    /// The tag, `latest` where none was given.
    pub tag: String,
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        // A colon before the last slash belongs to a port.
        let path = text.rfind('/').map_or(0, |slash| slash + 1);
        let (repository, tag) = match text[path..].rfind(':') {
            Some(colon) => (&text[..path + colon], &text[path + colon + 1..]),
            None => (text, DEFAULT_TAG),
        };
        if !is_repository(repository) {
            return Err(refuse(
                "an image",
                text,
                "expected NAME or NAME:TAG, the name of parts of a-z and 0-9 joined by . _ __ - and /, \
                 at most 255 bytes",
            ));
        }
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let first = tag.chars().next().is_some_and(word);
        if !first || !tag.chars().all(|c| word(c) || c == '.' || c == '-') || tag.len() > MAX_TAG {
            return Err(refuse(
                "an image",
                text,
                "expected a tag of at most 128 of the characters a-z, A-Z, 0-9, _, . and -",
            ));
        }
        Ok(Self { repository: repository.into(), tag: tag.into() })
    }
}

fn is_repository(text: &str) -> bool {
    let mut parts = text.split('/');
    let first = parts.next().unwrap_or_default();
    // A host may have a port where a path follows.
    let host = match first.split_once(':') {
        Some((host, port)) if text.contains('/') => {
            is_component(host) && !port.is_empty() && port.chars().all(|c| c.is_ascii_digit())
        }
        _ => is_component(first),
    };
    text.len() <= MAX_REPOSITORY && host && parts.all(is_component)
}

/// Letters and digits, with separators between them: a dot, one or two underscores, any number of
/// hyphens (the OCI distribution specification, as Docker reads it).
fn is_component(text: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separator =
        |part: &str| matches!(part, "." | "_" | "__") || part.bytes().all(|byte| byte == b'-');
    let inner = text.trim_start_matches(alphanumeric);
    let starts = inner.len() < text.len();
    let separators = inner.split(alphanumeric).filter(|part| !part.is_empty());
    starts && text.ends_with(alphanumeric) && separators.into_iter().all(separator)
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.repository, self.tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_read_as_docker_reads_them() {
        let read = |text: &str| text.parse::<Reference>().map(|r| r.to_string());
        assert_eq!(read("debian").unwrap(), "debian:latest");
        assert_eq!(read("debian:12.1").unwrap(), "debian:12.1");
        assert_eq!(read("localhost:5000/a/b-c").unwrap(), "localhost:5000/a/b-c:latest");
        assert_eq!(read("localhost:5000/a:T_1").unwrap(), "localhost:5000/a:T_1");
        for docker in ["my--app", "x__y", "a.b_c__d---e/f", "0", &format!("a:{}", "t".repeat(128))]
        {
            assert!(read(docker).is_ok(), "{docker}");
        }
    }

    #[test]
    fn odd_names_are_refused() {
        let long = "a".repeat(300);
        for odd in [
            "",
            ".",
            "..",
            "../x",
            "a/../b",
            "/a",
            "a/",
            "a//b",
            "A",
            "a:",
            ":a",
            "a:b:c",
            "a b",
            "a\n",
            "ä",
            "日本",
            "a:ä",
            "-a",
            "a-",
            "a..b",
            "a@b",
            "a___b",
            "a._b",
            "a-_b",
            "_a",
            "a__",
            &format!("a:{}", "t".repeat(129)),
            &long,
        ] {
            assert!(odd.parse::<Reference>().is_err(), "{odd:?}");
        }
        for odd in [
            "", ".", "..", "../x", "a/b", ".a", "-a", "a b", "a\0", "ä", "日本", "a@b", "a:b",
            &long,
        ] {
            assert!(check_name("a container", odd).is_err(), "{odd:?}");
        }
        for good in ["a", "A.b_c-1", &"a".repeat(100)] {
            check_name("a container", good).unwrap();
        }
    }
}

//! What an image says of another file, in the forms that QEMU knows, and what the user says of it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::format::Format;

/// What of a JSON description changes nothing about what is read.
const HARMLESS: [&str; 9] = [
    "driver",
    "file",
    "filename",
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "locking",
    "aio",
];

/// What an image refers to.
#[derive(Debug, PartialEq, Eq)]
pub struct Reference<'a> {
    /// As it stands in the image.
    pub text: &'a str,
    /// The file names that it may mean; none where it means no file.
    names: Vec<String>,
    /// The format, if it says one.
    pub format: Option<Format>,
}

impl<'a> Reference<'a> {
    /// Reads a path, also one of Windows, `file:PATH` and `json:{...}`. What has another protocol, or
    /// says more about a file than where it is, is no file.
    pub fn of(text: &'a str) -> Self {
        let described = text.strip_prefix("json:").map(|json| {
            let value: Value = serde_json::from_str(json).unwrap_or_default();
            let format = value["driver"].as_str().and_then(Format::of_backing);
            (value.as_object().and_then(described_path), format)
        });
        let (path, format) = described.unwrap_or_else(|| (path(text).map(str::to_owned), None));
        Self { text, names: path.as_deref().map_or_else(Vec::new, names), format }
    }

    /// Whether it means a file, whichever.
    pub fn is_file(&self) -> bool {
        !self.names.is_empty()
    }
}

/// The path in a reference, unless it begins with another protocol than `file:`.
fn path(text: &str) -> Option<&str> {
    let Some((protocol, rest)) = text.split_once(':') else { return Some(text) };
    match protocol {
        "file" => Some(rest.strip_prefix("//").unwrap_or(rest)),
        _ if protocol.contains('/') => Some(text),
        // A drive.
        _ if protocol.len() == 1 && rest.starts_with(['\\', '/']) => Some(text),
        _ => None,
    }
}

/// The path that a JSON description gives, by way of the `file` under each format.
fn described_path(described: &Map<String, Value>) -> Option<String> {
    let mut described = described.clone();
    loop {
        // Nested or with dots in the keys, as one likes.
        let nested = match described.get("file") {
            Some(Value::Object(file)) => file.clone(),
            Some(_) => return None,
            None => Map::new(),
        };
        let mut file = nested;
        described.retain(|key, value| match key.strip_prefix("file.") {
            Some(key) => {
                file.insert(key.to_owned(), value.take());
                false
            }
            None => true,
        });
        if !described.keys().all(|key| HARMLESS.contains(&key.as_str())) {
            return None;
        }
        let driver = described.get("driver").and_then(Value::as_str);
        match (described.get("filename"), driver) {
            (Some(Value::String(name)), Some("file" | "host_device")) => return Some(name.clone()),
            (Some(Value::String(name)), None) => return path(name).map(str::to_owned),
            (None, Some(format)) if Format::of_backing(format).is_some() => {}
            _ => return None,
        }
        // Each turn takes a level away.
        if file.is_empty() {
            return None;
        }
        described = file;
    }
}

/// The names that a path's file may have: a backslash may be a part of one, or separate folders.
fn names(path: &str) -> Vec<String> {
    let unix = Path::new(path).file_name().and_then(OsStr::to_str);
    let windows = path.rsplit_once('\\').map(|(_, name)| name);
    let windows = windows.filter(|name| !["", ".", ".."].contains(name) && !name.contains('/'));
    unix.into_iter().chain(windows).map(str::to_owned).collect()
}

/// A file that the user lets images refer to.
#[derive(Debug)]
pub struct Named {
    /// What they call it, where that is not its own name.
    name: Option<String>,
    /// Where it is.
    pub path: PathBuf,
}

impl Named {
    /// Reads `FILE` or `NAME=FILE`; a file with that whole name is one.
    pub fn of(argument: &Path) -> Self {
        let bytes = argument.as_os_str().as_bytes();
        let split = |at: usize| {
            let name = String::from_utf8(bytes[..at].to_vec()).ok();
            Self { name, path: OsStr::from_bytes(&bytes[at + 1..]).into() }
        };
        let mut signs =
            bytes.iter().enumerate().filter(|(_, byte)| **byte == b'=').map(|(at, _)| at);
        let first = signs.clone().next().filter(|_| !argument.exists());
        // A name may have such a sign too.
        let found = signs.find(|at| split(*at).path.exists());
        match first {
            Some(first) => split(found.unwrap_or(first)),
            None => Self { name: None, path: argument.to_owned() },
        }
    }

    /// Whether it is called what the reference says, by the user or, if `own`, by its own name.
    pub fn fits(&self, reference: &Reference<'_>, own: bool) -> bool {
        match &self.name {
            Some(name) => !own && (name == reference.text || reference.names.contains(name)),
            None => {
                let name = self.path.file_name().and_then(OsStr::to_str);
                own && name.is_some_and(|name| reference.names.iter().any(|other| other == name))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_in_every_form_and_nothing_else_is_one() {
        let names = |text: &str| Reference::of(text).names;
        for text in
            ["b.raw", "/x/b.raw", "../b.raw", "./a:b/b.raw", "file:b.raw", "file:///x/b.raw"]
        {
            assert_eq!(names(text), ["b.raw"], "{text}");
        }
        for text in [r"C:\vm\b.raw", r"..\b.raw", r"\\server\share\b.raw", "C:/vm/b.raw"] {
            assert!(names(text).contains(&"b.raw".to_owned()), "{text}");
        }
        for json in [
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"/x/b.raw"}}"#,
            r#"{"driver":"qcow2","file.driver":"file","file.filename":"b.raw"}"#,
            r#"{"file.filename":"b.raw","driver":"qcow2","read-only":true}"#,
        ] {
            let text = format!("json:{json}");
            let reference = Reference::of(&text);
            assert_eq!(reference.names, ["b.raw"], "{json}");
            assert_eq!(reference.format, Some(Format::Qcow2));
        }
        assert_eq!(names(r#"json:{"driver":"file","filename":"a:b"}"#), ["a:b"]);
        for text in [
            "nbd://host/b.raw",
            "nbd:host:10809:exportname=b.raw",
            "https://host/b.raw",
            "rbd:pool/b.raw",
            "",
            "..",
            "json:",
            "json:{",
            "json:[]",
            r#"json:{"driver":"nbd","path":"b.raw"}"#,
            r#"json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"b.raw"}}"#,
            r#"json:{"driver":"raw","file.filename":"b.raw","file.offset":"1"}"#,
            r#"json:{"driver":"qcow2","file":"b.raw"}"#,
            r#"json:{"driver":"qcow2","backing":null,"file.filename":"b.raw"}"#,
            r#"json:{"file.filename":"nbd://host/b.raw","driver":"raw"}"#,
            r#"json:{"file.driver":"https","file.filename":"https://host/b.raw","driver":"raw"}"#,
        ] {
            assert_eq!(names(text), [""; 0], "{text}");
        }
    }

    #[test]
    fn a_file_goes_by_its_own_name_or_by_what_the_user_calls_it() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("a=b");
        std::fs::write(&there, "").unwrap();
        let whole = Named::of(&there);
        assert!(whole.name.is_none() && whole.path == there);
        let called = |argument: &str| Named::of(Path::new(argument));
        let moved = called("b.raw=/moved/c.raw");
        assert_eq!(moved.path, Path::new("/moved/c.raw"));
        let reference = Reference::of("/x/b.raw");
        assert!(moved.fits(&reference, false) && !moved.fits(&reference, true));
        assert!(!called("c.raw=/x/b.raw").fits(&reference, false));
        assert!(called("/y/b.raw").fits(&reference, true));
        assert!(called("/x/b.raw=z").fits(&reference, false));
        let elsewhere = Reference::of("nbd://host/b.raw");
        assert!(!called("b.raw").fits(&elsewhere, true));
        assert!(called("nbd://host/b.raw=c.raw").fits(&elsewhere, false));
        let argument = format!("x?y=z={}", there.display());
        assert_eq!(called(&argument).name.as_deref(), Some("x?y=z"));
    }
}

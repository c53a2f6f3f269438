//! The requests, their answers, and how both look as JSON.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Changes;
use crate::error::{Error, ErrorKind, Result};

/// The version that requests and answers carry. One of another version is refused, so that no field
/// is ever ignored that was meant to matter.
pub const VERSION: u32 = 1;

/// What can be asked for. Names are the store's; disks are called as front ends call them, such as
/// `container/web`. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// Make an image of a container, which goes on over it.
    Commit {
        /// The container.
        container: String,
        /// The image's name, as in `web:1`.
        image: String,
        /// A remark for the image's history.
        #[serde(default)]
        comment: String,
    },
    /// Keep the present state of a container under a name.
    Snapshot {
        /// The container.
        container: String,
        /// The snapshot's name.
        name: String,
    },
    /// Tell what a container changed.
    Diff {
        /// The container.
        container: String,
    },
    /// Change a disk's size.
    Resize {
        /// The disk.
        disk: String,
        /// Its new size.
        size: u64,
        /// Allow a smaller one, which cuts data off.
        #[serde(default)]
        shrink: bool,
    },
    /// Tell which disks there are and who uses them.
    List {},
    /// Tell who is asked. (Both with braces: fields that are not known are refused only there.)
    Status {},
}

/// The words for them, in order.
const VERBS: [&str; 6] = ["commit", "snapshot", "diff", "resize", "list", "status"];

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase")]
pub enum Answer {
    /// An image was made.
    Commit {
        /// Its id: the hexadecimal SHA-256 of its manifest.
        image: String,
    },
    /// A snapshot was made.
    Snapshot,
    /// What a container changed.
    Diff(Changes),
    /// A size was changed.
    Resize {
        /// It is this now.
        size: u64,
    },
    /// The disks.
    List {
        /// All of them.
        disks: Vec<DiskUse>,
    },
    /// Who is asked.
    Status {
        /// The program's version.
        version: String,
        /// Its process.
        pid: u32,
        /// Since when it serves, RFC 3339.
        since: String,
    },
}

/// A disk and how many use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUse {
    /// Its name.
    pub name: String,
    /// A line for people.
    pub description: String,
    /// Who may write it: one at most.
    pub writers: usize,
    /// Who may only read it.
    pub readers: usize,
    /// How many of their requests wait for space on the host.
    #[serde(default)]
    pub waiting: usize,
}

#[derive(Serialize)]
struct Asked<'a> {
    version: u32,
    #[serde(flatten)]
    request: &'a Request,
}

#[derive(Debug, Serialize, Deserialize)]
struct Reply {
    version: u32,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Done(Answer),
    Error { kind: String, detail: String },
}

fn unsupported(detail: String) -> Error {
    Error::new(ErrorKind::Unsupported, detail)
}

fn check_version(version: Option<&Value>) -> Result<()> {
    match version.and_then(Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => Ok(()),
        _ => {
            let found = version.map_or_else(|| "none".into(), Value::to_string);
            let detail = format!("version {found} of the control protocol, expected {VERSION}");
            Err(unsupported(detail))
        }
    }
}

fn wrong(error: &serde_json::Error) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("not the JSON that was expected: {error}"))
}

impl Answer {
    fn answers(&self, request: &Request) -> bool {
        matches!(
            (self, request),
            (Self::Commit { .. }, Request::Commit { .. })
                | (Self::Snapshot, Request::Snapshot { .. })
                | (Self::Diff(_), Request::Diff { .. })
                | (Self::Resize { .. }, Request::Resize { .. })
                | (Self::List { .. }, Request::List {})
                | (Self::Status { .. }, Request::Status {})
        )
    }
}

impl Request {
    /// As JSON, in one line.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let asked = Asked { version: VERSION, request: self };
        serde_json::to_vec(&asked).map_err(|error| wrong(&error))
    }

    /// From JSON.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for another version and for a verb that is not known;
    /// [`ErrorKind::InvalidInput`] for everything else that is no request.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        let mut value: Value = serde_json::from_slice(bytes).map_err(|error| wrong(&error))?;
        check_version(value.get("version"))?;
        value.as_object_mut().map(|fields| fields.remove("version"));
        match value.get("verb").and_then(Value::as_str) {
            Some(verb) if !VERBS.contains(&verb) => {
                Err(unsupported(format!("there is no verb {verb:?} here")))
            }
            _ => serde_json::from_value(value).map_err(|error| wrong(&error)),
        }
    }
}

/// The outcome of a request as JSON, in one line.
pub(super) fn reply_to_json(outcome: Result<Answer>) -> Vec<u8> {
    let outcome = match outcome {
        Ok(answer) => Outcome::Done(answer),
        Err(error) => {
            Outcome::Error { kind: error.kind().name().into(), detail: error.to_string() }
        }
    };
    // All of it is text and numbers, which can be written.
    serde_json::to_vec(&Reply { version: VERSION, outcome }).unwrap_or_default()
}

fn nonsense(what: &dyn std::fmt::Display) -> Error {
    let detail = format!("the process that serves the store answers nonsense: {what}");
    Error::new(ErrorKind::Io, detail)
}

/// The outcome of a request from JSON: the error has the kind that it had, and says who says so.
pub(super) fn reply_from_json(request: &Request, bytes: &[u8]) -> Result<Answer> {
    let reply: Reply = serde_json::from_slice(bytes).map_err(|error| nonsense(&error))?;
    match reply.outcome {
        Outcome::Done(answer) if answer.answers(request) => Ok(answer),
        Outcome::Done(_) => Err(nonsense(&"what was done was not asked for")),
        Outcome::Error { kind, detail } => {
            let kind = ErrorKind::named(&kind).unwrap_or(ErrorKind::Io);
            let detail = format!("the process that serves the store says: {detail}");
            Err(Error::new(kind, detail))
        }
    }
}

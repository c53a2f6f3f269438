//! Asking the process that serves a store about a container that it has open: one request and one
//! answer, a JSON line each, over a Unix socket in the store.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thinply::error::{Error, ErrorKind, Result};
use thinply::store::Store;

/// Longest request that is read.
const MAX_REQUEST: u64 = 64 << 10;
/// Longest reply that is read: a list of millions of changes.
const MAX_REPLY: u64 = 1 << 30;
/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// What can be asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase")]
pub enum Request {
    /// Make an image of a container.
    Commit {
        /// Its name.
        container: String,
        /// The image's name.
        image: String,
        /// A remark for the image's history.
        comment: String,
    },
    /// Keep the present state of a container.
    Snapshot {
        /// Its name.
        container: String,
        /// The snapshot's name.
        name: String,
    },
    /// Tell what a container changed.
    Diff {
        /// Its name.
        container: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply {
    Done(Value),
    Error(String),
}

/// Where the socket of a store is.
pub fn socket(store: &Store) -> PathBuf {
    store.path().join("control")
}

/// Has the serving process carry a request out; `None` where nobody serves the store.
pub fn ask(store: &Store, request: &Request) -> Option<Result<Value>> {
    let stream = UnixStream::connect(socket(store)).ok()?;
    Some(converse(&stream, request))
}

fn converse(mut stream: &UnixStream, request: &Request) -> Result<Value> {
    let failed = |error| Error::io(error, "asking the process that serves the store");
    let mut line = serde_json::to_vec(request).map_err(|error| failed(error.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(failed)?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_REPLY)).read_line(&mut line).map_err(failed)?;
    match serde_json::from_str(&line).map_err(|error| failed(error.into()))? {
        Reply::Done(answer) => Ok(answer),
        Reply::Error(detail) => {
            let detail = format!("the process that serves the store says: {detail}");
            Err(Error::new(ErrorKind::Io, detail))
        }
    }
}

/// Reads the request of one client, has it carried out, and answers.
pub fn answer(mut stream: &UnixStream, carry_out: impl FnOnce(&Request) -> Result<Value>) {
    let reply = read(stream)
        .and_then(|request| carry_out(&request))
        .map_or_else(|error| Reply::Error(error.to_string()), Reply::Done);
    // Whoever asked may be gone; what was done stays done.
    let _ = serde_json::to_vec(&reply).map(|mut line| {
        line.push(b'\n');
        stream.write_all(&line)
    });
}

fn read(stream: &UnixStream) -> Result<Request> {
    let failed = |error| Error::io(error, "reading a request");
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_REQUEST)).read_line(&mut line).map_err(failed)?;
    serde_json::from_str(&line).map_err(|error| failed(error.into()))
}

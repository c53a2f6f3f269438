//! Messages with descriptors beside them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::socket::{receive_descriptors, send_descriptors};

/// What a holder says first.
pub const GREETING: &str = "holder 1";
pub const KEPT: &str = "kept";
pub const BEGIN: &str = "begin";
pub const KEEP: &str = "keep";
pub const DROP: &str = "drop";
pub const READY: &str = "ready";
pub const DONE: &str = "done";

/// Longest key in bytes.
pub const MAX_KEY: usize = 8000;
const MAX_MESSAGE: usize = 8192;

/// A message that came.
#[derive(Debug)]
pub struct Message {
    pub word: String,
    pub key: String,
    pub descriptors: Vec<OwnedFd>,
}

fn invalid(detail: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, detail)
}

/// Sends a word and a key, with descriptors.
pub fn send(
    socket: impl AsFd,
    word: &str,
    key: &str,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    if key.len() > MAX_KEY {
        return Err(invalid("a key for the holder that is too long"));
    }
    let text = if key.is_empty() { word.to_owned() } else { format!("{word} {key}") };
    send_descriptors(socket, text.as_bytes(), descriptors)
}

/// The next message; none once the other side is gone.
pub fn receive(socket: impl AsFd) -> io::Result<Option<Message>> {
    let mut text = vec![0; MAX_MESSAGE];
    let (length, descriptors) = match receive_descriptors(socket, &mut text) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        received => received?,
    };
    if length == 0 {
        return Ok(None);
    }
    text.truncate(length);
    let text = String::from_utf8(text).map_err(|_| invalid("a message that is no text"))?;
    let (word, key) = text.split_once(' ').unwrap_or((&text, ""));
    Ok(Some(Message { word: word.to_owned(), key: key.to_owned(), descriptors }))
}

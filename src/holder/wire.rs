//! Messages with descriptors beside them.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

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
/// Most descriptors of a key.
pub const MAX_DESCRIPTORS: usize = 64;
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
    if key.len() > MAX_KEY || descriptors.len() > MAX_DESCRIPTORS {
        return Err(invalid("a message to the holder that is too long"));
    }
    let text = if key.is_empty() { word.to_owned() } else { format!("{word} {key}") };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(invalid("more descriptors than one message takes"));
    }
    let text = [IoSlice::new(text.as_bytes())];
    sendmsg(socket, &text, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next message; none once the other side is gone.
pub fn receive(socket: impl AsFd) -> io::Result<Option<Message>> {
    let mut text = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut text)];
        match recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(invalid("a message that was cut off"));
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    text.truncate(received.bytes);
    let text = String::from_utf8(text).map_err(|_| invalid("a message that is no text"))?;
    let (word, key) = text.split_once(' ').unwrap_or((&text, ""));
    Ok(Some(Message { word: word.to_owned(), key: key.to_owned(), descriptors }))
}

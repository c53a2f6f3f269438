use std::io::{BufReader, Cursor, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use super::blocks::Blocks;
use super::connection::Connection;
use super::*;
use crate::nbd::address::Place;
use crate::nbd::proto::numbers::*;

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x01";

/// A client of a server that says `bytes`, then hangs up, and takes anything.
fn client(bytes: &[u8], structured: bool) -> Client {
    struct Fixed(Cursor<Vec<u8>>);
    impl Read for Fixed {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.0.read(buf)
        }
    }
    impl Write for Fixed {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let stream: Box<dyn connection::Stream> = Box::new(Fixed(Cursor::new(bytes.to_vec())));
    let connection = Connection {
        stream: BufReader::new(stream),
        size: 1 << 20,
        flags: FLAG_HAS_FLAGS | FLAG_SEND_FLUSH,
        blocks: Blocks::default(),
        structured,
        context: Context::Allocation,
        status: structured.then_some(1),
        cookie: 0,
        in_step: true,
    };
    Client { address: "nbd://host/disk".parse().unwrap(), connection }
}

fn chunk(flags: u16, kind: u16, length: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend([flags, kind].map(u16::to_be_bytes).concat());
    bytes.extend(1u64.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(body);
    bytes
}

fn data(offset: u64, bytes: &[u8], flags: u16) -> Vec<u8> {
    let body = [&offset.to_be_bytes()[..], bytes].concat();
    chunk(flags, REPLY_TYPE_OFFSET_DATA, body.len() as u32, &body)
}

fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let head = [SIMPLE_REPLY_MAGIC, error].map(u32::to_be_bytes).concat();
    [&head[..], &cookie.to_be_bytes()].concat()
}

const DONE: u16 = REPLY_FLAG_DONE;

#[test]
fn a_read_takes_what_was_asked_for_and_nothing_else() {
    let read = |bytes: &[u8]| {
        let mut buf = [9; 4];
        client(bytes, true).read(100, &mut buf).map(|()| buf)
    };
    let hole = |at: u64, length: u32| {
        let body = [&at.to_be_bytes()[..], &length.to_be_bytes()].concat();
        chunk(DONE, REPLY_TYPE_OFFSET_HOLE, 12, &body)
    };
    let good = [data(100, &[1, 2], 0), hole(102, 2)].concat();
    assert_eq!(read(&good).unwrap(), [1, 2, 0, 0]);
    let good = [data(100, &[1, 2, 3, 4], 0), chunk(DONE, REPLY_TYPE_NONE, 0, &[])].concat();
    assert_eq!(read(&good).unwrap(), [1, 2, 3, 4]);
    for bad in [
        data(100, &[1, 2], DONE),
        data(99, &[1, 2, 3, 4], DONE),
        data(102, &[1, 2, 3, 4], DONE),
        data(u64::MAX, &[1, 2, 3, 4], DONE),
        [data(100, &[1, 2, 3, 4], 0), data(100, &[1, 2, 3, 4], DONE)].concat(),
        chunk(DONE, REPLY_TYPE_OFFSET_DATA, u32::MAX, &[]),
        chunk(DONE, REPLY_TYPE_OFFSET_DATA, 8, &[0; 8]),
        chunk(DONE, REPLY_TYPE_BLOCK_STATUS, 4, &[0; 4]),
        chunk(DONE, REPLY_TYPE_ERROR, 6, &[0, 0, 0, 5, 0, 9]),
        chunk(DONE, REPLY_TYPE_ERROR, 2, &[0, 0]),
        // Without end, unless the client sees it.
        [chunk(0, REPLY_TYPE_NONE, 0, &[]), good.clone()].concat(),
        [hole(100, 0), good.clone()].concat(),
        [simple(0, 1), vec![1, 2, 3, 4]].concat(),
        vec![0; 64],
        vec![],
    ] {
        assert!(read(&bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_status_has_extents_with_lengths_inside_the_range() {
    let body = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
    let status = |flags, words: &[u32]| {
        let body = body(words);
        chunk(flags, REPLY_TYPE_BLOCK_STATUS, body.len() as u32, &body)
    };
    let extents = |bytes: &[u8]| {
        let extents = client(bytes, true).extents(0, 100)?;
        Ok::<_, Error>(extents.iter().map(|e| (e.length, e.hole)).collect::<Vec<_>>())
    };
    let told = extents(&status(DONE, &[1, 10, 3, 95, 0, 7, 3])).unwrap();
    assert_eq!(told, [(10, true), (90, false)]);
    let [hole, end] = [status(0, &[1, 10, 2]), chunk(DONE, REPLY_TYPE_NONE, 0, &[])];
    assert_eq!(extents(&[hole.clone(), end].concat()).unwrap(), [(10, true)]);
    assert!(extents(&status(DONE, &[2, 10, 3])).is_err(), "of another context");
    assert!(extents(&status(DONE, &[1, 0, 3])).is_err());
    assert!(extents(&status(DONE, &[1])).is_err());
    assert!(extents(&[hole.clone(), hole].concat()).is_err(), "twice");
    assert!(extents(&simple(0, 1)).is_err());
    // Of the depth, a hole is what no image holds, whatever it reads as.
    let mut depth = client(&status(DONE, &[1, 10, 0, 90, 1]), true);
    depth.connection.context = Context::Depth;
    let told: Vec<_> = depth.extents(0, 100).unwrap().iter().map(|told| told.hole).collect();
    assert_eq!(told, [true, false]);
    let all = client(&[], false).extents(0, 100).unwrap();
    assert_eq!(all, [Extent { length: 100, hole: false }]);
}

#[test]
fn simple_replies_are_enough() {
    let bytes = [simple(0, 1), simple(0, 2), simple(0, 3), vec![7; 4], simple(0, 5)].concat();
    let mut client = client(&bytes, false);
    client.write(0, &[7; 4]).unwrap();
    client.flush().unwrap();
    let mut buf = [0; 4];
    client.read(0, &mut buf).unwrap();
    assert_eq!(buf, [7; 4]);
    assert!(client.flush().unwrap_err().to_string().contains("another request"));
}

#[test]
fn after_a_reported_error_the_conversation_goes_on_and_after_others_not() {
    let message = [&[0, 0, 0, 28, 0, 6][..], b"full\x1b!"].concat();
    let error = chunk(DONE, REPLY_TYPE_ERROR, message.len() as u32, &message);
    let mut ours = client(&[error, simple(0, 2)].concat(), true);
    let error = ours.write(4096, &[1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let text = error.to_string();
    assert!(
        text.ends_with("writing 1 bytes at 4096: the server reports error 28: full\\u{1b}!"),
        "{text}"
    );
    ours.flush().unwrap();

    // EPIPE of a server must not pass for a pipe of ours.
    let mut ours = client(&[simple(32, 1), simple(0, 2)].concat(), true);
    let error = ours.write(0, &[1]).unwrap_err();
    let source = std::error::Error::source(&error).unwrap();
    let source = source.downcast_ref::<io::Error>().unwrap();
    assert_eq!(source.kind(), io::ErrorKind::Other);
    ours.flush().unwrap();

    let mut ours = client(&[vec![0; 16], simple(0, 2)].concat(), true);
    ours.write(0, &[1]).unwrap_err();
    let text = ours.flush().unwrap_err().to_string();
    assert!(text.contains("before this one"), "{text}");
}

#[test]
fn requests_have_the_sizes_that_the_server_takes() {
    let part = |at: u64, byte: u8| data(at, &[byte; 4096], DONE);
    let sizes = [4096u32, 4096, 4096].map(u32::to_be_bytes).concat();
    let with = |bytes: &[u8]| {
        let mut ours = client(bytes, true);
        ours.connection.blocks = Blocks::decode(&sizes).unwrap();
        ours
    };
    // Two requests of a block each, whose replies are of the next cookies.
    let second = |mut reply: Vec<u8>| {
        reply[15] = 2;
        reply
    };
    let mut buf = [9; 6];
    with(&[part(0, 1), second(part(4096, 2))].concat()).read(4093, &mut buf).unwrap();
    assert_eq!(buf, [1, 1, 1, 2, 2, 2]);
    with(&[part(4096, 1), simple(0, 2)].concat()).write(5000, &[7]).unwrap();
    assert!(with(&part(5000, 1)).read(5000, &mut buf).is_err());

    let body = [1u32, 2000, 3, 6288, 0].map(u32::to_be_bytes).concat();
    let status = chunk(DONE, REPLY_TYPE_BLOCK_STATUS, body.len() as u32, &body);
    let told = with(&status).extents(5000, 5000).unwrap();
    let told: Vec<_> = told.iter().map(|extent| (extent.length, extent.hole)).collect();
    assert_eq!(told, [(1096, true), (3904, false)]);
    let body = [1u32, 904, 3].map(u32::to_be_bytes).concat();
    let status = chunk(DONE, REPLY_TYPE_BLOCK_STATUS, body.len() as u32, &body);
    assert!(with(&status).extents(5000, 5000).is_err(), "all of it before the range");
}

#[test]
fn what_can_not_be_asked_for_is_refused_here() {
    let mut ours = client(&[], true);
    for (offset, length) in [(1 << 20, 1), (u64::MAX, 1), (0, (1 << 20) + 1)] {
        let error = ours.read(offset, &mut vec![0; length]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        assert!(error.to_string().contains("the export has 1048576 bytes"), "{error}");
    }
    assert!(ours.extents(1 << 20, 0).unwrap().is_empty());
    ours.connection.flags = FLAG_READ_ONLY;
    assert_eq!(ours.write(0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(ours.flush().unwrap_err().kind(), ErrorKind::Unsupported);
}

/// A server that treats each client that comes with the next of `acts`.
fn server(acts: Vec<fn(UnixStream)>) -> (tempfile::TempDir, Address, thread::JoinHandle<()>) {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let address = Address { place: Place::Unix(path), export: "disk".into() };
    let serve = move || acts.into_iter().for_each(|act| act(listener.accept().unwrap().0));
    (folder, address, thread::spawn(serve))
}

#[test]
fn a_server_that_keeps_silent_is_an_error() {
    let silent = |mut stream: UnixStream| drop(stream.read_to_end(&mut Vec::new()));
    let greets = |mut stream: UnixStream| {
        stream.write_all(GREETING).unwrap();
        // Until the client has given up.
        let _ = stream.read_to_end(&mut Vec::new());
    };
    let (_folder, address, serving) = server(vec![silent, greets]);
    for _ in 0..2 {
        let error =
            Client::connect_within(&address, Context::Allocation, Duration::from_millis(20))
                .unwrap_err();
        let text = error.to_string();
        assert!(text.ends_with("agreeing on the export: the server is there, but keeps silent"));
        assert!(text.starts_with(&address.to_string()), "{text}");
    }
    serving.join().unwrap();
}

#[test]
fn a_server_that_hangs_up_is_named_with_what_it_was_asked() {
    let at_once = |stream: UnixStream| drop(stream);
    let after_its_greeting = |mut stream: UnixStream| stream.write_all(GREETING).unwrap();
    let (_folder, address, serving) = server(vec![at_once, after_its_greeting]);
    for _ in 0..2 {
        let text = Client::connect(&address).unwrap_err().to_string();
        let wanted = "agreeing on the export: the server hung up instead of answering";
        assert_eq!(text, format!("{address}: {wanted}"));
    }
    serving.join().unwrap();
    // It is gone by now.
    let error = Client::connect(&address).unwrap_err();
    assert!(error.to_string().starts_with(&format!("{address}: connecting: ")), "{error}");

    let half = data(0, &[1, 2, 3, 4], DONE);
    for bytes in [&[][..], &half[..2], &half[..half.len() - 1]] {
        let text = client(bytes, true).read(0, &mut [0; 4]).unwrap_err().to_string();
        let wanted =
            "nbd://host:10809/disk: reading 4 bytes at 0: the server hung up instead of answering";
        assert_eq!(text, wanted);
    }
    let broken = in_words(io::ErrorKind::BrokenPipe.into());
    assert_eq!(broken.kind(), io::ErrorKind::UnexpectedEof, "a pipe of ours is another matter");
}

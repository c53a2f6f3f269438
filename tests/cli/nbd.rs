//! What `import` says of an NBD server that is not what it should be.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use crate::support::Folder;

/// Takes a message of that many bytes.
fn take(stream: &mut UnixStream, length: usize) {
    stream.read_exact(&mut vec![0; length]).unwrap();
}

/// Serves a disk of a MiB by simple replies, up to its first request.
fn agree(stream: &mut UnixStream) {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
    // Client flags, and an option without data: structured replies, which are not known here.
    take(stream, 4 + 16);
    let answer = |option: u8, kind: [u8; 4], data: &[u8]| {
        let head = [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, option];
        [&head[..], &kind, &[0, 0, 0, data.len() as u8], data].concat()
    };
    stream.write_all(&answer(8, [0x80, 0, 0, 1], &[])).unwrap();
    // The option GO for the export "", which asks for the sizes of blocks.
    take(stream, 16 + 8);
    stream.write_all(&answer(7, [0, 0, 0, 3], &[0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 1])).unwrap();
    stream.write_all(&answer(7, [0, 0, 0, 1], &[])).unwrap();
}

#[test]
fn a_server_that_hangs_up_is_an_error_that_names_it() {
    let folder = Folder::new();
    let acts: [fn(UnixStream); 5] = [
        drop,
        |mut stream| stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap(),
        // No request ever arrives.
        |mut stream| agree(&mut stream),
        |mut stream| {
            agree(&mut stream);
            take(&mut stream, 28);
        },
        |mut stream| {
            agree(&mut stream);
            take(&mut stream, 28);
            stream.write_all(&[0x67, 0x44, 0x66, 0x98, 0, 0]).unwrap();
        },
    ];
    for (number, act) in acts.into_iter().enumerate() {
        let name = format!("socket{number}");
        let listener = UnixListener::bind(folder.join(&name)).unwrap();
        let serving = thread::spawn(move || act(listener.accept().unwrap().0));
        let uri = format!("nbd+unix:///?socket={}", folder.join(&name).display());
        let run = folder.run(&["import", &uri, "disk.tply"]);
        let message = run.refused();
        serving.join().unwrap();
        let doing =
            if number < 2 { "agreeing on the export" } else { "reading 1048576 bytes at 0" };
        let wanted = format!("{uri}: {doing}: the server hung up instead of answering");
        assert!(message.contains(&wanted), "{number}: {message}");
        assert!(!folder.join("disk.tply").exists());
    }
}

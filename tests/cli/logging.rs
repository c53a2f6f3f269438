//! What the command has to say, and to whom it listens, decides nothing: a log that can't be written,
//! signals that come twice or were meant to be ignored, and files that may not grow.

use std::fs::{self, File, OpenOptions};
use std::io::{PipeReader, Read, Write, pipe};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;

use crate::store::Served;
use crate::support::{Folder, MIB, noise, output};

/// Where a server's log goes.
enum Sink {
    File(&'static str),
    Closed,
    Unread,
}

/// A pipe that takes no byte more, and its reading end.
fn full_pipe() -> (OwnedFd, PipeReader) {
    let (reader, writer) = pipe().unwrap();
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::NONBLOCK).unwrap();
    let mut filler = &writer;
    while filler.write(&[b'.'; 4096]).is_ok() {}
    while filler.write(b".").is_ok() {}
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::empty()).unwrap();
    (writer.into(), reader)
}

#[test]
fn a_server_whose_log_takes_nothing_keeps_its_clients_and_ends_when_told() {
    for sink in [Sink::File("/dev/full"), Sink::Closed, Sink::Unread] {
        let folder = Folder::new();
        folder.ok(&["create", "--size", "64M", "disk.tply"]);
        let args = ["serve", "disk.tply", "--socket", "nbd.sock", "--max-connections", "8"];
        let mut command = folder.command(&args);
        let mut reader = None;
        match sink {
            Sink::File(path) => {
                command.stderr(OpenOptions::new().write(true).open(path).unwrap());
            }
            Sink::Closed => {
                command.stderr(pipe().unwrap().1);
            }
            Sink::Unread => {
                let (writer, other) = full_pipe();
                command.stderr(writer);
                reader = Some(other);
            }
        }
        let served = Served::start(&folder, &mut command);
        // The command has the pipe's other end open too.
        drop(command);
        let mut clients: Vec<_> = (0..8).map(|_| served.client("").unwrap()).collect();
        for round in 0..20 {
            // Each is told of.
            assert!((0..4).all(|_| served.client("").is_err()));
            for (number, client) in clients.iter_mut().enumerate() {
                client.write(number as u64 * MIB, &[round + 1; 4096]).unwrap();
            }
        }
        // A sink that takes lines again hears how many it has missed.
        if let Some(mut reader) = reader {
            let mut taken = vec![0; 1 << 17];
            let mut text = String::new();
            while !text.contains("too many connections") {
                let count = reader.read(&mut taken).unwrap();
                text += &String::from_utf8_lossy(&taken[..count]);
            }
        }
        for (number, client) in clients.iter_mut().enumerate() {
            assert_eq!(client.read(number as u64 * MIB, 4096).unwrap(), [20; 4096]);
        }
        served.signal(Signal::TERM);
        drop(clients);
        assert_eq!(served.end(), Some(0));
        assert_eq!(folder.json(&["info", "--json", "disk.tply"])["state"], "writable");
    }
}

#[test]
fn nobody_waits_for_whoever_does_not_read_the_first_line() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "disk.tply"]);
    let (writer, _reader) = full_pipe();
    let mut command = folder.command(&["serve", "disk.tply", "--socket", "nbd.sock"]);
    let child = command.stdout(writer).stderr(Stdio::null()).spawn().unwrap();
    let served = Served::over(&folder, child);
    let begun = std::time::Instant::now();
    while served.client("").is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
    }
    served.signal(Signal::TERM);
    assert_eq!(served.end(), Some(0));
}

#[test]
fn a_second_signal_at_once_is_the_same_request_and_a_later_one_insists() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "disk.tply"]);
    let start = || {
        let args = ["serve", "disk.tply", "--socket", "nbd.sock"];
        Served::start(&folder, &mut folder.command(&args))
    };
    for signals in [[Signal::TERM, Signal::TERM], [Signal::HUP, Signal::TERM]] {
        let served = start();
        let mut client = served.client("").unwrap();
        client.write(0, &[7; 4096]).unwrap();
        // Some of them come while the layer is being closed.
        for signal in signals.into_iter().cycle().take(200) {
            served.signal(signal);
            std::thread::sleep(Duration::from_micros(200));
        }
        assert_eq!(served.end(), Some(0));
        assert_eq!(folder.json(&["info", "--json", "disk.tply"])["state"], "writable");
    }
}

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "disk.tply"]);
    let program = env!("CARGO_BIN_EXE_thinply");
    let script = format!("trap '' HUP; exec {program} serve disk.tply --socket nbd.sock");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &script]).current_dir(folder.path());
    let served = Served::start(&folder, &mut command);
    served.signal(Signal::HUP);
    std::thread::sleep(Duration::from_millis(200));
    assert!(served.client("").is_ok());
    served.signal(Signal::TERM);
    assert_eq!(served.end(), Some(0));
}

#[test]
fn a_file_that_may_not_grow_is_an_error_and_ends_nobody() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "64M", "disk.tply"]);
    folder.write("disk.raw", &noise(1, 24 * MIB as usize));
    let program = env!("CARGO_BIN_EXE_thinply");
    let limited = |what: &str| {
        let mut command = std::process::Command::new("sh");
        // In units of 512 bytes, or of 1 KiB.
        command.args(["-c", &format!("ulimit -f 16384; exec {program} {what}")]);
        command.current_dir(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    for what in ["import disk.raw new.tply", "export disk.tply new.raw"] {
        let run = output(&mut limited(what));
        assert_eq!(run.status.code(), Some(2), "{what}: {run:?}");
        assert!(String::from_utf8_lossy(&run.stderr).contains("File too large"), "{run:?}");
    }
    assert_eq!(folder.names(), ["disk.raw", "disk.tply"]);

    let mut command = limited("serve disk.tply --socket nbd.sock");
    let served = Served::start(&folder, command.stderr(File::create("/dev/null").unwrap()));
    let mut client = served.client("").unwrap();
    let refused = client.write(48 * MIB, &[1; 4096]).unwrap_err();
    assert!(refused.to_string().contains("error 28"), "{refused}");
    client.write(0, &[2; 4096]).unwrap();
    drop(client);
    served.signal(Signal::TERM);
    assert_eq!(served.end(), Some(0));
    assert!(fs::read(folder.join("disk.tply")).is_ok());
}

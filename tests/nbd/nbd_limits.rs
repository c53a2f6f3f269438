//! What connections cost, and a server without descriptors. In a program of its own, since it
//! measures the whole process and lowers its limits; the tests take turns.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testkit::device::{Op, TestDevice};
use testkit::nbd::*;

static TURN: Mutex<()> = Mutex::new(());

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn descriptors(count: u64) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum }).unwrap();
}

#[test]
fn idle_connections_are_cheap_and_announced_payloads_cost_nothing() {
    let _turn = TURN.lock().unwrap();
    descriptors(4000);
    let served = Served::device(&Arc::new(TestDevice::new(1 << 40)));
    let count = 300;
    let before = resident();
    let mut clients: Vec<_> = (0..count).map(|_| served.client()).collect();
    clients.iter_mut().for_each(|client| assert_eq!(client.read(0, 4096).len(), 4096));
    let each = resident().saturating_sub(before) / count;
    assert!(each < 64 << 10, "an idle connection takes {each} bytes");

    for client in &mut clients {
        client.start(0, WRITE, 0, 32 << 20);
        client.send(&[1; 100]);
    }
    assert_eq!(served.client().read(0, 1), [0]);
    let each = resident().saturating_sub(before) / count;
    assert!(each < 96 << 10, "a connection that announced a payload takes {each} bytes");
}

#[test]
fn without_descriptors_the_server_neither_dies_nor_spins() {
    let _turn = TURN.lock().unwrap();
    descriptors(4000);
    let device = Arc::new(TestDevice::new(1 << 20));
    let served = Served::device(&device);
    let (mut client, mut leaving) = (served.client(), served.client());
    let mut waiting = UnixStream::connect(served.path()).unwrap();
    waiting.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut open = Vec::new();
    descriptors(64);
    while let Ok(file) = std::fs::File::open("/dev/null") {
        open.push(file);
    }
    // A descriptor for the client's end of a connection, none for the server's.
    open.pop();
    let late = UnixStream::connect(served.path()).unwrap();
    let refused = || served.events.lock().unwrap().iter().filter(|e| e.contains("accept")).count();
    while refused() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Who is connected is served, also with what needs other threads.
    assert_eq!(client.read(0, 1), [0]);
    assert_eq!(client.write(FUA, 0, b"x").error, 0);
    assert_eq!(client.command(0, BLOCK_STATUS, 0, 4096).error, 0);
    device.hold(Op::Flush);
    leaving.start(0, FLUSH, 0, 0);
    leaving.start(0, DISC, 0, 0);
    device.wait_for(Op::Flush, 2);
    std::thread::sleep(Duration::from_millis(500));
    device.release(Op::Flush);
    assert_eq!(leaving.reply().error, 0);
    assert!(leaving.is_closed());
    assert!(refused() < 20, "accepting was tried {} times", refused());
    descriptors(4000);
    late.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut greeting = [0; 18];
    std::io::Read::read_exact(&mut &late, &mut greeting).unwrap();
    std::io::Read::read_exact(&mut waiting, &mut greeting).unwrap();
}

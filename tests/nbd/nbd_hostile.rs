//! What clients must not be able to do to the server, to each other, or to a shutdown; and what
//! holds when many things happen at once. A device that holds its calls stands in for time.

use std::io::{ErrorKind as Host, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use testkit::device::{Op, TestDevice};
use testkit::nbd::*;
use thinply::error::ErrorKind;
use thinply::nbd::server::ServerConfig;
use thinply::serve::{Opened, Table};

const MIB: u64 = 1 << 20;

fn disk() -> (Arc<TestDevice>, Served) {
    serve(TestDevice::new(64 * MIB), ServerConfig::default())
}

fn serve(device: TestDevice, config: ServerConfig) -> (Arc<TestDevice>, Served) {
    let device = Arc::new(device);
    let served = Served::with_config(&device, config);
    (device, served)
}

fn serve_with(
    workers: usize,
    device: TestDevice,
    config: ServerConfig,
) -> (Arc<TestDevice>, Served) {
    let device = Arc::new(device);
    let opened = Opened { workers, ..Opened::new(device.clone()) };
    (device, Served::opened(opened, config))
}

fn impatient() -> ServerConfig {
    ServerConfig { drain_timeout: Duration::from_millis(100), ..ServerConfig::default() }
}

/// Sends without reading until the server takes no more; answers how much it took.
fn send_until_refused(client: &Client, packet: &[u8], limit: usize) -> usize {
    let mut stream = &client.stream;
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut sent = 0;
    while sent < limit {
        let from = sent % packet.len();
        match stream.write(&packet[from..]) {
            Ok(length) => sent += length,
            Err(error) if matches!(error.kind(), Host::WouldBlock | Host::TimedOut) => break,
            Err(error) => panic!("{error}"),
        }
    }
    sent
}

#[test]
fn a_name_length_of_0xffffffff_is_invalid() {
    let (_device, served) = disk();
    let mut client = Client::raw(&served.path());
    for code in [OPT_GO, OPT_INFO, OPT_LIST_META_CONTEXT] {
        let data = [&[255; 4][..], b"disk", &[0; 6]].concat();
        assert_eq!(client.ask(code, &data)[0].0, ERR_INVALID);
    }
    client.go("disk");
}

#[test]
fn names_of_3000_bytes_are_looked_up() {
    let table = Table::new();
    let long = "ü".repeat(1500);
    let opened = || Opened::new(TestDevice::new(MIB));
    insert(&table, &long, opened());
    let too_long = thinply::serve::Served::new("a".repeat(4097), opened());
    assert_eq!(too_long.err().unwrap().kind(), ErrorKind::InvalidInput);
    let served = Served::exports(Arc::new(table), ServerConfig::default());
    let mut client = Client::raw(&served.path());
    assert_eq!(client.ask(OPT_GO, &info(&"a".repeat(3000), &[]))[0].0, ERR_UNKNOWN);
    assert_eq!(client.ask(OPT_GO, &info(&"a".repeat(5000), &[]))[0].0, ERR_TOO_BIG);
    client.go(&long);
    assert_eq!(client.read(0, 1), [0]);
}

#[test]
fn options_of_32_mib_are_skipped_and_endless_ones_hung_up_on() {
    let (_device, served) = disk();
    let mut client = Client::raw(&served.path());
    assert_eq!(client.ask(OPT_INFO, &vec![0; 32 << 20])[0].0, ERR_TOO_BIG);
    assert_eq!(client.ask(99, &vec![0; 1 << 20])[0].0, ERR_TOO_BIG);
    assert_eq!(client.ask(OPT_LIST, &[]).len(), 2);
    let mut header = option(OPT_INFO, &[]);
    header[12..].copy_from_slice(&[255; 4]);
    client.send(&header);
    assert!(client.is_closed());
}

#[test]
fn data_where_none_belongs_is_invalid() {
    let (_device, served) = disk();
    let mut client = Client::raw(&served.path());
    assert_eq!(client.ask(OPT_LIST, b"x")[0].0, ERR_INVALID);
    assert_eq!(client.ask(OPT_STRUCTURED_REPLY, b"x")[0].0, ERR_INVALID);
    assert_eq!(client.ask(OPT_GO, &[info("disk", &[]), vec![0]].concat())[0].0, ERR_INVALID);
    client.go("disk");
    assert_eq!(client.command(DF, READ, 0, 1).error, EINVAL, "structured replies were refused");
}

#[test]
fn unknown_options_and_starttls_leave_both_sides_in_step() {
    let (_device, served) = disk();
    let mut client = Client::raw(&served.path());
    // Options behind STARTTLS in plain text are answered as what they are, after the refusal.
    let packet = [option(OPT_STARTTLS, &[]), option(4242, b"???"), option(OPT_LIST, &[])].concat();
    client.send(&packet);
    assert_eq!(client.option_replies(OPT_STARTTLS)[0].0, ERR_UNSUP);
    assert_eq!(client.option_replies(4242)[0].0, ERR_UNSUP);
    assert_eq!(client.option_replies(OPT_LIST).len(), 2);
}

#[test]
fn hanging_up_at_every_stage_harms_nobody() {
    let (device, served) = disk();
    let mut client = Client::raw(&served.path());
    let mut script = [0, 0, 0, 3].to_vec();
    script.extend(option(OPT_STRUCTURED_REPLY, &[]));
    script.extend(option(OPT_SET_META_CONTEXT, &meta("disk", &["base:allocation"])));
    script.extend(option(OPT_GO, &info("disk", &[3])));
    script.extend(client.encode(FUA, WRITE, 0, 100).1);
    script.extend([7; 100]);
    script.extend(client.encode(0, READ, 0, 100).1);
    script.extend(client.encode(0, FLUSH, 0, 0).1);
    for cut in 0..script.len() {
        let mut client = Client::silent(&served.path());
        client.send(&script[..cut]);
    }
    client.go("disk");
    client.read(0, 1);
    assert!(device.count(Op::Write) <= 128 + 28, "a write is done only with all of its payload");
}

#[test]
fn commands_before_the_negotiation_ends_are_not_carried_out() {
    let (device, served) = disk();
    let mut client = Client::raw(&served.path());
    let (_, request) = client.encode(0, WRITE_ZEROES, 0, 512);
    client.send(&request);
    assert!(client.is_closed());
    assert_eq!(device.count(Op::Zero), 0);
}

#[test]
fn what_is_no_request_ends_the_connection() {
    let (_device, served) = disk();
    let mut client = served.client();
    client.send(&[0x55; 28]);
    assert!(client.is_closed());
}

#[test]
fn long_payloads_are_skipped_and_endless_ones_hung_up_on() {
    let (device, served) = disk();
    let mut client = served.client();
    assert_eq!(client.write(0, 0, &vec![1; (32 << 20) + 1]).error, EINVAL);
    assert_eq!(client.read(0, 1), [0]);
    assert_eq!(client.command(0, READ, 0, (32 << 20) + 1).error, EINVAL);
    client.start(0, WRITE, 0, u32::MAX);
    assert!(client.is_closed());
    assert_eq!(device.count(Op::Write), 0);
}

#[test]
fn half_a_request_and_silence_holds_nobody() {
    let (_device, mut served) = disk();
    let mut client = served.client();
    let (_, request) = client.encode(0, READ, 0, 512);
    client.send(&request[..20]);
    let mut writer = served.client();
    writer.start(0, WRITE, 0, 1 << 20);
    writer.send(&[1; 1000]);
    assert_eq!(served.client().read(0, 1), [0]);
    let begun = Instant::now();
    served.stop().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "it waited for the drain time to end");
    assert!(client.is_closed() && writer.is_closed());
}

#[test]
fn a_slow_handshake_is_ended() {
    let config =
        ServerConfig { handshake_timeout: Duration::from_millis(50), ..ServerConfig::default() };
    let (_device, served) = serve(TestDevice::new(MIB), config);
    let mut silent = Client::silent(&served.path());
    silent.take(18);
    assert!(silent.is_closed());
    // Bytes that drip in do not buy time.
    let mut dripping = Client::silent(&served.path());
    dripping.take(18);
    let mut script = [0, 0, 0, 3].into_iter().chain(option(99, &[0; 4000]));
    while dripping.stream.write_all(&[script.next().expect("it is never let finish")]).is_ok() {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Who is through may be silent for longer.
    let mut quick = served.client();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(quick.read(0, 1), [0]);
}

#[test]
fn connections_beyond_the_limit_are_closed_at_once() {
    let config = ServerConfig { max_connections: 3, ..ServerConfig::default() };
    let (_device, served) = serve(TestDevice::new(MIB), config);
    let mut clients: Vec<_> = (0..3).map(|_| served.client()).collect();
    for _ in 0..10_000 {
        assert!(Client::silent(&served.path()).is_closed());
    }
    assert!(clients.iter_mut().all(|client| client.read(0, 1) == [0]));
    // A place that is given up is given to the next.
    clients[0].start(0, DISC, 0, 0);
    assert!(clients[0].is_closed());
    loop {
        let mut client = Client::silent(&served.path());
        let mut greeting = [0; 18];
        if std::io::Read::read_exact(&mut client.stream, &mut greeting).is_ok() {
            break;
        }
    }
}

#[test]
fn a_client_that_never_reads_holds_nobody_and_no_shutdown() {
    for cold in [false, true] {
        let device = TestDevice::new(64 * MIB);
        let device = if cold { device.cold() } else { device };
        let (_device, mut served) = serve_with(2, device, impatient());
        let mut deaf = Client::open(&served.path(), "disk", false);
        let (_, request) = deaf.encode(0, READ, 0, 256 << 10);
        let sent = send_until_refused(&deaf, &request.repeat(64), 64 << 20);
        assert!(sent < 4 << 20, "the server took {sent} bytes of requests nobody reads answers to");
        let mut other = served.client();
        assert_eq!(other.write(FUA, 0, b"hello").error, 0);
        assert_eq!(other.read(0, 5), b"hello");
        served.stop().unwrap();
    }
}

#[test]
fn requests_in_flight_are_bounded_and_other_clients_served() {
    let device = TestDevice::new(64 * MIB).cold();
    let (device, served) = serve_with(2, device, ServerConfig::default());
    device.hold(Op::Write);
    let mut client = served.client();
    let (_, mut packet) = client.encode(0, WRITE, 0, 1 << 20);
    packet.resize(28 + (1 << 20), 9);
    let sent = send_until_refused(&client, &packet, 256 << 20);
    assert!((4 << 20..16 << 20).contains(&sent), "the server took {sent} bytes");

    let mut small = served.client();
    let (_, request) = small.encode(0, TRIM, 0, 4096);
    device.hold(Op::Trim);
    let sent = send_until_refused(&small, &request.repeat(64), 256 << 20);
    assert!(sent < 4 << 20, "the server took {sent} bytes of requests");
    assert_eq!(served.client().write(0, 0, b"").error, 0);
    device.release(Op::Write);
    device.release(Op::Trim);
}

#[test]
fn a_reply_that_does_not_fit_the_socket_is_finished_later() {
    let (_device, served) = serve(TestDevice::new(64 * MIB).cold(), ServerConfig::default());
    let mut client = served.client();
    // More than the socket holds, less than what makes the connection stop reading.
    for _ in 0..3 {
        let cookie = client.start(DF, READ, 0, 2 << 20);
        std::thread::sleep(Duration::from_millis(30));
        let reply = client.reply();
        assert_eq!((reply.cookie, reply.data().len()), (cookie, 2 << 20));
    }
}

#[test]
fn a_waiting_read_holds_up_neither_its_connection_nor_others() {
    let (device, served) = serve(TestDevice::new(MIB).cold(), ServerConfig::default());
    device.hold(Op::Read);
    let mut client = served.client();
    let read = client.start(DF, READ, 0, 100_000);
    device.wait_for(Op::Read, 1);
    assert_eq!(client.write(FUA, 0, b"later").error, 0);
    assert_eq!(client.command(0, BLOCK_STATUS, 0, 4096).error, 0);
    assert_eq!(client.command(0, READ, MIB, 1).error, EINVAL);
    assert_eq!(served.client().command(0, FLUSH, 0, 0).error, 0);
    device.release(Op::Read);
    let reply = client.reply();
    assert_eq!((reply.cookie, reply.error), (read, 0));
    // Nothing is in flight any more, and the connection works as before.
    assert_eq!(client.read(0, 5), b"later");
}

#[test]
fn connections_share_flushes_and_a_flush_covers_replied_writes_of_all() {
    let (device, served) = disk();
    let mut clients: Vec<_> = (0..5).map(|_| served.client()).collect();
    device.hold(Op::Flush);
    assert_eq!(clients[0].write(0, 0, b"one").error, 0);
    clients[1].start(0, FLUSH, 0, 0);
    device.wait_for(Op::Flush, 1);
    // While the first flush runs, others and a durable write come; they share the second.
    assert_eq!(clients[0].write(0, 0, b"two").error, 0);
    let fua = clients[0].start_write(FUA, 4096, b"three");
    for client in &mut clients[2..] {
        client.start(0, FLUSH, 0, 0);
        // Its own connection goes on meanwhile.
        let cookie = client.start(0, READ, 0, 3);
        assert_eq!(client.reply().cookie, cookie);
    }
    let cookie = clients[0].start(0, READ, 4096, 5);
    assert_eq!(clients[0].reply().cookie, cookie);
    device.release(Op::Flush);
    assert_eq!(clients[1].reply().error, 0);
    for client in &mut clients[2..] {
        assert_eq!(client.reply().error, 0);
        assert_eq!(device.durable_writes(), 3);
    }
    assert_eq!(clients[0].reply().cookie, fua);
    assert_eq!(device.count(Op::Flush), 2);
}

#[test]
fn a_failed_flush_fails_all_who_share_it() {
    let (device, served) = disk();
    let mut clients: Vec<_> = (0..3).map(|_| served.client()).collect();
    device.hold(Op::Flush);
    clients[0].start(0, FLUSH, 0, 0);
    device.wait_for(Op::Flush, 1);
    device.fail(Op::Flush, ErrorKind::Poisoned);
    for client in &mut clients[1..] {
        client.start(0, FLUSH, 0, 0);
    }
    device.release(Op::Flush);
    for client in &mut clients {
        assert_eq!(client.reply().error, EIO);
    }
}

#[test]
fn requests_at_shutdown_fail_and_running_ones_finish() {
    let (device, mut served) = disk();
    let mut client = served.client();
    client.write(0, 0, b"kept");
    device.hold(Op::TryRead);
    // Both arrive together, and the first holds the connection's thread.
    let (first, mut packet) = client.encode(0, READ, 0, 4);
    let (second, bytes) = client.encode(0, WRITE, 0, 4);
    packet.extend_from_slice(&bytes);
    packet.extend_from_slice(b"lost");
    client.send(&packet);
    device.wait_for(Op::TryRead, 1);
    served.handle.shutdown();
    device.release(Op::TryRead);
    let reply = client.reply();
    assert_eq!((reply.cookie, reply.data()), (first, b"kept".to_vec()));
    let reply = client.reply();
    assert_eq!((reply.cookie, reply.error), (second, ESHUTDOWN));
    assert!(client.is_closed());
    served.wait().unwrap();
    assert_eq!((device.count(Op::Flush), device.count(Op::Write)), (1, 1));
    assert!(!served.path().exists());
}

#[test]
fn shutdown_waits_for_running_writes_then_flushes() {
    let (device, mut served) = serve(TestDevice::new(MIB).cold(), ServerConfig::default());
    let mut client = served.client();
    device.hold(Op::Write);
    client.start_write(0, 0, b"in flight");
    device.wait_for(Op::Write, 1);
    served.handle.shutdown();
    // The connection is told to end, and yet the answer comes.
    while served.path().exists() {
        std::thread::yield_now();
    }
    device.release(Op::Write);
    assert_eq!(client.reply().error, 0);
    served.wait().unwrap();
    assert_eq!(device.durable_writes(), 1);
}

#[test]
fn shutdown_does_not_wait_for_ever_and_says_what_failed() {
    let (device, mut served) = serve(TestDevice::new(MIB).cold(), impatient());
    let mut client = served.client();
    device.hold(Op::Write);
    client.start_write(0, 0, b"stuck");
    device.wait_for(Op::Write, 1);
    let error = served.stop().unwrap_err();
    assert!(error.to_string().contains("still running"), "{error}");
    assert_eq!(device.count(Op::Flush), 1);
    device.release(Op::Write);

    let (device, mut served) = disk();
    served.client().read(0, 1);
    device.fail(Op::Flush, ErrorKind::NoSpace);
    assert_eq!(served.stop().unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn a_device_that_hangs_starves_no_other_export() {
    let (hanging, working) = (TestDevice::new(MIB).cold(), TestDevice::new(MIB).cold());
    let (hanging, working) = (Arc::new(hanging), Arc::new(working));
    let table = Table::new();
    insert(&table, "hanging", Opened { workers: 2, ..Opened::new(hanging.clone()) });
    insert(&table, "working", Opened { workers: 2, ..Opened::new(working) });
    let served = Served::exports(Arc::new(table), impatient());
    hanging.hold(Op::Read);
    let mut stuck = Client::open(&served.path(), "hanging", false);
    // Too long to share a thread with others.
    for _ in 0..20 {
        stuck.start(0, READ, 0, 100 << 10);
    }
    hanging.wait_for(Op::Read, 2);
    let mut client = Client::open(&served.path(), "working", false);
    assert_eq!(client.write(FUA, 0, b"here").error, 0);
    assert_eq!(client.read(0, 4), b"here");
    hanging.release(Op::Read);
    for _ in 0..20 {
        assert_eq!(stuck.reply().error, 0);
    }
}

#[test]
fn a_flush_that_hangs_holds_a_shutdown_for_its_time_only() {
    let config = ServerConfig { flush_timeout: Duration::from_millis(100), ..impatient() };
    let (device, mut served) = serve(TestDevice::new(MIB), config);
    served.client().read(0, 1);
    device.hold(Op::Flush);
    let error = served.stop().unwrap_err();
    assert!(error.to_string().contains("a flush was still running"), "{error}");
    device.release(Op::Flush);
}

#[test]
fn the_server_can_stop_with_its_last_client() {
    let config = ServerConfig { stop_with_last_client: true, ..ServerConfig::default() };
    let (_device, mut served) = serve(TestDevice::new(MIB), config);
    let (one, mut two) = (served.client(), served.client());
    drop(one);
    assert_eq!(two.read(0, 1), [0]);
    drop(two);
    served.wait().unwrap();
}

#[test]
fn work_of_clients_that_left_is_finished_before_their_place_is_free() {
    let config = ServerConfig { max_connections: 2, ..ServerConfig::default() };
    let (device, served) = serve(TestDevice::new(MIB).cold(), config);
    device.hold(Op::Read);
    for _ in 0..2 {
        let mut client = served.client();
        client.start(DF, READ, 0, 4096);
    }
    device.wait_for(Op::Read, 2);
    assert!(Client::silent(&served.path()).is_closed());
    device.release(Op::Read);
    while Client::silent(&served.path()).is_closed() {
        std::thread::yield_now();
    }
}

#[test]
fn a_panic_in_the_device_fails_its_request_only() {
    let device = TestDevice::new(MIB).cold();
    let (device, mut served) = serve_with(1, device, ServerConfig::default());
    device.panic(Op::Trim);
    device.panic(Op::Prefetch);
    let mut client = served.client();
    assert_eq!(client.command(0, TRIM, 0, 4096).error, EIO);
    assert_eq!(client.command(0, CACHE, 0, 4096).error, EIO);
    assert_eq!(client.write(FUA, 0, b"x").error, 0);
    // On a connection's own thread it ends that connection.
    device.panic(Op::TryRead);
    client.start(DF, READ, 0, 1);
    assert!(client.is_closed());
    assert_eq!(served.client().write(0, 0, b"y").error, 0);
    served.stop().unwrap();
}

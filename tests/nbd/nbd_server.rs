//! The NBD server as clients see it: handshake, commands and their errors.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use testkit::device::{Op, TestDevice};
use testkit::nbd::*;
use thinply::device::{Facts, ZeroMode};
use thinply::error::{Error, ErrorKind, Result};
use thinply::nbd::server::{Listener, Server, ServerConfig};
use thinply::serve::{Lease, Leases, Listed, Opened, Table};

const MIB: u64 = 1 << 20;

fn disk(size: u64) -> (Arc<TestDevice>, Served) {
    serve(TestDevice::new(size))
}

fn serve(device: TestDevice) -> (Arc<TestDevice>, Served) {
    let device = Arc::new(device);
    let served = Served::device(&device);
    (device, served)
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8 | 1).collect()
}

#[test]
fn options_tell_what_there_is() {
    let (_device, served) = disk(MIB);
    let mut client = Client::raw(&served.path());
    let list = client.ask(OPT_LIST, &[]);
    assert_eq!(list, [(REP_SERVER, b"\0\0\0\x04diska test".to_vec()), (REP_ACK, vec![])]);

    let answer = client.ask(OPT_INFO, &info("", &[1, 2, 3, 77]));
    let infos: Vec<_> = answer.iter().map(|(_, payload)| &payload[..]).collect();
    assert!(answer[..4].iter().all(|(kind, _)| *kind == REP_INFO));
    assert_eq!(infos[0][..10], [0, 0, 0, 0, 0, 0, 0, 16, 0, 0]);
    assert_eq!(infos[1], b"\0\x01disk");
    assert_eq!(infos[2], b"\0\x02a test");
    assert_eq!(infos[3], [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!((answer.len(), answer[4].0), (5, REP_ACK));
    // Nothing was started by INFO.
    assert_eq!(client.ask(OPT_ABORT, &[1, 2, 3]), [(REP_ACK, vec![])]);
    assert!(client.is_closed());
}

#[test]
fn transmission_flags_tell_what_can_be_done() {
    let table = Arc::new(Table::new());
    let opened = || Opened::new(TestDevice::new(MIB));
    insert(&table, "rw", opened());
    insert(&table, "ro", Opened { read_only: true, ..opened() });
    let served = Served::exports(table, ServerConfig::default());
    // FLUSH, FUA, MULTI_CONN, CACHE; READ_ONLY or TRIM, WRITE_ZEROES, FAST_ZERO; DF.
    assert_eq!(Client::open(&served.path(), "rw", false).flags, 0b1101_0110_1101);
    assert_eq!(Client::open(&served.path(), "rw", true).flags, 0b1101_1110_1101);
    assert_eq!(Client::open(&served.path(), "ro", false).flags, 0b0101_0000_1111);
}

#[test]
fn export_name_starts_the_transmission_phase() {
    let (_device, served) = disk(MIB);
    for (flags, zeroes) in [(1, 124), (3, 0)] {
        let mut client = Client::silent(&served.path());
        client.take(18);
        client.send(&[0, 0, 0, flags]);
        client.send(&option(OPT_EXPORT_NAME, b"disk"));
        let answer = client.take(10 + zeroes);
        assert_eq!(answer[..8], MIB.to_be_bytes());
        assert_eq!(client.write(0, 5, b"hello").error, 0);
        assert_eq!(client.read(4, 7), b"\0hello\0");
    }
    let mut client = Client::raw(&served.path());
    client.send(&option(OPT_EXPORT_NAME, b"nodisk"));
    assert!(client.is_closed());
}

/// Disks of which `taken` has a user who stays for longer than anybody waits.
struct Taken(Table);

/// How long that is.
const PATIENCE: Duration = Duration::from_millis(400);

impl Leases for Taken {
    fn lease(&self, name: &str) -> Result<Lease> {
        if name == "taken" {
            std::thread::sleep(PATIENCE);
            return Err(Error::new(ErrorKind::InUse, "has a user already"));
        }
        self.0.lease(name)
    }

    fn look(&self, name: &str) -> Result<Lease> {
        self.0.look(name)
    }

    fn facts(&self, name: &str) -> Result<Facts> {
        self.0.facts(name)
    }

    fn list(&self) -> Vec<Listed> {
        self.0.list()
    }
}

#[test]
fn an_export_in_use_is_told_of_and_waiting_for_it_is_not_the_clients_time() {
    let table = Table::new();
    insert(&table, "free", Opened::new(TestDevice::new(MIB)));
    insert(&table, "taken", Opened::new(TestDevice::new(2 * MIB)));
    let config = ServerConfig { handshake_timeout: 2 * PATIENCE, ..ServerConfig::default() };
    let served = Served::exports(Arc::new(Taken(table)), config);
    let mut client = Client::raw(&served.path());
    client.ask(OPT_STRUCTURED_REPLY, &[]);
    let told = client.ask(OPT_INFO, &info("taken", &[]));
    assert_eq!(told[0].1[2..10], (2 * MIB).to_be_bytes());
    for option in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        let contexts = client.ask(option, &meta("taken", &["base:allocation"]));
        assert_eq!(contexts[0].0, REP_META_CONTEXT);
    }
    for _ in 0..4 {
        assert_eq!(client.ask(OPT_GO, &info("taken", &[]))[0].0, ERR_POLICY);
    }
    client.go("free");
    assert_eq!(client.read(0, 1), [0]);
}

#[test]
fn the_empty_name_is_the_only_export() {
    let table = Arc::new(Table::new());
    let opened = || Opened::new(TestDevice::new(MIB));
    insert(&table, "a", opened());
    let second = thinply::serve::Served::new("a", opened()).unwrap();
    assert_eq!(table.insert(Arc::new(second)).unwrap_err().kind(), ErrorKind::Exists);
    let served = Served::exports(Arc::clone(&table), ServerConfig::default());
    let mut kept = Client::open(&served.path(), "", true);
    // The table changes while it is served.
    insert(&table, "b", opened());
    let mut client = Client::raw(&served.path());
    assert_eq!(client.ask(OPT_GO, &info("", &[]))[0].0, ERR_UNKNOWN);
    assert!(table.remove("a").is_some());
    assert_eq!(client.ask(OPT_GO, &info("a", &[]))[0].0, ERR_UNKNOWN);
    client.go("");
    assert_eq!(kept.read(0, 1), [0]);
}

#[test]
fn metadata_contexts_belong_to_one_export_and_need_structured_replies() {
    let (_device, served) = disk(MIB);
    let mut client = Client::raw(&served.path());
    let set = meta("disk", &["base:allocation"]);
    assert_eq!(client.ask(OPT_SET_META_CONTEXT, &set)[0].0, ERR_INVALID);
    assert_eq!(client.ask(OPT_LIST_META_CONTEXT, &meta("disk", &["base:"])).len(), 2);
    client.ask(OPT_STRUCTURED_REPLY, &[]);
    let chosen = client.ask(OPT_SET_META_CONTEXT, &set);
    assert_eq!(chosen[0], (REP_META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec()));
    client.go("");
    assert_eq!(client.command(0, BLOCK_STATUS, 0, 4096).error, EINVAL);
}

#[test]
fn any_alignment_and_length_is_served() {
    for structured in [false, true] {
        for cold in [false, true] {
            let device = TestDevice::new(16 * MIB);
            let (_device, served) = serve(if cold { device.cold() } else { device });
            let mut client = Client::open(&served.path(), "disk", structured);
            for (offset, length) in [(1, 1), (4095, 2), (511, 33_000), (12_345, 300_001)] {
                let data = pattern(length);
                assert_eq!(client.write(0, offset, &data).error, 0);
                assert_eq!(client.read(offset, length as u32), data);
            }
            let data = pattern(5 << 20);
            assert_eq!(client.write(0, 3, &data).error, 0);
            assert_eq!(client.read(0, (5 << 20) + 6)[3..][..5 << 20], data);
            assert_eq!(client.read(16 * MIB, 0), b"");
            assert_eq!(client.write(FUA, 0, b"").error, 0);
        }
    }
}

#[test]
fn many_requests_in_one_packet_are_all_answered() {
    for cold in [false, true] {
        let device = TestDevice::new(MIB);
        let (_device, served) = serve(if cold { device.cold() } else { device });
        let mut client = served.client();
        let content = pattern(1 << 20);
        client.write(0, 0, &content);
        let mut packet = Vec::new();
        let mut open: std::collections::HashMap<u64, u64> = (0..1000)
            .map(|i| {
                let (cookie, bytes) = client.encode(0, READ, i * 512, 512);
                packet.extend_from_slice(&bytes);
                (cookie, i)
            })
            .collect();
        let mut sender = client.stream.try_clone().unwrap();
        let thread = std::thread::spawn(move || std::io::Write::write_all(&mut sender, &packet));
        while !open.is_empty() {
            let reply = client.reply();
            let i = open.remove(&reply.cookie).expect("each is answered once") as usize;
            assert_eq!(reply.data(), content[i * 512..][..512]);
        }
        thread.join().unwrap().unwrap();
    }
}

#[test]
fn reads_that_have_to_wait_are_asked_of_the_disk_together() {
    for told in [true, false] {
        let (device, served) = serve(TestDevice::new(MIB).cold());
        let mut client = served.client();
        let content = pattern(32_768);
        client.write(0, 0, &content);
        // There is nothing to gain for a single one.
        assert_eq!(client.read(0, 4096), content[..4096]);
        assert_eq!(device.count(Op::Prefetch), 0);
        if !told {
            device.fail(Op::Prefetch, ErrorKind::Io);
        }
        device.hold(Op::Read);
        let (cookies, packets): (Vec<_>, Vec<_>) =
            (0..8).map(|i| client.encode(0, READ, i * 4096, 4096)).unzip();
        std::io::Write::write_all(&mut client.stream, &packets.concat()).unwrap();
        device.wait_for(Op::Read, 2);
        assert_eq!(device.count(Op::Prefetch), 8);
        device.release(Op::Read);
        for _ in &cookies {
            let reply = client.reply();
            let i = cookies.iter().position(|&cookie| cookie == reply.cookie).unwrap();
            assert_eq!(reply.data(), content[i * 4096..][..4096]);
        }
    }
}

#[test]
fn reads_that_the_disk_cannot_be_told_of_wait_side_by_side() {
    let (device, served) = serve(TestDevice::new(MIB).cold().untold());
    let mut client = served.client();
    device.hold(Op::Read);
    let packets: Vec<_> = (0..8).map(|i| client.encode(0, READ, i * 4096, 4096).1).collect();
    std::io::Write::write_all(&mut client.stream, &packets.concat()).unwrap();
    device.wait_for(Op::Read, 8);
    device.release(Op::Read);
    for _ in &packets {
        assert_eq!(client.reply().data(), [0; 4096]);
    }
}

#[test]
fn sparse_reads_name_their_holes() {
    for cold in [false, true] {
        let device = TestDevice::new(MIB);
        let (_device, served) = serve(if cold { device.cold() } else { device });
        let mut client = served.client();
        client.write(0, 8192, &[7; 4096]);
        let parts = client.command(0, READ, 100, 16_384).parts;
        let data = Part::Data(8192, vec![7; 4096]);
        assert_eq!(parts, [Part::Hole(100, 8092), data, Part::Hole(12_288, 4196)]);
        let whole = client.command(DF, READ, 100, 16_384).parts;
        assert!(matches!(&whole[..], [Part::Data(100, data)] if data.len() == 16_384));
        assert_eq!(client.command(0, READ, 8193, 5).parts, [Part::Data(8193, vec![7; 5])]);
    }
}

#[test]
fn a_read_of_many_holes_is_split_in_bounds() {
    let (_device, served) = serve(TestDevice::new(4 * MIB).striped());
    let mut client = served.client();
    client.write(0, MIB, &pattern(1 << 20));
    let reply = client.command(0, READ, 1, (2 * MIB) as u32);
    assert!(reply.parts.len() <= 64, "{}", reply.parts.len());
    assert_eq!(reply.data().len(), 2 << 20);
    assert_eq!(reply.data()[MIB as usize - 1..][..1 << 20], pattern(1 << 20));
}

#[test]
fn failed_reads_say_where_and_why() {
    for cold in [false, true] {
        let device = TestDevice::new(MIB);
        let (device, served) = serve(if cold { device.cold() } else { device });
        let mut client = served.client();
        client.write(0, 8192, b"x");
        device.fail(Op::Read, ErrorKind::Io);
        let reply = client.command(0, READ, 0, 16_384);
        assert_eq!((reply.error, reply.error_offset), (EIO, Some(8192)));
        assert!(reply.message.contains("host"), "{}", reply.message);
        assert!(reply.parts.is_empty());
        let mut simple = Client::open(&served.path(), "disk", false);
        assert_eq!(simple.command(0, READ, 8192, 1).error, EIO);
        let events = served.events.lock().unwrap();
        assert!(events.iter().any(|event| event.contains("planned to fail")), "{events:?}");
    }
}

#[test]
fn device_errors_map_to_errnos() {
    for (kind, errno) in [
        (ErrorKind::NoSpace, ENOSPC),
        (ErrorKind::Unsupported, ENOTSUP),
        (ErrorKind::ReadOnly, EPERM),
        (ErrorKind::OutOfRange, ENOSPC),
        (ErrorKind::InvalidInput, EINVAL),
        (ErrorKind::Poisoned, EIO),
        (ErrorKind::Corrupt, EIO),
    ] {
        for cold in [false, true] {
            let device = TestDevice::new(MIB);
            let (device, served) = serve(if cold { device.cold() } else { device });
            let mut client = served.client();
            device.fail(Op::Write, kind);
            let reply = client.write(0, 0, &pattern(100_000));
            assert_eq!(reply.error, errno, "{kind:?}");
            assert!(!reply.message.is_empty());
            assert_eq!(client.read(0, 2), [0, 0]);
        }
    }
    let (device, served) = disk(MIB);
    device.fail(Op::Trim, ErrorKind::OutOfRange);
    assert_eq!(served.client().command(0, TRIM, 0, 4096).error, EINVAL);
}

/// A device that finds no space for writes, served to clients that wait for some.
fn full(cold: bool) -> (Arc<TestDevice>, Served) {
    let device = TestDevice::new(MIB);
    let device = Arc::new(if cold { device.cold() } else { device });
    device.fail(Op::Write, ErrorKind::NoSpace);
    let config = ServerConfig { wait_for_space: true, ..ServerConfig::default() };
    let served = Served::with_config(&device, config);
    (device, served)
}

#[test]
fn where_asked_for_a_write_waits_for_space() {
    for cold in [false, true] {
        let (device, served) = full(cold);
        let mut client = served.client();
        let waiting = client.start_write(FUA, 4096, &pattern(100_000));
        // Tried, and tried again; meanwhile all else is answered.
        device.wait_for(Op::Write, 3);
        let read = client.start(0, READ, 0, 1);
        let reply = client.reply();
        assert_eq!((reply.cookie, reply.error), (read, 0), "the write was answered");
        assert_eq!(device.durable_writes(), 0);
        device.mend(Op::Write);
        let reply = client.reply();
        assert_eq!((reply.cookie, reply.error), (waiting, 0));
        assert_eq!((client.read(4096, 100_000), device.durable_writes()), (pattern(100_000), 1));
        let events = served.events.lock().unwrap();
        assert!(events.iter().any(|event| event.contains("waits for space")), "{events:?}");
    }
}

#[test]
fn the_wait_for_space_ends_with_the_client_and_with_the_server() {
    // With room for another request, and with none: then the client's end shows in another way.
    for count in [1, 130] {
        let (device, mut served) = full(false);
        let ask = |client: &mut Client| {
            let cookie = client.start_write(0, 0, &[1; 512]);
            for _ in 1..count {
                client.start_write(0, 0, &[1; 512]);
            }
            device.wait_for(Op::Write, device.count(Op::Write) + count + 2);
            cookie
        };
        let mut client = served.client();
        ask(&mut client);
        drop(client);
        // Nothing of it is tried any more.
        let tried = || {
            let tried = device.count(Op::Write);
            thread::sleep(Duration::from_millis(600));
            device.count(Op::Write) - tried
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while tried() > 0 {
            assert!(Instant::now() < deadline);
        }
        let mut client = served.client();
        let waiting = ask(&mut client);
        let begun = Instant::now();
        served.stop().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
        // The end may have come in the middle of a round.
        let mut replies = (0..count).map(|_| client.reply());
        assert_eq!(replies.find(|reply| reply.cookie == waiting).unwrap().error, ENOSPC);
    }
}

#[test]
fn who_says_goodbye_waits_for_space_no_more() {
    let (device, served) = full(false);
    let mut client = served.client();
    let waiting = client.start_write(0, 0, &[1; 512]);
    device.wait_for(Op::Write, 3);
    client.start(0, DISC, 0, 0);
    let reply = client.reply();
    assert_eq!((reply.cookie, reply.error), (waiting, ENOSPC));
    assert!(client.is_closed());
}

#[test]
fn block_status_describes_holes() {
    let (_device, served) = disk(MIB);
    let mut client = served.client();
    client.write(0, 8192, &[7; 4096]);
    let reply = client.command(0, BLOCK_STATUS, 100, 16_384);
    assert_eq!(reply.status, [(8092, 3), (4096, 0), (4196, 3)]);
    let reply = client.command(REQ_ONE, BLOCK_STATUS, 8192, 16_384);
    assert_eq!(reply.status, [(4096, 0)]);
    assert_eq!(client.command(0, BLOCK_STATUS, 0, 0).error, EINVAL);
    let mut simple = Client::open(&served.path(), "disk", false);
    assert_eq!(simple.command(0, BLOCK_STATUS, 0, 4096).error, EINVAL);
}

#[test]
fn status_near_4_gib_keeps_its_lengths() {
    let (_device, served) = disk(1 << 63);
    let mut client = served.client();
    let last = (1 << 63) - u64::from(u32::MAX);
    for offset in [0, 1, 1 << 32, (1 << 62) - 1, last] {
        let reply = client.command(0, BLOCK_STATUS, offset, u32::MAX);
        assert_eq!(reply.status, [(u32::MAX, 3)], "at {offset}");
    }
    assert_eq!(client.command(0, BLOCK_STATUS, last + 1, u32::MAX).error, EINVAL);
    client.write(0, u64::from(u32::MAX), &[1; 2]);
    let reply = client.command(0, BLOCK_STATUS, 1, u32::MAX);
    assert_eq!(reply.status, [(u32::MAX - 4096, 3), (4096, 0)]);
}

#[test]
fn status_has_at_most_a_million_extents() {
    let (_device, served) = serve(TestDevice::new(1 << 40).striped());
    let mut client = served.client();
    // 4 GiB of single blocks, and one more that the odd start touches.
    let reply = client.command(0, BLOCK_STATUS, 4095, u32::MAX);
    assert_eq!(reply.status.len(), 1 << 20);
    assert_eq!(reply.status[..2], [(1, 0), (4096, 3)]);
}

#[test]
fn ranges_past_the_end_fail_with_their_errno_and_in_step() {
    let (_device, served) = disk(MIB);
    for structured in [false, true] {
        let mut client = Client::open(&served.path(), "disk", structured);
        for (offset, length) in
            [(MIB, 1), (MIB - 1, 2), (MIB + 1, 4096), (1 << 63, 512), (u64::MAX, 70_000)]
        {
            let data = pattern(length as usize);
            assert_eq!(client.write(FUA, offset, &data).error, ENOSPC);
            assert_eq!(client.command(0, WRITE_ZEROES, offset, length).error, ENOSPC);
            assert_eq!(client.command(0, READ, offset, length).error, EINVAL);
            assert_eq!(client.command(0, TRIM, offset, length).error, EINVAL);
            assert_eq!(client.command(0, CACHE, offset, length).error, EINVAL);
            assert_eq!(client.command(0, BLOCK_STATUS, offset, length).error, EINVAL);
        }
        assert_eq!(client.read(MIB - 2, 2), [0, 0]);
    }
}

#[test]
fn read_only_exports_refuse_changes_and_stay_in_step() {
    let device = Arc::new(TestDevice::new(MIB).read_only());
    let served = Served::device(&device);
    let mut client = served.client();
    for length in [1, 4096, 300_000] {
        assert_eq!(client.write(0, 0, &pattern(length)).error, EPERM);
    }
    assert_eq!(client.command(0, WRITE_ZEROES, 0, 4096).error, EPERM);
    assert_eq!(client.command(0, TRIM, 0, 4096).error, EPERM);
    assert_eq!(client.command(0, FLUSH, 0, 0).error, 0);
    assert_eq!(client.read(0, 1), [0]);
}

#[test]
fn unknown_commands_and_flags_are_refused_in_step() {
    let (device, served) = disk(MIB);
    let mut client = served.client();
    assert_eq!(client.command(0, 8, 0, 512).error, EINVAL);
    assert_eq!(client.command(0, 0xffff, u64::MAX, u32::MAX).error, EINVAL);
    for flag in (1..16).map(|bit| 1 << bit) {
        let (cookie, mut bytes) = client.encode(flag, WRITE, 0, 5);
        bytes.extend_from_slice(b"wrong");
        client.send(&bytes);
        let reply = client.reply();
        assert_eq!((reply.cookie, reply.error), (cookie, EINVAL), "flag {flag}");
    }
    assert_eq!(device.count(Op::Write), 0);
    assert_eq!(client.read(0, 5), [0; 5]);
    let mut simple = Client::open(&served.path(), "disk", false);
    assert_eq!(simple.command(DF, READ, 0, 5).error, EINVAL);
}

#[test]
fn every_command_takes_fua_and_changes_are_durable_with_it() {
    for cold in [false, true] {
        let device = TestDevice::new(MIB);
        let (device, served) = serve(if cold { device.cold() } else { device });
        let mut client = served.client();
        for (kind, flushes) in
            [(READ, 0), (CACHE, 0), (BLOCK_STATUS, 0), (FLUSH, 1), (TRIM, 2), (WRITE_ZEROES, 3)]
        {
            let length = if kind == FLUSH { 0 } else { 4096 };
            assert_eq!(client.command(FUA, kind, 0, length).error, 0, "command {kind}");
            assert_eq!(device.count(Op::Flush), flushes, "command {kind}");
        }
        for length in [1, 100_000] {
            let before = device.durable_writes();
            assert_eq!(client.write(FUA, 0, &pattern(length)).error, 0);
            assert_eq!(device.durable_writes(), before + 1);
        }
        device.fail(Op::Flush, ErrorKind::Poisoned);
        assert_eq!(client.write(FUA, 0, b"x").error, EIO);
        assert_eq!(client.write(0, 0, b"x").error, 0);
    }
}

#[test]
fn zeroes_trim_and_cache_reach_the_device() {
    let (device, served) = disk(MIB);
    let mut client = served.client();
    client.write(0, 0, &pattern(16_384));
    assert_eq!(client.command(FAST_ZERO, WRITE_ZEROES, 0, 4096).error, ENOTSUP);
    assert_eq!(client.read(0, 4096), pattern(4096));
    assert_eq!(client.command(NO_HOLE, WRITE_ZEROES, 1, 4096).error, 0);
    assert_eq!(device.last_zero(), Some(ZeroMode { allocate: true, fast_only: false }));
    assert_eq!(client.read(0, 4098)[..], [&[1][..], &[0; 4096], &pattern(4098)[4097..]].concat());
    assert_eq!(client.command(0, WRITE_ZEROES, 0, 1).error, 0);
    assert_eq!(device.last_zero(), Some(ZeroMode::default()));
    assert_eq!(client.command(0, TRIM, 8192, 4096).error, 0);
    assert_eq!(client.read(8192, 4096), [0; 4096]);
    assert_eq!(client.command(0, CACHE, 8192, 4096).error, 0);
    assert_eq!(device.count(Op::Prefetch), 1);
    // Nothing to do is done without the device.
    for kind in [WRITE_ZEROES, TRIM, CACHE] {
        assert_eq!(client.command(0, kind, MIB, 0).error, 0);
    }
    assert_eq!((device.count(Op::Trim), device.count(Op::Prefetch)), (1, 1));
    assert_eq!(client.command(0, FLUSH, 0, 1).error, EINVAL);
}

#[test]
fn disconnecting_waits_for_answers() {
    let (device, served) = serve(TestDevice::new(MIB).cold());
    let mut client = served.client();
    device.hold(Op::Write);
    let cookie = client.start_write(0, 0, b"last words");
    client.start(0, DISC, 0, 0);
    device.wait_for(Op::Write, 1);
    device.release(Op::Write);
    assert_eq!(client.reply().cookie, cookie);
    assert!(client.is_closed());
    assert_eq!(served.client().read(0, 10), b"last words");
}

#[test]
fn tcp_is_served_too() {
    let table = Table::new();
    insert(&table, "disk", Opened::new(TestDevice::new(MIB)));
    let listeners = vec![Listener::tcp("127.0.0.1:0").unwrap(), Listener::tcp("[::1]:0").unwrap()];
    let addresses: Vec<_> = listeners.iter().map(|l| l.tcp_address().unwrap()).collect();
    let server = Server::new(listeners, Arc::new(table), ServerConfig::default()).unwrap();
    let handle = server.handle();
    let thread = std::thread::spawn(move || server.run());
    for address in addresses {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let mut greeting = [0; 18];
        std::io::Read::read_exact(&mut stream, &mut greeting).unwrap();
        assert_eq!(greeting[..16], *b"NBDMAGICIHAVEOPT");
    }
    handle.shutdown();
    thread.join().unwrap().unwrap();
}

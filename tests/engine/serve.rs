//! Disks in use: who gets one, when it is opened and closed, and what becomes of requests that wait.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use testkit::device::{Op as Call, TestDevice};
use thinply::device::{Device, Disk, ZeroMode};
use thinply::error::{Error, ErrorKind, Result};
use thinply::serve::{
    Broker, Completion, Desk, Facts, InUse, Lease, Leases, Listed, Log, Op, Opened, Payload, Served,
};
use thinply::storage::{Folder, MemoryFolder, Storage};

const SIZE: u64 = 1 << 20;
/// Longer than anything here takes.
const TOO_LONG: Duration = Duration::from_secs(20);
/// Long enough for what must not happen to happen.
const A_WHILE: Duration = Duration::from_millis(30);

/// Any name is a disk, and always the same device; names that begin with `shared` have many users.
struct Shelf {
    device: Arc<TestDevice>,
    opened: AtomicUsize,
    /// What the next open does instead.
    fails: Mutex<Option<ErrorKind>>,
    panics: AtomicBool,
    workers: usize,
    log: Mutex<Vec<String>>,
}

impl Broker for Shelf {
    type Disk = Arc<TestDevice>;

    fn open(&self, name: &str) -> Result<Opened<Self::Disk>> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        assert!(!self.panics.swap(false, Ordering::Relaxed), "planned to panic");
        if let Some(kind) = self.fails.lock().unwrap().take() {
            return Err(Error::new(kind, "planned to fail"));
        }
        let (shared, workers) = (name.starts_with("shared"), self.workers);
        Ok(Opened { shared, workers, ..Opened::new(self.device.clone()) })
    }

    fn facts(&self, _: &str) -> Result<Facts> {
        self.device.facts()
    }

    fn list(&self) -> Result<Vec<Listed>> {
        Err(Error::new(ErrorKind::Io, "planned to fail"))
    }

    fn scratch(&self) -> Result<Arc<dyn Storage>> {
        Ok(MemoryFolder::new("scratch").create("kept").unwrap())
    }

    fn log(&self, line: &str) {
        self.log.lock().unwrap().push(line.to_owned());
    }
}

fn shelf(workers: usize) -> Shelf {
    Shelf {
        device: Arc::new(TestDevice::new(SIZE)),
        opened: AtomicUsize::new(0),
        fails: Mutex::default(),
        panics: AtomicBool::new(false),
        workers,
        log: Mutex::default(),
    }
}

fn desk() -> (Desk<Shelf>, Arc<TestDevice>) {
    let desk = Desk::with_patience(shelf(2), Duration::from_millis(100));
    let device = desk.broker().device.clone();
    (desk, device)
}

fn opened(desk: &Desk<Shelf>) -> usize {
    desk.broker().opened.load(Ordering::Relaxed)
}

/// Who waits long enough.
fn patient() -> (Desk<Shelf>, Arc<TestDevice>) {
    let desk = Desk::with_patience(shelf(2), TOO_LONG);
    let device = desk.broker().device.clone();
    (desk, device)
}

/// The answers to requests by name.
type Answers<T> = Receiver<(T, Result<Vec<u8>>)>;

/// A completion that a test can wait for.
fn answer<T: Send + 'static>(to: &Sender<(T, Result<Vec<u8>>)>, name: T) -> impl Completion {
    let to = to.clone();
    move |result: Result<Vec<u8>>| drop(to.send((name, result)))
}

fn next<T>(answers: &Receiver<T>) -> T {
    answers.recv_timeout(TOO_LONG).unwrap()
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    result.err().unwrap().kind()
}

#[test]
fn a_disk_is_opened_with_the_first_user_and_closed_after_the_last() {
    let (desk, device) = desk();
    let (one, two) = (desk.lease("shared").unwrap(), desk.lease("shared").unwrap());
    let three = desk.visit("shared").unwrap();
    assert_eq!(opened(&desk), 1);
    let found = InUse { name: "shared".into(), shared: true, users: 2, waiting: 0 };
    assert_eq!(desk.in_use(), [found]);
    drop((one, two.clone(), two));
    assert_eq!(device.count(Call::Close), 0);
    assert_eq!(desk.in_use()[0].users, 0);
    three.leave().unwrap();
    assert_eq!((device.count(Call::Close), desk.in_use()), (1, vec![]));
    drop(desk.lease("shared").unwrap());
    assert_eq!((opened(&desk), device.count(Call::Close)), (2, 2));
}

#[test]
fn who_comes_second_waits_for_the_one_before_and_not_for_ever() {
    let (desk, _) = desk();
    let first = desk.lease("disk").unwrap();
    let other = desk.lease("other").unwrap();
    let error = desk.lease("disk").err().unwrap();
    assert_eq!((error.kind(), &*error.to_string()), (ErrorKind::InUse, "disk has a user already"));
    drop((first, other));
    let (desk, device) = patient();
    let first = desk.lease("disk").unwrap();
    thread::scope(|scope| {
        let second = scope.spawn(|| desk.lease("disk").unwrap());
        thread::sleep(A_WHILE);
        assert!(!second.is_finished());
        drop(first);
        second.join().unwrap();
    });
    // Closed in between or not: the second may come in while it is still open.
    assert_eq!(opened(&desk), device.count(Call::Close));
    assert!((1..=2).contains(&opened(&desk)));
}

#[test]
fn the_next_user_may_come_in_while_somebody_visits() {
    let (desk, device) = desk();
    let visit = desk.visit("disk").unwrap();
    let first = desk.lease("disk").unwrap();
    assert_eq!(kind(desk.lease("disk")), ErrorKind::InUse);
    drop(first);
    let second = desk.lease("disk").unwrap();
    assert_eq!((opened(&desk), device.count(Call::Close)), (1, 0));
    assert_eq!(kind(desk.lease("disk")), ErrorKind::InUse);
    drop((visit, second));
    assert_eq!(device.count(Call::Close), 1);
}

#[test]
fn a_visit_waits_while_the_disk_is_being_closed() {
    let (desk, device) = desk();
    device.hold(Call::Close);
    thread::scope(|scope| {
        let lease = desk.lease("disk").unwrap();
        scope.spawn(move || drop(lease));
        device.wait_for(Call::Close, 1);
        let visit = scope.spawn(|| desk.visit("disk").unwrap().leave());
        // Longer than a user's patience.
        thread::sleep(2 * Duration::from_millis(100));
        assert!(!visit.is_finished());
        assert_eq!(opened(&desk), 1, "opened while it is being closed");
        assert_eq!(kind(desk.lease("disk")), ErrorKind::InUse);
        device.release(Call::Close);
        visit.join().unwrap().unwrap();
    });
    assert_eq!(opened(&desk), 2);
}

#[test]
fn an_open_that_fails_or_panics_leaves_the_name_free() {
    let (desk, _) = desk();
    *desk.broker().fails.lock().unwrap() = Some(ErrorKind::Corrupt);
    assert_eq!(kind(desk.lease("disk")), ErrorKind::Corrupt);
    desk.broker().panics.store(true, Ordering::Relaxed);
    let lease = thread::scope(|scope| scope.spawn(|| desk.lease("disk").is_ok()).join());
    assert!(lease.is_err());
    assert_eq!(desk.in_use(), []);
    assert_eq!(kind(desk.lease(&"a".repeat(4097))), ErrorKind::InvalidInput);
    desk.lease("disk").unwrap();
}

#[test]
fn an_error_of_the_close_is_told_to_the_last_visitor_or_else_logged() {
    let (desk, device) = desk();
    device.fail(Call::Close, ErrorKind::NoSpace);
    let (one, two) = (desk.visit("disk").unwrap(), desk.visit("disk").unwrap());
    one.leave().unwrap();
    assert_eq!(kind(two.leave()), ErrorKind::NoSpace);
    assert!(desk.broker().log.lock().unwrap().is_empty());
    drop(desk.lease("disk").unwrap());
    let log = std::mem::take(&mut *desk.broker().log.lock().unwrap());
    assert_eq!(log, ["closing disk: planned to fail Close"]);
    assert_eq!((desk.in_use(), device.count(Call::Close)), (vec![], 2));
    assert_eq!(desk.list(), []);
    assert!(desk.broker().log.lock().unwrap()[0].contains("listing the disks"));
}

#[test]
fn the_end_waits_for_those_who_still_use_a_disk() {
    let (desk, _) = desk();
    desk.settle(Duration::ZERO).unwrap();
    let visit = desk.visit("disk").unwrap();
    let error = desk.settle(A_WHILE).unwrap_err();
    assert_eq!((error.kind(), &*error.to_string()), (ErrorKind::InUse, "still in use: disk"));
    thread::scope(|scope| {
        let end = scope.spawn(|| desk.settle(TOO_LONG));
        visit.leave().unwrap();
        end.join().unwrap().unwrap();
    });
}

#[test]
fn a_lease_ends_after_its_requests() {
    let (desk, device) = desk();
    let (to, answers) = mpsc::channel();
    let lease = desk.lease("disk").unwrap();
    device.hold(Call::Write);
    let data = Payload::Bytes(b"last words".to_vec());
    lease.submit(Op::Write { offset: 0, data }, false, answer(&to, ()));
    device.wait_for(Call::Write, 1);
    drop(lease);
    assert_eq!(kind(desk.lease("disk")), ErrorKind::InUse);
    device.release(Call::Write);
    next(&answers).1.unwrap();
    let mut found = [0; 10];
    desk.lease("disk").unwrap().read(0, &mut found).unwrap();
    assert_eq!(&found, b"last words");
}

#[test]
fn requests_are_carried_out_and_answered() {
    let (desk, device) = desk();
    let (to, answers) = mpsc::channel();
    let lease = desk.lease("disk").unwrap();
    let ask = |op, durable| {
        lease.submit(op, durable, answer(&to, ()));
        next(&answers).1.map_err(|error| error.kind())
    };
    let write = |offset| Op::Write { offset, data: Payload::Bytes(vec![7; 4096]) };
    assert_eq!(ask(write(0), false), Ok(vec![]));
    assert_eq!(device.durable_writes(), 0);
    assert_eq!(ask(write(4096), true), Ok(vec![]));
    assert_eq!(device.durable_writes(), 2);
    assert_eq!(
        ask(Op::Zero { offset: 0, length: 4095, mode: ZeroMode::default() }, false),
        Ok(vec![])
    );
    assert_eq!(ask(Op::Trim { offset: 4096, length: 4096 }, false), Ok(vec![]));
    assert_eq!(ask(Op::Prefetch { offset: 0, length: 4096 }, false), Ok(vec![]));
    assert_eq!(ask(Op::Read { offset: 4094, length: 3 }, false), Ok(vec![0, 7, 0]));
    assert_eq!(ask(Op::Read { offset: SIZE, length: 1 }, false), Err(ErrorKind::OutOfRange));
    // Nothing to do is done without the device.
    let before = device.count(Call::Trim);
    assert_eq!(ask(Op::Trim { offset: SIZE, length: 0 }, false), Ok(vec![]));
    assert_eq!(ask(Op::Read { offset: SIZE, length: 0 }, false), Ok(vec![]));
    assert_eq!(device.count(Call::Trim), before);
    // A change that failed is not flushed.
    device.fail(Call::Write, ErrorKind::NoSpace);
    let flushes = device.count(Call::Flush);
    assert_eq!(ask(write(0), true), Err(ErrorKind::NoSpace));
    assert_eq!(device.count(Call::Flush), flushes);
}

#[test]
fn a_disk_that_is_served_read_only_takes_no_change() {
    let opened = Opened { read_only: true, ..Opened::new(TestDevice::new(SIZE)) };
    let served = Served::new("disk", opened).unwrap();
    assert!(served.read_only());
    assert_eq!(kind(served.write(0, &[1])), ErrorKind::ReadOnly);
    assert_eq!(kind(served.zero(0, 1, ZeroMode::default())), ErrorKind::ReadOnly);
    assert_eq!(kind(served.trim(0, 4096)), ErrorKind::ReadOnly);
    let tried = served.try_write(0, (&[1][..]).into(), thinply::device::Wait::Never);
    assert_eq!(kind(tried), ErrorKind::ReadOnly);
}

fn flush(lease: &Lease, to: &Sender<(u32, Result<Vec<u8>>)>, name: u32) {
    lease.flush(answer(to, name));
}

#[test]
fn flushes_asked_for_during_one_share_the_next() {
    let (desk, device) = desk();
    let (to, answers) = mpsc::channel();
    let lease = desk.lease("disk").unwrap();
    device.hold(Call::Flush);
    flush(&lease, &to, 0);
    device.wait_for(Call::Flush, 1);
    (1..4).for_each(|name| flush(&lease, &to, name));
    device.release(Call::Flush);
    let names: Vec<_> = (0..4).map(|_| next(&answers).0).collect();
    assert_eq!((names, device.count(Call::Flush)), (vec![0, 1, 2, 3], 2));
    device.fail(Call::Flush, ErrorKind::Poisoned);
    flush(&lease, &to, 4);
    assert_eq!(next(&answers).1.map_err(|error| error.kind()), Err(ErrorKind::Poisoned));
}

#[test]
fn a_panic_of_a_front_end_costs_its_own_request_only() {
    let (desk, device) = desk();
    let (to, answers) = mpsc::channel();
    let lease = desk.lease("disk").unwrap();
    for _ in 0..4 {
        let read = Op::Read { offset: 0, length: 1 };
        lease.submit(read, false, |_: Result<Vec<u8>>| panic!("planned"));
        lease.run(|_| panic!("planned"));
    }
    device.hold(Call::Flush);
    flush(&lease, &to, 0);
    device.wait_for(Call::Flush, 1);
    lease.flush(|_: Result<Vec<u8>>| panic!("planned"));
    flush(&lease, &to, 1);
    device.release(Call::Flush);
    assert_eq!((next(&answers).0, next(&answers).0), (0, 1));
    flush(&lease, &to, 2);
    assert_eq!(next(&answers).0, 2);
    lease.submit(Op::Read { offset: 0, length: 1 }, false, answer(&to, 3));
    let (name, found) = next(&answers);
    assert_eq!((name, found.unwrap()), (3, vec![0]));
}

#[test]
fn a_panic_of_the_disk_drops_what_would_answer() {
    struct Duty(Sender<&'static str>);
    impl Completion for Duty {
        fn complete(self, _: Result<Vec<u8>>) {
            self.0.send("called").unwrap();
        }
    }
    impl Drop for Duty {
        fn drop(&mut self) {
            self.0.send("dropped").unwrap();
        }
    }
    let (desk, device) = desk();
    let (to, answers) = mpsc::channel();
    let lease = desk.lease("disk").unwrap();
    device.panic(Call::Trim);
    lease.submit(Op::Trim { offset: 0, length: 4096 }, false, Duty(to.clone()));
    assert_eq!(next(&answers), "dropped");
    device.panic(Call::Flush);
    lease.flush(Duty(to.clone()));
    assert_eq!(next(&answers), "dropped");
    lease.submit(Op::Read { offset: 0, length: 1 }, false, Duty(to));
    assert_eq!((next(&answers), next(&answers)), ("called", "dropped"));
    drop(lease);
    desk.settle(TOO_LONG).unwrap();
}

/// Who has its requests wait for space, until it says otherwise.
#[derive(Clone)]
struct Patient {
    waits: Arc<AtomicBool>,
    lines: Arc<Mutex<Vec<String>>>,
    to: Sender<(u32, Result<Vec<u8>>)>,
}

struct Duty {
    of: Patient,
    name: u32,
}

impl Completion for Duty {
    fn complete(self, result: Result<Vec<u8>>) {
        self.of.to.send((self.name, result)).unwrap();
    }

    fn waits(&self) -> Option<Log> {
        let lines = self.of.lines.clone();
        let log: Log = Arc::new(move |line| lines.lock().unwrap().push(line.to_owned()));
        self.of.waits.load(Ordering::Relaxed).then_some(log)
    }
}

impl Patient {
    fn new() -> (Self, Answers<u32>) {
        let (to, answers) = mpsc::channel();
        let waits = Arc::new(AtomicBool::new(true));
        (Self { waits, lines: Arc::default(), to }, answers)
    }

    fn duty(&self, name: u32) -> Duty {
        Duty { of: self.clone(), name }
    }
}

fn write_block(block: u64) -> Op {
    Op::Write { offset: block * 4096, data: Payload::Bytes(vec![block as u8 + 1; 4096]) }
}

/// Waits until so many requests of the desk's one disk wait for space.
fn wait_until_waiting(desk: &Desk<Shelf>, count: usize) {
    let deadline = std::time::Instant::now() + TOO_LONG;
    while desk.in_use()[0].waiting != count {
        assert!(std::time::Instant::now() < deadline, "{:?}", desk.in_use());
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_finds_no_space_waits_and_holds_up_nothing() {
    let (desk, device) = desk();
    let (patient, answers) = Patient::new();
    let (to, others) = mpsc::channel();
    let lease = desk.lease("disk").unwrap();
    device.fail(Call::Write, ErrorKind::NoSpace);
    device.fail(Call::Zero, ErrorKind::NoSpace);
    // More than there are workers; some that are tried on another one's thread.
    for name in 0..2 {
        lease.submit(write_block(name), name == 1, patient.duty(name as u32));
        wait_until_waiting(&desk, name as usize + 1);
    }
    let more = (2..5).map(|name| (write_block(name), false, patient.duty(name as u32)));
    lease.submit_all(more.collect());
    wait_until_waiting(&desk, 5);
    let zero = Op::Zero { offset: 1 << 19, length: 4096, mode: ZeroMode::default() };
    lease.submit(zero, false, patient.duty(5));
    wait_until_waiting(&desk, 6);
    // Who has no patience hears of it at once; all else goes on.
    lease.submit(write_block(9), false, answer(&to, 0));
    assert_eq!(kind(next(&others).1), ErrorKind::NoSpace);
    lease.submit(Op::Read { offset: 0, length: 1 }, false, patient.duty(10));
    lease.submit(Op::Trim { offset: 0, length: 4096 }, false, answer(&to, 1));
    assert_eq!(next(&answers).1.unwrap(), [0]);
    next(&others).1.unwrap();
    // A flush does not wait for them, and covers none of them.
    flush(&lease, &to, 2);
    next(&others).1.unwrap();
    assert_eq!((device.durable_writes(), lease.waiting()), (0, 6));
    let tried = device.count(Call::Write);
    device.wait_for(Call::Write, tried + 10);
    assert!(answers.try_recv().is_err());
    assert_eq!(patient.lines.lock().unwrap().len(), 1);
    device.mend(Call::Write);
    let mut names: Vec<_> = (0..5)
        .map(|_| next(&answers))
        .map(|(name, result)| {
            result.unwrap();
            name
        })
        .collect();
    // Once it is written the durable one waits for the flusher.
    names.retain(|name| *name != 1);
    // There may have been space in the middle of a round.
    let first = names.iter().position(|name| *name == 0).unwrap();
    names.rotate_left(first);
    assert_eq!(names, [0, 2, 3, 4]);
    assert!(device.durable_writes() >= 2);
    wait_until_waiting(&desk, 1);
    device.mend(Call::Zero);
    assert_eq!(next(&answers).0, 5);
    let mut found = [0; 5 * 4096];
    lease.read(0, &mut found).unwrap();
    assert!((0..5).all(|block| found[block * 4096..][..4096] == [block as u8 + 1; 4096]));
    wait_until_waiting(&desk, 0);
    let deadline = std::time::Instant::now() + TOO_LONG;
    while patient.lines.lock().unwrap().len() < 2 && std::time::Instant::now() < deadline {
        thread::sleep(Duration::from_millis(2));
    }
    let lines = patient.lines.lock().unwrap().clone();
    let want =
        ["disk waits for space on the host: planned to fail Write", "disk waits for space no more"];
    assert_eq!(lines, want);
    // And so once more.
    device.fail(Call::Write, ErrorKind::NoSpace);
    lease.submit(write_block(0), false, patient.duty(11));
    wait_until_waiting(&desk, 1);
    device.mend(Call::Write);
    assert_eq!(next(&answers).0, 11);
}

#[test]
fn a_flush_that_finds_no_space_waits_too() {
    let (desk, device) = desk();
    let (patient, answers) = Patient::new();
    let (to, others) = mpsc::channel();
    let lease = desk.lease("disk").unwrap();
    lease.submit(write_block(0), false, patient.duty(0));
    next(&answers).1.unwrap();
    device.fail(Call::Flush, ErrorKind::NoSpace);
    device.hold(Call::Flush);
    lease.flush(patient.duty(1));
    device.wait_for(Call::Flush, 1);
    // These share the next one.
    lease.flush(patient.duty(2));
    flush(&lease, &to, 0);
    device.release(Call::Flush);
    assert_eq!(kind(next(&others).1), ErrorKind::NoSpace);
    wait_until_waiting(&desk, 2);
    // A write whose own flush finds none waits as well, and is not written twice.
    lease.submit(write_block(1), true, patient.duty(3));
    wait_until_waiting(&desk, 3);
    assert_eq!((device.durable_writes(), device.count(Call::Write)), (0, 2));
    device.mend(Call::Flush);
    for name in 1..4 {
        let (found, result) = next(&answers);
        assert_eq!((found, result.unwrap()), (name, vec![]));
    }
    assert_eq!((device.durable_writes(), device.count(Call::Write)), (2, 2));
}

#[test]
fn who_waits_no_more_gets_the_error_and_lets_go_of_the_disk() {
    let (desk, device) = desk();
    let (patient, answers) = Patient::new();
    let lease = desk.lease("disk").unwrap();
    device.fail(Call::Write, ErrorKind::NoSpace);
    device.fail(Call::Flush, ErrorKind::NoSpace);
    lease.submit(write_block(0), false, patient.duty(0));
    lease.submit(write_block(1), true, patient.duty(1));
    lease.flush(patient.duty(2));
    wait_until_waiting(&desk, 3);
    drop(lease);
    assert_eq!(kind(desk.lease("disk")), ErrorKind::InUse);
    // Another error is no reason to wait.
    device.fail(Call::Flush, ErrorKind::Poisoned);
    let (name, result) = next(&answers);
    assert_eq!((name, kind(result)), (2, ErrorKind::Poisoned));
    patient.waits.store(false, Ordering::Relaxed);
    for _ in 0..2 {
        assert_eq!(kind(next(&answers).1), ErrorKind::NoSpace);
    }
    desk.settle(TOO_LONG).unwrap();
    assert_eq!(device.count(Call::Close), 1);
}

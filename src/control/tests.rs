//! Requests over a real store: what they do, what they are told, and what no request is.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::line::{Server, ask};
use super::request::{reply_from_json, reply_to_json};
use super::{Answer, Control, DiskUse, Request, carry_out};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::serve::{Leases, Log};
use crate::storage::Rights;
use crate::store::{NewImage, Store};

const SIZE: u64 = 1 << 20;

fn quiet() -> Log {
    Arc::new(|_| {})
}

/// A store with the container `web` over an image, and the volume `data`.
fn stocked() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open_or_make(folder.path()).unwrap();
    let draft = store.draft(Some(SIZE), None, Rights::Usual).unwrap();
    draft.chain().write(0, &[1; 4096]).unwrap();
    let new = NewImage {
        made_here: false,
        reference: "base".parse().unwrap(),
        created_by: "a test".into(),
        comment: String::new(),
        created: std::time::UNIX_EPOCH,
    };
    let image = store.publish(draft, None, &new).unwrap();
    store.create_container("web", &image, None).unwrap();
    store.create_volume("data", SIZE).unwrap();
    (folder, store)
}

fn commit(image: &str) -> Request {
    Request::Commit { container: "web".into(), image: image.into(), comment: String::new() }
}

fn resize(disk: &str, size: u64, shrink: bool) -> Request {
    Request::Resize { disk: disk.into(), size, shrink }
}

fn diff() -> Request {
    Request::Diff { container: "web".into() }
}

fn asked(store: &Store, request: &Request) -> Result<Answer> {
    ask(store, request).expect("somebody serves")
}

#[test]
fn a_disk_in_use_is_changed_beside_its_user() {
    let (_folder, store) = stocked();
    let control = Control::serving(store.clone(), quiet()).unwrap();
    let server = Server::start(control.clone()).unwrap();
    let lease = control.desk().lease("container/web").unwrap();
    lease.write(4096, &[2; 4096]).unwrap();
    let Answer::Diff(changes) = asked(&store, &diff()).unwrap() else { panic!() };
    let found: Vec<_> = changes.extents.iter().map(|e| (e.offset, e.length, e.zero)).collect();
    assert_eq!((found, changes.files), (vec![(4096, 4096, false)], None));
    let name = "before".to_owned();
    let snapshot = Request::Snapshot { container: "web".into(), name };
    assert_eq!(asked(&store, &snapshot).unwrap(), Answer::Snapshot);
    lease.write(4096, &[3; 4096]).unwrap();
    let Answer::Commit { image } = asked(&store, &commit("base:2")).unwrap() else { panic!() };
    assert_eq!(store.image("base:2").unwrap().id, image);
    let saved = control.desk().lease("container/web@before").unwrap();
    for (disk, byte) in [(&lease, 3), (&saved, 2)] {
        let mut found = [0; 1];
        disk.read(4096, &mut found).unwrap();
        assert_eq!(found, [byte]);
    }
    let grown = asked(&store, &resize("container/web", 2 * SIZE, false)).unwrap();
    assert_eq!(grown, Answer::Resize { size: 2 * SIZE });
    assert_eq!(lease.size(), 2 * SIZE);
    let Answer::List { disks } = asked(&store, &Request::List {}).unwrap() else { panic!() };
    let used = |name: &str| {
        let found: Vec<&DiskUse> = disks.iter().filter(|disk| disk.name == name).collect();
        assert_eq!(found.len(), 1, "{name}: {disks:?}");
        (found[0].writers, found[0].readers)
    };
    assert_eq!(used("container/web"), (1, 0));
    assert_eq!(used("container/web@before"), (0, 1));
    assert_eq!(used("volume/data"), (0, 0));
    let status = asked(&store, &Request::Status {}).unwrap();
    let Answer::Status { version, pid, since } = status else { panic!() };
    assert_eq!((&*version, pid), (env!("CARGO_PKG_VERSION"), std::process::id()));
    assert!(humantime::parse_rfc3339(&since).is_ok(), "{since}");
    drop((lease, saved, server));
    assert!(ask(&store, &Request::Status {}).is_none(), "nobody serves any more");
}

#[test]
fn errors_keep_their_kind_and_say_who_says_so() {
    let (_folder, store) = stocked();
    let _server = Server::start(Control::serving(store.clone(), quiet()).unwrap()).unwrap();
    let container = |container: &str| Request::Diff { container: container.into() };
    for (request, kind) in [
        (container("none"), ErrorKind::NotFound),
        (container("../web"), ErrorKind::InvalidInput),
        (commit("Not:a:name"), ErrorKind::InvalidInput),
        (resize("volume/data", SIZE / 2, false), ErrorKind::InvalidInput),
        (resize("volume/data:ro", 2 * SIZE, false), ErrorKind::ReadOnly),
        (resize("nonsense", SIZE, false), ErrorKind::NotFound),
    ] {
        let error = asked(&store, &request).unwrap_err();
        assert_eq!(error.kind(), kind, "{request:?}: {error}");
        assert!(
            error.to_string().starts_with("the process that serves the store says: "),
            "{error}"
        );
    }
    let shrunk = asked(&store, &resize("volume/data", SIZE / 2, true)).unwrap();
    assert_eq!(shrunk, Answer::Resize { size: SIZE / 2 });
    // A kind that this program does not know yet.
    let reply = br#"{"version":1,"error":{"kind":"later","detail":"text"}}"#;
    assert_eq!(reply_from_json(&diff(), reply).unwrap_err().kind(), ErrorKind::Io);
    let all = Error::new(ErrorKind::Corrupt, "text").at(7).in_file("a.tply");
    let error = reply_from_json(&diff(), &reply_to_json(Err(all))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().ends_with("a.tply: text (at byte 7)"), "{error}");
}

#[test]
fn one_process_has_the_desk_and_others_do_without() {
    let (folder, store) = stocked();
    // Nobody serves: done here.
    let done = carry_out(&store, &resize("volume/data", 2 * SIZE, false), quiet()).unwrap();
    assert_eq!(done, Answer::Resize { size: 2 * SIZE });
    let control = Control::serving(store.clone(), quiet()).unwrap();
    let error = Control::serving(store.clone(), quiet()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.to_string().contains("another process serves this store"), "{error}");
    let private = Control::private(store.clone(), quiet());
    assert_eq!(Server::start(private).err().unwrap().kind(), ErrorKind::InvalidInput);
    let server = Server::start(control).unwrap();
    let mode = std::fs::metadata(folder.path().join("control")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(server);
    while Control::serving(store.clone(), quiet()).is_err() {
        std::thread::yield_now();
    }
}

#[test]
fn requests_and_answers_come_back_as_they_went() {
    for request in [
        commit("web:1"),
        Request::Snapshot { container: "c".into(), name: "s".into() },
        diff(),
        resize("volume/v", u64::MAX, true),
        Request::List {},
        Request::Status {},
    ] {
        let json = request.to_json().unwrap();
        assert_eq!(Request::from_json(&json).unwrap(), request);
    }
    let answer = Answer::Commit { image: "id".into() };
    let json = reply_to_json(Ok(answer.clone()));
    assert_eq!(reply_from_json(&commit("web:1"), &json).unwrap(), answer);
    assert_eq!(reply_from_json(&diff(), &json).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn the_page_shows_lines_that_are_understood() {
    let page = include_str!("../../docs/serving.md");
    let lines = |mark| page.lines().filter_map(move |line: &str| line.strip_prefix(mark));
    let asked: Vec<_> = lines("> {").map(|rest| format!("{{{rest}")).collect();
    let answered: Vec<_> = lines("< {").map(|rest| format!("{{{rest}")).collect();
    assert_eq!((asked.len(), answered.len()), (6, 6));
    for (ask, answer) in asked.iter().zip(&answered) {
        let request = Request::from_json(ask.as_bytes()).unwrap();
        match reply_from_json(&request, answer.as_bytes()) {
            Ok(done) => assert_eq!(reply_to_json(Ok(done)), answer.as_bytes()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
                assert!(answer.contains("\"error\""), "{answer}");
            }
        }
    }
}

#[test]
fn what_is_no_request_is_refused() {
    let refused = |json: &[u8]| Request::from_json(json).unwrap_err().kind();
    for json in [
        r#"{"verb":"status"}"#,
        r#"{"version":2,"verb":"status"}"#,
        r#"{"version":"1","verb":"status"}"#,
        r#"{"version":1,"verb":"explode"}"#,
    ] {
        assert_eq!(refused(json.as_bytes()), ErrorKind::Unsupported, "{json}");
    }
    let deep = "[".repeat(100_000);
    for json in [
        "",
        "nonsense",
        &deep,
        r#"{"version":1}"#,
        r#"{"version":1,"verb":7}"#,
        r#"{"version":1,"verb":"diff"}"#,
        r#"{"version":1,"verb":"diff","container":"c","also":1}"#,
        r#"{"version":1,"verb":"status","also":1}"#,
        r#"{"version":1,"verb":"resize","disk":"d","size":-1}"#,
        r#"{"version":1,"verb":"status"} {}"#,
    ] {
        let kind = refused(json.as_bytes());
        let known = [ErrorKind::InvalidInput, ErrorKind::Unsupported];
        assert!(known.contains(&kind), "{json:.60}: {kind:?}");
    }
    assert_eq!(refused(b"\xff\xfe"), ErrorKind::InvalidInput);
}

#[test]
fn odd_clients_hold_nobody_up() {
    let (folder, store) = stocked();
    let _server = Server::start(Control::serving(store.clone(), quiet()).unwrap()).unwrap();
    let connect = || UnixStream::connect(folder.path().join("control")).unwrap();
    let silent = connect();
    // Leaves before its answer.
    connect().write_all(b"{\"version\":1,\"verb\":\"list\"}\n").unwrap();
    let told = |bytes: &[u8]| {
        let mut stream = connect();
        // The server may answer and hang up before all of it is sent.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut reply = String::new();
        let _ = stream.read_to_string(&mut reply);
        reply
    };
    assert!(told(b"{\"version\":1,\"verb\":\"status\"}").contains("\"error\""), "no end of line");
    assert!(told(b"\n").contains("invalid-input"));
    assert!(told(b"\xff\n").contains("invalid-input"));
    assert!(!told(&vec![b' '; 5 << 20]).contains("done"));
    assert!(matches!(asked(&store, &Request::Status {}), Ok(Answer::Status { .. })));
    drop(silent);
}

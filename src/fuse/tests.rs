//! Names and open files of disks that are chains.

use std::fs::File;
use std::sync::Arc;

use rustix::io::Errno;

use super::handles::{Handles, Open};
use super::proto::{ROOT, SENT_AGAIN};
use super::tree::{Tree, node_of};
use crate::chain::{Chain, Gate, create};
use crate::serve::{AnyServed, Leases, Opened, Served, Table};
use crate::storage::{Access, Folder, MemoryFolder};

fn disk(name: &str) -> Arc<AnyServed> {
    let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("memory"));
    let layers = Arc::new(Gate::default());
    create(&folder, "disk", Some(1 << 20), None, &layers).unwrap();
    let chain = Chain::open(folder, "disk", Access::Write, layers).unwrap();
    Arc::new(Served::new(name, Opened::new(chain)).unwrap())
}

fn open() -> Open {
    let table = Table::new();
    table.insert(disk("disk")).unwrap();
    Open { disk: table.lease("disk").unwrap(), writes: true, durable: true }
}

fn tree(names: &[&str]) -> Tree {
    let table = Table::new();
    for name in names {
        table.insert(disk(name)).unwrap();
    }
    Tree::new(Arc::new(table), vec!["volume".into()], "disk.tply".into())
}

fn names(tree: &Tree, path: &str) -> Vec<(String, bool)> {
    let entries = tree.entries(node_of(path)).unwrap();
    let mut names: Vec<_> = entries.into_iter().map(|e| (e.name, e.folder)).collect();
    names.sort();
    names
}

#[test]
fn names_with_slashes_are_files_in_folders() {
    let tree = tree(&["container/a", "image/host:5000/x/y:1", "image/x:2", ""]);
    let root = [("container", true), ("disk.tply", false), ("image", true), ("volume", true)];
    assert_eq!(names(&tree, ""), root.map(|(name, folder)| (name.to_owned(), folder)));
    assert_eq!(names(&tree, "image"), [("host:5000".into(), true), ("x:2".into(), false)]);
    assert_eq!(names(&tree, "volume"), []);
    let mut node = ROOT;
    for (name, folder) in [("image", true), ("host:5000", true), ("x", true), ("y:1", false)] {
        let found = tree.find(node, name.as_bytes()).unwrap();
        assert_eq!(found.folder, folder, "{name}");
        node = found.node;
    }
    assert_eq!(tree.attributes(node).unwrap().facts.size, 1 << 20);
    assert_eq!(tree.find(node_of("image"), b"y:1"), Err(Errno::NOENT));
    assert_eq!(tree.find(ROOT, b"\xff"), Err(Errno::NOENT));
    assert_eq!(tree.disk_of(node_of("disk.tply")).unwrap(), "");
}

#[test]
fn a_node_that_another_server_told_of_is_found_again() {
    let tree = tree(&["image/a/b:1", "image/c:1"]);
    for path in ["image/a/b:1", "image/a", "image", "volume"] {
        assert_eq!(tree.path(node_of(path)).unwrap(), path);
    }
    assert_eq!(tree.path(node_of("image/b:1")), Err(Errno::STALE));
}

#[test]
fn what_can_be_no_file_is_left_out() {
    let tree = tree(&["../x", "a//b", "/etc", "a/.", "ok", "a\0b"]);
    assert_eq!(names(&tree, ""), [("ok".into(), false), ("volume".into(), true)]);
}

#[test]
fn numbers_outlive_their_server() {
    let first = Handles::new().unwrap();
    assert_eq!(first.add(10, 100, open()).unwrap(), 1);
    assert_eq!(first.add(12, 200, open()).unwrap(), 2);
    assert_eq!(first.add(14, 300, open()).unwrap(), 3);
    assert!(first.release(2).unwrap().is_some());
    assert!(first.release(2).unwrap().is_none());

    let memory = File::from(first.memory().try_clone_to_owned().unwrap());
    drop(first);
    let second = Handles::of(memory).unwrap();
    let kept = second.kept().unwrap();
    assert!(kept.iter().all(|(_, kept)| kept.writes() && kept.durable()));
    let expected = [(1, 10, 100), (3, 14, 300)];
    assert_eq!(kept.iter().map(|(n, k)| (*n, k.unique, k.node)).collect::<Vec<_>>(), expected);
    assert!(second.knows(3) && second.get(3).is_none());
    // It was opened, and nobody had heard of it.
    assert_eq!(second.add(14 | SENT_AGAIN, 300, open()).unwrap(), 3);
    assert_eq!(second.add(16, 400, open()).unwrap(), 2);
    assert_eq!(second.add(18, 400, open()).unwrap(), 4);
    assert!(!second.knows(0) && !second.knows(5));
    assert!(second.release(u64::MAX).unwrap().is_none());
}

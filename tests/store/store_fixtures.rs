//! A store that an earlier version made (`tests/fixtures`): all of it is there, and work goes on.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use testkit::fixtures::{manifest, sha256, unpack};
use thinply::chain::{Chain, Kind};
use thinply::device::Device;
use thinply::storage::Access;
use thinply::store::{DiskKind, DiskName, Image, OpenDisk, Store};

/// A copy of the store, and what the manifest says of it.
fn store() -> (tempfile::TempDir, Store, Value) {
    let copy = unpack("store");
    let store = Store::open(&copy.path().join("store")).unwrap();
    (copy, store, manifest()["store"].take())
}

fn disk(kind: DiskKind, name: &str) -> DiskName {
    DiskName::new(kind, name).unwrap()
}

fn open(store: &Store, kind: DiskKind, name: &str, access: Access) -> OpenDisk {
    store.open_disk(&disk(kind, name), access).unwrap()
}

/// The facts of an image that the manifest has too.
fn facts(image: &Image) -> Value {
    let reference = image.reference.as_ref().unwrap();
    json!({
        "repository": reference.repository, "tag": reference.tag, "id": image.id,
        "created": image.created(),
    })
}

/// The hash of each disk, by the name under which it is served.
fn contents(store: &Store) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut put = |name: String, chain: &Chain| found.insert(name, sha256(chain));
    for image in store.images().unwrap().good {
        put(format!("image/{}", image.name()), &store.open_image(&image).unwrap());
    }
    for container in store.containers().unwrap().good {
        let name = container.name;
        let chain = open(store, DiskKind::Container, &name, Access::Read);
        put(format!("container/{name}"), &chain);
        for saved in container.snapshots {
            let chain = store.open_snapshot(&name, &saved.name).unwrap();
            put(format!("container/{name}@{}", saved.name), &chain);
        }
    }
    for volume in store.volumes().unwrap().good {
        let chain = open(store, DiskKind::Volume, &volume.name, Access::Read);
        put(format!("volume/{}", volume.name), &chain);
    }
    found
}

#[test]
fn what_was_kept_is_there() {
    let (_copy, store, mut then) = store();
    assert_eq!(store.verify().unwrap(), []);
    assert_eq!(json!(contents(&store)), then["disks"]);

    // What space things take depends on the host's file system.
    for list in ["images", "history", "containers", "volumes"] {
        for entry in then[list].as_array_mut().unwrap() {
            entry.as_object_mut().unwrap().remove("size");
        }
    }
    let mut images = store.images().unwrap().good;
    images.sort_by_key(Image::name);
    let images: Vec<_> = images.iter().map(facts).collect();
    assert_eq!(json!(images), then["images"]);
    let history = store.history(&store.image("app:2").unwrap()).unwrap();
    let history: Vec<_> = history
        .iter()
        .map(|entry| {
            json!({
                "id": entry.layer, "created": entry.created, "created_by": entry.created_by,
                "comment": entry.comment,
            })
        })
        .collect();
    assert_eq!(json!(history), then["history"]);

    let (web, _) = store.container("web").unwrap();
    let old = &then["containers"][0];
    let snapshots: Vec<_> = web.snapshots.iter().map(|saved| &saved.name).collect();
    assert_eq!(json!(snapshots), old["snapshots"]);
    assert_eq!(
        [&web.name, &web.image, &web.image_id, &web.created].map(|text| json!(text)),
        [
            old["name"].clone(),
            old["image"].clone(),
            old["image_id"].clone(),
            old["created"].clone()
        ]
    );
    assert_eq!(store.container_size("web").unwrap(), old["device_size"]);
    let data = store.volume("data").unwrap();
    let old = &then["volumes"][0];
    assert_eq!(
        json!([data.name, data.created, data.virtual_size]),
        json!([old["name"], old["created"], old["virtual_size"]])
    );

    // What the container changed since its image.
    let chain = open(&store, DiskKind::Container, "web", Access::Read);
    let (own, mut changed) = (chain.own_depth().unwrap(), Vec::new());
    chain
        .walk(&mut |extent| {
            if extent.depth.is_some_and(|depth| depth < own) {
                let zero = extent.kind == Kind::Zero;
                changed.push(json!({
                    "offset": extent.offset, "length": extent.length, "zero": zero
                }));
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(json!(changed), then["diff"]["extents"]);
}

#[test]
fn work_goes_on_in_it() {
    let (_copy, store, then) = store();
    let image = store.image("base:1").unwrap();
    store.create_container("new", &image, None).unwrap();
    for (kind, name) in
        [(DiskKind::Container, "web"), (DiskKind::Container, "new"), (DiskKind::Volume, "data")]
    {
        let chain = open(&store, kind, name, Access::Write);
        chain.write(8192, &[0xa5; 512]).unwrap();
        chain.close().unwrap();
    }
    let chain = open(&store, DiskKind::Container, "web", Access::Write);
    chain.snapshot("now").unwrap();
    let app = chain.commit(&"app:3".parse().unwrap(), "three").unwrap();
    chain.close().unwrap();
    drop(chain);
    assert_eq!(store.verify().unwrap(), []);
    let now = contents(&store);
    assert_eq!(now["container/web"], now["image/app:3"]);
    assert_eq!(now["container/web"], now["container/web@now"]);
    assert_eq!(store.history(&app).unwrap().len(), 3);
    // All that was there before is untouched.
    for name in ["image/base:1", "image/app:2", "container/web@before"] {
        assert_eq!(now[name], then["disks"][name], "{name}");
    }
    assert_ne!(now["container/web"], then["disks"]["container/web"]);
    store.collect(false).unwrap();
    store.reset_container("web", Some("before")).unwrap();
    let web = open(&store, DiskKind::Container, "web", Access::Read);
    assert_eq!(sha256(&web), then["disks"]["container/web@before"]);
    assert_eq!(store.verify().unwrap(), []);
}

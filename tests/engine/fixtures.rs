//! Gate that earlier versions made (`tests/fixtures`): they read as they did then, and one can go
//! on with them.

use std::sync::Arc;

use serde_json::{Value, json};
use testkit::fixtures::{manifest, sha256, unpack};
use thinply::chain::{Chain, Kind, Layer, MapExtent, create, seal};
use thinply::device::Device;
use thinply::format::header::{ParentLink, State};
use thinply::inspect;
use thinply::storage::{Access, FileFolder, Folder};
use thinply::types::Identity;

/// A layer of a set.
struct Fixture {
    folder: Arc<dyn Folder>,
    file: String,
    /// What the manifest says of it.
    then: Value,
}

impl Fixture {
    fn open(&self, name: &str, access: Access) -> Chain {
        Chain::open(self.folder.clone(), name, access, Arc::default())
            .unwrap_or_else(|error| panic!("{self}: {error}"))
    }

    fn layer(&self, name: &str) -> Layer {
        Layer::open(self.folder.open(name, Access::Read).unwrap()).unwrap()
    }

    /// Nothing is wrong with a layer's file.
    fn check(&self, name: &str) {
        let file = self.folder.open(name, Access::Read).unwrap();
        let report = match self.layer(name) {
            Layer::Live(_) => inspect::check(&*file).unwrap(),
            Layer::Packed(layer) => inspect::verify(&layer).unwrap(),
        };
        assert!(report.is_clean(), "{self}, {name}: {report:?}");
    }

    /// A disk shows what it must.
    fn compare(&self, name: &str, access: Access) {
        let chain = self.open(name, access);
        assert_eq!(sha256(&chain), self.then["sha256"], "{self}, {name}");
        if access == Access::Write {
            chain.close().unwrap();
        }
    }
}

impl std::fmt::Display for Fixture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {}", self.then["file"], self.then["set"])
    }
}

/// Hands every layer of every set to `act`, each in a copy of its own.
fn each(act: impl Fn(&Fixture)) {
    let manifest = manifest();
    let disks = manifest["disks"].as_array().unwrap();
    assert!(disks.len() >= 14);
    for then in disks {
        let copy = unpack(then["set"].as_str().unwrap());
        let folder = Arc::new(FileFolder::new(copy.path()));
        let file = then["file"].as_str().unwrap().to_owned();
        act(&Fixture { folder, file, then: then.clone() });
    }
}

/// The facts of an identity, as `info` names them.
fn name(identity: Option<Identity>) -> [Value; 3] {
    match identity {
        Some(Identity::Frozen(uuid, freeze)) => {
            [json!(uuid.to_string()), json!(freeze.to_string()), Value::Null]
        }
        Some(Identity::Packed(root)) => [Value::Null, Value::Null, json!(root.to_string())],
        None => [Value::Null, Value::Null, Value::Null],
    }
}

/// What is known of a layer without its content, as far as `info` tells it.
fn facts(layer: &Layer) -> Value {
    let [uuid, freeze_id, root] = name(layer.identity());
    let link = layer.parent();
    let [parent_uuid, parent_freeze_id, parent_root] = name(link.map(|link| link.identity));
    let mut facts = json!({
        "virtual_size": layer.virtual_size(),
        "uuid": uuid, "freeze_id": freeze_id, "root": root,
        "parent": link.map(|link: &ParentLink| &link.hint),
        "parent_uuid": parent_uuid, "parent_freeze_id": parent_freeze_id,
        "parent_root": parent_root,
        "visible_parent_size": link.map(|_| layer.visible_parent_size()),
        "generation": null, "epoch": null, "journal_tail": null,
        "compatible_features": 0, "read_only_compatible_features": null,
        "data_blocks": null, "zero_blocks": null,
    });
    match layer {
        Layer::Packed(layer) => {
            facts["state"] = json!("packed");
            facts["data_blocks"] = json!(layer.footer().data_blocks);
            facts["zero_blocks"] = json!(layer.footer().zero_blocks);
        }
        Layer::Live(layer) => {
            let header = layer.header();
            facts["state"] = match header.state {
                State::Writable => json!("writable"),
                State::InUse => json!("in use"),
                State::Frozen(_) => json!("frozen"),
            };
            facts["uuid"] = json!(header.uuid.to_string());
            facts["generation"] = json!(header.generation);
            facts["epoch"] = json!(header.epoch);
            facts["journal_tail"] = json!(header.journal_tail);
            facts["read_only_compatible_features"] = json!(header.read_only_compatible);
        }
    }
    facts
}

#[test]
fn what_was_made_reads_the_same() {
    each(|fixture| {
        fixture.check(&fixture.file);
        assert_eq!(facts(&fixture.layer(&fixture.file)), fixture.then["info"], "{fixture}");
        fixture.compare(&fixture.file, Access::Read);
        let mut map = Vec::new();
        let chain = fixture.open(&fixture.file, Access::Read);
        chain
            .walk(&mut |MapExtent { offset, length, depth, kind }| {
                map.push(json!([offset, length, depth, kind != Kind::Data]));
                Ok(())
            })
            .unwrap();
        assert_eq!(json!(map), fixture.then["map"], "{fixture}");
    });
}

/// A layer that takes writes is opened for them, and recovered where it was not closed; on another
/// one a new layer is put.
#[test]
fn what_was_made_can_be_gone_on_with() {
    each(|fixture| {
        let state = fixture.then["info"]["state"].as_str().unwrap();
        let is_open = matches!(state, "writable" | "in use");
        if !is_open {
            let parent = seal(&*fixture.folder, &fixture.file).unwrap();
            create(&fixture.folder, "over", None, Some(&parent), &Arc::default()).unwrap();
        }
        let top = if is_open { &fixture.file } else { "over" };
        fixture.compare(top, Access::Write);
        fixture.check(top);
        let chain = fixture.open(top, Access::Write);
        let (size, mut old) = (chain.size(), [[0; 512]; 2]);
        for (place, old) in [0, size - 512].into_iter().zip(&mut old) {
            chain.read(place, old).unwrap();
            chain.write(place, &[0xa5; 512]).unwrap();
        }
        chain.flush().unwrap();
        chain.snapshot("snapshot").unwrap();
        for (place, old) in [0, size - 512].into_iter().zip(&old) {
            let mut now = [0; 512];
            chain.read(place, &mut now).unwrap();
            assert_eq!(now, [0xa5; 512], "{fixture}");
            chain.write(place, old).unwrap();
        }
        chain.close().unwrap();
        drop(chain);
        fixture.compare(top, Access::Read);
        [top, "snapshot", &fixture.file].into_iter().for_each(|name| fixture.check(name));
    });
}

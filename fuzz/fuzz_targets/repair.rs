//! Repairing a two-layer image with anything in it: the damaged file stays as it is, what comes out
//! is clean, and where the damaged layer can be read it reads the same, but for what is reported.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use thinply::chain::{Chain, Gate};
use thinply::device::Device;
use thinply::inspect::{check, repair};
use thinply::storage::{Access, Folder};
use thinply_fuzz::image::{self, SIZE};
use thinply_fuzz::limits::within_limits;

fuzz_target!(|input: &[u8]| within_limits(|| run(input)));

fn read(folder: &Arc<dyn Folder>, name: &str) -> Option<Vec<u8>> {
    let chain =
        Chain::open(folder.clone(), name, Access::Read, Arc::new(Gate::default())).ok()?;
    let mut data = vec![0; chain.size().min(2 * SIZE) as usize];
    chain.read(0, &mut data).ok().map(|()| data)
}

fn run(input: &[u8]) {
    let folder = image::build(input);
    let before = image::bytes(&folder, "top");
    let file = folder.open("top", Access::Read).unwrap();
    let found = check(&*file);
    let new = folder.create("new").unwrap();
    let repaired = repair(&*file, &*new);
    assert!(before == image::bytes(&folder, "top"), "the damaged file was changed");
    let Ok(repaired) = repaired else {
        assert!(found.is_err() || !found.unwrap().is_clean(), "a clean layer can't be repaired");
        return;
    };
    let report = check(&*new).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(report.notes.is_empty(), "{report:?}");
    drop((file, new));
    let old = read(&folder, "top");
    let Some(mut old) = old else { return };
    let mut new = read(&folder, "new").expect("the new layer can be read where the old one can");
    assert_eq!(old.len(), new.len());
    for loss in &repaired.losses {
        let end = (loss.offset + loss.length).min(old.len() as u64) as usize;
        let start = (loss.offset as usize).min(end);
        old[start..end].fill(0);
        new[start..end].fill(0);
    }
    assert!(old == new, "other bytes than reported have changed: {:?}", repaired.losses);
}

//! A two-layer image with anything in it: opening, reading, checking and dumping it give answers or
//! errors, and the answers agree with each other.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use thinply::chain::{Chain, Gate};
use thinply::device::{Detail, Device};
use thinply::error::Result;
use thinply::inspect;
use thinply::storage::{Access, Folder};
use thinply_fuzz::image::{self, NAMES, SIZE};
use thinply_fuzz::limits::within_limits;

fuzz_target!(|input: &[u8]| within_limits(|| run(input)));

fn open(folder: &Arc<dyn Folder>, access: Access) -> Result<Chain> {
    Chain::open(folder.clone(), "top", access, Arc::new(Gate::default()))
}

fn read(chain: &Chain) -> Result<Vec<u8>> {
    let mut data = vec![0; chain.size().min(SIZE) as usize];
    chain.read(0, &mut data).map(|()| data)
}

fn is_clean(folder: &Arc<dyn Folder>, name: &str) -> bool {
    let file = folder.open(name, Access::Read).unwrap();
    inspect::check(&*file).is_ok_and(|report| report.is_clean())
}

fn run(input: &[u8]) {
    let folder = image::build(input);
    let before = NAMES.map(|name| image::bytes(&folder, name));
    for name in NAMES {
        let file = folder.open(name, Access::Read).unwrap();
        let _ = inspect::dump(&*file, &mut |_| Ok(()));
    }
    let clean = is_clean(&folder, "top");
    let sealed = open(&folder, Access::Read);
    let shown = sealed.as_ref().ok().map(read);
    if let Ok(chain) = &sealed {
        let mut extents = Vec::new();
        let _ = chain.extents(0, chain.size(), Detail::Files, 1000, &mut extents);
    }
    drop(sealed);
    assert!(before == NAMES.map(|name| image::bytes(&folder, name)), "looking changed a file");

    let Ok(chain) = open(&folder, Access::Write) else { return };
    let data = read(&chain);
    if let (Some(Ok(shown)), Ok(data)) = (&shown, &data) {
        assert!(shown == data, "a reader and a writer see different bytes");
    }
    let size = chain.size();
    let written = chain.write(size - 512, &[7; 512]).is_ok() && chain.flush().is_ok();
    if chain.close().is_err() {
        return;
    }
    drop(chain);
    assert!(before[0] == image::bytes(&folder, "base"), "the base has changed");
    // A page that was never loaded may be damaged still, but what was clean stays clean.
    assert!(!clean || is_clean(&folder, "top"), "writing made a clean layer unclean");
    let again = open(&folder, Access::Read).expect("what was closed opens");
    if let (Ok(mut data), Ok(again)) = (data, read(&again)) {
        if written && size <= SIZE {
            let end = size as usize;
            data[end - 512..].fill(7);
        }
        assert!(data == again, "closing changed what is read");
    }
}

//! A real two-layer image with its metadata overwritten here and there: opening, reading, checking
//! and dumping it give answers or errors, never a panic.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use thinply::chain::{Chain, Layers, create, seal};
use thinply::device::{Detail, Device};
use thinply::inspect;
use thinply::storage::{Access, Folder, MemoryFolder, write_all_at};

const SIZE: u64 = 1 << 20;
/// Slots, the first journal record, the bitmap page.
const PLACES: [u64; 4] = [0, 64 << 10, 1 << 20, 2 << 20];

#[derive(Arbitrary, Debug)]
struct Input {
    closed: bool,
    patches: Vec<(bool, u8, u16, Vec<u8>)>,
    cut: Option<u32>,
}

fuzz_target!(|input: Input| {
    let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("fuzz"));
    build(&folder, input.closed);
    for (base, place, offset, bytes) in &input.patches {
        let name = if *base { "base" } else { "top" };
        let at = PLACES[usize::from(*place) % PLACES.len()] + u64::from(offset % 4096);
        let file = folder.open(name, Access::Write).unwrap();
        write_all_at(&*file, &bytes[..bytes.len().min(4096)], at).unwrap();
    }
    if let Some(length) = input.cut {
        let file = folder.open("top", Access::Write).unwrap();
        file.set_length(u64::from(length).min(file.length().unwrap())).unwrap();
    }
    for name in ["base", "top"] {
        let file = folder.open(name, Access::Read).unwrap();
        let _ = inspect::check(&*file);
        let _ = inspect::dump(&*file, &mut |_| Ok(()));
    }
    for access in [Access::Read, Access::Write] {
        let Ok(chain) = Chain::open(folder.clone(), "top", access, Arc::new(Layers::default()))
        else {
            continue;
        };
        let mut data = vec![0; chain.size().min(SIZE) as usize];
        let _ = chain.read(0, &mut data);
        let _ = chain.extents(0, data.len() as u64, Detail::Files, 1000, &mut Vec::new());
        let _ = chain.write(0, &[1; 100]);
        let _ = chain.close();
    }
});

fn build(folder: &Arc<dyn Folder>, closed: bool) {
    let layers = Arc::new(Layers::default());
    create(folder, "base", Some(SIZE), None, &layers).unwrap();
    let open = |name| Chain::open(folder.clone(), name, Access::Write, layers.clone()).unwrap();
    let base = open("base");
    base.write(0, &[1; 20_000]).unwrap();
    base.close().unwrap();
    let parent = seal(&**folder, "base").unwrap();
    create(folder, "top", None, Some(&parent), &layers).unwrap();
    let top = open("top");
    top.write(5000, &[2; 9_000]).unwrap();
    top.flush().unwrap();
    top.write(70_000, &[3; 100]).unwrap();
    top.flush().unwrap();
    if closed {
        top.close().unwrap();
    }
}

//! Packed layers that are read from afar, through a cache that outlives crashes.

use std::collections::HashMap;
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use testkit::crash::Random;
use testkit::crash::disk::Disk;
use testkit::crash::folder::{CrashFolder, Event};
use thinply::chain::{Afar, Chain, Gate, Parent, create};
use thinply::derive::{Plan, Rule, compare};
use thinply::device::{Device, Prefetch};
use thinply::error::{Error, ErrorKind, Result};
use thinply::format::header::ParentLink;
use thinply::format::packed::FRAME_BLOCKS;
use thinply::packed::{ByteSource, Compression, FileSource, Packed, Writer, forget_frames};
use thinply::storage::{Access, Folder, MemoryFolder, Storage, read_exact_at, write_all_at};
use thinply::types::{BLOCK_SIZE, Block, GROUP_BLOCKS, Identity, Root};
use thinply::wait::{NotDone, Wait, unless_waiting, waited};

const BLOCK: usize = BLOCK_SIZE as usize;

/// A source that counts what it sends, and may fail or lie. Clones are the same source.
#[derive(Clone, Debug)]
struct Far(Arc<State>);

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    sent: AtomicU64,
    /// Reads that still succeed before one fails; `u64::MAX` for all.
    patience: AtomicU64,
    /// A place whose bits are sent turned round.
    lie: AtomicU64,
}

impl Deref for Far {
    type Target = State;

    fn deref(&self) -> &State {
        &self.0
    }
}

impl ByteSource for Far {
    fn name(&self) -> &Path {
        Path::new("far")
    }

    fn length(&self) -> Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        if self.patience.fetch_sub(1, Ordering::Relaxed) == 0 {
            self.patience.store(u64::MAX, Ordering::Relaxed);
            return Err(Error::io(io::ErrorKind::TimedOut.into(), "asking from afar"));
        }
        self.sent.fetch_add(buf.len() as u64, Ordering::Relaxed);
        buf.copy_from_slice(&self.bytes[offset as usize..][..buf.len()]);
        let lie = self.lie.load(Ordering::Relaxed).wrapping_sub(offset);
        if let Some(byte) = buf.get_mut(lie as usize) {
            *byte = !*byte;
        }
        Ok(())
    }
}

impl Far {
    fn take_sent(&self) -> u64 {
        self.sent.swap(0, Ordering::Relaxed)
    }
}

fn block(seed: u64) -> [u8; BLOCK] {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::array::from_fn(|at| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Every third block is noise, the others compress.
        if seed.is_multiple_of(3) || at % 64 == 0 { state as u8 } else { 7 }
    })
}

/// Blocks with data: enough for two chunks in the first group, and a few in another.
fn blocks() -> impl Iterator<Item = u64> {
    (0..800).map(|n| n * 2).chain([3 * GROUP_BLOCKS + 5, 3 * GROUP_BLOCKS + 6])
}

/// `salt` makes another layer of the same shape; a frame known to the process is not fetched.
fn layer(salt: u64, compression: Compression) -> (Far, Root) {
    let size = 4 * GROUP_BLOCKS * BLOCK_SIZE;
    let mut writer = Writer::new(Vec::new(), size, None, compression).unwrap();
    for number in blocks() {
        writer.data(Block(number), &block(salt + number)).unwrap();
    }
    let (summary, bytes) = writer.finish().unwrap();
    let far = State { bytes, lie: u64::MAX.into(), patience: u64::MAX.into(), ..State::default() };
    (Far(Arc::new(far)), summary.root)
}

fn cache() -> Arc<dyn Storage> {
    MemoryFolder::new("m").create("cache").unwrap()
}

fn read(layer: &Packed, number: u64) -> Result<[u8; BLOCK]> {
    let (number, mut bytes) = (Block(number), [0xee; BLOCK]);
    let from = (number.0 - number.word().block(0).0) * BLOCK_SIZE;
    waited(layer.read(number.word(), from, (&mut bytes).into(), Wait::Allowed)).map(|()| bytes)
}

fn content(file: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; file.length().unwrap() as usize];
    read_exact_at(file, &mut bytes, 0).unwrap();
    bytes
}

fn file(bytes: &[u8]) -> Arc<dyn Storage> {
    let file = cache();
    write_all_at(&*file, bytes, 0).unwrap();
    file
}

/// Every block reads as it was packed, whatever the cache holds.
fn check_all(far: &Far, root: Root, salt: u64, cache: Arc<dyn Storage>) {
    let layer = Packed::open_far(Box::new(far.clone()), root, Some(cache)).unwrap();
    for number in blocks() {
        assert!(read(&layer, number).unwrap() == block(salt + number), "block {number}");
    }
}

/// Bytes of frames that other tests, or the cache of the process, don't know.
fn salts() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed) << 32
}

#[test]
fn what_is_read_is_what_was_packed_and_is_fetched_once() {
    for compression in [Compression::None, Compression::Zstd(3)] {
        let salt = salts();
        let (far, root) = layer(salt, compression);
        let cache = cache();
        check_all(&far, root, salt, cache.clone());
        assert!(far.take_sent() <= far.bytes.len() as u64);
        forget_frames();
        check_all(&far, root, salt, cache);
        assert_eq!(far.take_sent(), 0, "all of it is in the cache");
        let mut absent = [1; BLOCK];
        let layer = Packed::open_far(Box::new(far), root, Some(file(&[]))).unwrap();
        let into = (&mut absent).into();
        layer.read(Block(1).word(), BLOCK_SIZE, into, Wait::Allowed).unwrap();
        assert_eq!(absent, [0; BLOCK]);
    }
}

#[test]
fn a_read_fetches_no_more_than_it_needs() {
    let salt = salts();
    let (far, root) = layer(salt, Compression::Zstd(3));
    let layer = Packed::open_far(Box::new(far.clone()), root, Some(cache())).unwrap();
    let opening = far.take_sent();
    assert_eq!(opening, 4096 + 128 + 2 * 56);
    // A map of 25 occupied words with two chunks, one chunk of 64 frames, one frame.
    read(&layer, 8).unwrap();
    let map = 96 + 25 * 16 + 2 * 32 + 4;
    let frame = u64::from(FRAME_BLOCKS);
    let chunk = 64 * (40 + 4 * frame) + 4;
    let first = far.take_sent();
    assert!((map + chunk + 1..=map + chunk + frame * BLOCK_SIZE).contains(&first), "{first}");
    read(&layer, 10).unwrap();
    assert_eq!(far.take_sent(), 0, "the same frame");
    read(&layer, 2 * frame).unwrap();
    assert!((1..=frame * BLOCK_SIZE).contains(&far.take_sent()), "another frame of the chunk");
}

#[test]
fn wrong_bytes_get_neither_out_nor_into_the_cache() {
    let salt = salts();
    let (far, root) = layer(salt, Compression::Zstd(3));
    let length = far.bytes.len() as u64;
    for lie in (0..length).step_by(4001).chain(length - 300..length) {
        forget_frames();
        far.lie.store(lie, Ordering::Relaxed);
        let cache = cache();
        match Packed::open_far(Box::new(far.clone()), root, Some(cache.clone())) {
            Err(error) => assert_ne!(error.kind(), ErrorKind::Io, "{error}"),
            Ok(layer) => {
                for number in blocks() {
                    match read(&layer, number) {
                        Ok(bytes) => assert!(bytes == block(salt + number), "{lie}: {number}"),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}"),
                    }
                }
                far.lie.store(u64::MAX, Ordering::Relaxed);
                assert!(read(&layer, 8).unwrap() == block(salt + 8), "asked again");
            }
        }
        far.lie.store(u64::MAX, Ordering::Relaxed);
        let kept = content(&*cache);
        let differs =
            kept.iter().zip(&far.bytes).position(|(kept, real)| *kept != 0 && kept != real);
        assert_eq!(differs, None, "lie at {lie}");
    }
}

#[test]
fn another_layer_is_refused() {
    let (far, root) = layer(salts(), Compression::Zstd(3));
    let (other, other_root) = layer(salts(), Compression::Zstd(3));
    let error = Packed::open_far(Box::new(far.clone()), other_root, Some(cache())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentMismatch);
    let full = cache();
    drop(Packed::open_far(Box::new(far.clone()), root, Some(full.clone())).unwrap());
    for (far, root, cache) in [(other, other_root, full), (far, root, file(&[7; 100]))] {
        let before = content(&*cache);
        let error = Packed::open_far(Box::new(far), root, Some(cache.clone())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(content(&*cache) == before, "changed");
    }
}

#[test]
fn an_error_of_the_source_is_tried_again_by_the_next_read() {
    let salt = salts();
    let (far, root) = layer(salt, Compression::Zstd(3));
    let cache = cache();
    let fail = |after| far.patience.store(after, Ordering::Relaxed);
    for after in 0..3 {
        fail(after);
        let error = Packed::open_far(Box::new(far.clone()), root, Some(cache.clone())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    }
    let layer = Packed::open_far(Box::new(far.clone()), root, Some(cache)).unwrap();
    // Map, chunk, frame: each fails once, and what came before is not asked for again.
    for _ in 0..3 {
        fail(0);
        assert_eq!(read(&layer, 8).unwrap_err().kind(), ErrorKind::Io);
        fail(1);
        let _ = read(&layer, 8);
    }
    assert!(read(&layer, 8).unwrap() == block(salt + 8));
}

#[test]
fn a_damaged_cache_costs_fetches_and_nothing_else() {
    let salt = salts();
    let (far, root) = layer(salt, Compression::Zstd(3));
    let full = cache();
    check_all(&far, root, salt, full.clone());
    let mut bytes = content(&*full);
    let head = bytes.len() / BLOCK * BLOCK;
    far.take_sent();
    for at in (0..far.bytes.len()).step_by(199) {
        bytes[at] = !bytes[at];
    }
    forget_frames();
    let damaged = file(&bytes);
    check_all(&far, root, salt, damaged.clone());
    assert!(far.take_sent() > 0);
    forget_frames();
    check_all(&far, root, salt, damaged.clone());
    assert_eq!(far.take_sent(), 0, "repaired");
    assert!(
        content(&*damaged)[..head.min(far.bytes.len())] == far.bytes[..head.min(far.bytes.len())]
    );
}

#[test]
fn a_cache_that_takes_nothing_does_no_harm() {
    let salt = salts();
    let (far, root) = layer(salt, Compression::Zstd(3));
    let folder = MemoryFolder::new("m");
    drop(
        Packed::open_far(Box::new(far.clone()), root, Some(folder.create("cache").unwrap()))
            .unwrap(),
    );
    let read_only = folder.open("cache", Access::Read).unwrap();
    check_all(&far, root, salt, read_only);
}

#[test]
fn two_fill_one_cache() {
    let salt = salts();
    let (far, root) = layer(salt, Compression::Zstd(3));
    let folder = MemoryFolder::new("m");
    folder.create("cache").unwrap();
    let open = || folder.open("cache", Access::Write).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| check_all(&far, root, salt, open()));
        }
    });
    far.take_sent();
    forget_frames();
    check_all(&far, root, salt, open());
    // Bits of one byte may get lost where two set them at once, so a few parts may come again.
    assert!(far.take_sent() < far.bytes.len() as u64 / 2);
    forget_frames();
    check_all(&far, root, salt, open());
    assert_eq!(far.take_sent(), 0);
}

#[test]
fn a_file_is_a_source() {
    let salt = salts();
    let (far, root) = layer(salt, Compression::None);
    let layer =
        Packed::open_far(Box::new(FileSource(file(&far.bytes))), root, Some(cache())).unwrap();
    assert!(read(&layer, 598).unwrap() == block(salt + 598));
    let error =
        Packed::open_far(Box::new(FileSource(file(b"short"))), root, Some(cache())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAnImage);
}

/// Three processes fill a cache one after the other; the power goes at every step of each of them, and
/// the next one starts from what one of those losses left.
#[test]
fn power_lost_at_any_step_of_filling_a_cache_costs_fetches_and_nothing_else() {
    let (mut kept, mut lost) = (0, 0);
    for seed in 0..24 {
        let random = &mut Random::new(seed);
        let salt = salts();
        let compression = if seed % 2 == 0 { Compression::None } else { Compression::Zstd(1) };
        let (far, root) = layer(salt, compression);
        let numbers: Vec<_> = blocks().collect();
        let fill = |folder: &CrashFolder, reads: &[u64]| {
            forget_frames();
            let cache = folder.open("cache", Access::Write).unwrap();
            let layer = Packed::open_far(Box::new(far.clone()), root, Some(cache)).unwrap();
            for &number in reads {
                assert!(read(&layer, number).unwrap() == block(salt + number), "{seed}: {number}");
            }
        };
        let folder = CrashFolder::new(Disk::default());
        folder.create("cache").unwrap();
        folder.sync().unwrap();
        let mut disk = folder.disk();
        for _ in 0..3 {
            let reads: Vec<u64> = (0..5).map(|_| *random.pick(&numbers)).collect();
            let folder = CrashFolder::new(disk.clone());
            folder.record(seed);
            fill(&folder, &reads);
            let mut left = vec![disk.clone()];
            for event in folder.take_record() {
                let Event::Disk(change) = event else { continue };
                disk.apply(&change);
                for _ in 0..2 {
                    left.push(disk.crashed(random));
                    far.take_sent();
                    fill(&CrashFolder::new(left[left.len() - 1].clone()), &reads);
                    *(if far.take_sent() == 0 { &mut kept } else { &mut lost }) += 1;
                }
            }
            disk = random.pick(&left).clone();
        }
    }
    assert!(kept > 0 && lost > 0, "{kept} losses cost nothing, {lost} cost fetches");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Nothing is synced after the head, so a crash leaves any mixture of the states that each
    /// sector had, and any length.
    #[test]
    fn a_cache_torn_by_a_crash_never_gives_wrong_data(
        seed: u64,
        reads in prop::collection::vec(0usize..602, 1..12),
        cut: prop::sample::Index,
    ) {
        let salt = salts();
        let (far, root) = layer(salt, Compression::Zstd(3));
        let cache = cache();
        let numbers: Vec<_> = blocks().collect();
        let mut states = Vec::new();
        {
            let layer = Packed::open_far(Box::new(far.clone()), root, Some(cache.clone())).unwrap();
            for &place in &reads {
                states.push(content(&*cache));
                read(&layer, numbers[place]).unwrap();
            }
            states.push(content(&*cache));
        }
        let head = far.bytes.len().next_multiple_of(BLOCK) + 512;
        let longest = states.last().unwrap().len();
        let mut torn = vec![0; head + cut.index(longest - head + 1)];
        let mut chance = block(seed | 3).into_iter().cycle().map(usize::from);
        for (sector, bytes) in torn.chunks_mut(512).enumerate() {
            let state = &states[chance.next().unwrap() % states.len()];
            for (to, from) in bytes.iter_mut().zip(state.iter().skip(sector * 512)) {
                *to = *from;
            }
        }
        forget_frames();
        check_all(&far, root, salt, file(&torn));
    }
}

/// A place that knows layers by their roots, as many times as it was asked.
#[derive(Debug, Default)]
struct Place {
    layers: HashMap<Root, Far>,
    asked: AtomicU64,
}

impl Afar for Place {
    fn name(&self) -> String {
        "the far place".into()
    }

    fn find(&self, root: Root) -> Result<Option<Packed>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let far = self.layers.get(&root);
        far.map(|far| Packed::open_far(Box::new(far.clone()), root, None)).transpose()
    }
}

const SIZE: u64 = 4 * GROUP_BLOCKS * BLOCK_SIZE;

/// A far layer of these blocks over a parent.
fn far_layer(parent: Option<Root>, salt: u64, blocks: impl Iterator<Item = u64>) -> (Far, Root) {
    let link = |root| ParentLink { identity: Identity::Packed(root), hint: "nowhere".into() };
    let parent = parent.map(|root| (link(root), SIZE));
    let mut writer = Writer::new(Vec::new(), SIZE, parent, Compression::Zstd(1)).unwrap();
    for number in blocks {
        writer.data(Block(number), &block(salt + number)).unwrap();
    }
    let (summary, bytes) = writer.finish().unwrap();
    let far = State { bytes, lie: u64::MAX.into(), patience: u64::MAX.into(), ..State::default() };
    (Far(Arc::new(far)), summary.root)
}

/// A live layer `top` over a far one over another far one, in a folder that has neither.
struct Remote {
    folder: Arc<dyn Folder>,
    place: Arc<Place>,
    salt: u64,
    roots: [Root; 2],
}

impl Remote {
    fn new() -> Self {
        let salt = salts();
        let (base, base_root) = far_layer(None, salt, blocks());
        let (middle, root) = far_layer(Some(base_root), salt + 1, (0..100).map(|n| n * 3));
        let layers = HashMap::from([(base_root, base), (root, middle)]);
        let place = Arc::new(Place { layers, ..Place::default() });
        let folder: Arc<dyn Folder> = Arc::new(MemoryFolder::new("here"));
        let link = ParentLink { identity: Identity::Packed(root), hint: "image".into() };
        let parent = Parent { link, virtual_size: SIZE, newly_frozen: false };
        let gate = Gate::default().with_afar(place.clone());
        create(&folder, "top", None, Some(&parent), &gate).unwrap();
        Self { folder, place, salt, roots: [base_root, root] }
    }

    fn open(&self, place: Arc<dyn Afar>) -> Result<Chain> {
        let gate = Gate::default().with_afar(place);
        Chain::open(self.folder.clone(), "top", Access::Write, Arc::new(gate))
    }

    /// What a block below the top holds.
    fn expected(&self, number: u64) -> [u8; BLOCK] {
        match number {
            _ if number < 300 && number.is_multiple_of(3) => block(self.salt + 1 + number),
            _ if blocks().any(|other| other == number) => block(self.salt + number),
            _ => [0; BLOCK],
        }
    }
}

#[test]
fn a_chain_stands_on_layers_that_are_far_away() {
    let remote = Remote::new();
    let chain = remote.open(remote.place.clone()).unwrap();
    let mut found = [0; BLOCK];
    let tried = chain.try_read(0, (&mut found).into(), Wait::Decode);
    assert!(matches!(tried, Err(NotDone::WouldWait)), "nothing is fetched without leave to wait");
    chain.write(7 * BLOCK_SIZE + 100, &[1; 10]).unwrap();
    for number in (0..310).chain([1598, 3 * GROUP_BLOCKS + 5]) {
        chain.read(number * BLOCK_SIZE, &mut found).unwrap();
        let mut expected = remote.expected(number);
        if number == 7 {
            expected[100..110].fill(1);
        }
        assert!(found == expected, "block {number}");
    }
    // Other tests make the process forget frames.
    let mut known = (0..100).map(|_| {
        chain.read(0, &mut found)?;
        unless_waiting(chain.try_read(0, (&mut found).into(), Wait::Never))
    });
    assert!(known.any(|tried| tried.unwrap().is_some()));
    assert_eq!(chain.prefetch(0, BLOCK_SIZE).unwrap(), Prefetch::InPart);
    assert!(chain.host_range(0, BLOCK_SIZE).unwrap().is_none());
    // Both are open once, and only their identity was asked for.
    let asked = remote.place.asked.load(Ordering::Relaxed);
    chain.close().unwrap();
    remote.open(remote.place.clone()).unwrap().close().unwrap();
    assert_eq!(remote.place.asked.load(Ordering::Relaxed), asked + 2);

    let whole = remote.open(remote.place.clone()).unwrap();
    whole.close().unwrap();
    let gate = || Arc::new(Gate::default().with_afar(remote.place.clone()));
    let still = Chain::open(remote.folder.clone(), "top", Access::Read, gate()).unwrap();
    let plan = Plan::flatten(&still, None).unwrap();
    still.derive_live(&plan, &remote.folder, "flat", gate(), &mut |_| {}).unwrap();
    let alone = Arc::new(Gate::default());
    let flat = Chain::open(remote.folder.clone(), "flat", Access::Read, alone).unwrap();
    assert_eq!(compare(&still, &flat, Rule::Strict, &|_| {}).unwrap(), None);
}

#[test]
fn a_far_parent_is_found_by_its_identity_and_by_nothing_else() {
    let remote = Remote::new();
    let [base, root] = remote.roots;
    let refused = |place: Place| remote.open(Arc::new(place)).unwrap_err();
    let error = refused(Place::default());
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("the far place"), "{error}");
    // Its own parent is missing.
    let all = &remote.place.layers;
    let layers = HashMap::from([(root, all[&root].clone())]);
    assert_eq!(refused(Place { layers, ..Place::default() }).kind(), ErrorKind::NotFound);
    // Somebody else's bytes under the right name, and none at all.
    let layers = HashMap::from([(root, all[&base].clone())]);
    assert_eq!(refused(Place { layers, ..Place::default() }).kind(), ErrorKind::ParentMismatch);
    all[&root].patience.store(0, Ordering::Relaxed);
    assert_eq!(remote.open(remote.place.clone()).unwrap_err().kind(), ErrorKind::Io);
    remote.open(remote.place.clone()).unwrap().close().unwrap();
    // Another layer in the folder under the hint's name is passed over.
    let gate = Gate::default();
    create(&remote.folder, "image", Some(SIZE), None, &gate).unwrap();
    remote.open(remote.place.clone()).unwrap().close().unwrap();
    assert_eq!(refused(Place::default()).kind(), ErrorKind::ParentMismatch);
    // One that is there itself is taken first.
    remote.folder.remove("image").unwrap();
    let asked = remote.place.asked.load(Ordering::Relaxed);
    let here = remote.folder.create("image").unwrap();
    write_all_at(&*here, &all[&root].bytes, 0).unwrap();
    remote.open(remote.place.clone()).unwrap().close().unwrap();
    assert_eq!(remote.place.asked.load(Ordering::Relaxed), asked + 1, "only the base is far");
}

#[test]
fn a_far_layer_that_fails_fails_that_read_alone_and_never_shows_zeros() {
    let remote = Remote::new();
    let mut found = [0; BLOCK];
    let base = &remote.place.layers[&remote.roots[0]];
    // A map, a chunk and a frame are asked for; these blocks are the base's.
    for (patience, number) in (0..).zip([2, 4, 8]) {
        forget_frames();
        let chain = remote.open(remote.place.clone()).unwrap();
        base.patience.store(patience, Ordering::Relaxed);
        // A write into a part of the block needs the rest of it.
        let at = number * BLOCK_SIZE;
        let results = [chain.read(at, &mut found), chain.write(at + 5, &[9])];
        let failed = results.iter().filter(|result| result.is_err()).count();
        assert_eq!(failed, 1, "after {patience} requests: {results:?}");
        chain.write(at + 5, &[9]).unwrap();
        chain.read(at, &mut found).unwrap();
        let mut expected = remote.expected(number);
        expected[5] = 9;
        assert!(found == expected);
        chain.close().unwrap();
    }
}

//! Every verb of the store, killed or without power between any two of its steps, and once more
//! while the next one clears up (`docs/store.md`, "Changes, step by step").
//!
//! Each verb runs once on the crash simulator, which records every change of the disk. Each disk that
//! a kill or a power loss may leave is then judged: the store checks clean, shows what it showed
//! before the verb or what it shows after it, and is rid of all leftovers once garbage was collected.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use testkit::crash::Random;
use testkit::crash::disk::Disk as Media;
use testkit::crash::folder::{CrashFolder, Event};
use testkit::crash::parts::Part;
use thinply::chain::Chain;
use thinply::device::Device;
use thinply::error::{ErrorKind, Result};
use thinply::storage::{Access, Folder, Rights};
use thinply::store::{DiskKind, DiskName, Folders, Need, NewImage, OpenDisk, Reference, Store};

const SIZE: u64 = 64 << 10;
const BLOCK: usize = 4096;
/// Power losses tried at each step.
const LOSSES: u64 = 2;
/// Crashes tried in what follows each kill.
const SECOND: u64 = 2;
const PARTS: [&str; 4] = ["root/", "blobs/", "containers/", "volumes/"];

struct World {
    whole: CrashFolder,
    store: Store,
}

impl World {
    fn start(media: Media) -> Self {
        let whole = CrashFolder::new(media);
        let [root, blobs, containers, volumes] = PARTS.map(|part| Part::folder(&whole, part));
        let store = Store::over(Folders { root, blobs, containers, volumes }).unwrap();
        Self { whole, store }
    }

    /// What the last process left, with nothing to lose.
    fn settled(&self) -> Media {
        let mut media = self.whole.disk();
        while !media.is_settled() {
            media = media.crashed(&mut Random::new(1));
        }
        media
    }
}

fn reference(name: &str) -> Reference {
    name.parse().unwrap()
}

fn container(name: &str) -> DiskName {
    DiskName::new(DiskKind::Container, name).unwrap()
}

fn volume(name: &str) -> DiskName {
    DiskName::new(DiskKind::Volume, name).unwrap()
}

fn import(store: &Store, name: &str, base: Option<&str>, fill: u8) -> Result<()> {
    let base = base.map(|base| store.image(base)).transpose()?;
    let draft = store.draft(Some(SIZE), base.as_ref(), Rights::Usual)?;
    draft.chain().write(u64::from(fill) * BLOCK as u64, &[fill; BLOCK])?;
    let new = NewImage {
        made_here: false,
        reference: reference(name),
        created_by: format!("import {fill}"),
        comment: String::new(),
        created: std::time::SystemTime::now(),
    };
    store.publish(draft, base.as_ref(), &new).map(drop)
}

fn with_open<T>(
    store: &Store,
    disk: &DiskName,
    act: impl FnOnce(&OpenDisk) -> Result<T>,
) -> Result<T> {
    let chain = store.open_disk(disk, Access::Write)?;
    let done = act(&chain)?;
    chain.close()?;
    Ok(done)
}

fn write(store: &Store, disk: &DiskName, block: u64, fill: u8) -> Result<()> {
    with_open(store, disk, |chain| chain.write(block * BLOCK as u64, &[fill; BLOCK]))
}

/// A store with one of everything that a verb could break.
fn stocked() -> Media {
    let world = World::start(Media::default());
    let store = &world.store;
    import(store, "base", None, 1).unwrap();
    import(store, "app", Some("base"), 2).unwrap();
    import(store, "lone", None, 3).unwrap();
    import(store, "shared", None, 12).unwrap();
    // One that lost its name, and that a container stands on; and one that nobody wants.
    for name in ["moved", "unwanted"] {
        import(store, name, Some("base"), if name == "moved" { 4 } else { 5 }).unwrap();
        if name == "moved" {
            store.create_container("old", &store.image(name).unwrap(), None).unwrap();
        }
        store.tag(&store.image("shared").unwrap(), &reference(name)).unwrap();
    }
    let app = store.image("app").unwrap();
    for name in ["web", "idle"] {
        store.create_container(name, &app, Some(2 * SIZE)).unwrap();
        write(store, &container(name), 6, 6).unwrap();
    }
    let chain = store.open_disk(&container("web"), Access::Write).unwrap();
    chain.snapshot("first").unwrap();
    chain.close().unwrap();
    write(store, &container("web"), 7, 7).unwrap();
    store.create_volume("data", SIZE).unwrap();
    write(store, &volume("data"), 8, 8).unwrap();
    world.settled()
}

/// All that a store shows: names, and what reads under them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct View(BTreeMap<String, Vec<u8>>);

fn content(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; chain.size() as usize];
    chain.read(0, &mut bytes).unwrap();
    bytes.iter().step_by(BLOCK).copied().collect()
}

fn view(store: &Store) -> View {
    let mut seen = BTreeMap::new();
    for image in store.images().unwrap().good.iter().filter(|image| image.reference.is_some()) {
        let chain = store.open_image(image).unwrap();
        seen.insert(format!("image {}", image.name()), content(&chain));
    }
    for found in store.containers().unwrap().good {
        let chain = store.open_disk(&container(&found.name), Access::Read).unwrap();
        seen.insert(format!("container {}", found.name), content(&chain));
        for saved in found.snapshots {
            let chain = store.open_snapshot(&found.name, &saved.name).unwrap();
            seen.insert(format!("container {}@{}", found.name, saved.name), content(&chain));
        }
    }
    for found in store.volumes().unwrap().good {
        let chain = store.open_disk(&volume(&found.name), Access::Read).unwrap();
        seen.insert(format!("volume {}", found.name), content(&chain));
    }
    View(seen)
}

/// The files that a store needs for what it shows.
fn needed(store: &Store) -> BTreeSet<String> {
    let mut files = BTreeSet::from(
        ["oci-layout", "index.json", "lock", "reserve"].map(|name| format!("root/{name}")),
    );
    for image in store.images().unwrap().good {
        files.extend(store.blobs_of(&image).unwrap().iter().map(|blob| format!("blobs/{blob}")));
    }
    let mut add = |chain: OpenDisk| {
        let paths = chain.paths();
        files.extend(
            paths
                .iter()
                .map(|path| path.strip_prefix("crash").unwrap().to_str().unwrap().to_owned()),
        );
    };
    for found in store.containers().unwrap().good {
        add(store.open_disk(&container(&found.name), Access::Read).unwrap());
        for saved in &found.snapshots {
            add(store.open_snapshot(&found.name, &saved.name).unwrap());
        }
    }
    for found in store.volumes().unwrap().good {
        add(store.open_disk(&volume(&found.name), Access::Read).unwrap());
    }
    for (kind, folder) in [(DiskKind::Container, "containers"), (DiskKind::Volume, "volumes")] {
        let names = store.disk_names(kind).unwrap();
        files.extend(names.iter().map(|name| format!("{folder}/{name}.json")));
    }
    files
}

type Verb = fn(&Store) -> Result<()>;

const VERBS: &[(&str, Verb)] = &[
    ("image import", |store| import(store, "new", None, 9)),
    ("image import over another", |store| import(store, "new", Some("app"), 9)),
    ("image import over a name that is taken", |store| import(store, "lone", None, 9)),
    ("image tag", |store| store.tag(&store.image("app")?, &reference("second"))),
    ("image rm", |store| store.remove_image("lone", false).map(drop)),
    ("image rm of one name of several", |store| store.remove_image("moved", false).map(drop)),
    ("image rm of layers that others have", |store| store.remove_image("base", false).map(drop)),
    ("image load", load),
    ("container create", |store| store.create_container("new", &store.image("app")?, None)),
    ("container commit", |store| commit(store, "idle")),
    ("container commit with a snapshot", |store| commit(store, "web")),
    ("container snapshot", |store| {
        with_open(store, &container("web"), |chain| chain.snapshot("second"))
    }),
    ("container reset", |store| store.reset_container("web", None)),
    ("container reset to a snapshot", |store| store.reset_container("web", Some("first"))),
    ("container rm", |store| store.remove_disk(&container("web"))),
    ("volume create", |store| store.create_volume("new", SIZE)),
    ("volume rm", |store| store.remove_disk(&volume("data"))),
    ("gc", |store| store.collect(false).map(drop)),
];

fn commit(store: &Store, name: &str) -> Result<()> {
    with_open(store, &container(name), |chain| chain.commit(&reference("committed"), "").map(drop))
}

/// Loads an image of another store.
fn load(store: &Store) -> Result<()> {
    let other = World::start(Media::default()).store;
    import(&other, "loaded", None, 10)?;
    import(&other, "loaded-too", Some("loaded"), 11)?;
    let images = other.images()?.good;
    for digest in images.iter().flat_map(|image| other.blobs_of(image).unwrap()) {
        let file = other.blob(&digest)?;
        let mut bytes = vec![0; file.length().unwrap() as usize];
        thinply::storage::read_exact_at(&*file, &mut bytes, 0).unwrap();
        store.add_blob(&digest, &mut bytes.as_slice(), &Rights::Usual)?;
    }
    store.add_images(&other.index_of(&images)?).map(drop)
}

/// Runs a verb and answers the disk after each change that it made, the first one before any.
fn record(media: &Media, seed: u64, verb: Verb) -> (Vec<Media>, Result<()>) {
    record_in(media, seed, |world| verb(&world.store))
}

fn record_in(
    media: &Media,
    seed: u64,
    act: impl FnOnce(&World) -> Result<()>,
) -> (Vec<Media>, Result<()>) {
    let world = World::start(media.clone());
    world.whole.record(seed);
    let done = act(&world);
    drop(world.store);
    let mut states = vec![media.clone()];
    for event in world.whole.take_record() {
        let Event::Disk(change) = event else { continue };
        let mut next = states[states.len() - 1].clone();
        next.apply(&change);
        states.push(next);
    }
    (states, done)
}

fn assert_clean(store: &Store, what: &dyn Debug) {
    assert_eq!(store.verify().unwrap(), [], "{what:?}");
}

/// What a verb may leave.
struct Outcome {
    before: View,
    after: View,
}

impl Outcome {
    /// The store shows all of the verb or nothing of it, and checks clean.
    fn judge(&self, store: &Store, what: &dyn Debug) -> View {
        assert_clean(store, what);
        let seen = view(store);
        if seen != self.before && seen != self.after {
            assert_eq!(seen, self.before, "{what:?}, nor is it as after: {:?}", self.after);
        }
        seen
    }

    /// Nothing is left over once garbage was collected, and the verb can be run again.
    fn clear_up(&self, media: Media, verb: Verb, what: &dyn Debug) {
        let world = World::start(media);
        let store = &world.store;
        let seen = self.judge(store, what);
        store.collect(false).unwrap();
        // A snapshot that was cut off may be finished, but nothing goes.
        let kept = self.judge(store, &(what, "gc"));
        assert!(kept == seen || kept == self.after, "{what:?}: gc took something");
        let seen = kept;
        let left = world.whole.list().unwrap().into_iter().collect::<BTreeSet<_>>();
        assert_eq!(left, needed(store), "{what:?}: left after gc");
        assert_eq!(store.collect(true).unwrap(), Default::default(), "{what:?}");
        match verb(store) {
            Ok(()) => {}
            Err(error) => {
                let told = matches!(error.kind(), ErrorKind::Exists | ErrorKind::NotFound);
                assert!(seen == self.after && told, "{what:?}, again: {error}");
            }
        }
        assert_clean(store, what);
        assert_eq!(view(store), self.after, "{what:?}, again");
    }
}

#[test]
fn a_kill_or_a_power_loss_between_any_two_steps_leaves_a_store_that_works() {
    cut_off_everywhere(&stocked(), VERBS);
}

/// There a snapshot copies the layer.
#[test]
fn cut_off_likewise_where_a_file_has_one_name() {
    let mut start = stocked();
    start.without_links = true;
    let freezes = |verb: &&(&str, Verb)| {
        ["container commit", "container snapshot"].iter().any(|name| verb.0.starts_with(name))
    };
    let verbs: Vec<_> = VERBS.iter().filter(freezes).copied().collect();
    assert_eq!(verbs.len(), 3);
    cut_off_everywhere(&start, &verbs);
}

fn cut_off_everywhere(start: &Media, verbs: &[(&str, Verb)]) {
    for (number, &(name, verb)) in verbs.iter().enumerate() {
        let random = &mut Random::new(number as u64);
        let (states, done) = record(start, 1, verb);
        done.unwrap_or_else(|error| panic!("{name}: {error}"));
        let last = states[states.len() - 1].clone();
        let outcome = Outcome {
            before: view(&World::start(start.clone()).store),
            after: view(&World::start(last.clone()).store),
        };
        for (step, media) in states.iter().enumerate() {
            outcome.clear_up(media.clone(), verb, &(name, "killed", step));
            for loss in 0..LOSSES {
                let lost = media.crashed(random);
                outcome.clear_up(lost, verb, &(name, "without power", step, loss));
            }
            // The next process may be cut off too, while the last one's changes are not durable.
            let next: Verb =
                if random.one_in(2) { verb } else { |store| store.collect(false).map(drop) };
            let (states, _) = record(media, 2, next);
            for _ in 0..SECOND {
                let at = random.below(states.len() as u64) as usize;
                let lost = states[at].crashed(random);
                outcome.clear_up(lost, verb, &(name, "killed", step, "then without power", at));
            }
        }
        // After the verb has returned, nothing of it can be lost.
        let store = World::start(last.crashed(random)).store;
        assert_eq!(view(&store), outcome.after, "{name}: answered, and lost");
        println!("{name}: {} steps", states.len());
    }
}

fn is_unsupported<T>(done: Result<T>) -> bool {
    done.is_err_and(|error| error.kind() == ErrorKind::Unsupported)
}

#[test]
fn no_verb_touches_a_store_that_only_a_later_version_may_change() {
    let world = World::start(stocked());
    let seen = view(&world.store);
    let open = world.store.open_disk(&container("idle"), Access::Write).unwrap();
    world.store.require("later", Need::Write).unwrap();
    // One that runs already sees it too; what it has open it may write and close.
    open.write(6 * BLOCK as u64, &[6; BLOCK]).unwrap();
    assert!(is_unsupported(open.snapshot("late")));
    assert!(is_unsupported(open.commit(&reference("late"), "")));
    open.close().unwrap();
    drop(open);

    let start = world.settled();
    for &(name, verb) in VERBS {
        let (states, done) = record(&start, 1, verb);
        assert!(is_unsupported(done), "{name}");
        assert_eq!(states.len(), 1, "{name} changed the disk");
    }
    let store = World::start(start).store;
    assert!(is_unsupported(store.collect(true)));
    for disk in [container("web"), volume("data")] {
        assert!(is_unsupported(store.open_disk(&disk, Access::Write)));
    }
    assert_eq!(view(&store), seen);
    assert_eq!(store.usage().unwrap().good[1].total, 3);
    assert_clean(&store, &"read");
}

#[test]
fn a_file_of_a_feature_is_nowhere_without_its_name() {
    let start = stocked();
    let seen = view(&World::start(start.clone()).store);
    let random = &mut Random::new(7);
    let (states, done) = record_in(&start, 3, |world| {
        world.store.require("later", Need::Write)?;
        // As the later version does it.
        let root = Part::folder(&world.whole, PARTS[0]);
        root.create("later-room").unwrap();
        Ok(())
    });
    done.unwrap();
    let mut there = 0;
    for (step, media) in states.iter().enumerate() {
        for loss in 0..20 {
            let media = if loss == 0 { media.clone() } else { media.crashed(random) };
            let world = World::start(media);
            let named = is_unsupported(world.store.collect(true));
            if world.whole.list().unwrap().contains(&"root/later-room".to_owned()) {
                assert!(named, "{:?}", (step, loss));
                there += 1;
            }
            assert_clean(&world.store, &(step, loss));
            assert_eq!(view(&world.store), seen, "{:?}", (step, loss));
        }
    }
    assert!(there > 0, "the file was never there");
}

//! Two processes at each pair of verbs: what they answer and what the store shows afterwards is what
//! one of them after the other would give, in one order or the other; or one says why it did nothing,
//! and the store shows what the other alone would give.
//!
//! `THINPLY_RACES` is the number of rounds for each pair, 1 where it is not set. The first round, and
//! every second one after it, is on a file system in memory, where there is one: nothing here is about
//! what is durable. In the others the disk's syncs leave more time between the steps.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::Command;
use std::time::Duration;

use testkit::plain::Client;
use thinply::chain::Chain;
use thinply::device::Device;
use thinply::storage::Access;
use thinply::store::{DiskKind, DiskName, Store};

use crate::store::Served;
use crate::support::{Folder, KIB, Run, alone, noise, output, start};

/// What changes the store, on things that others change too.
const VERBS: &[&[&str]] = &[
    &["image", "import", "other.raw", "new"],
    &["image", "import", "--parent", "app", "changed.raw", "app"],
    &["image", "build-from", "tree", "new"],
    &["image", "tag", "app", "base"],
    &["image", "rm", "app"],
    &["image", "rm", "lone"],
    &["image", "load", "images.tar"],
    &["container", "create", "app", "--name", "new"],
    &["container", "create", "lone", "--name", "new"],
    &["container", "commit", "web", "committed"],
    &["container", "commit", "web", "app"],
    &["container", "snapshot", "web", "second"],
    &["container", "reset", "web"],
    &["container", "reset", "web", "first"],
    &["container", "rm", "web"],
    &["volume", "create", "--size", "1M", "new"],
    &["volume", "create", "--size", "1M", "data"],
    &["volume", "rm", "data"],
    &["gc"],
];

/// What only looks.
const LOOKS: &[&[&str]] = &[
    &["container", "ls", "-s"],
    &["container", "inspect", "web"],
    &["container", "diff", "web"],
    &["image", "ls"],
    &["image", "history", "app"],
    &["image", "inspect", "app"],
    &["image", "save", "-o", "saved.tar", "app"],
    &["volume", "ls"],
    &["volume", "inspect", "data"],
    &["df"],
    &["gc", "--dry-run"],
    &["store", "check"],
];

/// Why an honest store may refuse a verb.
const REASONS: &[&str] = &[
    "already",
    "there is no ",
    "in use",
    "is being written by",
    "is used by",
    "is being read",
    "has no snapshot",
    "removed meanwhile",
    "No such file",
    "is missing",
];

fn rounds() -> u64 {
    std::env::var("THINPLY_RACES").map_or(1, |rounds| rounds.parse().unwrap())
}

/// A store with one of everything, each of which several verbs are after.
fn stocked() -> Folder {
    let folder = Folder::new();
    for (seed, name) in ["base.raw", "other.raw", "app.raw", "changed.raw"].iter().enumerate() {
        folder.write(name, &noise(seed as u64, 64 * KIB as usize));
    }
    std::fs::create_dir(folder.join("tree")).unwrap();
    folder.write("tree/file", b"text");
    folder.ok(&["image", "import", "base.raw", "base"]);
    folder.ok(&["image", "import", "--parent", "base", "app.raw", "app"]);
    folder.ok(&["image", "import", "other.raw", "lone"]);
    folder.ok(&["image", "save", "-o", "images.tar", "lone", "app"]);
    folder.ok(&["container", "create", "app", "--name", "web"]);
    folder.ok(&["volume", "create", "--size", "1M", "data"]);
    let write = |byte| {
        let served = Served::all(&folder);
        let mut client = served.client("container/web").unwrap();
        client.write(0, &[byte; 4096]).unwrap();
        client.disconnect().unwrap();
    };
    write(1);
    folder.ok(&["container", "snapshot", "web", "first"]);
    write(2);
    folder
}

/// A copy, holes included.
fn copy(of: &Folder, round: u64) -> Folder {
    let folder = if round.is_multiple_of(2) { Folder::in_memory() } else { Folder::new() };
    let from = of.path().join(".");
    let copied =
        output(Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(folder.path()));
    assert!(copied.status.success());
    folder
}

/// Names, and a digest of what reads under them.
pub type View = BTreeMap<String, u64>;

fn digest(chain: &Chain) -> u64 {
    let mut bytes = vec![0; chain.size() as usize];
    chain.read(0, &mut bytes).unwrap();
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// What a store shows.
pub fn view(folder: &Folder) -> View {
    alone(|| {
        let store = Store::open(&folder.join("store")).unwrap();
        let mut seen = View::new();
        for image in store.images().unwrap().good.iter().filter(|image| image.reference.is_some()) {
            let chain = store.open_image(image).unwrap();
            seen.insert(format!("image {}", image.name()), digest(&chain));
        }
        for found in store.containers().unwrap().good {
            let disk = DiskName::new(DiskKind::Container, &found.name).unwrap();
            let chain = store.open_disk(&disk, Access::Read).unwrap();
            seen.insert(format!("container {}", found.name), digest(&chain));
            for saved in found.snapshots {
                let chain = store.open_snapshot(&found.name, &saved.name).unwrap();
                seen.insert(format!("container {}@{}", found.name, saved.name), digest(&chain));
            }
        }
        for found in store.volumes().unwrap().good {
            let disk = DiskName::new(DiskKind::Volume, &found.name).unwrap();
            let chain = store.open_disk(&disk, Access::Read).unwrap();
            seen.insert(format!("volume {}", found.name), digest(&chain));
        }
        seen
    })
}

/// It did its work, or did nothing and said a reason.
fn judge(verb: &[&str], run: &Run, pair: &str) {
    assert!(!run.stderr.contains("panicked"), "{pair}: {verb:?}: {run:?}");
    if run.code == 0 {
        return;
    }
    assert_eq!((run.code, run.stdout.as_str()), (2, ""), "{pair}: {verb:?}: {run:?}");
    let said = REASONS.iter().any(|reason| run.stderr.contains(reason));
    assert!(said, "{pair}: {verb:?}: {run:?}");
}

/// What verbs give that run one after the other, or one alone: which of them did their work, and what
/// the store shows then.
struct Serial<'a> {
    template: &'a Folder,
    known: HashMap<Vec<usize>, (Vec<bool>, View)>,
}

impl Serial<'_> {
    fn of(&mut self, verbs: &[usize]) -> &(Vec<bool>, View) {
        self.known.entry(verbs.to_vec()).or_insert_with(|| {
            let folder = copy(self.template, 0);
            let done = verbs.iter().map(|&number| folder.run(verb(number)).code == 0).collect();
            (done, view(&folder))
        })
    }

    /// Whether this is what the two would give in one order or the other. One that gave way to
    /// the other did nothing; both can't have given way.
    fn allows(&mut self, [a, b]: [usize; 2], done: [bool; 2], seen: &View) -> bool {
        let (forth, after_forth) = self.of(&[a, b]);
        if forth[..] == done && after_forth == seen {
            return true;
        }
        let (back, after_back) = self.of(&[b, a]);
        if back[..] == [done[1], done[0]] && after_back == seen {
            return true;
        }
        let winner = match done {
            [true, false] => a,
            [false, true] => b,
            _ => return false,
        };
        self.of(&[winner]).1 == *seen
    }
}

fn verb(number: usize) -> &'static [&'static str] {
    VERBS.iter().chain(LOOKS).nth(number).unwrap()
}

/// Runs two verbs at once. From the third round on one of them gets a start on the other.
fn race(folder: &Folder, verbs: [&[&str]; 2], round: u64) -> [Run; 2] {
    let first = (round / 2 % 2) as usize;
    let begin = |number: usize| start(&mut folder.command(verbs[number]));
    let ahead = begin(first);
    std::thread::sleep(Duration::from_micros(round / 2 * 613 % 9000));
    let behind = begin(1 - first);
    let runs = [ahead, behind].map(|child| Run::from(child.wait_with_output().unwrap()));
    let [ahead, behind] = runs;
    if first == 0 { [ahead, behind] } else { [behind, ahead] }
}

/// Nothing is wrong, and nothing is left over once garbage was collected.
fn tidy(folder: &Folder, what: &str) {
    assert_eq!(folder.ok(&["store", "check"]), "clean\n", "{what}");
    let before = view(folder);
    folder.ok(&["gc"]);
    assert_eq!(view(folder), before, "{what}: gc took something");
    assert_eq!(folder.ok(&["store", "check"]), "clean\n", "{what}: after gc");
    assert_eq!(folder.ok(&["gc"]), "Reclaimed: 0 bytes\n", "{what}");
}

#[test]
fn two_processes_at_each_pair_of_verbs() {
    let template = stocked();
    let mut serial = Serial { template: &template, known: HashMap::new() };
    for a in 0..VERBS.len() {
        for b in a..VERBS.len() + LOOKS.len() {
            for round in 0..rounds() {
                let folder = copy(&template, round);
                let verbs = [verb(a), verb(b)];
                let pair =
                    format!("{} | {}, round {round}", verbs[0].join(" "), verbs[1].join(" "));
                let runs = race(&folder, verbs, round);
                for (verb, run) in verbs.iter().zip(&runs) {
                    judge(verb, run, &pair);
                }
                let (done, seen) = (runs.each_ref().map(|run| run.code == 0), view(&folder));
                assert!(serial.allows([a, b], done, &seen), "{pair}: {runs:?}, {seen:?}");
                tidy(&folder, &pair);
            }
        }
    }
}

/// The same with a container that is served: the one process that has it does the work, and its
/// client loses nothing.
#[test]
fn two_processes_at_each_pair_of_verbs_on_a_served_container() {
    let template = stocked();
    let after = ["web", "app", "new"];
    let about = |verb: &&&[&str]| verb[0] == "gc" || verb.iter().any(|word| after.contains(word));
    let changes: Vec<_> = VERBS.iter().filter(about).collect();
    let looks = LOOKS.iter().filter(about);
    let all: Vec<_> = changes.iter().copied().chain(looks).collect();
    for (number, a) in changes.iter().enumerate() {
        for b in all.iter().skip(number) {
            for round in 0..rounds() {
                let folder = copy(&template, round);
                let pair = format!("{} | {}, round {round}", a.join(" "), b.join(" "));
                let served = Served::all(&folder);
                let mut client = served.client("container/web").unwrap();
                client.write(4096, &[3; 4096]).unwrap();
                let runs = race(&folder, [a, b], round);
                for (verb, run) in [a, b].iter().zip(&runs) {
                    judge(verb, run, &pair);
                }
                client.write(8192, &[4; 4096]).unwrap();
                hang_up(client, served);
                let served = Served::all(&folder);
                let mut client = served.client("container/web").unwrap();
                for (block, byte) in [2, 3, 4].into_iter().enumerate() {
                    let read = client.read(block as u64 * 4096, 4096).unwrap();
                    assert!(read == [byte; 4096], "{pair}: block {block} is lost: {runs:?}");
                }
                hang_up(client, served);
                for (verb, run) in [a, b].iter().zip(&runs) {
                    if matches!(verb[..], ["container", "rm" | "reset", ..]) {
                        assert_eq!(run.code, 2, "{pair}: {verb:?} of a served container: {run:?}");
                    }
                }
                tidy(&folder, &pair);
            }
        }
    }
}

fn hang_up(client: Client, served: Served) {
    client.disconnect().unwrap();
    drop(served);
}

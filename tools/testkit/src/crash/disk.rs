//! What a folder's files hold: what is durable, and every value that a sector was given since, of
//! which a power loss keeps any one (`format-spec.md`, "Media assumptions").

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::Random;

pub const PAGE: u64 = 4096;
const SECTOR: usize = 512;
const SECTORS: u32 = 8;

/// Bytes that were written.
#[derive(Clone)]
pub struct Data(pub Arc<[u8]>);

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, {:?}...", self.0.len(), &self.0[..self.0.len().min(4)])
    }
}

/// The content of a page; without one it is a hole.
pub type Bytes = Option<Arc<[u8; PAGE as usize]>>;
/// A set of sectors of a page.
pub type Sectors = u8;
/// When a change was made, counted in changes.
pub type Time = u64;

/// The sectors of a page that a range of its bytes touches.
pub fn sectors(from: usize, to: usize) -> Sectors {
    let (first, end) = (from / SECTOR, to.div_ceil(SECTOR));
    ((1u32 << end) - (1 << first)) as Sectors
}

/// The numbers of the sectors in a set.
pub fn each_sector(set: Sectors) -> impl Iterator<Item = usize> {
    (0..SECTORS).filter(move |sector| set >> sector & 1 == 1).map(|sector| sector as usize)
}

/// A sector of a page.
pub fn sector(bytes: &Bytes, number: usize) -> &[u8] {
    static ZEROS: [u8; SECTOR] = [0; SECTOR];
    bytes.as_ref().map_or(&ZEROS, |bytes| &bytes[number * SECTOR..][..SECTOR])
}

fn to_array(bytes: &Bytes) -> [u8; PAGE as usize] {
    bytes.as_ref().map_or([0; PAGE as usize], |bytes| **bytes)
}

/// `base` with the sectors of `set` from `other`.
fn mixed(base: &Bytes, other: &Bytes, set: Sectors) -> Bytes {
    match set {
        0 => base.clone(),
        Sectors::MAX => other.clone(),
        _ => {
            let mut bytes = to_array(base);
            each_sector(set).for_each(|number| {
                bytes[number * SECTOR..][..SECTOR].copy_from_slice(sector(other, number));
            });
            Some(Arc::new(bytes))
        }
    }
}

#[derive(Clone, Debug)]
struct Version {
    time: Time,
    sectors: Sectors,
    bytes: Bytes,
}

#[derive(Clone, Debug, Default)]
struct Page {
    durable: Bytes,
    /// What is read: the last change, or what a failed sync left.
    cached: Bytes,
    /// Since they were last synced, oldest first.
    versions: Vec<Version>,
    /// Sectors of `cached` that a failed sync left as if they were clean: no later sync writes them.
    ghosts: Sectors,
}

impl Page {
    fn settled(bytes: Bytes) -> Self {
        Self { durable: bytes.clone(), cached: bytes, ..Self::default() }
    }

    fn change(&mut self, time: Time, sectors: Sectors, bytes: Bytes) {
        self.ghosts &= !sectors;
        self.cached = bytes.clone();
        self.versions.push(Version { time, sectors, bytes });
    }

    /// Takes out what was changed at or before `upto`: the result of it, and which sectors it is.
    fn take(&mut self, upto: Time) -> (Bytes, Sectors) {
        let count = self.versions.partition_point(|change| change.time <= upto);
        let (mut bytes, mut all) = (None, 0);
        for change in self.versions.drain(..count) {
            bytes = mixed(&bytes, &change.bytes, change.sectors);
            all |= change.sectors;
        }
        (bytes, all)
    }

    fn sync(&mut self, upto: Time) {
        let (bytes, sectors) = self.take(upto);
        self.durable = if self.versions.is_empty() && self.ghosts == 0 {
            self.cached.clone()
        } else {
            mixed(&self.durable, &bytes, sectors)
        };
    }

    /// Some sectors reach the media, the kernel forgets that the others have not.
    fn fail_sync(&mut self, upto: Time, random: &mut Random) {
        let (bytes, sectors) = self.take(upto);
        let landed = sectors & random.sectors();
        self.durable = mixed(&self.durable, &bytes, landed);
        let dirty = self.versions.iter().fold(0, |set, change| set | change.sectors);
        self.ghosts = (self.ghosts | sectors & !landed) & !dirty;
    }

    fn drop_cache(&mut self) {
        if self.ghosts != 0 && self.versions.is_empty() {
            self.cached = self.durable.clone();
            self.ghosts = 0;
        }
    }

    /// What a power loss leaves of it.
    fn crashed(&self, luck: Luck, random: &mut Random) -> Bytes {
        let Some(last) = self.versions.last() else { return self.durable.clone() };
        match luck {
            Luck::All if self.ghosts == 0 => self.cached.clone(),
            Luck::Nothing => self.durable.clone(),
            Luck::Pages if random.below(2) == 0 => self.durable.clone(),
            Luck::All | Luck::Pages => self
                .versions
                .iter()
                .fold(self.durable.clone(), |bytes, c| mixed(&bytes, &c.bytes, c.sectors)),
            Luck::Last => mixed(&self.durable, &last.bytes, last.sectors),
            Luck::Sectors => self.versions.iter().fold(self.durable.clone(), |bytes, change| {
                mixed(&bytes, &change.bytes, change.sectors & random.sectors())
            }),
        }
    }
}

/// How much of what was not synced survives a power loss.
#[derive(Clone, Copy, Debug)]
enum Luck {
    All,
    Nothing,
    /// Of each page the last change alone.
    Last,
    /// Each page wholly or not at all.
    Pages,
    /// Each sector with any of its values.
    Sectors,
}

impl Luck {
    fn draw(random: &mut Random) -> Self {
        *random.pick(&[
            Self::All,
            Self::Nothing,
            Self::Last,
            Self::Pages,
            Self::Pages,
            Self::Sectors,
            Self::Sectors,
            Self::Sectors,
        ])
    }
}

/// One file.
#[derive(Clone, Debug)]
struct File {
    pages: BTreeMap<u64, Page>,
    /// The durable length, then each that it was given since.
    lengths: Vec<(Time, u64)>,
    /// Syncs that have failed.
    failures: u64,
}

impl File {
    fn length(&self) -> u64 {
        self.lengths.last().map_or(0, |&(_, length)| length)
    }

    fn write(&mut self, time: Time, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        if end > self.length() {
            self.lengths.push((time, end));
        }
        let mut done = 0;
        while done < data.len() {
            let (number, from) =
                ((offset + done as u64) / PAGE, ((offset + done as u64) % PAGE) as usize);
            let to = (from + data.len() - done).min(PAGE as usize);
            let page = self.pages.entry(number).or_default();
            let mut bytes = if to - from == PAGE as usize {
                [0; PAGE as usize]
            } else {
                to_array(&page.cached)
            };
            bytes[from..to].copy_from_slice(&data[done..][..to - from]);
            page.change(time, sectors(from, to), Some(Arc::new(bytes)));
            done += to - from;
        }
    }

    /// Only pages that hold something; a punch can span a lot of nothing.
    fn clear(&mut self, time: Time, from: u64, to: u64) {
        for (&number, page) in self.pages.range_mut(from / PAGE..to.div_ceil(PAGE)) {
            if page.cached.is_none() && page.ghosts == 0 {
                continue;
            }
            let start = from.saturating_sub(number * PAGE) as usize;
            let end = (to - number * PAGE).min(PAGE) as usize;
            let bytes = (end - start < PAGE as usize).then(|| {
                let mut bytes = to_array(&page.cached);
                bytes[start..end].fill(0);
                Arc::new(bytes)
            });
            page.change(time, sectors(start, end), bytes);
        }
    }

    fn is_settled(&self) -> bool {
        let settled = |page: &Page| page.versions.is_empty() && page.ghosts == 0;
        self.lengths.len() == 1 && self.pages.values().all(settled)
    }

    fn crashed(&self, luck: Luck, random: &mut Random) -> Self {
        let length = random.pick(&self.lengths).1;
        let pages = self
            .pages
            .range(..length.div_ceil(PAGE))
            .map(|(&number, page)| (number, Page::settled(page.crashed(luck, random))));
        Self { pages: pages.collect(), lengths: vec![(0, length)], failures: 0 }
    }
}

/// Names lead to files by their number.
pub type Names = BTreeMap<String, usize>;

/// Something that was done to the disk.
#[derive(Clone, Debug)]
pub enum Change {
    Write {
        file: usize,
        offset: u64,
        data: Data,
    },
    Clear {
        file: usize,
        from: u64,
        to: u64,
    },
    Length {
        file: usize,
        length: u64,
    },
    Sync {
        file: usize,
        upto: Time,
    },
    FailedSync {
        file: usize,
        upto: Time,
        seed: u64,
    },
    DropCache {
        file: usize,
        from: u64,
        to: u64,
    },
    NewFile,
    Names(Names),
    /// Of the names that begin so.
    SyncNames(&'static str),
}

fn own((name, &file): (&String, &usize)) -> (String, usize) {
    (name.clone(), file)
}

/// A folder's files and their names. A clone shares all content, so it costs little.
#[derive(Clone, Debug)]
pub struct Disk {
    files: Vec<Arc<File>>,
    names: Arc<Names>,
    /// The durable names, then those after each change since.
    history: Vec<Arc<Names>>,
    time: Time,
    /// A file has one name at most, as on FAT.
    pub without_links: bool,
}

impl Default for Disk {
    fn default() -> Self {
        let names = Arc::<Names>::default();
        let history = vec![names.clone()];
        Self { files: Vec::new(), history, names, time: 0, without_links: false }
    }
}

impl Disk {
    fn file(&mut self, file: usize) -> &mut File {
        Arc::make_mut(&mut self.files[file])
    }

    pub fn apply(&mut self, change: &Change) {
        self.time += 1;
        let time = self.time;
        match *change {
            Change::Write { file, offset, ref data } => {
                self.file(file).write(time, offset, &data.0);
            }
            Change::Clear { file, from, to } => self.file(file).clear(time, from, to),
            Change::Length { file, length } => {
                let file = self.file(file);
                if length < file.length() {
                    file.clear(time, length, file.length());
                }
                file.lengths.push((time, length));
            }
            Change::Sync { file, upto } => {
                let file = self.file(file);
                file.pages.values_mut().for_each(|page| page.sync(upto));
                let count = file.lengths.partition_point(|&(time, _)| time <= upto);
                file.lengths.drain(..count - 1);
            }
            Change::FailedSync { file, upto, seed } => {
                let random = &mut Random::new(seed);
                let file = self.file(file);
                file.failures += 1;
                file.pages.values_mut().for_each(|page| page.fail_sync(upto, random));
            }
            Change::DropCache { file, from, to } => {
                let pages = self.file(file).pages.range_mut(from / PAGE..to.div_ceil(PAGE));
                pages.for_each(|(_, page)| page.drop_cache());
            }
            Change::NewFile => {
                let file = File { pages: BTreeMap::new(), lengths: vec![(time, 0)], failures: 0 };
                self.files.push(Arc::new(file));
            }
            Change::Names(ref names) => {
                self.names = Arc::new(names.clone());
                self.history.push(self.names.clone());
            }
            Change::SyncNames(prefix) => self.sync_names(prefix),
        }
    }

    /// All states that are left have the present names that begin so.
    fn sync_names(&mut self, prefix: &str) {
        let present: Names =
            self.names.iter().filter(|(name, _)| name.starts_with(prefix)).map(own).collect();
        for state in &mut self.history {
            let others = state.iter().filter(|(name, _)| !name.starts_with(prefix)).map(own);
            *state = Arc::new(others.chain(present.iter().map(own)).collect());
        }
        self.history.dedup();
    }

    /// When the last change was made.
    pub fn time(&self) -> Time {
        self.time
    }

    pub fn names(&self) -> &Names {
        &self.names
    }

    pub fn count(&self) -> usize {
        self.files.len()
    }

    pub fn length(&self, file: usize) -> u64 {
        self.files[file].length()
    }

    /// How many syncs of a file have failed since the machine started.
    pub fn failures(&self, file: usize) -> u64 {
        self.files[file].failures
    }

    /// Whether a sync of any file has failed.
    pub fn has_lost_a_sync(&self) -> bool {
        self.files.iter().any(|file| file.failures > 0)
    }

    /// Whether a power loss could lose anything.
    pub fn is_settled(&self) -> bool {
        self.history.len() == 1 && self.files.iter().all(|file| file.is_settled())
    }

    /// One of the disks that a power loss may leave.
    pub fn crashed(&self, random: &mut Random) -> Self {
        let luck = Luck::draw(random);
        // Changes of names reach the media in order, as in a journaling file system.
        let names = match luck {
            Luck::All => self.names.clone(),
            _ => random.pick(&self.history).clone(),
        };
        let files = self.files.iter().map(|file| match file.is_settled() {
            true => file.clone(),
            false => Arc::new(file.crashed(luck, random)),
        });
        let files = files.collect();
        Self { files, history: vec![names.clone()], names, ..*self }
    }

    /// Reads what there is of a range; answers its length.
    pub fn read(&self, file: usize, buf: &mut [u8], offset: u64) -> usize {
        let file = &self.files[file];
        let count = file.length().saturating_sub(offset).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let (number, from) = (at / PAGE, (at % PAGE) as usize);
            let part = &mut buf[done..count.min(done + PAGE as usize - from)];
            match file.pages.get(&number).and_then(|page| page.cached.as_ref()) {
                Some(bytes) => part.copy_from_slice(&bytes[from..from + part.len()]),
                None => part.fill(0),
            }
            done += part.len();
        }
        count
    }

    pub fn next_data(&self, file: usize, offset: u64) -> Option<u64> {
        let mut pages = self.files[file].pages.range(offset / PAGE..);
        pages.find(|(_, page)| page.cached.is_some()).map(|(&number, _)| offset.max(number * PAGE))
    }

    pub fn next_hole(&self, file: usize, offset: u64) -> u64 {
        let file = &self.files[file];
        let is_data =
            |number: &u64| file.pages.get(number).is_some_and(|page| page.cached.is_some());
        let hole = (offset / PAGE..).find(|number| !is_data(number)).unwrap_or_default();
        offset.max(hole * PAGE).min(file.length())
    }

    /// Whether a file reads the same as another disk's, byte for byte.
    pub fn same_content(&self, file: usize, other: &Self, others: usize) -> bool {
        if Arc::ptr_eq(&self.files[file], &other.files[others]) {
            return true;
        }
        let pages = |file: &'_ File| {
            let data = file.pages.iter().filter(|(_, page)| page.cached.is_some());
            data.map(|(&number, page)| (number, page.cached.clone())).collect::<Vec<_>>()
        };
        let (a, b) = (pages(&self.files[file]), pages(&other.files[others]));
        let same = |a: &Bytes, b: &Bytes| match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
            _ => false,
        };
        a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| a.0 == b.0 && same(&a.1, &b.1))
    }
}

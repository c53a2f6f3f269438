//! What a device may hold: for each sector every value that a client may find there after a crash.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::disk::{Bytes, Data, PAGE, Sectors, each_sector, sector, sectors};

/// What a client asked for.
#[derive(Clone, Debug)]
pub enum Ask {
    /// Bytes that become `data`.
    Write { offset: u64, data: Data },
    /// Bytes that become zeros.
    Zero { offset: u64, length: u64 },
    /// All that was answered before becomes durable.
    Flush,
    /// As a flush, and the content of that moment gets a name.
    Snapshot(String),
}

/// What a client learns, in its order. The number tells requests from each other.
#[derive(Clone, Debug)]
pub enum Note {
    Asked(usize, Ask),
    Done(usize),
    Failed(usize),
    /// The disk was opened anew after a sync of it had failed: what no flush has covered by then may
    /// be lost, and no later flush covers it.
    Reopened,
}

/// When something happened, counted in notes.
type Time = u64;

/// A value that some sectors of a block were given.
#[derive(Clone, Debug)]
struct Value {
    bytes: Bytes,
    sectors: Sectors,
    asked: Time,
    /// Failed or not, it has no effect from here on.
    answered: Option<Time>,
    done: bool,
    request: usize,
}

impl Value {
    /// The sectors whose older values this one has replaced for all who ask after `by`.
    fn replaces(&self, older: &Self, by: Time) -> Sectors {
        let later = older.answered.is_some_and(|answered| answered < self.asked);
        let certain = self.done && self.answered.is_some_and(|answered| answered < by);
        if later && certain { self.sectors } else { 0 }
    }
}

#[derive(Clone, Debug, Default)]
struct Block(Vec<Value>);

impl Block {
    fn settled(bytes: Bytes) -> Self {
        let (sectors, answered) = (Sectors::MAX, Some(0));
        Self(vec![Value { bytes, sectors, asked: 0, answered, done: true, request: usize::MAX }])
    }

    /// What is left of a value's sectors for those who ask after `by`.
    fn remaining(&self, value: &Value, by: Time) -> Sectors {
        self.0.iter().fold(value.sectors, |left, other| left & !other.replaces(value, by))
    }

    /// A flush that was asked for at `by` has been answered.
    fn flush(&mut self, by: Time) {
        if self.0.len() > 1 {
            let left: Vec<_> = self.0.iter().map(|value| self.remaining(value, by)).collect();
            self.0.iter_mut().zip(left).for_each(|(value, left)| value.sectors = left);
            self.0.retain(|value| value.sectors != 0);
        }
    }

    /// The first sector of `found` that has no allowed value.
    fn stranger(&self, found: &[u8]) -> Option<usize> {
        let mut open = sectors(0, found.len());
        for value in &self.0 {
            let found = |&number: &usize| {
                let part = &found[number * 512..];
                part[..512] == *sector(&value.bytes, number)
            };
            let set = open & value.sectors;
            each_sector(set).filter(found).for_each(|number| open &= !(1 << number));
            if open == 0 {
                return None;
            }
        }
        each_sector(open).next()
    }

    fn check(&self, block: u64, found: &[u8]) -> Result<(), String> {
        let Some(number) = self.stranger(found) else { return Ok(()) };
        let values = self.0.iter().filter(|value| value.sectors >> number & 1 == 1);
        let allowed: Vec<_> =
            values.map(|value| sector(&value.bytes, number)[..4].to_vec()).collect();
        let found = &found[number * 512..][..4];
        Err(format!("sector {number} of block {block} begins {found:?}, not one of {allowed:?}"))
    }
}

/// What was allowed in a block when a client began to read it.
#[derive(Debug)]
pub struct Look {
    block: u64,
    values: Block,
    time: Time,
}

/// The blocks of a device that are looked at, each with its allowed values.
#[derive(Clone, Debug)]
pub struct Oracle {
    size: u64,
    blocks: BTreeMap<u64, Block>,
    time: Time,
    /// When each request was asked.
    asked: BTreeMap<usize, (Time, Ask)>,
    /// What snapshots hold.
    pub snapshots: BTreeMap<String, Arc<Self>>,
}

impl Oracle {
    /// All zeros; `blocks` are looked at also where nobody writes them.
    pub fn new(size: u64, blocks: &[u64]) -> Self {
        let blocks = blocks.iter().map(|&block| (block, Block::settled(None))).collect();
        Self { size, blocks, time: 0, asked: BTreeMap::new(), snapshots: BTreeMap::new() }
    }

    /// How many bytes of a block the device has.
    pub fn length(&self, block: u64) -> usize {
        (self.size - block * PAGE).min(PAGE) as usize
    }

    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().copied()
    }

    pub fn note(&mut self, note: &Note) {
        self.time += 1;
        match note {
            Note::Asked(request, ask) => {
                match ask {
                    Ask::Write { offset, data } => self.change(*request, *offset, &data.0),
                    Ask::Zero { offset, length } => {
                        self.change(*request, *offset, &vec![0; *length as usize]);
                    }
                    Ask::Flush | Ask::Snapshot(_) => {}
                }
                self.asked.insert(*request, (self.time, ask.clone()));
            }
            Note::Done(request) => self.answer(*request, true),
            Note::Failed(request) => self.answer(*request, false),
            Note::Reopened => {
                let values = self.blocks.values_mut().flat_map(|block| &mut block.0);
                values.filter(|value| value.answered.is_some()).for_each(|v| v.done = false);
            }
        }
    }

    fn change(&mut self, request: usize, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (number, from) = (at / PAGE, (at % PAGE) as usize);
            let to = (from + data.len() - done).min(PAGE as usize);
            let whole = self.length(number);
            let block = self.blocks.entry(number).or_insert_with(|| Block::settled(None));
            let mut bytes = [0; PAGE as usize];
            if !from.is_multiple_of(512) || !to.is_multiple_of(512) && to != whole {
                // Only where one client does one thing at a time: then the last value is known.
                for value in &block.0 {
                    each_sector(value.sectors).for_each(|number| {
                        bytes[number * 512..][..512].copy_from_slice(sector(&value.bytes, number));
                    });
                }
            }
            bytes[from..to].copy_from_slice(&data[done..][..to - from]);
            let sectors = sectors(from, to);
            let bytes = bytes.iter().any(|&byte| byte != 0).then(|| Arc::new(bytes));
            let (asked, answered) = (self.time, None);
            block.0.push(Value { bytes, sectors, asked, answered, done: false, request });
            done += to - from;
        }
    }

    fn answer(&mut self, request: usize, done: bool) {
        let Some((by, ask)) = self.asked.remove(&request) else { return };
        let time = self.time;
        let touched = match &ask {
            Ask::Write { offset, data } => Some((*offset, data.0.len() as u64)),
            Ask::Zero { offset, length } => Some((*offset, *length)),
            Ask::Flush | Ask::Snapshot(_) => None,
        };
        if let Some((offset, length)) = touched {
            let range = offset / PAGE..(offset + length).div_ceil(PAGE);
            let values = self.blocks.range_mut(range).flat_map(|(_, block)| &mut block.0);
            values.filter(|value| value.request == request).for_each(|value| {
                (value.answered, value.done) = (Some(time), done);
            });
        } else if done {
            self.blocks.values_mut().for_each(|block| block.flush(by));
            if let Ask::Snapshot(name) = ask {
                let content = Arc::new(Self { snapshots: BTreeMap::new(), ..self.clone() });
                self.snapshots.insert(name, content);
            }
        }
    }

    /// The writes that were asked for and not answered, and what they write.
    pub fn unanswered(&self) -> Vec<(u64, Data)> {
        let write = |(_, ask): &(Time, Ask)| match ask {
            Ask::Write { offset, data } => Some((*offset, data.clone())),
            _ => None,
        };
        self.asked.values().filter_map(write).collect()
    }

    /// Fails where a crash can't leave what is found in a block.
    pub fn check(&self, block: u64, found: &[u8]) -> Result<(), String> {
        self.blocks[&block].check(block, found)
    }

    /// What a client that begins to read a block now may get, as long as nobody changes it.
    pub fn look(&self, block: u64) -> Look {
        let values = &self.blocks[&block];
        let left = values
            .0
            .iter()
            .map(|value| Value { sectors: values.remaining(value, Time::MAX), ..value.clone() });
        Look { block, values: Block(left.collect()), time: self.time }
    }

    /// Fails where a client that began to read at `look` and got its answer now can't have found this.
    pub fn check_read(&self, look: Look, found: &[u8]) -> Result<(), String> {
        let Look { block, mut values, time } = look;
        let newer = self.blocks[&block].0.iter().filter(|value| value.asked > time);
        values.0.extend(newer.cloned());
        values.check(block, found)
    }

    /// What was found is all that is allowed from now on. Every request was answered or died.
    pub fn settle(&mut self, found: &[(u64, Bytes)]) {
        for (block, bytes) in found {
            self.blocks.insert(*block, Block::settled(bytes.clone()));
        }
        self.asked.clear();
        self.time = 0;
    }
}

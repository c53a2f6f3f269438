//! A disk in memory with a volatile write cache: what was not flushed when the power is cut reaches
//! the media sector by sector, or not.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fastrand::Rng;
use thinply::device::{Detail, Device, Extent, Prefetch, ZeroMode, push_extent};
use thinply::error::Result;
use thinply::memory::{Gather, Scatter};
use thinply::wait::{Attempt, Wait};

const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

struct State {
    media: Vec<u8>,
    /// What each sector was given since the last flush, oldest first.
    cache: BTreeMap<u64, Vec<Sector>>,
    /// Requests that come with the power gone change nothing.
    dark: bool,
}

pub struct Disk(Mutex<State>);

impl Disk {
    /// A disk that holds `media`.
    pub fn new(media: Vec<u8>) -> Self {
        assert!(media.len().is_multiple_of(SECTOR));
        Self(Mutex::new(State { media, cache: BTreeMap::new(), dark: false }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The power is gone. Answers how many sectors were in the cache.
    pub fn cut(&self, random: &mut Rng) -> usize {
        let mut state = self.state();
        let State { media, cache, dark } = &mut *state;
        *dark = true;
        // Now and then all or nothing of it is lost; otherwise each sector has a luck of its own.
        let mode = random.u8(..8);
        let count = cache.len();
        for (number, values) in std::mem::take(cache) {
            let chosen = match mode {
                0 => Some(values.len() - 1),
                1 | 2 => None,
                _ => random.usize(..=values.len()).checked_sub(1),
            };
            if let Some(chosen) = chosen {
                place(media, number).copy_from_slice(&values[chosen]);
            }
        }
        count
    }

    /// The power is back.
    pub fn power_up(&self) {
        self.state().dark = false;
    }

    /// All that is on the media.
    pub fn media(&self) -> Vec<u8> {
        self.state().media.clone()
    }
}

fn place(media: &mut [u8], number: u64) -> &mut [u8] {
    &mut media[number as usize * SECTOR..][..SECTOR]
}

impl State {
    fn read(&self, offset: u64, buf: &mut [u8]) {
        buf.copy_from_slice(&self.media[offset as usize..][..buf.len()]);
        let sectors = offset / SECTOR as u64..(offset + buf.len() as u64) / SECTOR as u64;
        for (number, values) in self.cache.range(sectors.clone()) {
            place(buf, number - sectors.start).copy_from_slice(values.last().unwrap());
        }
    }
}

impl thinply::device::Disk for Disk {}

impl Device for Disk {
    fn size(&self) -> u64 {
        self.state().media.len() as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    fn try_read(&self, offset: u64, mut into: Scatter<'_>, _: Wait) -> Attempt {
        let mut bytes = vec![0; into.len()];
        self.state().read(offset, &mut bytes);
        into.copy_from(&bytes);
        Ok(())
    }

    fn try_write(&self, offset: u64, from: Gather<'_>, _: Wait) -> Result<u64> {
        let mut data = vec![0; from.len()];
        from.copy_to(&mut data);
        let mut state = self.state();
        if !state.dark {
            let numbers = offset / SECTOR as u64..;
            for (number, sector) in numbers.zip(data.as_chunks::<SECTOR>().0) {
                state.cache.entry(number).or_default().push(*sector);
            }
        }
        Ok(data.len() as u64)
    }

    fn zero(&self, offset: u64, length: u64, _: ZeroMode) -> Result<()> {
        self.write(offset, &vec![0; length as usize])
    }

    fn trim(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.state();
        if !state.dark {
            for (number, values) in std::mem::take(&mut state.cache) {
                place(&mut state.media, number).copy_from_slice(values.last().unwrap());
            }
        }
        Ok(())
    }

    fn try_extents(
        &self,
        _: u64,
        length: u64,
        _: Detail,
        limit: usize,
        out: &mut Vec<Extent>,
        _: Wait,
    ) -> Attempt {
        push_extent(out, limit, Extent { length, hole: false });
        Ok(())
    }

    fn prefetch(&self, _: u64, _: u64) -> Result<Prefetch> {
        Ok(Prefetch::InPart)
    }
}

#[test]
fn a_cut_takes_only_what_was_not_flushed() {
    let mut outcomes = [0; 3];
    for seed in 0..100 {
        let disk = Disk::new(vec![0; 1 << 16]);
        disk.write(512, &[1; 512]).unwrap();
        disk.flush().unwrap();
        disk.write(512, &[2; 1024]).unwrap();
        let mut found = [0; 1024];
        disk.read(512, &mut found).unwrap();
        assert_eq!(found, [2; 1024]);
        assert_eq!(disk.cut(&mut Rng::with_seed(seed)), 2);
        disk.write(0, &[3; 512]).unwrap();
        disk.flush().unwrap();
        disk.power_up();
        disk.read(512, &mut found).unwrap();
        assert!(disk.media()[..512] == [0; 512] && matches!(found[0], 1 | 2));
        outcomes[usize::from(found[0] == 2) + usize::from(found[512] == 2)] += 1;
    }
    assert!(outcomes.iter().all(|&count| count > 10), "{outcomes:?}");
}

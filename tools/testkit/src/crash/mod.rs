//! The crash simulator.
//!
//! A script runs once on a [`folder::CrashFolder`], which records every change of its files, and
//! what the clients asked for and were answered. [`judge::Run::sample`] plays the record back, lets
//! the power go between any two changes as often as one likes, and has each disk that this leaves
//! recovered and judged.

pub mod client;
pub mod death;
#[cfg(simulation)]
pub mod desk;
pub mod disk;
pub mod folder;
pub mod judge;
pub mod keeper;
pub mod lives;
pub mod oracle;
pub mod parts;
pub mod script;

/// A small generator with a seed to repeat a run by.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Random {
    pub fn new(seed: u64) -> Self {
        // Splitmix, so that neighbouring seeds have nothing in common.
        let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((state ^ state >> 31) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// A set of sectors, each in it or not.
    pub fn sectors(&mut self) -> disk::Sectors {
        self.next() as disk::Sectors
    }

    /// True once in `times` on average.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

//! Memory that requests read into and write from, in one stretch or several.
//!
//! A guest, or a process behind a shared mapping, may change its memory at any time. So such memory is
//! never lent out as a slice: the kernel gets its address, or bytes are copied between it and memory
//! of our own. What must be checked and then used is copied first. Slices count as one stretch.

use std::marker::PhantomData;
use std::ptr;

/// A stretch of memory by its address, laid out as the `iovec` of `readv` and `writev`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Stretch(nix::libc::iovec);

// SAFETY: an address and a length, which mean nothing until an unsafe constructor below vouches for
// the memory.
unsafe impl Send for Stretch {}
// SAFETY: as above.
unsafe impl Sync for Stretch {}

impl Stretch {
    /// `length` bytes from `start` on.
    pub fn new(start: *mut u8, length: usize) -> Self {
        Self(nix::libc::iovec { iov_base: start.cast(), iov_len: length })
    }

    /// Length in bytes.
    pub fn length(&self) -> usize {
        self.0.iov_len
    }

    fn start(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }
}

/// A range over stretches: a first one that may begin anywhere in what the caller gave, and whole
/// ones behind it, of which the last may be cut off by `length`.
#[derive(Clone, Copy, Debug)]
struct Parts<'a> {
    first: Stretch,
    rest: &'a [Stretch],
    /// Bytes in all.
    length: usize,
}

/// Most stretches handed to the kernel in one call. A longer range makes a short read or write.
const MOST: usize = 64;

impl<'a> Parts<'a> {
    fn one(start: *mut u8, length: usize) -> Self {
        Self { first: Stretch::new(start, length), rest: &[], length }
    }

    fn many(stretches: &'a [Stretch]) -> Self {
        let length = stretches.iter().map(Stretch::length).sum();
        match stretches {
            [first, rest @ ..] => Self { first: *first, rest, length },
            [] => Self::one(ptr::dangling_mut(), 0),
        }
    }

    /// All but the first `count` bytes.
    fn skip(mut self, count: usize) -> Self {
        let mut left = count.min(self.length);
        self.length -= left;
        while left >= self.first.length()
            && let [next, rest @ ..] = self.rest
        {
            left -= self.first.length();
            (self.first, self.rest) = (*next, rest);
        }
        let first = self.first;
        let left = left.min(first.length());
        self.first = Stretch::new(first.start().wrapping_add(left), first.length() - left);
        self
    }

    /// Only the first `count` bytes.
    fn take(mut self, count: usize) -> Self {
        self.length = self.length.min(count);
        self
    }

    fn is_one(&self) -> bool {
        self.length <= self.first.length()
    }

    /// The stretches, cut to the range.
    fn iter(self) -> impl Iterator<Item = Stretch> {
        let mut left = self.length;
        let cut = move |stretch: Stretch| {
            let length = stretch.length().min(left);
            left -= length;
            Stretch::new(stretch.start(), length)
        };
        let all = std::iter::once(self.first).chain(self.rest.iter().copied());
        all.map(cut).filter(|stretch| stretch.length() > 0)
    }

    /// Calls `act` with the first stretches as the kernel takes them.
    fn with_iovecs<T>(self, act: impl FnOnce(&[nix::libc::iovec]) -> T) -> T {
        if self.is_one() {
            return act(&[Stretch::new(self.first.start(), self.length).0]);
        }
        let mut iovecs = [Stretch::new(ptr::dangling_mut(), 0).0; MOST];
        let mut count = 0;
        for (place, stretch) in iovecs.iter_mut().zip(self.iter()) {
            *place = stretch.0;
            count += 1;
        }
        act(&iovecs[..count])
    }
}

/// Room that a read fills.
#[derive(Debug)]
pub struct Scatter<'a> {
    parts: Parts<'a>,
    /// Made of a slice: nobody else can see or change it.
    own: bool,
    lent: PhantomData<&'a mut [u8]>,
}

// SAFETY: stands for a `&mut [u8]`, or for memory that the constructor's caller vouched for from any
// thread.
unsafe impl Send for Scatter<'_> {}

impl<'a> Scatter<'a> {
    /// Memory that others may see and change meanwhile.
    ///
    /// # Safety
    /// For as long as `'a` each stretch must be mapped and writable, and nothing in this process may
    /// hold a reference into it. Its bytes may change at any time.
    pub unsafe fn shared(stretches: &'a [Stretch]) -> Self {
        Self { parts: Parts::many(stretches), own: false, lent: PhantomData }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.parts.length
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `count` bytes, and the others.
    pub fn split_at(self, count: usize) -> (Self, Self) {
        let part = |parts| Self { parts, own: self.own, lent: PhantomData };
        (part(self.parts.take(count)), part(self.parts.skip(count)))
    }

    /// Bytes `from..to`, for a while.
    pub fn range(&mut self, from: usize, to: usize) -> Scatter<'_> {
        let parts = self.parts.skip(from).take(to.saturating_sub(from));
        Scatter { parts, own: self.own, lent: PhantomData }
    }

    /// All of it, for a while.
    pub fn again(&mut self) -> Scatter<'_> {
        Scatter { parts: self.parts, own: self.own, lent: PhantomData }
    }

    /// The bytes themselves, where nobody else can see them.
    pub fn own(&mut self) -> Option<&mut [u8]> {
        if !self.own {
            return None;
        }
        // SAFETY: made of one `&'a mut [u8]`, of which this is a part that is lent to nobody else:
        // splitting takes `self`, and every other way borrows it.
        Some(unsafe { std::slice::from_raw_parts_mut(self.parts.first.start(), self.parts.length) })
    }

    /// Copies `bytes` to its begin; what doesn't fit is left out.
    pub fn copy_from(&mut self, mut bytes: &[u8]) {
        for part in self.parts.iter() {
            let (now, later) = bytes.split_at(part.length().min(bytes.len()));
            // SAFETY: the part is writable, as the constructor says, and `now` is memory of our own,
            // so they don't overlap. That others change it meanwhile changes which bytes it holds.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), part.start(), now.len()) };
            bytes = later;
        }
    }

    /// Fills it with zeros.
    pub fn clear(&mut self) {
        for part in self.parts.iter() {
            // SAFETY: the part is writable, as the constructor says.
            unsafe { ptr::write_bytes(part.start(), 0, part.length()) };
        }
    }

    /// Calls `act` with the addresses, for a `readv`: the first ones, where there are many.
    pub fn with_iovecs<T>(&mut self, act: impl FnOnce(&[nix::libc::iovec]) -> T) -> T {
        self.parts.with_iovecs(act)
    }
}

impl<'a> From<&'a mut [u8]> for Scatter<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        let parts = Parts::one(bytes.as_mut_ptr(), bytes.len());
        Self { parts, own: true, lent: PhantomData }
    }
}

impl<'a, const N: usize> From<&'a mut [u8; N]> for Scatter<'a> {
    fn from(bytes: &'a mut [u8; N]) -> Self {
        bytes.as_mut_slice().into()
    }
}

impl<'a> From<&'a mut Vec<u8>> for Scatter<'a> {
    fn from(bytes: &'a mut Vec<u8>) -> Self {
        bytes.as_mut_slice().into()
    }
}

/// Bytes that a write takes.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    parts: Parts<'a>,
    lent: PhantomData<&'a [u8]>,
}

// SAFETY: stands for a `&[u8]`, or for memory that the constructor's caller vouched for from any
// thread.
unsafe impl Send for Gather<'_> {}
// SAFETY: as above; it is only read through.
unsafe impl Sync for Gather<'_> {}

impl<'a> Gather<'a> {
    /// Memory that others may change meanwhile.
    ///
    /// # Safety
    /// For as long as `'a` each stretch must be mapped and readable, and nothing in this process may
    /// hold a mutable reference into it. Its bytes may change at any time.
    pub unsafe fn shared(stretches: &'a [Stretch]) -> Self {
        Self { parts: Parts::many(stretches), lent: PhantomData }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.parts.length
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes `from..to`.
    pub fn range(self, from: usize, to: usize) -> Self {
        Self { parts: self.parts.skip(from).take(to.saturating_sub(from)), lent: PhantomData }
    }

    /// Copies its begin to `bytes`, as far as they reach. Two copies may differ where others change
    /// the memory.
    pub fn copy_to(self, mut bytes: &mut [u8]) {
        for part in self.parts.iter() {
            let (now, later) = bytes.split_at_mut(part.length().min(bytes.len()));
            // SAFETY: the part is readable, as the constructor says, and `now` is memory of our own,
            // so they don't overlap. That others change it meanwhile changes which bytes arrive.
            unsafe { ptr::copy_nonoverlapping(part.start(), now.as_mut_ptr(), now.len()) };
            bytes = later;
        }
    }

    /// Calls `act` with the addresses, for a `writev`: the first ones, where there are many.
    pub fn with_iovecs<T>(self, act: impl FnOnce(&[nix::libc::iovec]) -> T) -> T {
        self.parts.with_iovecs(act)
    }
}

impl<'a> From<&'a [u8]> for Gather<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        let parts = Parts::one(bytes.as_ptr().cast_mut(), bytes.len());
        Self { parts, lent: PhantomData }
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Gather<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        bytes.as_slice().into()
    }
}

impl<'a> From<&'a Vec<u8>> for Gather<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        bytes.as_slice().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stretches of these lengths over one buffer, with a byte that belongs to none between them.
    fn stretches(memory: &mut [u8], lengths: &[usize]) -> Vec<Stretch> {
        let mut at = 0;
        let start = memory.as_mut_ptr();
        let place = |&length: &usize| {
            let stretch = Stretch::new(start.wrapping_add(at), length);
            at += length + 1;
            stretch
        };
        lengths.iter().map(place).collect()
    }

    #[test]
    fn any_range_of_any_stretches_is_its_own_bytes() {
        for lengths in [&[9][..], &[1, 1, 7], &[0, 4, 0, 5, 0], &[3, 3, 3], &[]] {
            let total: usize = lengths.iter().sum();
            let mut memory = vec![0xee; total + lengths.len()];
            let list = stretches(&mut memory, lengths);
            for from in 0..=total {
                for to in from..=total {
                    // SAFETY: all stretches lie in `memory`, which nobody refers to meanwhile.
                    let mut room = unsafe { Scatter::shared(&list) };
                    room.clear();
                    let bytes: Vec<_> = (1..).take(to - from).collect();
                    room.range(from, to).copy_from(&bytes);
                    let (head, tail) = room.split_at(from);
                    assert_eq!((head.len(), tail.len()), (from, total - from));
                    // SAFETY: as above.
                    let all = unsafe { Gather::shared(&list) };
                    let mut found = vec![0xff; total];
                    all.copy_to(&mut found);
                    let expected = [&vec![0; from][..], &bytes, &vec![0; total - to]].concat();
                    assert_eq!(found, expected, "{lengths:?} {from}..{to}");
                    let mut part = vec![0xff; to - from];
                    all.range(from, to).copy_to(&mut part);
                    assert_eq!(part, bytes);
                    let lengths = |iovecs: &[nix::libc::iovec]| {
                        iovecs.iter().map(|iovec| iovec.iov_len).sum::<usize>()
                    };
                    assert_eq!(all.range(from, to).with_iovecs(lengths), to - from);
                }
            }
            assert_eq!(memory.iter().filter(|&&byte| byte == 0xee).count(), lengths.len());
        }
    }

    #[test]
    fn a_slice_is_lent_back_and_shared_memory_is_not() {
        let mut memory = [1, 2, 3, 4];
        let mut room = Scatter::from(&mut memory);
        assert_eq!(room.range(1, 3).own(), Some(&mut [2, 3][..]));
        let (_, mut tail) = room.split_at(3);
        assert_eq!(tail.own(), Some(&mut [4][..]));
        let list = stretches(&mut memory, &[4]);
        // SAFETY: the stretch lies in `memory`, which nobody refers to meanwhile.
        assert_eq!(unsafe { Scatter::shared(&list) }.own(), None);
    }

    #[test]
    fn the_kernel_gets_the_first_of_many() {
        let mut memory = [0; 300];
        let list = stretches(&mut memory, &[1; 100]);
        // SAFETY: all stretches lie in `memory`, which nobody refers to meanwhile.
        let all = unsafe { Gather::shared(&list) };
        assert_eq!(all.with_iovecs(<[_]>::len), MOST);
        assert_eq!(all.range(30, 32).with_iovecs(<[_]>::len), 2);
    }
}

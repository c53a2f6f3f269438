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

/// A range of bytes: of one slice, or of stretches that somebody else can see.
#[derive(Clone, Copy, Debug)]
struct Parts<'a> {
    place: Place<'a>,
    length: usize,
}

#[derive(Clone, Copy, Debug)]
enum Place<'a> {
    /// Begins here, in one slice.
    Slice(*mut u8),
    /// Begins so many bytes behind the begin of the first stretch.
    Shared(&'a [Stretch], usize),
}

/// Most stretches handed to the kernel in one call. A longer range makes a short read or write.
const MOST: usize = 64;

impl<'a> Parts<'a> {
    fn shared(stretches: &'a [Stretch]) -> Self {
        let length = stretches.iter().map(Stretch::length).sum();
        Self { place: Place::Shared(stretches, 0), length }
    }

    /// All but the first `count` bytes.
    #[inline]
    fn skip(self, count: usize) -> Self {
        let count = count.min(self.length);
        let place = match self.place {
            Place::Slice(start) => Place::Slice(start.wrapping_add(count)),
            Place::Shared(stretches, skipped) => skip(stretches, skipped + count),
        };
        Self { place, length: self.length - count }
    }

    /// Only the first `count` bytes.
    #[inline]
    fn take(self, count: usize) -> Self {
        Self { length: self.length.min(count), ..self }
    }

    /// Hands the stretches to `visit`, cut to the range.
    #[inline]
    fn each(self, mut visit: impl FnMut(Stretch)) {
        match self.place {
            Place::Slice(start) => visit(Stretch::new(start, self.length)),
            Place::Shared(stretches, skipped) => {
                cut(stretches, skipped, self.length).for_each(visit);
            }
        }
    }

    /// Calls `act` with the first stretches as the kernel takes them.
    #[inline]
    fn with_iovecs<T>(self, act: impl FnOnce(&[nix::libc::iovec]) -> T) -> T {
        match self.place {
            Place::Slice(start) => act(&[Stretch::new(start, self.length).0]),
            Place::Shared(stretches, skipped) => {
                let mut iovecs = [Stretch::new(ptr::dangling_mut(), 0).0; MOST];
                let mut count = 0;
                for (place, stretch) in iovecs.iter_mut().zip(cut(stretches, skipped, self.length))
                {
                    *place = stretch.0;
                    count += 1;
                }
                act(&iovecs[..count])
            }
        }
    }
}

/// Leaves out the stretches that lie wholly before byte `count`.
fn skip(mut stretches: &[Stretch], mut count: usize) -> Place<'_> {
    while let [first, rest @ ..] = stretches
        && count >= first.length()
    {
        count -= first.length();
        stretches = rest;
    }
    Place::Shared(stretches, count)
}

/// The stretches of `length` bytes from byte `skipped` on.
fn cut(
    stretches: &[Stretch],
    mut skipped: usize,
    mut length: usize,
) -> impl Iterator<Item = Stretch> {
    let part = move |stretch: &Stretch| {
        let start = stretch.start().wrapping_add(skipped);
        let part = Stretch::new(start, (stretch.length() - skipped).min(length));
        skipped = 0;
        length -= part.length();
        part
    };
    stretches.iter().map(part).filter(|part| part.length() > 0)
}

/// Room that a read fills.
#[derive(Debug)]
pub struct Scatter<'a> {
    parts: Parts<'a>,
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
        Self { parts: Parts::shared(stretches), lent: PhantomData }
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
    #[inline]
    pub fn split_at(self, count: usize) -> (Self, Self) {
        let part = |parts| Self { parts, lent: PhantomData };
        (part(self.parts.take(count)), part(self.parts.skip(count)))
    }

    /// Bytes `from..to`, for a while.
    #[inline]
    pub fn range(&mut self, from: usize, to: usize) -> Scatter<'_> {
        let parts = self.parts.skip(from).take(to.saturating_sub(from));
        Scatter { parts, lent: PhantomData }
    }

    /// All of it, for a while.
    #[inline]
    pub fn again(&mut self) -> Scatter<'_> {
        Scatter { parts: self.parts, lent: PhantomData }
    }

    /// The bytes themselves, where nobody else can see them.
    #[inline]
    pub fn own(&mut self) -> Option<&mut [u8]> {
        let Place::Slice(start) = self.parts.place else { return None };
        // SAFETY: made of one `&'a mut [u8]`, of which this is a part that is lent to nobody else:
        // splitting takes `self`, and every other way borrows it.
        Some(unsafe { std::slice::from_raw_parts_mut(start, self.parts.length) })
    }

    /// Copies `bytes` to its begin; what doesn't fit is left out.
    #[inline]
    pub fn copy_from(&mut self, mut bytes: &[u8]) {
        self.parts.each(|part| {
            let (now, later) = bytes.split_at(part.length().min(bytes.len()));
            // SAFETY: the part is writable, as the constructor says, and `now` is memory of our own,
            // so they don't overlap. That others change it meanwhile changes which bytes it holds.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), part.start(), now.len()) };
            bytes = later;
        });
    }

    /// Fills it with zeros.
    pub fn clear(&mut self) {
        self.parts.each(|part| {
            // SAFETY: the part is writable, as the constructor says.
            unsafe { ptr::write_bytes(part.start(), 0, part.length()) };
        });
    }

    /// Calls `act` with the addresses, for a `readv`: the first ones, where there are many.
    pub fn with_iovecs<T>(&mut self, act: impl FnOnce(&[nix::libc::iovec]) -> T) -> T {
        self.parts.with_iovecs(act)
    }
}

impl<'a> From<&'a mut [u8]> for Scatter<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        let parts = Parts { place: Place::Slice(bytes.as_mut_ptr()), length: bytes.len() };
        Self { parts, lent: PhantomData }
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
        Self { parts: Parts::shared(stretches), lent: PhantomData }
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

    /// The bytes themselves, where nobody can change them.
    #[inline]
    pub fn own(&self) -> Option<&'a [u8]> {
        let Place::Slice(start) = self.parts.place else { return None };
        // SAFETY: a part of the `&'a [u8]` that this was made of.
        Some(unsafe { std::slice::from_raw_parts(start, self.parts.length) })
    }

    /// Copies its begin to `bytes`, as far as they reach. Two copies may differ where others change
    /// the memory.
    pub fn copy_to(self, bytes: &mut [u8]) {
        let mut left = bytes;
        self.parts.each(|part| {
            let length = part.length().min(left.len());
            let (now, later) = std::mem::take(&mut left).split_at_mut(length);
            // SAFETY: the part is readable, as the constructor says, and `now` is memory of our own,
            // so they don't overlap. That others change it meanwhile changes which bytes arrive.
            unsafe { ptr::copy_nonoverlapping(part.start(), now.as_mut_ptr(), now.len()) };
            left = later;
        });
    }

    /// Calls `act` with the addresses, for a `writev`: the first ones, where there are many.
    pub fn with_iovecs<T>(self, act: impl FnOnce(&[nix::libc::iovec]) -> T) -> T {
        self.parts.with_iovecs(act)
    }
}

impl<'a> From<&'a [u8]> for Gather<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        let parts = Parts { place: Place::Slice(bytes.as_ptr().cast_mut()), length: bytes.len() };
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

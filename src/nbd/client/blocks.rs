//! The sizes of requests that a server takes ("Block size constraints").

use crate::nbd::proto::MAX_PAYLOAD;

/// Largest minimum that a server may have.
const MOST_MINIMUM: u32 = 64 << 10;

/// What offsets and lengths of requests are multiples of, and the most bytes in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    minimum: u64,
    most: u64,
}

impl Default for Blocks {
    /// What a server takes that says nothing.
    fn default() -> Self {
        Self { minimum: 1, most: MAX_PAYLOAD.into() }
    }
}

impl Blocks {
    /// Minimum, preferred and maximum size as the server sends them; none for such that can't be.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let [minimum, preferred, maximum] = match bytes.as_chunks() {
            ([minimum, preferred, maximum], []) => {
                [minimum, preferred, maximum].map(|bytes| u32::from_be_bytes(*bytes))
            }
            _ => return None,
        };
        let good = minimum.is_power_of_two() && minimum <= MOST_MINIMUM && maximum >= minimum;
        // Nothing is done by the preferred size: a request here is a large one anyway.
        (good && preferred >= minimum).then(|| {
            let most = maximum.min(MAX_PAYLOAD);
            Self { minimum: minimum.into(), most: (most - most % minimum).into() }
        })
    }

    /// The least range of whole blocks around one, in an export of `size` bytes: it ends with the
    /// export, whole block or not.
    pub fn around(self, offset: u64, length: u64, size: u64) -> (u64, u64) {
        let from = offset - offset % self.minimum;
        let end = (offset + length).checked_next_multiple_of(self.minimum);
        (from, end.map_or(size, |end| end.min(size)) - from)
    }

    /// The most bytes of one request.
    pub fn most(self) -> u64 {
        self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_can_not_be_are_refused() {
        let decode = |sizes: [u32; 3]| Blocks::decode(&sizes.map(u32::to_be_bytes).concat());
        assert_eq!(decode([512, 4096, 65536]), Some(Blocks { minimum: 512, most: 65536 }));
        assert_eq!(decode([1, 1, u32::MAX]), Some(Blocks::default()));
        assert_eq!(decode([4096, 4096, 10_000]), Some(Blocks { minimum: 4096, most: 8192 }));
        for wrong in [[0, 0, 0], [3, 4096, 65536], [1 << 17, 1 << 17, 1 << 20], [512, 512, 511]] {
            assert_eq!(decode(wrong), None, "{wrong:?}");
        }
        assert_eq!(decode([512, 1, 65536]), None);
        assert!(Blocks::decode(&[0; 11]).is_none() && Blocks::decode(&[1; 13]).is_none());
    }

    #[test]
    fn a_range_grows_to_whole_blocks_inside_the_export() {
        let blocks = Blocks { minimum: 4096, most: 65536 };
        assert_eq!(blocks.around(4096, 8192, 1 << 20), (4096, 8192));
        assert_eq!(blocks.around(5000, 1, 1 << 20), (4096, 4096));
        assert_eq!(blocks.around(4095, 2, 1 << 20), (0, 8192));
        assert_eq!(blocks.around(8192, 10, 8202), (8192, 10));
        assert_eq!(blocks.around(u64::MAX - 1, 1, u64::MAX), (u64::MAX - 4095, 4095));
    }
}

//! Sizes on the command line and in output, in powers of 1024 as qemu-img has them.

use std::str::FromStr;

use thinply::error::{Error, ErrorKind, Result};
use thinply::format::geometry::is_virtual_size;
use thinply::types::SECTOR_SIZE;

const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// A size in bytes, or a change of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This size.
    Exactly(u64),
    /// This much more.
    More(u64),
    /// This much less.
    Less(u64),
}

impl FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if let Some(more) = text.strip_prefix('+') {
            return parse(more).map(Self::More);
        }
        if let Some(less) = text.strip_prefix('-') {
            return parse(less).map(Self::Less);
        }
        parse(text).map(Self::Exactly)
    }
}

impl NewSize {
    /// The size that it makes of `current`.
    pub fn of(self, current: u64) -> Result<u64> {
        let size = match self {
            Self::Exactly(size) => Some(size),
            Self::More(more) => current.checked_add(more),
            Self::Less(less) => current.checked_sub(less),
        };
        let detail = || format!("that is no change of a size of {current} bytes");
        size.ok_or_else(|| Error::new(ErrorKind::InvalidInput, detail()))
    }
}

/// Reads `512`, `64K`, `1.5G`, `2GiB`. What a fraction leaves of a sector is rounded up.
pub fn parse(text: &str) -> std::result::Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write bytes, or a number with K, M, G, T, P or E");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.strip_suffix("iB").or(unit.strip_suffix('B')).unwrap_or(unit);
    let factor = match unit.to_ascii_uppercase().as_str() {
        "" => 1,
        unit => {
            let power =
                UNITS.iter().position(|known| unit == known.to_string()).ok_or_else(wrong)?;
            1_u128 << (10 * (power + 1))
        }
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || number.ends_with('.') || fraction.len() > 9 || fraction.contains('.') {
        return Err(wrong());
    }
    let whole: u128 = whole.parse().map_err(|_| wrong())?;
    let mut bytes = whole.checked_mul(factor).ok_or_else(wrong)?;
    if !fraction.is_empty() {
        let parts: u128 = fraction.parse().map_err(|_| wrong())?;
        let scale = 10_u128.pow(fraction.len() as u32);
        let part = (parts * factor).div_ceil(scale);
        bytes = (bytes + part).next_multiple_of(u128::from(SECTOR_SIZE));
    }
    u64::try_from(bytes).map_err(|_| wrong())
}

/// Refuses what `--size` says if no disk can have it, before anything is done.
pub fn check(size: Option<u64>) -> Result<()> {
    let refused = |error: Error| Error::new(ErrorKind::InvalidInput, format!("--size: {error}"));
    size.map_or(Ok(0), possible).map(drop).map_err(refused)
}

/// This size, if a disk can have it.
pub fn possible(size: u64) -> Result<u64> {
    if is_virtual_size(size) {
        return Ok(size);
    }
    let detail = format!("a disk of {size} bytes, expected a positive multiple of 512 up to 64P");
    Err(Error::new(ErrorKind::InvalidInput, detail))
}

/// A size for people: at most one digit behind the point, never rounded to something rounder.
pub fn human(bytes: u64) -> String {
    let mut unit = 0;
    while unit < UNITS.len() && bytes >> (10 * (unit + 1)) != 0 {
        unit += 1;
    }
    let Some(name) = unit.checked_sub(1).map(|unit| UNITS[unit]) else {
        return format!("{bytes} bytes");
    };
    let tenths = (u128::from(bytes) * 10) >> (10 * unit);
    let exact = (tenths << (10 * unit)) == u128::from(bytes) * 10;
    let about = if exact { "" } else { "about " };
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{about}{whole} {name}iB"),
        (whole, part) => format!("{about}{whole}.{part} {name}iB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            ("512", 512),
            ("10G", 10 << 30),
            ("512m", 512 << 20),
            ("1T", 1 << 40),
            ("1.5G", 3 << 29),
            ("1.1k", 1536),
            ("2GiB", 2 << 30),
            ("3KB", 3072),
            ("1.5", 512),
            ("15.5E", 31 << 59),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1.", ".5G", "1..5", "1.5.5", "1 G", "1X", "16E", "1e3", "0x10"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn changes_of_sizes_have_a_sign() {
        let of = |text: &str, current| text.parse::<NewSize>().unwrap().of(current).ok();
        assert_eq!(of("1K", 9), Some(1024));
        assert_eq!(of("+1K", 512), Some(1536));
        assert_eq!(of("-1K", 1536), Some(512));
        assert_eq!(of("-1K", 512), None);
        assert_eq!(of("+15E", u64::MAX), None);
        assert!("+-1".parse::<NewSize>().is_err());
    }

    #[test]
    fn sizes_for_people_do_not_hide_a_rest() {
        assert_eq!(human(0), "0 bytes");
        assert_eq!(human(1023), "1023 bytes");
        assert_eq!(human(10 << 30), "10 GiB");
        assert_eq!(human(3 << 29), "1.5 GiB");
        assert_eq!(human((1 << 20) + 512), "about 1 MiB");
        assert_eq!(human(u64::MAX), "about 15.9 EiB");
    }
}

//! What a source is. Its name or the user says so, never its bytes: whoever can write a raw disk
//! can make it begin like any image.

use std::path::Path;

use clap::ValueEnum;
use thinply::error::{Error, ErrorKind, Result};

/// A format that is read here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The disk's bytes
    Raw,
    /// A qcow2 image
    Qcow2,
    /// The descriptor of a VMDK image with flat extents
    Vmdk,
}

/// How images of other formats begin: format, offset, bytes.
const BEGINNINGS: [(&str, usize, &[u8]); 10] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("qed", 0, b"QED\0"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
];

impl Format {
    /// What the user said, or what the name ends with. Without either it is raw, if it doesn't
    /// begin like anything else.
    pub fn of(path: &Path, said: Option<Self>) -> Option<Self> {
        let extension = path.extension().and_then(|extension| extension.to_str());
        said.or(match extension {
            Some("qcow2") => Some(Self::Qcow2),
            Some("vmdk") => Some(Self::Vmdk),
            _ => None,
        })
    }

    /// A backing format as qcow2 headers name it.
    pub fn of_backing(name: &str) -> Option<Self> {
        Self::from_str(name, false).ok()
    }
}

/// Refuses to take a disk for raw that nobody called so, if it begins like an image of another
/// format.
pub fn check_raw(beginning: &[u8]) -> Result<()> {
    let begins =
        |at: usize, bytes: &[u8]| beginning.get(at..).is_some_and(|b| b.starts_with(bytes));
    let Some((name, ..)) = BEGINNINGS.iter().find(|(_, at, bytes)| begins(*at, bytes)) else {
        return Ok(());
    };
    let other = match Format::of_backing(name) {
        Some(_) => format!("say --format {name} if it is one"),
        None => serve_it(name),
    };
    let detail = format!("begins like a {name} image: {other}, or --format raw to take the bytes");
    Err(Error::new(ErrorKind::InvalidInput, detail))
}

/// How to get at what can't be read here.
pub fn serve_it(format: &str) -> String {
    format!(
        "serve it with `qemu-nbd --read-only --socket=/tmp/nbd.sock --format={format} SRC` and \
         import nbd+unix:///?socket=/tmp/nbd.sock"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_or_the_user_says_what_it_is() {
        let of = |name: &str, said| Format::of(Path::new(name), said);
        assert_eq!(of("a.qcow2", None), Some(Format::Qcow2));
        assert_eq!(of("a.vmdk", None), Some(Format::Vmdk));
        assert_eq!(of("qcow2", None), None);
        assert_eq!(of("a.qcow2", Some(Format::Raw)), Some(Format::Raw));
    }

    #[test]
    fn what_begins_like_an_image_is_no_raw_disk() {
        for (name, at, bytes) in BEGINNINGS {
            let disk = [&vec![0; at], bytes, &[0; 512]].concat();
            let message = check_raw(&disk).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
            assert!(
                message.contains("qemu-nbd") != Format::of_backing(name).is_some(),
                "{message}"
            );
        }
        for disk in [&b""[..], b"QFI", &[0; 4096], b"TPLYLIVE"] {
            check_raw(disk).unwrap();
        }
    }
}

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

/// How to get at a disk in something that is not one.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// It is read here, if the user says so.
    Say(Format),
    /// QEMU reads it, under this name.
    Serve(&'static str),
    /// This program writes what was compressed.
    Unpack(&'static str),
    /// The disk is a file in it.
    Extract(&'static str),
    /// It is ours.
    Export,
}

/// What a file is that begins, or ends, so: offset (from the end: of the last bytes), bytes.
type Sign = (&'static str, usize, &'static [u8], Way);

/// How others than raw disks begin.
const BEGINNINGS: [Sign; 25] = [
    ("a qcow2 image", 0, b"QFI\xfb", Way::Say(Format::Qcow2)),
    ("a vmdk image", 0, b"KDMV", Way::Say(Format::Vmdk)),
    ("a vmdk image", 0, b"COWD", Way::Say(Format::Vmdk)),
    ("a vmdk image", 0, b"# Disk DescriptorFile", Way::Say(Format::Vmdk)),
    ("a vhdx image", 0, b"vhdxfile", Way::Serve("vhdx")),
    ("a vpc image (VHD)", 0, VHD, Way::Serve("vpc")),
    ("a vdi image", 64, b"\x7f\x10\xda\xbe", Way::Serve("vdi")),
    ("a qed image", 0, b"QED\0", Way::Serve("qed")),
    ("a parallels image", 0, b"WithoutFreeSpace", Way::Serve("parallels")),
    ("a parallels image", 0, b"WithouFreSpacExt", Way::Serve("parallels")),
    ("gzip", 0, b"\x1f\x8b\x08", Way::Unpack("gzip -dc")),
    ("xz", 0, b"\xfd7zXZ\0", Way::Unpack("xz -dc")),
    ("zstd", 0, b"\x28\xb5\x2f\xfd", Way::Unpack("zstd -dc")),
    // The first frame of what pzstd writes.
    ("zstd", 0, b"\x50\x2a\x4d\x18", Way::Unpack("zstd -dc")),
    ("bzip2", 4, b"1AY&SY", Way::Unpack("bzip2 -dc")),
    ("bzip2", 4, b"\x17\x72\x45\x38\x50\x90", Way::Unpack("bzip2 -dc")),
    ("lz4", 0, b"\x04\x22\x4d\x18", Way::Unpack("lz4 -dc")),
    ("lzip", 0, b"LZIP\x01", Way::Unpack("lzip -dc")),
    ("lzop", 0, b"\x89LZO\0\r\n\x1a\n", Way::Unpack("lzop -dc")),
    ("a tar archive (an OVA is one)", 257, b"ustar", Way::Extract("tar -xf SRC")),
    ("a zip archive", 0, b"PK\x03\x04", Way::Extract("unzip SRC")),
    ("a 7z archive", 0, b"7z\xbc\xaf\x27\x1c", Way::Extract("7z x SRC")),
    ("an Android sparse image", 0, b"\x3a\xff\x26\xed\x01\0", Way::Unpack("simg2img SRC -")),
    // With version and size of the header: a disk may hold the magic alone.
    ("a layer of thinply's", 0, b"TPLYLIVE\x01\0\0\0\0\x10\0\0", Way::Export),
    ("a layer of thinply's", 0, b"TPLYPACK\x01\0\0\0\0\x10\0\0", Way::Export),
];

/// What a fixed VHD has behind the disk; it had 511 bytes once.
const VHD: &[u8] = b"conectix";

/// How others end: how many bytes before the end.
const ENDS: [Sign; 3] = [
    ("a vpc image (VHD)", 512, VHD, Way::Serve("vpc")),
    ("a vpc image (VHD)", 511, VHD, Way::Serve("vpc")),
    ("a dmg image", 512, b"koly\0\0\0\x04", Way::Serve("dmg")),
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

    /// Its name, as the user says it.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// A backing format as qcow2 headers name it.
    pub fn of_backing(name: &str) -> Option<Self> {
        Self::from_str(name, false).ok()
    }
}

/// Bytes at the beginning and at the end of a disk that tell what it may be.
pub const TELLING: usize = 512;

/// Refuses to take a disk for raw that nobody called so, if it begins like something else. `stream`
/// is what can only be read from beginning to end.
pub fn check_beginning(bytes: &[u8], stream: bool) -> Result<()> {
    let found = BEGINNINGS.iter().find(|(_, at, sign, _)| has(bytes, *at, sign));
    found.map_or(Ok(()), |(what, .., way)| refuse("begins", what, *way, stream))
}

/// As [`check_beginning`], of the last [`TELLING`] bytes, or of all of a shorter disk.
pub fn check_end(bytes: &[u8], stream: bool) -> Result<()> {
    let at = |back: usize| bytes.len().checked_sub(back);
    let found =
        ENDS.iter().find(|(_, back, sign, _)| at(*back).is_some_and(|at| has(bytes, at, sign)));
    found.map_or(Ok(()), |(what, .., way)| refuse("ends", what, *way, stream))
}

fn has(bytes: &[u8], at: usize, sign: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|bytes| bytes.starts_with(sign))
}

fn refuse(verb: &str, what: &str, way: Way, stream: bool) -> Result<()> {
    let way = match way {
        Way::Say(_) if stream => "save it as a file and import that".into(),
        Way::Say(format) => format!("say --format {} if it is one", format.name()),
        Way::Serve(format) => serve_it(format),
        Way::Unpack(_) if stream => "unpack it first".into(),
        Way::Unpack(program) => {
            let program =
                if program.contains("SRC") { program.into() } else { format!("{program} SRC") };
            format!("import what `{program}` writes (`{program} | thinply import - FILE`)")
        }
        Way::Extract(program) => format!("import a disk that `{program}` takes out of it"),
        Way::Export => "`thinply export` makes a raw disk of one".into(),
    };
    let detail = format!("{verb} like {what}: {way}, or --format raw to take the bytes");
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
    fn what_begins_or_ends_like_something_else_is_no_raw_disk() {
        for (what, at, sign, way) in BEGINNINGS {
            let disk = [&vec![0; at], sign, &[0; 512]].concat();
            for stream in [false, true] {
                let message = check_beginning(&disk, stream).unwrap_err().to_string();
                assert!(message.contains(what), "{message}");
                let serves = matches!(way, Way::Serve(_));
                assert_eq!(message.contains("qemu-nbd"), serves, "{message}");
            }
        }
        for (what, back, sign, _) in ENDS {
            let disk = [&[0; 1000], sign, &vec![0; back - sign.len()]].concat();
            let message = check_end(&disk, true).unwrap_err().to_string();
            assert!(message.contains(what), "{message}");
            check_end(&disk[1..disk.len() - 2], false).unwrap();
        }
        for disk in [&b""[..], b"QFI", &[0; 4096], b"TPLY", b"BZh9", b"conecti"] {
            check_beginning(disk, false).unwrap();
            check_end(disk, false).unwrap();
        }
    }
}

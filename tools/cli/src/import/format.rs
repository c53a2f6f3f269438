//! What a source is. The user says so, or its bytes do. Whoever can write a raw disk can make it begin
//! like any image, so that it is not enough for a source that is called raw, or that is a device; and
//! nothing becomes a raw disk that begins like something else, or that is called an image.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use clap::ValueEnum;
use thinply::error::{Error, ErrorKind, Result};

/// How a qcow2 image begins.
pub const QCOW2: &[u8] = b"QFI\xfb";
/// How a sparse extent of a VMDK image begins.
pub const VMDK_SPARSE: &[u8] = b"KDMV";
/// How the descriptor of a VMDK image begins.
pub const VMDK_DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";
/// How the footer of a VHD image begins, and the copy that one of growing size has in front.
pub const VHD: &[u8] = b"conectix";

/// A format that is read here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The disk's bytes
    Raw,
    /// A qcow2 image
    Qcow2,
    /// A VMDK image: the file that is all of it, or the descriptor of several
    Vmdk,
    /// A VHD image, of fixed or growing size
    #[value(alias = "vpc")]
    Vhd,
    /// A VHDX image
    Vhdx,
    /// A VDI image
    Vdi,
}

/// How to get at a disk in something that is not one.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// It is read here.
    Read(Format),
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
    ("a qcow2 image", 0, QCOW2, Way::Read(Format::Qcow2)),
    ("a VMDK image", 0, VMDK_SPARSE, Way::Read(Format::Vmdk)),
    ("a VMDK image", 0, VMDK_DESCRIPTOR, Way::Read(Format::Vmdk)),
    ("a VMDK image of ESX", 0, b"COWD", Way::Serve("vmdk")),
    ("a VHDX image", 0, b"vhdxfile", Way::Read(Format::Vhdx)),
    ("a VHD image", 0, VHD, Way::Read(Format::Vhd)),
    ("a VDI image", 64, b"\x7f\x10\xda\xbe", Way::Read(Format::Vdi)),
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

/// How others end: how many bytes before the end.
const ENDS: [Sign; 3] = [
    // What one of fixed size has behind the disk; it had 511 bytes once.
    ("a VHD image", 512, VHD, Way::Read(Format::Vhd)),
    ("a VHD image", 511, VHD, Way::Read(Format::Vhd)),
    ("a dmg image", 512, b"koly\0\0\0\x04", Way::Serve("dmg")),
];

/// What the name of a file says.
pub fn by_name(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "raw" => Some(Format::Raw),
        "qcow2" => Some(Format::Qcow2),
        "vmdk" => Some(Format::Vmdk),
        "vhd" | "vpc" => Some(Format::Vhd),
        "vhdx" => Some(Format::Vhdx),
        "vdi" => Some(Format::Vdi),
        _ => None,
    }
}

impl Format {
    /// What the user said; else what a file's bytes say, unless its name says raw; else what its name
    /// says. Without any of it, it is raw if it looks like nothing else.
    pub fn of(path: &Path, said: Option<Self>) -> Result<Option<Self>> {
        let named = by_name(path).filter(|format| *format != Self::Raw);
        if said.is_some() || !path.is_file() {
            return Ok(said.or(named));
        }
        let failed = |error| Error::io(error, "looking what it is").in_file(path);
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut bytes = vec![0; length.min(TELLING as u64) as usize];
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        let beginning = found(&BEGINNINGS, &bytes, Some);
        let last = length - bytes.len() as u64;
        file.read_exact_at(&mut bytes, last).map_err(failed)?;
        let end = found(&ENDS, &bytes, |back| bytes.len().checked_sub(back));
        match beginning.or(end) {
            Some((.., Way::Read(format))) if by_name(path) != Some(Self::Raw) => Ok(Some(*format)),
            _ => Ok(named),
        }
    }

    /// Its name, as the user says it.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// As QEMU calls it.
    pub fn of_qemu(self) -> String {
        if self == Self::Vhd { "vpc".into() } else { self.name() }
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
    let found = found(&BEGINNINGS, bytes, Some);
    found.map_or(Ok(()), |(what, .., way)| refuse("begins", what, *way, stream))
}

/// As [`check_beginning`], of the last [`TELLING`] bytes, or of all of a shorter disk.
pub fn check_end(bytes: &[u8], stream: bool) -> Result<()> {
    let found = found(&ENDS, bytes, |back| bytes.len().checked_sub(back));
    found.map_or(Ok(()), |(what, .., way)| refuse("ends", what, *way, stream))
}

/// What a file with this beginning is compressed with, if it is.
pub fn compressed(beginning: &[u8]) -> Option<&'static str> {
    match found(&BEGINNINGS, beginning, Some) {
        Some((what, .., Way::Unpack(_))) => Some(what),
        _ => None,
    }
}

/// The sign that bytes have, where its offset is in them.
fn found<'a>(
    signs: &'a [Sign],
    bytes: &[u8],
    place: impl Fn(usize) -> Option<usize>,
) -> Option<&'a Sign> {
    signs.iter().find(|(_, at, sign, _)| place(*at).is_some_and(|at| has(bytes, at, sign)))
}

fn has(bytes: &[u8], at: usize, sign: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|bytes| bytes.starts_with(sign))
}

fn refuse(verb: &str, what: &str, way: Way, stream: bool) -> Result<()> {
    let way = match way {
        Way::Read(_) if stream => "save it as a file and import that".into(),
        Way::Read(format) => format!("say --format {} if it is one", format.name()),
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
    fn the_user_or_the_bytes_say_what_it_is_and_the_name_what_it_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str, bytes: &[u8], said| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            Format::of(&path, said).unwrap()
        };
        let fixed = [&[7; 5000], VHD, &[0; 504]].concat();
        let vdi = [&[b' '; 64], &b"\x7f\x10\xda\xbe"[..]].concat();
        for (bytes, format) in [
            (&b"QFI\xfb..."[..], Format::Qcow2),
            (b"KDMV", Format::Vmdk),
            (b"# Disk DescriptorFile\n", Format::Vmdk),
            (b"vhdxfile", Format::Vhdx),
            (b"conectix", Format::Vhd),
            (&fixed, Format::Vhd),
            (&vdi, Format::Vdi),
        ] {
            for name in ["a", "a.img", "a.qcow2", "a.vhdx"] {
                assert_eq!(of(name, bytes, None), Some(format), "{name}");
                assert_eq!(of(name, bytes, Some(Format::Raw)), Some(Format::Raw));
            }
            // It is refused as a raw disk then.
            assert_eq!(of("a.raw", bytes, None), None);
        }
        for (name, format) in [
            ("a.qcow2", Some(Format::Qcow2)),
            ("a.vmdk", Some(Format::Vmdk)),
            ("a.vhd", Some(Format::Vhd)),
            ("a.vhdx", Some(Format::Vhdx)),
            ("a.vdi", Some(Format::Vdi)),
            ("a.raw", None),
            ("a.img", None),
            ("qcow2", None),
        ] {
            for bytes in [&[][..], &[0; 600], b"\x1f\x8b\x08"] {
                assert_eq!(of(name, bytes, None), format, "{name}");
            }
        }
        // Neither a device nor what is not there is looked at.
        assert_eq!(Format::of(Path::new("/dev/null"), None).unwrap(), None);
        assert_eq!(Format::of(Path::new("/nowhere/a.vmdk"), None).unwrap(), Some(Format::Vmdk));
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

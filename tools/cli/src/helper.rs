//! `mount.thinply`: the command under the name by which mount(8), and so fstab, runs it.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// The name.
const HELPER: &str = "mount.thinply";
/// Options that are for mount(8) and what reads fstab.
const NOT_OURS: [&str; 11] = [
    "_netdev", "auto", "noauto", "nofail", "user", "nouser", "users", "nousers", "owner", "group",
    "defaults",
];

/// The arguments of `thinply mount` for those of the helper: `mount.thinply SOURCE DIR [-sfnv] [-N NAMESPACE]
/// [-o OPTIONS] [-t TYPE]`. Nothing where the command has its usual name.
pub fn arguments(given: &[OsString]) -> Option<Vec<OsString>> {
    let (name, given) = given.split_first()?;
    if Path::new(name).file_name() != Some(OsStr::new(HELPER)) {
        return None;
    }
    let mut out = vec!["thinply".into(), "mount".into()];
    let mut operands = Vec::new();
    let mut given = given.iter();
    while let Some(argument) = given.next() {
        match argument.to_str() {
            Some("-o") => {
                let options = given.next().map(|text| text.to_string_lossy().into_owned());
                options
                    .iter()
                    .flat_map(|text| text.split(','))
                    .for_each(|word| option(word, &mut out));
            }
            Some("-t" | "-N") => drop(given.next()),
            Some(flags) if flags.len() > 1 && flags.starts_with('-') => {
                if flags.contains('f') {
                    // Nothing is to be done but to say what would be.
                    std::process::exit(0);
                }
            }
            _ => operands.push(argument.clone()),
        }
    }
    out.push("--".into());
    out.extend(operands);
    Some(out)
}

/// Adds what an option says.
fn option(word: &str, out: &mut Vec<OsString>) {
    let (name, value) =
        word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
    match (name, value) {
        ("trust", None) => out.push("--trust".into()),
        ("root" | "layers" | "partition", Some(value)) => {
            out.extend([format!("--{name}").into(), value.into()]);
        }
        _ if word.is_empty() || word.starts_with("x-") || NOT_OURS.contains(&name) => {}
        _ => out.extend(["-o".into(), word.into()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_mount_says_becomes_the_verb() {
        let translated = |line: &str| {
            let given: Vec<_> = line.split(' ').map(OsString::from).collect();
            arguments(&given).map(|out| out.join(OsStr::new(" ")).into_string().unwrap())
        };
        for (line, wanted) in [
            (
                "/sbin/mount.thinply container/web /mnt -o rw,root=/s,trust,noatime,_netdev",
                "thinply mount -o rw --root /s --trust -o noatime -- container/web /mnt",
            ),
            (
                "mount.thinply -sn -t thinply disk.tply /mnt -o partition=2,x-a=b,data=journal",
                "thinply mount --partition 2 -o data=journal -- disk.tply /mnt",
            ),
            ("mount.thinply a b", "thinply mount -- a b"),
        ] {
            assert_eq!(translated(line).unwrap(), wanted);
        }
        assert_eq!(translated("/usr/bin/thinply mount a b"), None);
    }
}

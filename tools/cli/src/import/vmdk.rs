//! Descriptors of VMDK images as VMware's programs write them, put as the library reads them.

/// What the library doesn't know and a reader needn't.
const IGNORED: [&str; 2] = ["encoding", "changeTrackPath"];

/// The same descriptor in UTF-8, with flat extents called so, and without what doesn't say where the
/// disk's bytes are.
pub fn plain(descriptor: &[u8]) -> String {
    // A name in another encoding is only shown, or matched by what the user calls it.
    let text = str::from_utf8(descriptor)
        .map_or_else(|_| descriptor.iter().copied().map(char::from).collect(), ToOwned::to_owned);
    let lines = text.lines().filter(|line| !is_ignored(line)).map(|line| {
        // An extent on VMware's own file system: access, sectors, type, name.
        match line.split_whitespace().nth(2) {
            Some("VMFS") => line.replacen("VMFS", "FLAT", 1),
            _ => line.to_owned(),
        }
    });
    lines.map(|line| line + "\n").collect()
}

fn is_ignored(line: &str) -> bool {
    let Some((key, value)) = line.split_once('=') else { return false };
    match key.trim() {
        // One of the storage's own making has its bytes elsewhere.
        "isNativeSnapshot" => value.trim().trim_matches('"') == "no",
        key => IGNORED.contains(&key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_vmware_adds_is_left_out_or_put_otherwise() {
        let text = "# Disk DescriptorFile\r\nversion=1\r\nencoding = \"windows-1252\"\r\n\
                    isNativeSnapshot=\"no\"\nchangeTrackPath=\"a-ctk.vmdk\"\n\
                    RW 8 VMFS \"VMFS.vmdk\"\nRW 8 FLAT \"VMFS\" 0\nddb.encoding = \"x\"\n";
        let wanted = "# Disk DescriptorFile\nversion=1\n\
                      RW 8 FLAT \"VMFS.vmdk\"\nRW 8 FLAT \"VMFS\" 0\nddb.encoding = \"x\"\n";
        assert_eq!(plain(text.as_bytes()), wanted);
        assert_eq!(plain(b"isNativeSnapshot=yes\n"), "isNativeSnapshot=yes\n");
        assert_eq!(plain(b"RW 8 FLAT \"\xfc.vmdk\" 0"), "RW 8 FLAT \"\u{fc}.vmdk\" 0\n");
    }
}

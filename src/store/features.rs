//! `features`: what a program must know to read the store, and to change it.

use serde::{Deserialize, Serialize};

use super::{Store, check_name, files, json};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Folder;

const FILE: &str = "features";
const VERSION: u64 = 1;
/// Most names in a list.
const MAX_NAMES: usize = 64;
/// What this version knows.
const KNOWN: &[&str] = &[];

/// What a program can't do that doesn't know a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Read the store, let alone change it.
    Read,
    /// Change the store.
    Write,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Features {
    version: u64,
    read: Vec<String>,
    write: Vec<String>,
}

impl Default for Features {
    fn default() -> Self {
        Self { version: VERSION, read: Vec::new(), write: Vec::new() }
    }
}

/// The version alone: the rest of another one may look like anything.
#[derive(Deserialize)]
struct Version {
    version: u64,
}

impl Features {
    /// Those of the store whose root this is; none where there is no such file.
    fn load(root: &dyn Folder) -> Result<Self> {
        match files::read_small(root, FILE)? {
            Some(bytes) => {
                Self::parse(&bytes).map_err(|error| error.in_file(root.path().join(FILE)))
            }
            None => Ok(Self::default()),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let Version { version } = json::parse(bytes)?;
        if version != VERSION {
            let detail = format!("features of version {version}, expected {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, detail));
        }
        let features: Self = json::parse(bytes)?;
        features.check_bounds()?;
        Ok(features)
    }

    fn check_bounds(&self) -> Result<()> {
        for list in [&self.read, &self.write] {
            if list.len() > MAX_NAMES {
                let detail = format!("{} names, expected at most {MAX_NAMES}", list.len());
                return Err(Error::new(ErrorKind::Corrupt, detail));
            }
            for name in list {
                check_name("a feature", name)
                    .map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))?;
            }
        }
        Ok(())
    }

    /// A name that has to be known for this, and isn't.
    fn unknown(&self, need: Need) -> Option<&str> {
        let write = match need {
            Need::Read => &[][..],
            Need::Write => &self.write,
        };
        let mut names = self.read.iter().chain(write).map(String::as_str);
        names.find(|name| !KNOWN.contains(name))
    }
}

/// Whether this version may read or change the store whose root this is.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where it doesn't know what it must; [`ErrorKind::Corrupt`].
pub(super) fn check(root: &dyn Folder, need: Need) -> Result<()> {
    match Features::load(root)?.unknown(need) {
        None => Ok(()),
        Some(name) => {
            let act = match need {
                Need::Read => "be read",
                Need::Write => "be changed",
            };
            let detail = format!(
                "the store has the feature {name:?}, so it can only {act} by a later version of \
                 thinply"
            );
            Err(Error::new(ErrorKind::Unsupported, detail).in_file(root.path()))
        }
    }
}

impl Store {
    /// Keeps programs off that don't know `feature`, from now on: durably, so that its first file may
    /// be made as soon as this has returned.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is no name; [`ErrorKind::Limit`]; host errors.
    pub fn require(&self, feature: &str, need: Need) -> Result<()> {
        check_name("a feature", feature)?;
        let _guard = self.lock()?;
        let mut features = Features::load(self.root())?;
        let list = match need {
            Need::Read => &mut features.read,
            Need::Write => &mut features.write,
        };
        if !list.iter().any(|name| name == feature) {
            if list.len() == MAX_NAMES {
                let detail = format!("a store with more than {MAX_NAMES} features");
                return Err(Error::new(ErrorKind::Limit, detail));
            }
            list.push(feature.to_owned());
        }
        // A name that is there may be so in the page cache alone, from a program that was killed.
        files::replace(self.root(), FILE, &json::canonical(&features)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::storage::{Access, MemoryFolder, write_all_at};
    use crate::store::{DiskKind, DiskName, Folders};

    fn unknown(bytes: &str) -> Result<[Option<String>; 2]> {
        let features = Features::parse(bytes.as_bytes())?;
        Ok([Need::Read, Need::Write].map(|need| features.unknown(need).map(str::to_owned)))
    }

    #[test]
    fn a_name_to_be_known_for_reading_is_to_be_known_for_writing_too() {
        let name = |text: &str| Some(text.to_owned());
        let found =
            |read, write| unknown(&format!(r#"{{"read":{read},"version":1,"write":{write}}}"#));
        assert_eq!(found("[]", "[]").unwrap(), [None, None]);
        assert_eq!(found("[]", r#"["lazy"]"#).unwrap(), [None, name("lazy")]);
        assert_eq!(found(r#"["lazy"]"#, "[]").unwrap(), [name("lazy"), name("lazy")]);
    }

    #[test]
    fn a_store_opens_unless_reading_needs_a_name_that_is_not_known() {
        let folder = || Arc::new(MemoryFolder::new("m")) as Arc<dyn Folder>;
        let (root, blobs, containers, volumes) = (folder(), folder(), folder(), folder());
        let folders = Folders { root, blobs, containers, volumes };
        let store = Store::over(folders.clone()).unwrap();
        assert!(!store.root().list().unwrap().contains(&FILE.to_owned()), "nobody needs it yet");
        store.create_volume("data", 4096).unwrap();
        store.require("tidy", Need::Write).unwrap();
        let store = Store::over(folders.clone()).unwrap();
        assert_eq!(store.volumes().unwrap().good.len(), 1);
        let error = store.create_volume("more", 4096).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("\"tidy\""), "{error}");

        let replace = |text: &[u8]| {
            store.root().remove(FILE).unwrap();
            write_all_at(&*store.root().create(FILE).unwrap(), text, 0).unwrap();
        };
        replace(br#"{"read":["lazy"],"version":1,"write":[]}"#);
        assert_eq!(Store::over(folders.clone()).unwrap_err().kind(), ErrorKind::Unsupported);
        let disk = DiskName::new(DiskKind::Volume, "data").unwrap();
        let error = store.open_disk(&disk, Access::Read).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        replace(b"nonsense");
        let error = Store::over(folders).unwrap_err();
        assert_eq!((error.kind(), error.path()), (ErrorKind::Corrupt, Some("m/features".as_ref())));
    }

    #[test]
    fn what_is_no_list_of_names_is_corrupt_and_another_version_unsupported() {
        let many = vec!["a"; MAX_NAMES + 1];
        for odd in [
            String::new(),
            "[]".into(),
            "{}".into(),
            r#"{"version":1}"#.into(),
            r#"{"version":-1,"read":[],"write":[]}"#.into(),
            r#"{"version":1,"read":[],"write":[],"more":[]}"#.into(),
            r#"{"version":1,"read":[],"write":["../a"]}"#.into(),
            r#"{"version":1,"read":[""],"write":[]}"#.into(),
            r#"{"version":1,"read":"a","write":[]}"#.into(),
            format!(r#"{{"version":1,"read":[],"write":{many:?}}}"#),
            "[".repeat(100_000),
        ] {
            assert_eq!(unknown(&odd).unwrap_err().kind(), ErrorKind::Corrupt, "{odd:.60}");
        }
        let later = r#"{"version":2,"gone":{}}"#;
        assert_eq!(unknown(later).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

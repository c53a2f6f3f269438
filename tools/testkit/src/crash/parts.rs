//! Several folders on one disk: names of a part begin with its prefix. What one folder syncs makes
//! nothing durable in another.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thinply::storage::{Access, Folder, Rights, Storage};

use super::folder::CrashFolder;

#[derive(Clone, Debug)]
pub struct Part {
    whole: CrashFolder,
    prefix: &'static str,
    path: PathBuf,
}

impl Part {
    /// The folder of the files of `whole` whose names begin with `prefix`.
    pub fn folder(whole: &CrashFolder, prefix: &'static str) -> Arc<dyn Folder> {
        let path = Path::new("crash").join(prefix.trim_end_matches('/'));
        Arc::new(Self { whole: whole.clone(), prefix, path })
    }

    fn inside(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl Folder for Part {
    fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn Storage>> {
        self.whole.open(&self.inside(name), access)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.whole.create(&self.inside(name))
    }

    fn creating(&self, _: Rights) -> Arc<dyn Folder> {
        Arc::new(self.clone())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let names = self.whole.list()?;
        Ok(names.iter().filter_map(|name| name.strip_prefix(self.prefix)).map(Into::into).collect())
    }

    fn same_file(&self, a: &str, b: &str) -> io::Result<bool> {
        self.whole.same_file(&self.inside(a), &self.inside(b))
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.whole.link(&self.inside(from), &self.inside(to))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.whole.rename(&self.inside(from), &self.inside(to))
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        self.whole.rename_new(&self.inside(from), &self.inside(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.whole.remove(&self.inside(name))
    }

    fn remove_folder(&self, name: &str) -> io::Result<()> {
        self.whole.remove_folder(&self.inside(name))
    }

    fn sync(&self) -> io::Result<()> {
        self.whole.sync_names(self.prefix)
    }
}

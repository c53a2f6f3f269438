//! `thinply volume`

use clap::{Args, Subcommand};
use serde::Serialize;
use thinply::device::Device;
use thinply::error::{Error, Result};
use thinply::storage::Access;
use thinply::store::{DiskKind, DiskName, Store, Survey, Volume};

use crate::import::open_raw;
use crate::io::ext4::{make_empty_ext4, temporary};
use crate::io::output::Output;
use crate::io::size;
use crate::io::table::{self, ago, short};
use crate::options::StoreArg;
use crate::verbs::disks::remove_disks;
use crate::verbs::{Answer, Outcome, tell};

/// Make and remove volumes: disks that no image lies under.
///
/// A volume has one writer, or many readers: a file system on a disk that two write to would be
/// destroyed, so the second one is refused.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  thinply volume create --size 10G data
  thinply volume ls")]
pub struct VolumeVerbs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(CreateVolume),
    Ls(ListVolumes),
    Rm(RemoveVolumes),
    Inspect(InspectVolumes),
}

impl VolumeVerbs {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        match &self.verb {
            Verb::Create(verb) => verb.run(),
            Verb::Ls(verb) => verb.run(),
            Verb::Rm(verb) => verb.run(),
            Verb::Inspect(verb) => verb.run(),
        }
    }
}

/// Make an empty volume, or one with an empty file system.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  thinply volume create --size 10G --fs ext4 data
  thinply mount volume/data /mnt")]
struct CreateVolume {
    #[command(flatten)]
    store: StoreArg,
    /// Size of the disk
    #[arg(long, value_name = "S", value_parser = size::parse)]
    size: u64,
    /// Make a file system on it (needs mke2fs)
    #[arg(long, value_name = "TYPE", value_parser = ["ext4"])]
    fs: Option<String>,
    /// Its name
    name: String,
}

impl CreateVolume {
    fn run(&self) -> Outcome {
        size::check(Some(self.size))?;
        let store = self.store.open_or_make()?;
        store.create_volume(&self.name, self.size)?;
        if self.fs.is_some() {
            let disk = DiskName::new(DiskKind::Volume, &self.name)?;
            // One without what was asked for is no use.
            fill(&store, &disk).inspect_err(|_| drop(store.remove_disk(&disk)))?;
        }
        let mut output = Output::new();
        output.line(&self.name)?;
        output.print()?;
        Ok(Answer::Yes)
    }
}

/// Makes an empty file system on a new volume.
fn fill(store: &Store, disk: &DiskName) -> Result<()> {
    let raw = temporary(store.path())?;
    let volume = store.open_disk(disk, Access::Write)?;
    let size = volume.size();
    let sized = raw.as_file().set_len(size);
    let copied = sized
        .map_err(|error| Error::io(error, "making a temporary file"))
        .and_then(|()| make_empty_ext4(raw.path()))
        .and_then(|()| open_raw(raw.path())?.copy_to(&volume, Some(size), 0));
    let closed = volume.close();
    copied.and(closed)?;
    store.note_made_volume(&disk.name)
}

#[derive(Debug, Serialize)]
struct Facts<'a> {
    name: &'a str,
    created: &'a str,
    size: u64,
    virtual_size: u64,
    export: String,
}

impl<'a> From<&'a Volume> for Facts<'a> {
    fn from(volume: &'a Volume) -> Self {
        Self {
            name: &volume.name,
            created: &volume.created,
            size: volume.size,
            virtual_size: volume.virtual_size,
            export: format!("volume/{}", volume.name),
        }
    }
}

/// List the volumes.
///
/// Those that are damaged are told of on standard error, and the exit code is 1 then.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply volume ls")]
struct ListVolumes {
    #[command(flatten)]
    store: StoreArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl ListVolumes {
    fn run(&self) -> Outcome {
        let Survey { good: volumes, bad } = self.store.open()?.volumes()?;
        let mut output = Output::new();
        if self.json {
            output.json(&volumes.iter().map(Facts::from).collect::<Vec<_>>())?;
        } else {
            let rows: Vec<_> = volumes
                .iter()
                .map(|v| {
                    vec![v.name.clone(), ago(&v.created), short(v.size), short(v.virtual_size)]
                })
                .collect();
            let heading = ["VOLUME NAME", "CREATED", "SIZE", "DEVICE"];
            table::print(&mut output, &heading, &rows)?;
        }
        output.print()?;
        Ok(tell(&bad))
    }
}

/// Remove volumes and all that is on them.
///
/// A volume that somebody has open is refused.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply volume rm data")]
struct RemoveVolumes {
    #[command(flatten)]
    store: StoreArg,
    /// Their names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl RemoveVolumes {
    fn run(&self) -> Outcome {
        remove_disks(&self.store, DiskKind::Volume, &self.names)
    }
}

/// Tell all about volumes, in JSON.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply volume inspect data")]
struct InspectVolumes {
    #[command(flatten)]
    store: StoreArg,
    /// Their names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl InspectVolumes {
    fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let volumes = self.names.iter().map(|name| store.volume(name));
        let volumes = volumes.collect::<thinply::error::Result<Vec<_>>>()?;
        let mut output = Output::new();
        output.json(&volumes.iter().map(Facts::from).collect::<Vec<_>>())?;
        output.print()?;
        Ok(Answer::Yes)
    }
}

//! `thinply demo`: the main job on real input, in a temporary folder.

mod mount;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use clap::Args;
use thinply::chain::{Chain, Gate, Parent, create, seal};
use thinply::device::Device;
use thinply::error::{Error, ErrorKind, Result};
use thinply::inspect;
use thinply::nbd::client::Client;
use thinply::nbd::server::{Listener, Server, ServerConfig};
use thinply::nbd::{Address, Place};
use thinply::serve::{Opened, Served, Table};
use thinply::storage::{Access, FileFolder, Folder};

use crate::io::ext4::make_ext4;
use crate::io::pump::is_zero;
use crate::io::size::human;
use crate::io::table::short;
use crate::verbs::{Answer, Outcome};

const CONTAINERS: usize = 5;
/// What a container may cost before its first write.
const LARGEST_START: u64 = 16 << 10;
const CHUNK: usize = 1 << 20;
/// Trees that a Debian system has, the first one there is taken.
const TREES: [&str; 3] = ["/usr/share/perl", "/usr/share/doc", "/etc"];

/// Show the main job on real input, in a temporary folder.
///
/// Builds a base image from a file tree (with mke2fs; else from a generated disk), starts five
/// containers over it, writes to each over NBD, mounts one where this machine can, checks
/// everything, shows what each costs, and cleans up.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  thinply demo --tree /usr/share/doc")]
pub struct Demo {
    /// The file tree that becomes the base image.
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
}

/// The demo's folder and what is in it.
struct Stage {
    path: PathBuf,
    folder: Arc<dyn Folder>,
    layers: Arc<Gate>,
}

fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::io(error, what)
}

fn wrong(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, detail)
}

impl Demo {
    /// Runs the demo; fails where anything is not as it should be.
    pub fn run(&self) -> Outcome {
        let start = Instant::now();
        let dir = tempfile::Builder::new()
            .prefix("thinply-demo-")
            .tempdir()
            .map_err(host("making a temporary folder"))?;
        let stage = Stage {
            path: dir.path().to_owned(),
            folder: Arc::new(FileFolder::new(dir.path())),
            layers: Arc::default(),
        };
        let (parent, file_system) = stage.build_base(self.tree.as_deref())?;
        let base = stage.digest("base.tply")?;

        stage.start_containers(&parent)?;
        stage.write_over_nbd(&parent)?;
        if file_system {
            stage.mount_first()?;
        }
        stage.check(&base)?;
        stage.show_costs(&parent)?;

        let used = stage.disk_use()?;
        dir.close().map_err(host("removing the temporary folder"))?;
        println!(
            "\nEverything is as it should be, and removed again: {:.1} s, {} of disk at most.",
            start.elapsed().as_secs_f64(),
            human(used)
        );
        Ok(Answer::Yes)
    }
}

impl Stage {
    /// Makes `base.tply` from a file tree where mke2fs is there, else from a generated disk; says
    /// whether it holds a file system.
    fn build_base(&self, tree: Option<&Path>) -> Result<(Parent, bool)> {
        if let Some(missing) = tree.filter(|tree| !tree.is_dir()) {
            return Err(Error::new(ErrorKind::NotFound, "not a folder").in_file(missing));
        }
        let raw = self.path.join("base.raw");
        let tree = tree.or_else(|| TREES.iter().map(Path::new).find(|tree| tree.is_dir()));
        let no_tree = || Error::new(ErrorKind::NotFound, "there is no file tree to take");
        let built = tree.ok_or_else(no_tree).and_then(|tree| {
            make_ext4(&raw, tree, None)?;
            Ok(tree)
        });
        let from = match &built {
            Ok(tree) => format!("the file tree {} as ext4", tree.display()),
            Err(error) => {
                generate(&raw).map_err(host("generating a disk"))?;
                format!("a generated disk ({error})")
            }
        };
        self.import(&raw)?;
        fs::remove_file(&raw).map_err(host("removing the raw disk"))?;
        let parent = seal(&*self.folder, "base.tply")?;
        println!("Base image from {from}:");
        println!(
            "  base.tply: {} of disk for a device of {}\n",
            human(self.cost("base.tply")?),
            human(parent.virtual_size)
        );
        Ok((parent, built.is_ok()))
    }

    fn import(&self, raw: &Path) -> Result<()> {
        let mut source = File::open(raw).map_err(host("opening the raw disk"))?;
        let length = source.metadata().map_err(host("looking at the raw disk"))?.len();
        create(&self.folder, "base.tply", Some(length), None, &self.layers)?;
        let chain = self.open("base.tply", Access::Write)?;
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < length {
            let part = &mut buffer[..CHUNK.min((length - at) as usize)];
            source.read_exact(part).map_err(host("reading the raw disk"))?;
            for (block, offset) in part.chunks(4096).zip((at..).step_by(4096)) {
                if !is_zero(block) {
                    chain.write(offset, block)?;
                }
            }
            at += part.len() as u64;
        }
        chain.close()
    }

    fn open(&self, name: &str, access: Access) -> Result<Chain> {
        Chain::open(self.folder.clone(), name, access, self.layers.clone())
    }

    fn start_containers(&self, parent: &Parent) -> Result<()> {
        let start = Instant::now();
        for number in 1..=CONTAINERS {
            create(&self.folder, &layer(number), None, Some(parent), &self.layers)?;
        }
        let each = start.elapsed().as_secs_f64() * 1e3 / CONTAINERS as f64;
        println!("{CONTAINERS} containers over it, {each:.1} ms each:");
        for number in 1..=CONTAINERS {
            let cost = self.cost(&layer(number))?;
            println!("  {}: {}", layer(number), human(cost));
            if cost > LARGEST_START {
                return Err(wrong(format!(
                    "a container costs {cost} bytes before its first write"
                )));
            }
        }
        Ok(())
    }

    /// Serves all containers in one process and writes to each; what one writes, no other sees.
    fn write_over_nbd(&self, parent: &Parent) -> Result<()> {
        let socket = self.path.join("nbd.sock");
        let table = Arc::new(Table::new());
        let mut disks = Vec::new();
        for number in 1..=CONTAINERS {
            let chain = self.open(&layer(number), Access::Write)?;
            let served = Arc::new(Served::new(name(number), Opened::new(chain))?);
            table.insert(served.clone())?;
            disks.push(served);
        }
        let listeners = vec![Listener::unix(&socket)?];
        let server = Server::new(listeners, table.clone(), ServerConfig::default())?;
        println!("\nServed at {}", server.listeners()[0].uri(&name(1)));
        let handle = server.handle();
        let serving = thread::spawn(move || server.run());
        let written = converse(&socket, parent.virtual_size);
        handle.shutdown();
        let served = serving.join().unwrap_or_else(|_| Err(wrong("the server panicked")));
        disks.iter().for_each(|disk| drop(table.remove(disk.name())));
        let closed = disks.into_iter().map(Served::leave).fold(Ok(()), Result::and);
        written.and(served).and(closed)?;
        println!("  wrote to each container and flushed; each sees its own writes alone");
        Ok(())
    }

    /// A real mount of the first container, where this machine can.
    fn mount_first(&self) -> Result<()> {
        match mount::missing() {
            Some(reason) => println!("\nNo mount: {reason}"),
            None => {
                let listing = mount::write_a_file(&self.path, &layer(1))?;
                println!("\nMounted {} for real and wrote a file: {listing}", layer(1));
            }
        }
        Ok(())
    }

    fn check(&self, base: &blake3::Hash) -> Result<()> {
        for name in (1..=CONTAINERS).map(layer).chain(["base.tply".into()]) {
            let chain = self.open(&name, Access::Read)?;
            let mut buffer = vec![0; CHUNK];
            let end = chain.size();
            for at in (0..end).step_by(CHUNK) {
                let part = CHUNK.min((end - at) as usize);
                chain.read(at, &mut buffer[..part])?;
            }
        }
        for name in (1..=CONTAINERS).map(layer).chain(["base.tply".into()]) {
            let file = self.folder.open(&name, Access::Read).map_err(host("opening a layer"))?;
            if let Some(finding) = inspect::check(&*file)?.findings.first() {
                return Err(wrong(format!("{name}: {finding:?}")));
            }
        }
        if self.digest("base.tply")? != *base {
            return Err(wrong("the base has changed"));
        }
        println!(
            "\nRead every block of every container and checked every layer; the base is bit-identical."
        );
        Ok(())
    }

    fn show_costs(&self, parent: &Parent) -> Result<()> {
        let base = self.cost("base.tply")?;
        println!("\n{:<12} {:>12} {:>14} {:>14}", "CONTAINER", "SIZE", "VIRTUAL SIZE", "DEVICE");
        for number in 1..=CONTAINERS {
            let own = self.cost(&layer(number))?;
            println!(
                "{:<12} {:>12} {:>14} {:>14}",
                name(number),
                short(own),
                short(own + base),
                short(parent.virtual_size)
            );
        }
        Ok(())
    }

    /// What a layer takes on disk.
    fn cost(&self, name: &str) -> Result<u64> {
        let meta = fs::metadata(self.path.join(name)).map_err(host("looking at a layer"))?;
        Ok(meta.blocks() * 512)
    }

    fn disk_use(&self) -> Result<u64> {
        (1..=CONTAINERS).map(layer).chain(["base.tply".into()]).map(|name| self.cost(&name)).sum()
    }

    /// The digest of a layer's whole file: not only what it shows, every byte.
    fn digest(&self, name: &str) -> Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        let file = File::open(self.path.join(name)).map_err(host("opening a layer"))?;
        hasher.update_reader(file).map_err(host("reading a layer"))?;
        Ok(hasher.finalize())
    }
}

/// Writes to every container over NBD and reads back through all of them.
fn converse(socket: &Path, device_size: u64) -> Result<()> {
    let connect = |number| {
        let place = Place::Unix(socket.to_owned());
        Client::connect(&Address { place, export: name(number) })
    };
    let mut clients = (1..=CONTAINERS).map(connect).collect::<Result<Vec<_>>>()?;
    // The end of the device: no file system built here keeps anything in its last MiB but zeros.
    let place = device_size - (1 << 20);
    for (number, client) in (1..).zip(&mut clients) {
        client.write(place, &message(number))?;
        client.flush()?;
    }
    for (number, client) in (1..).zip(&mut clients) {
        let mut found = [0; 4096];
        client.read(place, &mut found)?;
        if found[..] != message(number) {
            return Err(wrong(format!("{} reads what it did not write", name(number))));
        }
    }
    clients.into_iter().try_for_each(Client::disconnect)
}

fn message(number: usize) -> Vec<u8> {
    let mut block = format!("written by container {number}\n").into_bytes();
    block.resize(4096, number as u8);
    block
}

fn name(number: usize) -> String {
    format!("container-{number}")
}

fn layer(number: usize) -> String {
    format!("{}.tply", name(number))
}

/// 64 MiB, every fourth MiB of it hard to guess, the rest zeros.
fn generate(raw: &Path) -> io::Result<()> {
    let mut file = File::create(raw)?;
    let mut stream = blake3::Hasher::new().update(b"thinply demo").finalize_xof();
    let (mut noise, zeros) = (vec![0; CHUNK], vec![0; CHUNK]);
    for number in 0..64 {
        stream.fill(&mut noise);
        file.write_all(if number % 4 == 0 { &noise } else { &zeros })?;
    }
    Ok(())
}

//! `thinply serve`: disks as block devices over NBD, and as files by FUSE.

mod held;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use thinply::chain::Chain;
use thinply::control::{Control, line};
use thinply::error::{Error, ErrorKind, Result};
use thinply::fuse;
use thinply::holder::Holder;
use thinply::live::Keepers;
use thinply::nbd::server::{Handle, Listener, Server, ServerConfig};
use thinply::serve::{Keep, Leases, Log, Opened, Served, Table};
use thinply::storage::{self, Access, Storage};
use thinply::store::{Store, StoreBroker};

use crate::io::paths::{self, Place};
use crate::io::{log, output, signals};
use crate::mounting::freezer::MountFreezer;
use crate::options::LayersArg;
use crate::options::StoreArg;
use crate::verbs::{Answer, Outcome};

/// How long changes of disks that are under way at the end may take.
const LAST_WAIT: Duration = Duration::from_secs(60);
/// How long after the first signal another one ends the server at once.
const INSISTENCE: Duration = Duration::from_secs(3);
/// How long the end waits for whoever reads standard output.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serve a layer, or all of the store, as block devices over NBD and as files by FUSE.
///
/// With --all every container, volume and image of the store is an export by name, also those that
/// come while it runs: container/NAME, container/NAME@SNAP, volume/NAME for one writer,
/// volume/NAME:ro for many readers, image/NAME:TAG. A disk is open only while a client has it. Of a
/// store that may only be read, what is for reading is served. What is damaged is logged when somebody
/// lists the exports or asks for it, and all else is served.
#[derive(Args, Debug)]
#[command(after_help = "\
Prints the NBD URI once clients can connect, and the folder once files are in it, then serves until
SIGTERM or SIGINT: requests under way are finished, everything is made durable, the layer is closed.

Example:
  thinply serve vm.tply --socket /run/vm.sock &
  nbdinfo 'nbd+unix:///?socket=/run/vm.sock'
  thinply serve --all --socket /run/thinply.sock --fuse /run/disks
  losetup --find --show --direct-io=on -b 4096 /run/disks/container/web")]
pub struct Serve {
    /// The layer to serve.
    #[arg(required_unless_present = "all")]
    file: Option<PathBuf>,
    /// Serve all of the store.
    #[arg(long, conflicts_with_all = ["file", "read_only", "name", "folders"])]
    all: bool,
    #[command(flatten)]
    store: StoreArg,
    /// Listen on a Unix socket.
    #[arg(long, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// Listen on a TCP address, as in 127.0.0.1:10809.
    #[arg(long, value_name = "ADDR")]
    listen: Vec<String>,
    /// Show the disks as files in a folder, by FUSE.
    #[arg(long, value_name = "DIR")]
    fuse: Option<PathBuf>,
    /// Refuse writes, and change nothing in the file.
    #[arg(long)]
    read_only: bool,
    /// The export's name; clients that ask for none get it too.
    #[arg(long, default_value = "", value_name = "NAME")]
    name: String,
    /// Clients served at a time; more are hung up on.
    #[arg(long, default_value_t = 1024, value_name = "N")]
    max_connections: usize,
    /// What a change does that finds no space on the host: fail, or wait until there is some. Not
    /// given, it waits under a mount (--fuse) and fails over NBD.
    #[arg(long, value_enum, value_name = "WHAT")]
    full: Option<Full>,
    /// Write the process id to a file once clients can connect.
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,
    /// End when the last client has hung up, or the last file is closed (none was opened for a minute).
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    layers: LayersArg,
}

/// What becomes of a change that finds no space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Full {
    /// It waits until there is some.
    Wait,
    /// It fails.
    Error,
}

impl Serve {
    /// Serves until told to stop.
    pub fn run(&self) -> Outcome {
        // One that another process started has the name of what it was started by.
        let _ = rustix::thread::set_name(c"thinply");
        let holder = held::holder()?;
        if self.fuse.is_some() {
            if holder.is_none() {
                std::process::exit(held::hold()?);
            }
            held::stand_in_the_way_out();
        }
        match &self.file {
            Some(file) => self.run_layer(file, holder),
            None => self.run_store(holder),
        }
    }

    fn run_layer(&self, file: &Path, holder: Option<Arc<Holder>>) -> Outcome {
        let listeners = self.listeners(holder.as_deref())?;
        let place = Place::existing(file)?;
        let layers = self.layers.layers()?;
        let chain = match &holder {
            Some(holder) if !self.read_only => {
                Chain::open_kept(place.folder.clone(), &place.name, layers, holder.of(""))?
            }
            _ => place.chain(if self.read_only { Access::Read } else { Access::Write }, layers)?,
        };
        let served = Arc::new(Served::new(&self.name, Opened::new(chain))?);
        let table = Arc::new(Table::new());
        table.insert(served.clone())?;
        let name = file.file_name().map(|name| name.to_string_lossy().into_owned());
        let shown = fuse::ServerConfig {
            default_name: name.unwrap_or_default(),
            source: place.path(),
            ..fuse::ServerConfig::default()
        };
        if let Err(error) = self.serve(listeners, table.clone(), shown, holder) {
            // Something may hang in the device still, and closing would wait for it. What was flushed
            // is safe, and the next open recovers the layer.
            std::mem::forget(served);
            return Err(error);
        }
        drop(table.remove(&self.name));
        served.leave().map(|()| Answer::Yes)
    }

    fn run_store(&self, holder: Option<Arc<Holder>>) -> Outcome {
        let listeners = self.listeners(holder.as_deref())?;
        let mut store = self.store.open_or_make()?;
        let source = paths::real(store.path())?;
        if let Some(holder) = &holder {
            let freezer = MountFreezer::new(source.clone());
            store = store.with_keepers(Arc::new(holder.clone())).with_freezer(Arc::new(freezer));
        }
        let shown = fuse::ServerConfig {
            folders: ["container", "image", "volume"].map(str::to_owned).to_vec(),
            source,
            ..fuse::ServerConfig::default()
        };
        let (control, asked) = match desk(&store, holder.as_deref()) {
            Ok(desk) => {
                let mut broker = StoreBroker::new(store, say());
                if held::is_for_mounts() {
                    broker = broker.for_mounts();
                }
                let control = Control::with_desk(broker, desk);
                (control.clone(), listen(control)?)
            }
            Err(error) if error.kind().forbids_writing() => {
                output::say(format!("what can only be read is served for reading: {error}"));
                (Control::private(store, say()), None)
            }
            Err(error) => return Err(error),
        };
        self.serve(listeners, Arc::new(control.desk().clone()), shown, holder)?;
        drop(asked);
        // Somebody may be committing still.
        control.desk().settle(LAST_WAIT).map(|()| Answer::Yes)
    }

    fn serve(
        &self,
        listeners: Vec<Listener>,
        disks: Arc<dyn Leases>,
        shown: fuse::ServerConfig,
        holder: Option<Arc<Holder>>,
    ) -> Result<()> {
        let config = ServerConfig {
            max_connections: self.max_connections,
            stop_with_last_client: self.once,
            wait_for_space: self.full == Some(Full::Wait),
            log: say(),
            ..ServerConfig::default()
        };
        let (files, goes_on) = self.files(disks.clone(), shown, holder.as_ref())?;
        // What nobody has open any more is opened once and closed, as it would have been.
        for disk in holder.iter().flat_map(|holder| holder.disks()) {
            if let Err(error) = disks.look(&disk) {
                output::say(format!("{disk}, which a server that died had open: {error}"));
            }
        }
        let sockets = !listeners.is_empty();
        let server = Server::new(listeners, disks, config)?;
        let doors = Doors { nbd: server.handle(), fuse: files.as_ref().map(fuse::Server::handle) };
        stop_on_signals(doors.clone())?;
        if let Some(path) = &self.pid_file {
            std::fs::write(path, format!("{}\n", pid(holder.as_deref())))
                .map_err(|error| Error::io(error, "writing the pid file").in_file(path))?;
        }
        for length in server.listeners().iter().filter_map(Listener::overlong_path) {
            output::say(format!(
                "the socket's path has {length} bytes, which other programs than this can't connect \
                 to: give them a symbolic link to its folder"
            ));
        }
        // Whoever started the server may not care for the line, and have closed the pipe or not read
        // it.
        let stdout = log::stdout();
        if !goes_on {
            stdout.line(self.places(&server, files.as_ref()).trim_end());
        }
        if let Some(holder) = &holder {
            holder.ready()?;
        }
        let served = match files {
            Some(files) if sockets => run_both(server, files, &doors),
            Some(files) => files.run(),
            None => server.run(),
        };
        stdout.settle(LAST_WORDS);
        if let Some(path) = &self.pid_file {
            let _ = std::fs::remove_file(path);
        }
        served
    }

    /// The disks as files, if that is asked for, and whether they are those of a server that died.
    fn files(
        &self,
        disks: Arc<dyn Leases>,
        shown: fuse::ServerConfig,
        holder: Option<&Arc<Holder>>,
    ) -> Result<(Option<fuse::Server>, bool)> {
        let keep = holder.map(|holder| holder.clone() as Arc<dyn Keep>);
        let stop_with_last_file = self.once;
        let wait_for_space = self.full != Some(Full::Error);
        let shown =
            fuse::ServerConfig { keep, stop_with_last_file, wait_for_space, log: say(), ..shown };
        if let Some((key, kept)) = holder.and_then(|holder| holder.inherit(fuse::KEPT).pop()) {
            return Ok((Some(fuse::Server::resume(&key, kept, disks, shown)?), true));
        }
        let mount = |folder| fuse::Server::mount(folder, disks, shown);
        Ok((self.fuse.as_deref().map(mount).transpose()?, false))
    }

    /// Where the disks are to be found, a line each.
    fn places(&self, server: &Server, files: Option<&fuse::Server>) -> String {
        let uris = server.listeners().iter().map(|listener| listener.uri(&self.name) + "\n");
        let folder = files.map(|files| format!("{}\n", files.folder().display()));
        uris.chain(folder).collect()
    }

    /// The sockets asked for, or those that a service manager has opened.
    fn listeners(&self, holder: Option<&Holder>) -> Result<Vec<Listener>> {
        let mut listeners = Listener::activated(pid(holder))?;
        for path in &self.socket {
            listeners.push(Listener::unix(path)?);
        }
        for address in &self.listen {
            listeners.push(Listener::tcp(address)?);
        }
        if listeners.is_empty() && self.fuse.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "nowhere to serve: give --socket PATH, --listen ADDR or --fuse DIR",
            ));
        }
        if self.once && self.fuse.is_some() && !listeners.is_empty() {
            let detail = "--once is for --fuse or for sockets, not for both";
            return Err(Error::new(ErrorKind::InvalidInput, detail));
        }
        Ok(listeners)
    }
}

/// The process that the user knows: the holder, where there is one.
fn pid(holder: Option<&Holder>) -> u32 {
    holder.map_or_else(std::process::id, |_| held::pid())
}

/// Serves both ways until the sockets are shut.
fn run_both(server: Server, files: fuse::Server, doors: &Doors) -> Result<()> {
    std::thread::scope(|scope| {
        let files = scope.spawn(|| files.run());
        let served = server.run();
        doors.shut();
        served.and(files.join().unwrap_or_else(|_| Err(panicked())))
    })
}

/// The right to serve the store, which a server that died may have had.
fn desk(store: &Store, holder: Option<&Holder>) -> Result<Arc<dyn Storage>> {
    const DESK: &str = "desk";
    let kept = holder.and_then(|holder| holder.inherit(DESK).pop());
    let desk = match kept.and_then(|(_, mut kept)| kept.pop()) {
        Some(desk) => storage::opened(store.path().join(DESK), desk.into())
            .map_err(|error| Error::io(error, "taking over the desk"))?,
        None => store.take_desk()?,
    };
    if let (Some(holder), Some(descriptor)) = (holder, desk.descriptor()) {
        holder.keep(DESK, &[descriptor])?;
    }
    Ok(desk)
}

/// Says on standard error what goes wrong where nobody waits for an answer.
pub fn say() -> Log {
    // Its thread is there before all memory may be taken.
    log::stderr();
    Arc::new(|line| output::say(line))
}

/// All ways to the disks.
#[derive(Clone)]
struct Doors {
    nbd: Handle,
    fuse: Option<fuse::Handle>,
}

impl Doors {
    fn shut(&self) {
        self.nbd.shutdown();
        self.fuse.iter().for_each(fuse::Handle::shutdown);
    }
}

fn panicked() -> Error {
    Error::new(ErrorKind::Io, "the thread that serves the files has panicked")
}

/// Has the server come to its end at the first SIGTERM, SIGINT or SIGHUP. At one that comes
/// [`INSISTENCE`] later the process ends at once: what was not flushed is lost, as the user insists.
/// One that comes sooner is the same request: `timeout` signals its child and then the child's group.
fn stop_on_signals(doors: Doors) -> Result<()> {
    let mut asked: Option<Instant> = None;
    let stop = move || match asked {
        None => {
            asked = Some(Instant::now());
            doors.shut();
        }
        Some(first) if first.elapsed() >= INSISTENCE => std::process::exit(130),
        Some(_) => {}
    };
    signals::on_end(stop).map_err(|error| Error::io(error, "setting up signal handlers"))
}

/// Answers those who ask for changes of disks in use, where there can be sockets.
fn listen(control: Control) -> Result<Option<line::Server>> {
    match line::Server::start(control) {
        // Disks can be used all the same.
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            output::say(format!(
                "{error}: commits, snapshots and diffs of disks in use will be refused"
            ));
            Ok(None)
        }
        started => started.map(Some),
    }
}

//! `thinply serve`: a layer as a block device over NBD.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use thinply::control::{Control, line};
use thinply::error::{Error, ErrorKind, Result};
use thinply::nbd::server::{Handle, Listener, Server, ServerConfig};
use thinply::serve::{Leases, Log, Opened, Served, Table};
use thinply::storage::Access;

use crate::io::paths::Place;
use crate::io::{log, output, signals};
use crate::options::LayersArg;
use crate::options::StoreArg;
use crate::verbs::{Answer, Outcome};

/// How long changes of disks that are under way at the end may take.
const LAST_WAIT: Duration = Duration::from_secs(60);
/// How long after the first signal another one ends the server at once.
const INSISTENCE: Duration = Duration::from_secs(3);
/// How long the end waits for whoever reads standard output.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serve a layer, or all of the store, as block devices over NBD.
///
/// With --all every container, volume and image of the store is an export by name, also those that
/// come while it runs: container/NAME, container/NAME@SNAP, volume/NAME for one writer,
/// volume/NAME:ro for many readers, image/NAME:TAG. A disk is open only while a client has it. Of a
/// store that may only be read, what is for reading is served. What is damaged is logged when somebody
/// lists the exports or asks for it, and all else is served.
#[derive(Args, Debug)]
#[command(after_help = "\
Prints the NBD URI once clients can connect, then serves until SIGTERM or SIGINT: requests under
way are finished, everything is made durable, the layer is closed.

Example:
  thinply serve vm.tply --socket /run/vm.sock &
  nbdinfo 'nbd+unix:///?socket=/run/vm.sock'
  thinply serve --all --socket /run/thinply.sock")]
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
    /// Refuse writes, and change nothing in the file.
    #[arg(long)]
    read_only: bool,
    /// The export's name; clients that ask for none get it too.
    #[arg(long, default_value = "", value_name = "NAME")]
    name: String,
    /// Clients served at a time; more are hung up on.
    #[arg(long, default_value_t = 1024, value_name = "N")]
    max_connections: usize,
    /// Write the process id to a file once clients can connect.
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,
    /// End when the last client has hung up.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    layers: LayersArg,
}

impl Serve {
    /// Serves until told to stop.
    pub fn run(&self) -> Outcome {
        match &self.file {
            Some(file) => self.run_layer(file),
            None => self.run_store(),
        }
    }

    fn run_layer(&self, file: &Path) -> Outcome {
        let listeners = self.listeners()?;
        let place = Place::existing(file)?;
        let access = if self.read_only { Access::Read } else { Access::Write };
        let chain = place.chain(access, self.layers.layers()?)?;
        let served = Arc::new(Served::new(&self.name, Opened::new(chain))?);
        let table = Arc::new(Table::new());
        table.insert(served.clone())?;
        if let Err(error) = self.serve(listeners, table.clone()) {
            // Something may hang in the device still, and closing would wait for it. What was flushed
            // is safe, and the next open recovers the layer.
            std::mem::forget(served);
            return Err(error);
        }
        drop(table.remove(&self.name));
        served.leave().map(|()| Answer::Yes)
    }

    fn run_store(&self) -> Outcome {
        let listeners = self.listeners()?;
        let store = self.store.open()?;
        let (control, asked) = match Control::serving(store.clone(), say()) {
            Ok(control) => (control.clone(), listen(control)?),
            Err(error) if error.kind().forbids_writing() => {
                output::say(format!("what can only be read is served for reading: {error}"));
                (Control::private(store, say()), None)
            }
            Err(error) => return Err(error),
        };
        self.serve(listeners, Arc::new(control.desk().clone()))?;
        drop(asked);
        // Somebody may be committing still.
        control.desk().settle(LAST_WAIT).map(|()| Answer::Yes)
    }

    fn serve(&self, listeners: Vec<Listener>, disks: Arc<dyn Leases>) -> Result<()> {
        let config = ServerConfig {
            max_connections: self.max_connections,
            stop_with_last_client: self.once,
            log: say(),
            ..ServerConfig::default()
        };
        let server = Server::new(listeners, disks, config)?;
        stop_on_signals(server.handle())?;
        if let Some(path) = &self.pid_file {
            std::fs::write(path, format!("{}\n", std::process::id()))
                .map_err(|error| Error::io(error, "writing the pid file").in_file(path))?;
        }
        for length in server.listeners().iter().filter_map(Listener::overlong_path) {
            output::say(format!(
                "the socket's path has {length} bytes, which other programs than this can't connect \
                 to: give them a symbolic link to its folder"
            ));
        }
        let uris = server.listeners().iter().map(|listener| listener.uri(&self.name) + "\n");
        let ready: String = uris.collect();
        // Whoever started the server may not care for the line, and have closed the pipe or not read
        // it.
        let stdout = log::stdout();
        stdout.line(ready.trim_end());
        let served = server.run();
        stdout.settle(LAST_WORDS);
        if let Some(path) = &self.pid_file {
            let _ = std::fs::remove_file(path);
        }
        served
    }

    /// The sockets asked for, or those that a service manager has opened.
    fn listeners(&self) -> Result<Vec<Listener>> {
        let mut listeners = Listener::activated()?;
        for path in &self.socket {
            listeners.push(Listener::unix(path)?);
        }
        for address in &self.listen {
            listeners.push(Listener::tcp(address)?);
        }
        if listeners.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "nowhere to listen: give --socket PATH or --listen ADDR",
            ));
        }
        Ok(listeners)
    }
}

/// Says on standard error what goes wrong where nobody waits for an answer.
pub fn say() -> Log {
    // Its thread is there before all memory may be taken.
    log::stderr();
    Arc::new(|line| output::say(line))
}

/// Has the server come to its end at the first SIGTERM, SIGINT or SIGHUP. At one that comes
/// [`INSISTENCE`] later the process ends at once: what was not flushed is lost, as the user insists.
/// One that comes sooner is the same request: `timeout` signals its child and then the child's group.
fn stop_on_signals(server: Handle) -> Result<()> {
    let mut asked: Option<Instant> = None;
    let stop = move || match asked {
        None => {
            asked = Some(Instant::now());
            server.shutdown();
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

//! A real loop mount of a layer: `thinply serve`, `nbdfuse`, `mount -o loop`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use thinply::error::{Error, ErrorKind, Result};

/// Why there can't be a mount here, if so.
pub fn missing() -> Option<String> {
    if fs::metadata("/proc/self").map_or(0, |meta| std::os::unix::fs::MetadataExt::uid(&meta)) != 0
    {
        return Some("not root".into());
    }
    if !Path::new("/dev/fuse").exists() {
        return Some("no /dev/fuse".into());
    }
    let tools = ["nbdfuse", "mount", "umount", "fusermount3"];
    let absent = tools.iter().find(|tool| {
        !Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    });
    absent.map(|tool| format!("{tool} is not here"))
}

/// Ends a process when it goes out of scope, with SIGTERM so that it closes what it holds.
struct Running(Child);

impl Running {
    fn end(&mut self) -> std::io::Result<bool> {
        if self.0.try_wait()?.is_none() {
            run(Command::new("kill").arg(self.0.id().to_string()))?;
        }
        Ok(self.0.wait()?.success())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // On the way out of an error already.
        let _ = self.end();
    }
}

fn run(command: &mut Command) -> std::io::Result<bool> {
    Ok(command.stdout(Stdio::null()).status()?.success())
}

/// Unmounts when it goes out of scope.
struct Mounted<'a>(&'a Path, &'a [&'a str]);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let [tool, arguments @ ..] = self.1 else { return };
        // The caller finds out by the file system check that follows.
        let _ = run(Command::new(tool).args(arguments).arg(self.0));
    }
}

/// Mounts the layer `name` in `folder`, writes a file there, unmounts; tells what the mount showed.
pub fn write_a_file(folder: &Path, name: &str) -> Result<String> {
    mounted(folder, name).map_err(|error| Error::io(error, "mounting a container"))?
}

fn mounted(folder: &Path, name: &str) -> std::io::Result<Result<String>> {
    let (socket, disk, root) =
        (folder.join("mount.sock"), folder.join("disk"), folder.join("root"));
    fs::write(&disk, "")?;
    fs::create_dir(&root)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("serve").arg(folder.join(name)).arg("--socket").arg(&socket);
    let mut server = Running(command.stdout(Stdio::piped()).spawn()?);
    let mut ready = String::new();
    if let Some(output) = server.0.stdout.take() {
        BufReader::new(output).read_line(&mut ready)?;
    }
    let mut fuse = Command::new("nbdfuse");
    let fuse = Running(fuse.arg(&disk).arg("--unix").arg(&socket).stderr(Stdio::null()).spawn()?);
    for _attempt in 0..100 {
        if fs::metadata(&disk)?.len() > 0 {
            break;
        }
        sleep(Duration::from_millis(50));
    }
    let device = Mounted(&disk, &["fusermount3", "-u"]);
    if !run(Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(&root))? {
        return Ok(Err(Error::new(ErrorKind::Unsupported, "mount refused the container")));
    }
    let listing = {
        let _mount = Mounted(&root, &["umount"]);
        fs::write(root.join("hello"), "written through a real mount\n")?;
        let count = fs::read_dir(&root)?.count();
        format!("{count} names in its root")
    };
    drop((device, fuse));
    fs::remove_dir(&root)?;
    fs::remove_file(&disk)?;
    match server.end()? {
        true => Ok(Ok(listing)),
        false => Ok(Err(Error::new(ErrorKind::Io, "the server ended with an error"))),
    }
}

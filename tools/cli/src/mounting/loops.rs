//! Loop devices (loop(4)): block devices over files.

use std::ffi::c_int;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use linux_raw_sys::loop_device::{LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO, LO_FLAGS_READ_ONLY};
use linux_raw_sys::loop_device::{LOOP_CLR_FD, LOOP_CONFIGURE, LOOP_CTL_GET_FREE};
use linux_raw_sys::loop_device::{loop_config, loop_info64};
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Setter, ioctl};
use thinply::error::{Error, ErrorKind, Result};

use crate::io::mountinfo::Mounted;

const CONTROL: &str = "/dev/loop-control";
const DEVICES: &str = "/sys/block";
/// How often another process may be quicker to take a device that was free.
const ATTEMPTS: u32 = 64;

/// What to attach, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Where the device begins in the file, in bytes.
    pub offset: u64,
    /// Its length in bytes; 0 for all of the file.
    pub length: u64,
    /// Its sectors' size in bytes.
    pub sector: u32,
    /// Whether it may only be read.
    pub read_only: bool,
    /// Whether it goes with its last user.
    pub passing: bool,
}

/// A loop device that is open.
#[derive(Debug)]
pub struct Device {
    file: File,
    /// Its path.
    pub path: PathBuf,
}

/// A loop device in use.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Its path.
    pub path: PathBuf,
    /// Major and minor number, as in `7:0`.
    pub device: String,
    /// The file behind it, as far as this process can see it.
    pub file: PathBuf,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// Its length in bytes; 0 for all of the file.
    pub length: u64,
    /// What no other device had since the host was started.
    pub sequence: String,
    /// Whether it may only be read.
    pub read_only: bool,
}

/// Makes a block device of a file. Its reads and writes pass no page cache of the file.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where the kernel has no loop devices; [`ErrorKind::PermissionDenied`] for
/// whoever may not use them; host errors.
pub fn attach(file: BorrowedFd<'_>, options: &Options) -> Result<Device> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL);
    let control = control.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => missing("there is no /dev/loop-control (modprobe loop)"),
        io::ErrorKind::PermissionDenied => {
            let detail = "only root may use loop devices";
            Error::new(ErrorKind::PermissionDenied, detail).in_file(CONTROL)
        }
        _ => Error::io(error, "looking for a free loop device").in_file(CONTROL),
    })?;
    for _ in 0..ATTEMPTS {
        let path = free(&control)?;
        let device = OpenOptions::new().read(true).write(true).open(&path);
        let device = device.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => missing("the loop device that is free has no node in /dev"),
            _ => Error::io(error, "opening the loop device").in_file(&path),
        })?;
        match configure(&device, file, options) {
            Ok(()) => return Ok(Device { file: device, path }),
            Err(Errno::BUSY) => {}
            Err(Errno::INVAL | Errno::NOTTY) if !has_configure() => {
                return Err(missing("loop devices that are set up in one step take Linux 5.8"));
            }
            Err(error) => {
                let error = Error::io(error.into(), "attaching to the loop device");
                return Err(error.in_file(path));
            }
        }
    }
    Err(Error::new(ErrorKind::InUse, "others take each loop device that is free").in_file(CONTROL))
}

fn missing(detail: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("no loop device: {detail}"))
}

fn has_configure() -> bool {
    // What came with it. (A kernel that has it also says EINVAL to what it doesn't like.)
    Path::new("/sys/module/loop/parameters/hw_queue_depth").exists()
}

fn free(control: &File) -> Result<PathBuf> {
    /// An ioctl that takes nothing and answers a number.
    struct GetFree;
    // SAFETY: the kernel takes no argument and answers a number of this size, or an error.
    unsafe impl rustix::ioctl::Ioctl for GetFree {
        type Output = c_int;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> rustix::ioctl::Opcode {
            LOOP_CTL_GET_FREE
        }
        fn as_ptr(&mut self) -> *mut std::ffi::c_void {
            std::ptr::null_mut()
        }
        unsafe fn output_from_ptr(
            answer: rustix::ioctl::IoctlOutput,
            _: *mut std::ffi::c_void,
        ) -> rustix::io::Result<c_int> {
            Ok(answer)
        }
    }
    // SAFETY: as above; the descriptor is of the loop control device.
    let number = unsafe { ioctl(control, GetFree) };
    let number = number.map_err(|error| {
        Error::io(error.into(), "looking for a free loop device").in_file(CONTROL)
    })?;
    Ok(format!("/dev/loop{number}").into())
}

fn configure(device: &File, file: BorrowedFd<'_>, options: &Options) -> rustix::io::Result<()> {
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    let info = loop_info64 {
        lo_device: 0,
        lo_inode: 0,
        lo_rdevice: 0,
        lo_offset: options.offset,
        lo_sizelimit: options.length,
        lo_number: 0,
        lo_encrypt_type: 0,
        lo_encrypt_key_size: 0,
        lo_flags: LO_FLAGS_DIRECT_IO as u32
            | flag(options.passing, LO_FLAGS_AUTOCLEAR as u32)
            | flag(options.read_only, LO_FLAGS_READ_ONLY as u32),
        lo_file_name: [0; 64],
        lo_crypt_name: [0; 64],
        lo_encrypt_key: [0; 32],
        lo_init: [0; 2],
    };
    let fd = file.as_raw_fd() as u32;
    let config = loop_config { fd, block_size: options.sector, info, __reserved: [0; 8] };
    // SAFETY: the ioctl reads a structure of this type, and changes nothing in this process.
    let set = unsafe { Setter::<LOOP_CONFIGURE, loop_config>::new(config) };
    // SAFETY: as above; both descriptors live as long as the call.
    unsafe { ioctl(device.as_fd(), set) }
}

/// Lets go of the file behind a device: at once, or with the device's last user.
///
/// # Errors
/// Host errors.
pub fn detach(path: &Path) -> Result<()> {
    let fail = |error: io::Error| Error::io(error, "detaching the loop device").in_file(path);
    let device = File::open(path).map_err(fail)?;
    // SAFETY: the ioctl takes no argument, and changes nothing in this process.
    let clear = unsafe { NoArg::<LOOP_CLR_FD>::new() };
    // SAFETY: as above.
    match unsafe { ioctl(&device, clear) } {
        // It went meanwhile.
        Err(Errno::NXIO) => Ok(()),
        done => done.map_err(|error| fail(error.into())),
    }
}

/// The devices over files in a folder.
pub fn over(folder: &Path) -> Result<Vec<Attached>> {
    let fail = |error| Error::io(error, "looking for loop devices").in_file(DEVICES);
    let mut found = Vec::new();
    for entry in fs::read_dir(DEVICES).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let fact = |name: &str| fs::read(entry.path().join(name)).ok();
        // Those that are in use have it.
        let Some(file) = fact("loop/backing_file") else { continue };
        let file = Path::new(std::ffi::OsStr::from_bytes(file.trim_ascii_end())).to_owned();
        if file.starts_with(folder) {
            let text = |name: &str| {
                let text = fact(name).and_then(|bytes| String::from_utf8(bytes).ok());
                text.unwrap_or_default().trim_end().to_owned()
            };
            found.push(Attached {
                path: Path::new("/dev").join(entry.file_name()),
                device: text("dev"),
                file,
                offset: text("loop/offset").parse().unwrap_or(0),
                length: text("loop/sizelimit").parse().unwrap_or(0),
                sequence: text("diskseq"),
                read_only: text("ro") == "1",
            });
        }
    }
    Ok(found)
}

impl Attached {
    /// Whether a mount shows what is on it.
    pub fn is_at(&self, mounted: &Mounted) -> bool {
        // Some file systems have a device number of their own.
        mounted.device == self.device || mounted.source == self.path
    }

    /// Whether it shows a byte that a device with these options would show too.
    pub fn overlaps(&self, options: &Options) -> bool {
        let end = |offset: u64, length: u64| match length {
            0 => u64::MAX,
            length => offset.saturating_add(length),
        };
        self.offset < end(options.offset, options.length)
            && options.offset < end(self.offset, self.length)
    }
}

impl Device {
    /// Its number since the host was started, which no other has.
    pub fn sequence(&self) -> Option<String> {
        let name = self.path.file_name()?;
        let sequence = fs::read_to_string(Path::new(DEVICES).join(name).join("diskseq")).ok()?;
        Some(sequence.trim_end().to_owned())
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

"""The host file systems that are tried, each mounted over loop devices or folders of its own.

What is stacked on another file system stands on a new ext4, so that nothing depends on what the
temporary folder is on.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))

from support import MiB, run  # noqa: E402


class Unavailable(Exception):
    """This machine lacks a program, or its kernel the file system."""


def attempt(*command):
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=60)
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it failed").splitlines()[-1]
        raise Unavailable(f"{command[0]}: {last}")


def unmount(point, seconds=30):
    """Again and again while the kernel says that it is busy."""
    end = time.monotonic() + seconds
    while subprocess.run(["umount", point], capture_output=True).returncode:
        if time.monotonic() > end:
            run("umount", "--lazy", point)
            raise AssertionError(f"{point} is busy")
        time.sleep(0.1)


@contextmanager
def mounted(*command):
    """A mount by `command` at the new folder that `{}` stands for."""
    with tempfile.TemporaryDirectory(prefix="thinply-hostfs-") as point:
        attempt(*[str(word).replace("{}", point) for word in command])
        try:
            yield Path(point)
        finally:
            unmount(point)


@contextmanager
def image(size, *mkfs):
    """A file with a new file system in it."""
    with tempfile.TemporaryDirectory(prefix="thinply-hostfs-") as folder:
        file = Path(folder) / "image"
        with open(file, "wb") as out:
            out.truncate(size)
        attempt(*mkfs, file)
        yield file


def on_disk(*mkfs, size=160 * MiB, mount=("mount", "-o", "loop")):
    @contextmanager
    def filesystem():
        with image(size, *mkfs) as file, mounted(*mount, file, "{}") as point:
            yield point
    return filesystem


ext4 = on_disk("mkfs.ext4", "-q", "-F", "-b", "4096", size=320 * MiB)


@contextmanager
def exfat():
    with image(320 * MiB, "mkfs.exfat") as file:
        # It takes no plain file.
        device = run("losetup", "--find", "--show", file).strip()
        try:
            with mounted("mount.exfat-fuse", device, "{}") as point:
                yield point
        finally:
            run("losetup", "--detach", device)


def btrfs(options, nodatacow=False):
    @contextmanager
    def filesystem():
        with on_disk("mkfs.btrfs", "-q", size=320 * MiB, mount=("mount", "-o", options))() as point:
            if nodatacow:
                attempt("chattr", "+C", point)
            yield point
    return filesystem


def over(prepare, *folders):
    """A mount whose command, which `prepare` answers, names folders on a new ext4."""
    @contextmanager
    def filesystem():
        with ext4() as below:
            paths = [below / name for name in folders]
            for path in paths:
                path.mkdir()
            with mounted(*prepare(*paths)) as point:
                yield point
    return filesystem


def overlayfs(lower, upper, work):
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    return "mount", "-t", "overlay", "overlay", "-o", options, "{}"


def gocryptfs(below, _):
    attempt("gocryptfs", "-q", "-init", "-scryptn", "10", "-extpass", "echo secret", below)
    return "gocryptfs", "-q", "-extpass", "echo secret", below, "{}"


def fuse_overlayfs(lower, upper, work):
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    return "fuse-overlayfs", "-o", options, "{}"


def rclone(mode):
    def prepare(below, cache):
        return ("rclone", "mount", "--daemon", "--config", cache / "config", "--cache-dir", cache,
                "--vfs-cache-mode", mode, below, "{}")
    return over(prepare, "below", "cache")


MKFS_XFS = ("mkfs.xfs", "-q", "-b")

# Name, how it is mounted, and whether it belongs to the short form too: the kernel's own, and FUSE
# that Debian installs in no time.
ALL = [
    ("ext4", ext4, True),
    ("ext4, blocks of 1 KiB", on_disk("mkfs.ext4", "-q", "-F", "-b", "1024"), True),
    ("ext4, bigalloc",
     on_disk("mkfs.ext4", "-q", "-F", "-O", "bigalloc", "-C", "65536", size=320 * MiB), True),
    ("ext3", on_disk("mkfs.ext3", "-q", "-F"), True),
    ("xfs", on_disk(*MKFS_XFS, "size=4096", size=400 * MiB), True),
    ("xfs, blocks of 1 KiB", on_disk(*MKFS_XFS, "size=1024", size=400 * MiB), True),
    ("xfs, blocks of 16 KiB",
     on_disk(*MKFS_XFS, "size=16384", size=400 * MiB), False),
    ("btrfs", btrfs("loop"), True),
    ("btrfs, compress", btrfs("loop,compress=zstd"), True),
    ("btrfs, nodatacow", btrfs("loop", nodatacow=True), True),
    ("tmpfs", lambda: mounted("mount", "-t", "tmpfs", "-o", "size=320M", "tmpfs", "{}"), True),
    ("overlayfs", over(overlayfs, "lower", "upper", "work"), True),
    ("bindfs", over(lambda below: ("bindfs", below, "{}"), "below"), True),
    ("bindfs, lock forwarding",
     over(lambda below: ("bindfs", "--enable-lock-forwarding", "--multithreaded", below, "{}"),
          "below"), True),
    ("fuse2fs",
     on_disk("mkfs.ext4", "-q", "-F", mount=("fuse2fs", "-o", "fakeroot")), True),
    ("exfat-fuse", exfat, True),
    ("ntfs-3g", on_disk("mkntfs", "-q", "-F", "-Q", mount=("ntfs-3g",), size=320 * MiB), False),
    ("mergerfs", over(lambda a, b: ("mergerfs", "-o", "minfreespace=0", f"{a}:{b}", "{}"), "a", "b"), False),
    ("unionfs-fuse",
     over(lambda a, b: ("unionfs-fuse", "-o", "cow", f"{a}=RW:{b}=RO", "{}"), "a", "b"), False),
    ("gocryptfs", over(gocryptfs, "below", "unused"), False),
    ("fuse-overlayfs", over(fuse_overlayfs, "lower", "upper", "work"), False),
    ("rclone mount, cache writes", rclone("writes"), False),
    ("rclone mount, cache full", rclone("full"), False),
]


def wanted(long):
    return [(name, mount) for name, mount, short in ALL if short or long]

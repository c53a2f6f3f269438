"""What the suites of disks as files share."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))

from support import (  # noqa: E402
    THINPLY, die_with_parent, insist, missing, need, run, wait_for)


def need_mounts(*tools):
    need("losetup", "mkfs.ext4", "e2fsck", "mount", "umount", "pgrep", *tools)
    if os.geteuid() != 0:
        missing("mounting needs root")
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            missing(f"this kernel has no {device}")


def is_mounted(folder):
    """Whether something is mounted there, dead or alive."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(folder) for line in lines)


class Files:
    """`thinply serve … --fuse` for the time of a `with` block."""

    def __init__(self, *what, environment=None, program=THINPLY):
        self.scratch = tempfile.TemporaryDirectory(prefix="thinply-files-")
        scratch = Path(self.scratch.name).resolve()
        self.folder = scratch / "mount"
        self.folder.mkdir()
        self.log = open(scratch / "log", "w+")
        command = [program, "serve", *what, "--fuse", self.folder]
        self.process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=self.log, text=True,
            stdin=subprocess.DEVNULL, preexec_fn=die_with_parent, start_new_session=True,
            env={**os.environ, **(environment or {})})
        self.ready = self.process.stdout.readline().strip()
        if self.ready != str(self.folder):
            self.end(signal.SIGKILL)
            raise AssertionError(f"no ready line but {self.ready!r}: {self.errors()}")
        self.server = self.find_server()

    def errors(self):
        self.log.seek(0)
        return self.log.read()

    def find_server(self):
        """The process that serves, which the holder has started."""
        found = run("pgrep", "-P", self.process.pid, status=None).split()
        return int(found[0]) if found else None

    def kill_server(self):
        """Kills the server and waits for the next one, which answers."""
        os.kill(self.server, signal.SIGKILL)
        dead = self.server

        def next_one():
            found = self.find_server()
            return found if found != dead else None

        self.server = wait_for(next_one, "another server")

    def end(self, sign=signal.SIGTERM, status=None):
        if self.process.poll() is None:
            self.process.send_signal(sign)
        ended = self.process.wait(timeout=60)
        if status is not None and ended != status:
            raise AssertionError(f"ended with {ended}: {self.errors()}")

    def __enter__(self):
        return self

    def __exit__(self, kind, _error, _trace):
        try:
            self.end(status=None if kind else 0)
            if not kind and is_mounted(self.folder):
                raise AssertionError("still mounted")
        finally:
            if is_mounted(self.folder):
                run("umount", "-l", self.folder, status=None)
            self.process.stdout.close()
            self.log.close()
            self.scratch.cleanup()


@contextmanager
def loop_device(file, *options):
    command = ["losetup", "--find", "--show", "--direct-io=on", "-b", "4096", *options, file]
    device = run(*command).strip()
    try:
        yield device
    finally:
        insist("losetup", "-d", device)


@contextmanager
def mounted(device, folder, *options):
    folder.mkdir(exist_ok=True)
    run("mount", *options, device, folder)
    try:
        yield folder
    finally:
        insist("umount", folder)

"""What is measured: how each server makes its layers, and the command that serves one."""

import contextlib
import os
import shutil
import socket as sockets
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THINPLY = ROOT / "target/release/thinply"
# Another build of the command, to be measured beside this one.
BEFORE = os.environ.get("THINPLY_BEFORE")
LOAD = ROOT / "target/release/examples/bench-load"


def run(*command):
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return done.stdout


def load(socket, rw, block, depth=1, connections=1, seconds=60, ops=1 << 60, seed=1):
    """Operations, and the seconds that they took."""
    arguments = (rw, block, depth, connections, seconds, ops, seed)
    done, took = run(LOAD, "load", socket, *arguments).split()
    return int(done), float(took)


def processor_time(process):
    """Seconds of processor time that a process has taken, its ended threads included."""
    return time.clock_gettime(~process << 3 | 2)


def answers(path):
    with sockets.socket(sockets.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@contextlib.contextmanager
def serving(command, socket):
    """Runs a server until the block ends; yields its process id."""
    # Servers complain when the client hangs up in the middle, which it does when its time is over.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(list(map(str, command)), **quiet)
    while not answers(socket):
        if server.poll() is not None:
            sys.exit(f"{command[0]} did not start")
        time.sleep(0.005)
    yield server.pid
    server.terminate()
    server.wait()
    socket.unlink(missing_ok=True)


class Contender:
    """Images of one size in a folder; `create` makes one, over a parent if one is named.
    Contenders of one format read the same chain."""

    def __init__(self, folder, size):
        self.folder, self.size = folder, size

    def begin_round(self):
        pass


class Thinply(Contender):
    name, format, program = "thinply", "thinply", THINPLY

    def begin_round(self):
        """Where in memory the pages of a program's file happen to be makes one copy of it up to 5 % faster
        than another: each round has copies of its own."""
        place = self.folder.parent / f"program-{type(self).__name__}"
        place.unlink(missing_ok=True)
        self.program = shutil.copy(type(self).program, place)

    def create(self, name, parent=None):
        base = ["--parent", self.folder / parent] if parent else ["--size", self.size]
        run(self.program, "create", *base, self.folder / name)

    def command(self, name, socket, read_only=False):
        flags = ["--read-only"] if read_only else []
        return [self.program, "serve", *flags, self.folder / name, "--socket", socket]


class Before(Thinply):
    name, program = "thinply before", BEFORE


class QemuNbd(Contender):
    name, format, options = "qemu-nbd qcow2", "qcow2", []

    def create(self, name, parent=None):
        base = ["-b", parent, "-F", "qcow2"] if parent else []
        size = [] if parent else [self.size]
        run(
            "qemu-img", "create", "-q", "-f", "qcow2", *self.options, *base,
            self.folder / name, *size,
        )

    def command(self, name, socket, read_only=False):
        flags = ["-r"] if read_only else []
        image = self.folder / name
        return ["qemu-nbd", "-f", "qcow2", "-k", socket, "-t", "-e", "16", *flags, image]


class QemuNbdExtended(QemuNbd):
    name, format = "qemu-nbd qcow2, extended_l2", "qcow2-extended"
    options = ["-o", "extended_l2=on,cluster_size=128k"]


class StorageDaemon(QemuNbd):
    name = "qemu-storage-daemon qcow2"

    def command(self, name, socket, read_only=False):
        return self.many({"": self.folder / name}, socket, read_only)

    @staticmethod
    def many(images, socket, read_only=False):
        """The command that serves each image under its name."""
        address = f"addr.type=unix,addr.path={socket},max-connections=0"
        command = ["qemu-storage-daemon", "--nbd-server", address]
        access, writable = (",read-only=on", "") if read_only else ("", ",writable=on")
        for name, image in images.items():
            node = f"n{name}"
            command += [
                "--blockdev", f"driver=file,node-name=f{node},filename={image}{access}",
                "--blockdev", f"driver=qcow2,node-name={node},file=f{node}{access}",
                "--export", f"type=nbd,id=e{node},node-name={node},name={name}{writable}",
            ]
        return command


class Raw(Contender):
    """A raw file: one without layers, so that a fresh overlay is an empty sparse file."""

    format = "raw"

    def create(self, name, parent=None):
        if parent and not name.startswith("fresh"):
            os.link(self.folder / parent, self.folder / name)
        else:
            with open(self.folder / name, "wb") as file:
                file.truncate(self.size)


class NbdkitFile(Raw):
    name = "nbdkit file (raw)"

    def command(self, name, socket, read_only=False):
        flags = ["-r"] if read_only else []
        return ["nbdkit", "-f", *flags, "-U", socket, "file", self.folder / name]


class NbdkitCow(NbdkitFile):
    name = "nbdkit file with cow"

    def command(self, name, socket, read_only=False):
        # Its overlay is a temporary file of the server's own.
        base = self.folder / "layer0"
        return ["nbdkit", "-f", "-U", socket, "--filter=cow", "file", base]


class SameServerRaw(Raw):
    name = "raw file, thinply's server"

    def command(self, name, socket, read_only=False):
        return [LOAD, "serve", socket, self.size, self.folder / name]


@contextlib.contextmanager
def running(*commands):
    """Runs commands, the first one last to end, each with what says that it is ready for the next; yields
    their process ids."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = []
    for command, ready in commands:
        started.append(subprocess.Popen(list(map(str, command)), **quiet))
        while not ready():
            if any(process.poll() is not None for process in started):
                sys.exit(f"{command[0]} did not start")
            time.sleep(0.002)
    yield [process.pid for process in started]
    for process in reversed(started):
        process.terminate()
        process.wait()


class ThinplyFile(Thinply):
    """A disk as a file, by thinply itself."""

    @contextlib.contextmanager
    def shown(self, name, point, read_only):
        flags = ["--read-only"] if read_only else []
        command = [self.program, "serve", *flags, self.folder / name, "--fuse", point]
        file = point / name
        with running((command, file.exists)) as [holder]:
            children = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
            yield file, [int(child) for child in children]


class StorageDaemonFile(StorageDaemon):
    """A qcow2 image as a file."""

    name = "qemu-storage-daemon's FUSE export"

    @contextlib.contextmanager
    def shown(self, name, point, read_only):
        file = point / "qcow2"
        file.touch()
        access, writable = (",read-only=on", "") if read_only else ("", ",writable=on")
        command = [
            "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=f,filename={self.folder / name}{access}",
            "--blockdev", f"driver=qcow2,node-name=n,file=f{access}",
            "--export", f"type=fuse,id=e,node-name=n,mountpoint={file}{writable}",
        ]
        ready = lambda: file.stat().st_size == self.size  # noqa: E731
        with running((command, ready)) as servers:
            yield file, servers


class NbdFuseBefore(Before):
    """A disk as a file, by nbdfuse over the other build."""

    name = "nbdfuse over thinply before"

    @contextlib.contextmanager
    def shown(self, name, point, read_only):
        socket, file = self.folder / "socket", point / "nbd"
        flags = ["-r"] if read_only else []
        fuse = ["nbdfuse", *flags, file, f"nbd+unix:///?socket={socket}"]
        server = self.command(name, socket, read_only), lambda: answers(socket)
        with running(server, (fuse, file.exists)) as servers:
            yield file, servers


CONTENDERS = {
    kind.__name__: kind
    for kind in (
        Thinply, QemuNbd, QemuNbdExtended, StorageDaemon, NbdkitFile, NbdkitCow, SameServerRaw,
        *([Before] if BEFORE else []),
    )
}


def build(contender, depth, socket):
    """The last layer of a chain, made if its folder is not there: layer 0 holds every block, each
    other one its share at random places, the same in all contenders."""
    new = not contender.folder.exists()
    contender.folder.mkdir(exist_ok=True)
    for left in contender.folder.glob("fresh*"):
        left.unlink()
    for level in range(depth if new else 0):
        contender.create(f"layer{level}", f"layer{level - 1}" if level else None)
        # The cow filter forgets what is written through it: its base is written as a plain file.
        command = NbdkitFile.command if isinstance(contender, NbdkitCow) else type(contender).command
        with serving(command(contender, f"layer{level}", socket), socket):
            if level == 0:
                load(socket, "write/fresh", 1 << 20, 4)
            else:
                ops = max(contender.size // depth // 4096, 1)
                load(socket, "randwrite", 4096, 16, ops=ops, seed=level)
    return f"layer{depth - 1}"

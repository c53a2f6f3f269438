"""What is tried on a file system: what it can do itself, and each verb of thinply on it."""

import ctypes
import errno
import fcntl
import os
import struct
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))

from support import THINPLY, KiB, MiB, Server, nbd, pattern, used  # noqa: E402

SIZE = 24 * MiB
# What headers, bitmap pages and the file system's own records may take.
LITTLE = MiB
OK = "ok"


# ---- What the file system can do ---------------------------------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)
RENAME_NOREPLACE = 1
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
F_OFD_SETLK, F_OFD_GETLK = 37, 38
FICLONE = 0x40049409


def call(name, *words):
    if getattr(LIBC, name)(*words):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def fallocate(file, mode):
    call("fallocate", file.fileno(), mode, ctypes.c_long(64 * KiB), ctypes.c_long(64 * KiB))


def answered(act):
    """`yes`, or what the file system says."""
    try:
        return act() or "yes"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))


def has_holes(folder):
    with open(folder / "sparse", "wb") as file:
        file.truncate(4 * MiB)
        file.seek(2 * MiB)
        file.write(b"x" * 64 * KiB)
        file.flush()
        os.fsync(file.fileno())
        if used(folder / "sparse") > MiB:
            return "no"
        start = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        return "yes" if start >= MiB else "not told"


def gives_back(folder):
    path = folder / "punched"
    with open(path, "w+b") as file:
        file.write(b"x" * 4 * MiB)
        file.flush()
        os.fsync(file.fileno())
        call("fallocate", file.fileno(), KEEP_SIZE | PUNCH_HOLE, ctypes.c_long(MiB),
             ctypes.c_long(2 * MiB))
        # A change of the file has whoever remembers what it takes ask again.
        os.pwrite(file.fileno(), b"y", 0)
        os.fsync(file.fileno())
        return "yes" if used(path) <= 3 * MiB else "nothing freed"


def locks(folder):
    path = folder / "locked"
    path.write_bytes(b"x")
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    with open(path, "r+b") as one, open(path, "r+b") as other:
        fcntl.fcntl(one, F_OFD_SETLK, whole)
        try:
            fcntl.fcntl(other, F_OFD_SETLK, whole)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return "yes"
            raise
        told = struct.unpack("hhqqi4x", fcntl.fcntl(other, F_OFD_GETLK, whole))[0]
        return "granted twice" + ("" if told == fcntl.F_UNLCK else ", but told of")


def renames_new(folder):
    for name in ("a", "taken"):
        (folder / name).write_bytes(b"x")
    words = [-100, os.fsencode(folder / "a"), -100, os.fsencode(folder / "b"), RENAME_NOREPLACE]
    call("renameat2", *words)


def links(folder):
    (folder / "first").write_bytes(b"x")
    os.link(folder / "first", folder / "second")
    same = os.stat(folder / "first").st_ino == os.stat(folder / "second").st_ino
    return "yes" if same else "two numbers"


def syncs_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reads_cached(folder):
    (folder / "cached").write_bytes(b"x" * MiB)
    with open(folder / "cached", "rb", buffering=0) as file:
        file.read()
        os.preadv(file.fileno(), [bytearray(4 * KiB)], 0, os.RWF_NOWAIT)


def shares(folder):
    (folder / "original").write_bytes(b"x" * MiB)
    with open(folder / "original", "rb") as one, open(folder / "clone", "wb") as other:
        fcntl.ioctl(other.fileno(), FICLONE, one.fileno())


def zeroes(folder):
    with open(folder / "zeroed", "w+b") as file:
        file.write(b"x" * MiB)
        file.flush()
        fallocate(file, KEEP_SIZE | ZERO_RANGE)


ABILITIES = {
    "holes": has_holes,
    "punching": gives_back,
    "zeroing": zeroes,
    "sharing": shares,
    "locks": locks,
    "links": links,
    "rename without replacing": renames_new,
    "folder sync": syncs_folder,
    "cached reads": reads_cached,
}


def abilities(point):
    folder = point / "abilities"
    folder.mkdir()
    return {name: answered(lambda: act(folder)) for name, act in ABILITIES.items()}


# ---- What thinply does there -------------------------------------------------------------------

class Refused(Exception):
    pass


class Lost(Exception):
    """It worked, but something is lost that other file systems give."""


def demand(holds, what):
    if not holds:
        raise AssertionError(what)


class Life:
    """A disk and a store on a file system. Each method is a column of the table."""

    def __init__(self, point):
        self.folder = point / "life"
        self.folder.mkdir()
        self.content = bytearray(SIZE)
        self.links = True

    def path(self, name):
        return self.folder / name

    def thinply(self, *words, status=0):
        environment = {**os.environ, "THINPLY_ROOT": str(self.path("store"))}
        command = [THINPLY, *[str(word) for word in words]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                              stdin=subprocess.DEVNULL, env=environment)
        if done.returncode != status:
            raise Refused(self.plain(done.stderr.strip()) or f"ended with {done.returncode}")
        return done.stdout + done.stderr

    def plain(self, text):
        """A message without what differs from run to run."""
        lines = text.replace(f"{self.folder}/", "").splitlines()
        return (lines[0] if lines else "").removeprefix("thinply: ").removeprefix("error: ")

    def shows(self, layer):
        with Server(self.path(layer), read_only=True) as server:
            handle = server.connect()
            got = handle.pread(handle.get_size(), 0)
            handle.shutdown()
        want = bytes(self.content) + bytes(len(got) - len(self.content))
        demand(got == want, f"{layer} reads wrong")

    def create(self):
        self.thinply("create", "--size", SIZE, self.path("disk.tply"))
        if used(self.path("disk.tply")) > LITTLE:
            raise Lost("an empty disk takes its full size")

    def import_(self):
        raw = self.path("disk.raw")
        with open(raw, "wb") as file:
            file.truncate(SIZE)
            file.seek(5 * MiB)
            file.write(pattern(3 * MiB, "raw"))
        self.thinply("import", raw, self.path("base.tply"))
        self.thinply("compare", "-F", "raw", self.path("base.tply"), raw)
        if used(self.path("base.tply")) > 4 * MiB + LITTLE:
            raise Lost("zeros take space")

    def write(self, handle, offset, data):
        handle.pwrite(data, offset)
        self.content[offset:offset + len(data)] = data

    def serve(self):
        disk = self.path("disk.tply")
        with Server(disk) as server:
            handle = server.connect()
            self.write(handle, 0, pattern(6 * MiB, "serve"))
            self.write(handle, 10 * MiB + 700, pattern(9 * KiB, "odd"))
            handle.flush()
            full = used(disk)
            handle.zero(MiB, MiB, nbd.CMD_FLAG_NO_HOLE)
            handle.trim(3 * MiB, 3 * MiB)
            handle.flush()
            self.content[MiB:2 * MiB] = bytes(MiB)
            self.content[3 * MiB:6 * MiB] = bytes(3 * MiB)
            demand(handle.pread(SIZE, 0) == bytes(self.content), "it reads wrong")
            handle.shutdown()
        self.shows("disk.tply")
        if used(disk) > full - 2 * MiB:
            raise Lost("trim gives no space back")

    def second_writer(self):
        with Server(self.path("disk.tply")) as server:
            handle = server.connect()
            done = self.thinply("resize", self.path("disk.tply"), "+1M", status=2)
            demand("in use" in done or "is being" in done, f"refused, but: {self.plain(done)}")
            handle.shutdown()

    def kill(self):
        with Server(self.path("disk.tply")) as server:
            handle = server.connect()
            self.write(handle, 7 * MiB, pattern(MiB, "killed"))
            handle.flush()
            server.kill()
        with Server(self.path("disk.tply")) as server:
            got = server.connect().pread(SIZE, 0)
        demand(got == bytes(self.content), "flushed data is lost")

    def snapshot(self):
        self.thinply("snapshot", self.path("disk.tply"), self.path("snap.tply"))
        self.shows("snap.tply")
        with Server(self.path("disk.tply")) as server:
            handle = server.connect()
            handle.pwrite(pattern(KiB, "after"), 2 * MiB)
            handle.flush()
            handle.shutdown()
        self.shows("snap.tply")
        self.content[2 * MiB:2 * MiB + KiB] = pattern(KiB, "after")
        self.shows("disk.tply")
        if not self.links:
            raise Lost("it copies the layer, and writes wait meanwhile")

    def check(self):
        for name in ("disk.tply", "snap.tply", "base.tply"):
            if self.path(name).exists():
                self.thinply("check", self.path(name))

    def flatten(self):
        self.thinply("flatten", self.path("disk.tply"), self.path("flat.tply"))
        self.shows("flat.tply")

    def pack(self):
        self.thinply("pack", self.path("flat.tply"), self.path("packed.tply"))
        self.shows("packed.tply")

    def verify(self):
        self.thinply("verify", self.path("packed.tply"))

    def resize(self):
        self.thinply("resize", self.path("disk.tply"), "+4M")
        self.shows("disk.tply")

    def export(self):
        self.thinply("export", self.path("disk.tply"), self.path("out.raw"))
        want = bytes(self.content) + bytes(4 * MiB)
        demand(self.path("out.raw").read_bytes() == want, "it reads wrong")
        done = self.thinply("export", self.path("base.tply"), self.path("out.raw"), status=2)
        demand("is there already" in done, f"over a file: {self.plain(done)}")

    def store(self):
        self.thinply("image", "import", self.path("disk.raw"), "one")
        self.thinply("container", "create", "one", "--name", "web")
        with Server("--all", "--root", self.path("store")) as server:
            handle = server.connect(uri=server.uri.replace(":///", ":///container/web"))
            handle.pwrite(pattern(MiB, "container"), 0)
            handle.flush()
            asked = self.path("store/control").exists()
            done = self.thinply("container", "snapshot", "web", "monday", status=0 if asked else 2)
            demand(asked or "in use" in done, f"refused, but: {self.plain(done)}")
            handle.shutdown()
        self.thinply("container", "commit", "web", "two")
        self.thinply("image", "save", "-o", self.path("images.tar"), "two")
        self.thinply("image", "rm", "one")
        self.thinply("gc")
        self.thinply("store", "check")
        demand("two" in self.thinply("image", "ls"), "the image is not there")
        demand(self.path("images.tar").stat().st_size > MiB, "there is no archive")
        if not asked:
            raise Lost("no sockets: a disk in use can be neither committed nor snapshotted")


COLUMNS = {
    "create": Life.create,
    "import": Life.import_,
    "serve": Life.serve,
    "second writer": Life.second_writer,
    "kill -9": Life.kill,
    "snapshot": Life.snapshot,
    "check": Life.check,
    "flatten": Life.flatten,
    "pack": Life.pack,
    "verify": Life.verify,
    "resize": Life.resize,
    "export": Life.export,
    "store": Life.store,
}


def verbs(point, can):
    """A cell for each column: `ok`, `lost: …`, `refused: …` or `wrong: …`."""
    life = Life(point)
    life.links = can["links"] in ("yes", "two numbers")
    return {name: cell(life, act) for name, act in COLUMNS.items()}


def cell(life, act):
    try:
        act(life)
        return OK
    except Lost as what:
        return f"lost: {what}"
    except Refused as what:
        return f"refused: {what}"
    except (AssertionError, OSError, nbd.Error, subprocess.TimeoutExpired) as error:
        return f"wrong: {life.plain(str(error))}"

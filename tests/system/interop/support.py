"""What the interop suites share: the binary under test, servers, and what to do without a tool.

The suites run the real `thinply` binary (environment variable THINPLY, else target/release/thinply)
and talk to it with other people's NBD clients. A suite whose tools are missing is skipped, or fails
if THINPLY_STRICT is 1.
"""

import ctypes
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

try:
    import nbd
except ImportError:
    nbd = None

ROOT = Path(__file__).resolve().parents[3]
THINPLY = os.environ.get("THINPLY", str(ROOT / "target/release/thinply"))
STRICT = os.environ.get("THINPLY_STRICT") == "1"

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BLOCK = 4 * KiB

# The system's own python3 is the one whose nbd module nbdsh looks for, and mkfs lives in sbin.
os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin:" + os.environ.get("PATH", "")
# What tests make is not this host's own.
os.environ.setdefault("THINPLY_HOST_KEY", str(ROOT / "target/test-host.key"))
# How long anything may take that should be instant, on a busy machine.
PATIENCE = 60


def _interrupt(_number, _frame):
    raise KeyboardInterrupt


# The `with` blocks of a running test then clean up, as they do for Ctrl-C.
signal.signal(signal.SIGTERM, _interrupt)


def missing(reason):
    """Skips what can't run here; in strict mode that is a failure."""
    if STRICT:
        raise AssertionError(f"strict mode: {reason}")
    raise unittest.SkipTest(reason)


def need(*tools, bindings=False):
    """Makes sure that commands, and libnbd's Python bindings if asked for, are there."""
    absent = [tool for tool in tools if not shutil.which(tool)]
    if bindings and nbd is None:
        absent.append("the Python module nbd (Debian: python3-libnbd)")
    if absent:
        missing("not installed: " + ", ".join(absent))


def run(*command, status=0, timeout=300, **options):
    """Runs a command and checks its exit status (None: any); answers its standard output."""
    command = [str(word) for word in command]
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, timeout=timeout, **options)
    if status is not None and done.returncode != status:
        raise AssertionError(
            f"{' '.join(command)}\nended with {done.returncode}, not {status}\n"
            f"{done.stdout}{done.stderr}")
    return done.stdout


def thinply(*words, **options):
    """Runs a thinply command."""
    return run(THINPLY, *words, **options)


def pattern(length, seed):
    """`length` bytes, the same for the same seed, none of whose blocks is zero."""
    return random.Random(seed).randbytes(length)


def wait_for(condition, what, seconds=PATIENCE):
    """Waits until `condition()` holds and answers its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.02)
    return value


def insist(*command, seconds=30):
    """Undoes a mount or the like, again and again while the kernel says that it is busy."""
    end = time.monotonic() + seconds
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return
        if time.monotonic() > end:
            raise AssertionError(f"{' '.join(map(str, command))}: {done.stderr}")
        time.sleep(0.1)


def die_with_parent():
    """No server outlives a test runner that was killed (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Server:
    """`thinply serve FILE` for the time of a `with` block; checks that it ends well.

    A Unix socket in a folder of its own, or TCP on a free port.
    """

    def __init__(self, file, *options, read_only=False, tcp=False, environment=None):
        self.folder = tempfile.TemporaryDirectory(prefix="thinply-sock-")
        self.socket = Path(self.folder.name) / "s"
        self.log = open(Path(self.folder.name) / "log", "w+")
        where = ["--listen", "127.0.0.1:0"] if tcp else ["--socket", self.socket]
        command = [THINPLY, "serve", file, *where, *options]
        if read_only:
            command.append("--read-only")
        self.process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=self.log, text=True,
            stdin=subprocess.DEVNULL, preexec_fn=die_with_parent,
            # Ctrl-C is for the tests, which then stop their servers in order.
            start_new_session=True, env={**os.environ, **(environment or {})})
        self.uri = self.process.stdout.readline().strip()
        if not self.uri.startswith("nbd"):
            self.kill()
            raise AssertionError(f"no ready line but {self.uri!r}: {self.errors()}")

    def errors(self):
        """What the server has said on standard error."""
        self.log.seek(0)
        return self.log.read()

    def connect(self, context=True, structured=True, prepare=None, uri=None):
        """A libnbd handle. `prepare` may set it up before it connects."""
        handle = nbd.NBD()
        handle.set_request_structured_replies(structured)
        if context:
            handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        if prepare:
            prepare(handle)
        handle.connect_uri(uri or self.uri)
        return handle

    def stop(self, seconds=PATIENCE):
        """SIGTERM; the server closes cleanly, says nothing more and ends with 0."""
        self.process.send_signal(signal.SIGTERM)
        try:
            rest, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still there {seconds} s after SIGTERM: {self.errors()}") from None
        if self.process.returncode != 0:
            raise AssertionError(f"ended with {self.process.returncode}: {self.errors()}")
        if rest:
            raise AssertionError(f"more than a ready line on standard output: {rest!r}")

    def kill(self):
        """SIGKILL: no flush, no clean close."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, _error, _trace):
        try:
            if self.process.poll() is None:
                if kind:
                    self.kill()
                else:
                    self.stop()
        finally:
            self.log.close()
            self.folder.cleanup()


class Case(unittest.TestCase):
    """A test with a folder of its own."""

    maxDiff = 4000

    def setUp(self):
        if not os.access(THINPLY, os.X_OK):
            self.fail(f"{THINPLY} is not there: build it first (cargo build --release)")
        scratch = tempfile.TemporaryDirectory(prefix="thinply-test-")
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)

    def path(self, name):
        return self.folder / name

    def create(self, name, size=None, parent=None):
        """A new layer; answers its path."""
        words = ["create", *(["--size", size] if size is not None else []),
                 *(["--parent", parent] if parent else []), self.path(name)]
        thinply(*words)
        return self.path(name)

    def overlay(self, name, size, writes, top_size=None):
        """A writable layer over a frozen one that holds `writes`, (offset, bytes) pairs."""
        base = self.create(f"{name}-base.tply", size)
        with Server(base) as server:
            self.write(server, writes)
        return self.create(f"{name}.tply", top_size, parent=base)

    def write(self, server, writes):
        handle = server.connect()
        for offset, data in writes:
            for at in range(0, len(data), 16 * MiB):
                handle.pwrite(data[at:at + 16 * MiB], offset + at)
        handle.flush()
        handle.shutdown()

    def assert_bytes(self, got, want, what=""):
        """Like assertEqual, but says where the first difference is and not all the bytes."""
        got, want = bytes(got), bytes(want)
        if got == want:
            return
        self.assertEqual(len(got), len(want), f"{what}: lengths differ")
        at = next(i for i in range(len(got)) if got[i] != want[i])
        count = sum(a != b for a, b in zip(got, want))
        self.fail(f"{what}: {count} of {len(got)} bytes differ, first at {at}: "
                  f"got {got[at:at + 16].hex()}, want {want[at:at + 16].hex()}")

    def assert_disk(self, handle, want, what=""):
        """The whole device reads as the bytes `want`."""
        self.assertEqual(handle.get_size(), len(want))
        for at in range(0, len(want), 16 * MiB):
            length = min(16 * MiB, len(want) - at)
            self.assert_bytes(handle.pread(length, at), want[at:at + length], f"{what} from {at}")

    def assert_clean(self, file):
        """`thinply check` finds nothing."""
        thinply("check", file)


def used(path):
    """Bytes that a file takes on the host."""
    return os.stat(path).st_blocks * 512


def extents(handle, length, offset=0, flags=0):
    """base:allocation of a range as [(length, flags)]."""
    found = []

    def hear(context, at, entries, _error):
        assert context == nbd.CONTEXT_BASE_ALLOCATION and at == offset
        found.extend(zip(entries[::2], entries[1::2]))

    handle.block_status(length, offset, hear, flags)
    return found

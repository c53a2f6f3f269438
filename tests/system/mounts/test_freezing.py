"""Snapshots and commits of mounted containers: the file system holds still meanwhile, and goes on whoever
dies."""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
import unittest
from pathlib import Path

from files import is_mounted, need_mounts
from mounting import Mounting

from support import THINPLY, run, thinply, wait_for

# A file system holds still for two seconds at most; the rest is for a busy machine.
GOES_ON = 30


def setUpModule():
    need_mounts("fsfreeze", "mkfs.xfs")


class Writer(threading.Thread):
    """Writes to a file, durably each time, until it is told to stop."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.path, self.written, self.error, self.going = folder / "busy", 0, None, True
        self.start()

    def run(self):
        try:
            with open(self.path, "wb", buffering=0) as file:
                while self.going:
                    file.write(b"%8d" % self.written * 512)
                    os.fsync(file.fileno())
                    self.written += 1
        except OSError as error:
            self.error = error

    def goes_on(self):
        before = self.written
        wait_for(lambda: self.error or self.written > before + 1, "a write", GOES_ON)
        if self.error:
            raise self.error

    def stop(self):
        self.going = False
        self.join(GOES_ON)
        assert not self.is_alive() and not self.error, self.error


class Freezing(Mounting):
    def setUp(self):
        super().setUp()
        self.target, self.place = self.container(), self.top / "place"
        self.place.mkdir()
        thinply("mount", self.target, self.dir)
        (use,) = self.uses()
        self.holder = use["pid"]

    def server(self):
        return int(wait_for(lambda: run("pgrep", "-P", self.holder, status=None), "a server").split()[0])

    def is_clean(self, target):
        """It can be read as it is."""
        thinply("mount", "--read-only", target, self.place)
        self.assertEqual((self.place / "hello").read_text(), "world")
        thinply("umount", self.place)
        device = thinply("attach", "--read-only", target).strip()
        run("e2fsck", "-f", "-n", device)
        thinply("detach", device)

    def snapshots(self):
        (container,) = json.loads(thinply("container", "ls", "--json"))
        return container["snapshots"]

    def test_what_is_taken_of_a_busy_container_is_clean(self):
        writer = Writer(self.dir)
        writer.goes_on()
        for number in range(4):
            thinply("container", "snapshot", "web", f"s{number}")
            writer.goes_on()
        thinply("container", "commit", "web", "made:1")
        writer.goes_on()
        for target in ["image/made:1", *(f"container/web@s{number}" for number in range(4))]:
            self.is_clean(target)
        writer.stop()
        thinply("umount", self.dir)
        self.nothing_stays()

    def test_it_goes_on_whoever_dies_meanwhile(self):
        writer, chance = Writer(self.dir), random.Random(5)
        writer.goes_on()
        for number in range(24):
            taking = subprocess.Popen([THINPLY, "container", "snapshot", "web", f"s{number}"],
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(chance.random() * 0.05)
            if number % 2:
                os.kill(self.server(), signal.SIGKILL)
            else:
                taking.kill()
            # It may have to hear first that its server is gone.
            taking.wait(timeout=60)
            writer.goes_on()
        # Then nobody else is left to have it go on.
        for number in range(6):
            taking = subprocess.Popen([THINPLY, "container", "snapshot", "web", f"h{number}"],
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(chance.random() * 0.05)
            if number == 0:
                os.kill(self.holder, signal.SIGKILL)
            taking.wait(timeout=60)
            writer.goes_on()
        writer.stop()
        thinply("umount", self.dir)
        for name in self.snapshots():
            device = thinply("attach", "--read-only", f"container/web@{name}").strip()
            # What a death has cut off is as after a power loss.
            run("e2fsck", "-f", "-n", device, status=None)
            thinply("detach", device)
        thinply("mount", self.target, self.dir)
        thinply("umount", self.dir)
        device = thinply("attach", "--read-only", self.target).strip()
        run("e2fsck", "-f", "-n", device)
        thinply("detach", device)
        self.nothing_stays()

    def test_all_die_while_it_holds_still(self):
        chance = random.Random(7)
        for number in range(6):
            taking = subprocess.Popen([THINPLY, "container", "snapshot", "web", f"s{number}"],
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(chance.random() * 0.03)
            server = self.server()
            for pid in (taking.pid, self.holder, server):
                os.kill(pid, signal.SIGKILL)
            taking.wait()
            done = subprocess.run([THINPLY, "umount", self.dir], capture_output=True, text=True, timeout=60)
            self.assertIn("may be lost", done.stderr)
            self.assertFalse(is_mounted(self.dir))
            # Nothing of it is kept.
            self.nothing_stays()
            thinply("mount", self.target, self.dir)
            (use,) = self.uses()
            self.holder = use["pid"]
            self.assertEqual((self.dir / "hello").read_text(), "world")
        thinply("umount", self.dir)

    def holds_still(self, server):
        """Whether a process waits for the server to be through while the file system holds still."""
        for thread in Path(f"/proc/{server}/task").glob("*/children"):
            # Each may be gone by now.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                for pid in thread.read_text().split():
                    call = Path(f"/proc/{pid}/syscall").read_text().split()
                    freezes = b"THINPLY_FREEZES=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
                    if freezes and call[0] == self.RECEIVES:
                        return True
        return False

    # recvfrom(2) of this architecture.
    RECEIVES = {"x86_64": "45", "aarch64": "207"}.get(os.uname().machine)

    def test_it_does_not_hold_still_for_long(self):
        writer, caught = Writer(self.dir), None
        for number in range(60):
            server = self.server()
            taking = subprocess.Popen([THINPLY, "container", "snapshot", "web", f"s{number}"], stderr=subprocess.PIPE,
                                      stdout=subprocess.DEVNULL, text=True)
            while taking.poll() is None and not self.holds_still(server):
                pass
            if taking.poll() is None:
                # It holds still just now, and the server is not through.
                os.kill(server, signal.SIGSTOP)
                time.sleep(3)
                os.kill(server, signal.SIGCONT)
            said = taking.communicate(timeout=60)[1]
            writer.goes_on()
            if taking.returncode:
                caught = number
                break
        self.assertIsNotNone(caught, "never stopped in time")
        self.assertIn("could not be made to hold still for longer than 2 s", said)
        self.assertNotIn(f"s{caught}", self.snapshots())
        writer.stop()
        thinply("container", "snapshot", "web", f"s{caught}")
        self.is_clean(f"container/web@s{caught}")
        thinply("umount", self.dir)
        self.nothing_stays()

    def test_what_somebody_else_froze_stays_frozen(self):
        run("fsfreeze", "--freeze", self.dir)
        try:
            thinply("container", "snapshot", "web", "then")
        finally:
            # Fails where it isn't frozen.
            run("fsfreeze", "--unfreeze", self.dir)
        self.is_clean("container/web@then")
        thinply("umount", self.dir)

    def test_each_mount_of_it_holds_still_and_what_is_hidden_is_refused(self):
        run("mount", "--bind", self.dir, self.place)
        run("mount", "-t", "tmpfs", "hides", self.dir)
        thinply("container", "snapshot", "web", "one")
        run("umount", self.place)
        self.refused("container", "snapshot", "web", "two", says="something else is mounted over it")
        run("umount", self.dir)
        thinply("container", "snapshot", "web", "two")
        self.assertEqual(self.snapshots(), ["one", "two"])
        thinply("umount", self.dir)
        self.is_clean("container/web@two")


if __name__ == "__main__":
    unittest.main()

"""What the tests of mounting stand on: a store, a folder to mount on, and what must not stay."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from support import THINPLY, Case, run, thinply, wait_for


class Mounting(Case):
    def setUp(self):
        super().setUp()
        self.top = Path(tempfile.mkdtemp(prefix="thinply-mounting-")).resolve()
        self.addCleanup(self.clear)
        self.runs, self.dir = self.top / "run", self.top / "mnt"
        self.dir.mkdir()
        os.environ["THINPLY_ROOT"] = str(self.top / "store")
        os.environ["THINPLY_RUN"] = str(self.runs)
        os.environ["THINPLY_HOST_KEY"] = str(self.top / "key")
        for name in ("THINPLY_ROOT", "THINPLY_RUN", "THINPLY_HOST_KEY"):
            self.addCleanup(os.environ.pop, name)

    def clear(self):
        """Whatever a failed test has left."""
        run("pkill", "-KILL", "-f", "--", f"--fuse {self.runs}", status=None)
        for _ in range(3):
            lines = Path("/proc/self/mountinfo").read_text().splitlines()
            for folder in [line.split()[4] for line in lines]:
                if folder.startswith(str(self.top)):
                    run("umount", "-l", folder, status=None)
        for device in run("losetup", "-n", "-O", "NAME,BACK-FILE").splitlines():
            if str(self.top) in device:
                run("losetup", "-d", device.split()[0], status=None)
        shutil.rmtree(self.top, ignore_errors=True)

    def uses(self):
        """What is mounted and attached, beside what others do meanwhile."""
        uses = json.loads(thinply("mounts", "--json"))
        return [use for use in uses if str(self.top) in (use["store"] or use["target"])]

    def nothing_stays(self):
        self.assertEqual(self.uses(), [])
        mounts = Path("/proc/self/mountinfo").read_text()
        wait_for(lambda: str(self.top) not in Path("/proc/self/mountinfo").read_text(), f"no mount {mounts}")
        self.assertNotIn(str(self.top), run("losetup", "-n", "-O", "BACK-FILE", status=None))
        self.server_ends()

    def server_ends(self):
        found = lambda: run("pgrep", "-f", "--", f"--fuse {self.runs}", status=None)
        wait_for(lambda: not found(), "the server's end")

    def container(self, name="web"):
        tree = self.top / "tree"
        if not tree.exists():
            tree.mkdir()
            (tree / "hello").write_text("world")
            thinply("image", "build-from", tree, "base")
        thinply("container", "create", "--name", name, "base")
        return f"container/{name}"

    def volume(self, name="data", size="64M"):
        thinply("volume", "create", "--size", size, "--fs", "ext4", name)
        return f"volume/{name}"

    def refused(self, *command, says):
        done = subprocess.run([THINPLY, *map(str, command)], capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
        self.assertIn(says, done.stderr)

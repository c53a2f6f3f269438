"""Which file systems `thinply mount` lets the kernel read: those that this host made, and nobody changed."""

import os
import subprocess
import unittest

from files import Files, need_mounts
from mounting import Mounting

from support import THINPLY, run, thinply

REFUSAL = "this host did not make its file system"


def setUpModule():
    need_mounts("qemu-io")


class Trust(Mounting):
    def setUp(self):
        super().setUp()
        self.store = self.top / "store"

    def is_trusted(self, target):
        done = subprocess.run([THINPLY, "mount", target, self.dir], capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            thinply("umount", self.dir)
            return True
        self.assertIn(REFUSAL, done.stderr)
        return False

    def test_what_a_copied_store_says_of_itself_counts_for_nothing(self):
        disks = [self.container(), self.volume(), "image/base"]
        for disk in disks:
            self.assertTrue(self.is_trusted(disk), disk)
        self.nothing_stays()
        copy = self.top / "copy"
        run("cp", "-a", self.store, copy)
        os.environ["THINPLY_ROOT"] = str(copy)
        for disk in disks:
            self.assertFalse(self.is_trusted(disk), disk)
        # What is made in it from now on is its own.
        self.assertTrue(self.is_trusted(self.volume("more")))
        self.assertFalse(self.is_trusted("volume/data"))
        os.environ["THINPLY_ROOT"] = str(self.store)
        self.assertTrue(self.is_trusted("volume/data"))
        self.nothing_stays()

    def test_another_host_and_a_key_that_others_know_count_for_nothing(self):
        target = self.volume()
        key = self.top / "key"
        self.assertEqual((key.stat().st_mode & 0o777, key.stat().st_size), (0o600, 32))
        os.environ["THINPLY_HOST_KEY"] = str(self.top / "other key")
        self.assertFalse(self.is_trusted(target))
        os.environ["THINPLY_HOST_KEY"] = str(key)
        self.assertTrue(self.is_trusted(target))
        key.chmod(0o644)
        self.assertFalse(self.is_trusted(target))
        key.chmod(0o600)
        key.write_bytes(key.read_bytes()[:31])
        self.assertFalse(self.is_trusted(target))

    def test_a_list_that_is_damaged_counts_as_missing(self):
        target, made = self.volume(), self.store / "made"
        text = made.read_text()
        for damaged in ("", "{", text.replace("data", "date"), text[:-2] + "x}"):
            made.write_text(damaged)
            self.assertFalse(self.is_trusted(target), damaged)
            self.assertTrue(self.is_trusted(self.volume("more")), damaged)
            thinply("volume", "rm", "more")
            made.write_text(text)
            self.assertTrue(self.is_trusted(target))
        for put in (lambda: made.symlink_to("/dev/null"), made.mkdir):
            made.unlink()
            put()
            self.assertFalse(self.is_trusted(target))
            self.assertTrue(self.is_trusted(self.volume("more")))
            thinply("volume", "rm", "more")

    def test_what_others_may_write_to_is_refused(self):
        target, layer = self.container(), self.store / "containers/web.tply"
        blobs = self.store / "blobs/sha256"
        base = max(blobs.iterdir(), key=lambda blob: blob.stat().st_size)
        record = self.store / "containers/web.json"
        for path in (self.store, self.store / "blobs", blobs, base, layer.parent, layer, record):
            mode = path.stat().st_mode & 0o777
            path.chmod(mode | 0o020)
            self.refused("mount", target, self.dir, says=f"{path}: others may write to it")
            path.chmod(mode)
            os.chown(path, 65534, -1)
            self.refused("mount", target, self.dir, says=f"{path}: others may write to it")
            os.chown(path, 0, -1)
        self.assertTrue(self.is_trusted(target))

    def test_what_something_else_was_written_to_is_a_strangers(self):
        web, data = self.container(), self.volume()
        thinply("container", "snapshot", "web", "before")
        # For reading only, nothing changes.
        for target in (web, data):
            thinply("attach", "--read-only", target)
            thinply("detach", target)
            self.assertTrue(self.is_trusted(target))
        for target in (web, data):
            device = thinply("attach", target).strip()
            run("mkfs.ext4", "-q", "-F", device)
            thinply("detach", target)
            self.assertFalse(self.is_trusted(target))
        self.assertFalse(self.is_trusted("container/web@before"))
        thinply("container", "commit", "web", "made:1")
        self.assertFalse(self.is_trusted("image/made:1"))
        # What it holds after a reset is its image again, but its snapshots are what they were.
        thinply("container", "reset", "web")
        self.assertFalse(self.is_trusted("container/web@before"))
        thinply("container", "reset", "web", "before")
        self.assertFalse(self.is_trusted(web))
        # Its image is still this host's, and so is another container of the same name.
        self.assertTrue(self.is_trusted("image/base"))
        thinply("container", "rm", "web")
        self.assertTrue(self.is_trusted(self.container()))
        thinply("gc")
        self.assertTrue(self.is_trusted(web))

    def test_what_an_nbd_client_writes_is_a_strangers(self):
        web, other, socket = self.container(), self.container("other"), self.top / "socket"
        server = subprocess.Popen([THINPLY, "serve", "--all", "--socket", socket], stdout=subprocess.PIPE, text=True)
        self.addCleanup(server.kill)
        server.stdout.readline()
        uri = f"nbd+unix:///container/web?socket={socket}"
        # To look at a disk is not to write to it.
        run("nbdinfo", "--list", f"nbd+unix://?socket={socket}")
        run("qemu-io", "-f", "raw", "-c", "write 1M 4k", uri)
        server.terminate()
        server.communicate()
        self.assertFalse(self.is_trusted(web))
        self.assertTrue(self.is_trusted(other))

    def test_a_container_is_its_image_again_after_a_reset(self):
        web = self.container()
        thinply("attach", web)
        thinply("detach", web)
        self.assertFalse(self.is_trusted(web))
        thinply("container", "reset", "web")
        self.assertTrue(self.is_trusted(web))

    def test_what_was_not_noted_is_a_strangers(self):
        web, key = self.container(), self.top / "key"
        # A process that can't seal the list anew.
        os.environ["THINPLY_HOST_KEY"] = str(self.top / "other")
        thinply("attach", web)
        thinply("detach", web)
        os.environ["THINPLY_HOST_KEY"] = str(key)
        self.assertFalse(self.is_trusted(web))
        # Nor does a list that is begun anew know what was before.
        thinply("image", "build-from", self.top / "tree", "base")
        self.assertFalse(self.is_trusted(web))
        self.assertTrue(self.is_trusted(self.container("new")))

    def test_a_copy_at_the_root_of_a_file_system_is_another_one(self):
        roots = [self.top / "one", self.top / "two"]
        for root in roots:
            root.mkdir()
            run("truncate", "-s", "64M", f"{root}.raw")
            run("mkfs.ext4", "-q", f"{root}.raw")
            run("mount", "-o", "loop", f"{root}.raw", root)
            self.addCleanup(run, "umount", root, status=None)
            (root / "lost+found").rmdir()
        os.environ["THINPLY_ROOT"] = str(roots[0])
        web = self.container()
        self.assertTrue(self.is_trusted(web))
        self.server_ends()
        run("cp", "-a", f"{roots[0]}/.", roots[1])
        self.assertEqual(roots[0].stat().st_ino, roots[1].stat().st_ino)
        os.environ["THINPLY_ROOT"] = str(roots[1])
        self.assertFalse(self.is_trusted(web))
        self.server_ends()

    def test_a_server_that_gives_disks_to_others_is_not_trusted(self):
        web = self.container()
        with Files("--all", environment={"THINPLY_ROOT": str(self.store)}) as files:
            self.refused("mount", web, self.dir, says="its server gives it to others than mounts too")
            thinply("mount", "--trust", web, self.dir)
            thinply("umount", self.dir)
            self.assertTrue((files.folder / web).exists())
        self.assertFalse(self.is_trusted(web))


if __name__ == "__main__":
    unittest.main()

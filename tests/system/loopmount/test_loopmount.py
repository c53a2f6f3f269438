"""A real file system on a real mount, over chains of depth 1, 8 and 64.

serve, nbdfuse, losetup, mkfs.ext4, mount, a file tree copied in, unmount, e2fsck, snapshot, changes
through the new top; the snapshot stays bit-identical and keeps the tree. Needs root, FUSE and loop
devices. Whatever happens, nothing stays mounted.
"""

import hashlib
import os
import random
import stat
import subprocess
import sys
import tempfile
import unittest
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))

from support import (  # noqa: E402
    BLOCK, MiB, Case, Server, die_with_parent, insist, missing, need, pattern, run, thinply, wait_for)

# There wherever these tests can run: this interpreter's library, and links and modes in /etc.
SOURCES = [Path(os.__file__).parent, Path("/etc")]


def setUpModule():
    need("nbdfuse", "fusermount3", "losetup", "mkfs.ext4", "e2fsck", "mount", "umount", "nbdcopy",
         bindings=True)
    if os.geteuid() != 0:
        missing("mounting needs root")
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            missing(f"this kernel has no {device}")


@contextmanager
def as_file(server, read_only=False):
    """The export as a file, by nbdfuse."""
    with tempfile.TemporaryDirectory(prefix="thinply-fuse-") as folder:
        file = Path(folder) / "disk"
        command = ["nbdfuse", *(["-r"] if read_only else []), str(file), server.uri]
        fuse = subprocess.Popen(command, preexec_fn=die_with_parent, stdin=subprocess.DEVNULL,
                                start_new_session=True)
        try:
            wait_for(lambda: file.exists() or fuse.poll() is not None, "nbdfuse")
            assert fuse.poll() is None, "nbdfuse has ended"
            yield file
        finally:
            if os.path.ismount(folder):
                insist("fusermount3", "-u", folder)
            try:
                status = fuse.wait(timeout=60)
            except subprocess.TimeoutExpired:
                fuse.kill()
                fuse.wait()
                raise
    assert status == 0, f"nbdfuse ended with {status}"


@contextmanager
def as_loop_device(file, read_only=False):
    options = ["--read-only"] if read_only else []
    device = run("losetup", "--find", "--show", *options, file).strip()
    try:
        yield device
    finally:
        insist("losetup", "--detach", device)
        # Detaching a busy device is put off by the kernel; the file under it must be free first.
        wait_for(lambda: not run("losetup", "--associated", file, status=None).strip(), "losetup")


@contextmanager
def as_tree(device, read_only=False):
    with tempfile.TemporaryDirectory(prefix="thinply-mnt-") as folder:
        run("mount", "-t", "ext4", "-o", "ro" if read_only else "rw", device, folder)
        try:
            yield Path(folder)
        finally:
            insist("umount", folder)


@contextmanager
def as_block_device(layer, read_only=False):
    with ExitStack() as stack:
        server = stack.enter_context(Server(layer, read_only=read_only))
        file = stack.enter_context(as_file(server, read_only))
        yield stack.enter_context(as_loop_device(file, read_only))


def tree(root):
    """What is to be the same in a copy: names, kinds, owners, modes, times, targets, contents."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            if path.parent == Path(root) and name == "lost+found":
                continue
            state = path.lstat()
            facts = [state.st_mode, state.st_uid, state.st_gid, int(state.st_mtime)]
            if stat.S_ISLNK(state.st_mode):
                facts.append(os.readlink(path))
            elif stat.S_ISREG(state.st_mode):
                facts += [state.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
            found[str(path.relative_to(root))] = tuple(facts)
    return found


def content(layer):
    """SHA-256 of all the bytes that a layer shows, over a read-only server."""
    with Server(layer, read_only=True) as server:
        handle, digest = server.connect(), hashlib.sha256()
        for at in range(0, handle.get_size(), 16 * MiB):
            digest.update(handle.pread(min(16 * MiB, handle.get_size() - at), at))
        return digest.hexdigest()


class LoopMount(Case):
    SIZE = 256 * MiB

    def setUp(self):
        super().setUp()
        # A copy first: /etc may change while this runs.
        self.source = self.path("source")
        self.source.mkdir()
        for folder in SOURCES:
            run("cp", "-a", folder, self.source)
        self.tree = tree(self.source)
        size = sum(facts[4] for facts in self.tree.values() if stat.S_ISREG(facts[0]))
        self.assertGreater(size, 10 * MiB)
        self.assertGreater(len(self.tree), 500)

    def chain(self, depth):
        """A writable top over `depth - 1` snapshots, each with changes of its own."""
        top, disk, chance = self.create("top.tply", self.SIZE), bytearray(self.SIZE), random.Random(7)
        for level in range(depth):
            with Server(top) as server:
                handle = server.connect()
                for number in range(24):
                    at = chance.randrange(0, self.SIZE, 512)
                    data = pattern(min(self.SIZE - at, chance.choice([512, BLOCK, 40 * BLOCK])),
                                   f"{level} {number}")
                    handle.pwrite(data, at)
                    disk[at:at + len(data)] = data
                at = chance.randrange(0, self.SIZE - MiB, BLOCK)
                handle.zero(MiB, at)
                disk[at:at + MiB] = bytes(MiB)
            if level + 1 < depth:
                thinply("snapshot", top, self.path(f"level{level}.tply"))
        with Server(top, read_only=True) as server:
            self.assert_disk(server.connect(), disk, f"chain of depth {depth}")
        return top

    def same_tree(self, root, want):
        got = tree(root)
        wrong = sorted(name for name in got.keys() | want.keys() if got.get(name) != want.get(name))
        shown = [(name, got.get(name), want.get(name)) for name in wrong[:5]]
        self.assertFalse(wrong, f"{len(wrong)} of {len(want)} differ: {shown}")

    def life(self, depth):
        top, snapshot = self.chain(depth), self.path("snapshot.tply")
        with as_block_device(top) as device:
            run("mkfs.ext4", "-q", "-F", device)
            with as_tree(device) as root:
                for folder in SOURCES:
                    run("cp", "-a", self.source / folder.name, root)
                run("sync", "-f", root)
            run("e2fsck", "-fn", device)
        self.assert_clean(top)

        thinply("snapshot", top, snapshot)
        before = content(snapshot)
        self.assertEqual(content(top), before)

        with as_block_device(top) as device:
            with as_tree(device) as root:
                self.same_tree(root, self.tree)
                changed = self.change(root)
                run("sync", "-f", root)
            run("e2fsck", "-fn", device)

        self.assertEqual(content(snapshot), before)
        with as_block_device(snapshot, read_only=True) as device:
            run("e2fsck", "-fn", device)
            with as_tree(device, read_only=True) as root:
                self.same_tree(root, self.tree)
        with as_block_device(top) as device, as_tree(device) as root:
            self.same_tree(root, changed)
        self.assertNotEqual(content(top), before)
        self.assertEqual(content(snapshot), before)
        self.assert_clean(top)
        self.assert_clean(snapshot)

    def change(self, root):
        """Removes, rewrites, renames and adds files; answers what the tree is then."""
        chance = random.Random(11)
        files = sorted(name for name, facts in self.tree.items() if stat.S_ISREG(facts[0]))
        for number, name in enumerate(chance.sample(files, 300)):
            path = root / name
            if number % 3 == 0:
                path.unlink()
            elif number % 3 == 1:
                with open(path, "r+b") as file:
                    file.write(pattern(5000, number))
            else:
                path.rename(path.with_name(path.name + ".renamed"))
        (root / "new").write_bytes(pattern(20 * MiB, "new"))
        return tree(root)

    def test_depth_1(self):
        self.life(1)

    def test_depth_8(self):
        self.life(8)

    def test_depth_64(self):
        self.life(64)


if __name__ == "__main__":
    unittest.main()

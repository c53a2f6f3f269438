"""Import, export and flatten share space where the file system can do that, and copy elsewhere.

Loop-mounted XFS and btrfs. Needs root and loop devices; whatever happens, nothing stays mounted.
"""

import os
import subprocess
import sys
import tempfile
import unittest
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))

from support import GiB, KiB, MiB, Case, Server, missing, need, pattern, run, thinply  # noqa: E402

SIZE = 300 * MiB
# What a few headers, bitmap pages and the file system's own records may take.
LITTLE = 3 * MiB


def setUpModule():
    need("losetup", "mount", "umount", "cmp")
    if os.geteuid() != 0:
        missing("mounting needs root")
    if not os.path.exists("/dev/loop-control"):
        missing("this kernel has no /dev/loop-control")


@contextmanager
def mounted(*mkfs):
    """A new file system of 2 GiB."""
    need(mkfs[0])
    with tempfile.TemporaryDirectory(prefix="thinply-reflink-") as folder:
        image, point = Path(folder) / "image", Path(folder) / "mnt"
        with open(image, "wb") as file:
            file.truncate(2 * GiB)
        point.mkdir()
        run(*mkfs, image)
        run("mount", "-o", "loop", image, point)
        try:
            yield point
        finally:
            run("umount", point)


def taken(point):
    """Bytes in use on a file system, once all is written."""
    run("sync", "-f", point)
    stat = os.statvfs(point)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


class Reflink(Case):
    def disk(self, path):
        """A disk with data in several groups, holes, and an end inside a block."""
        with open(path, "wb") as file:
            for offset, length in [(0, 20 * MiB), (120 * MiB, 30 * MiB), (200 * MiB + 512, 9 * KiB)]:
                file.seek(offset)
                file.write(pattern(length, offset))
            file.seek(SIZE - 1536)
            file.write(pattern(1536, "end"))
        return path

    def equal(self, a, b):
        run("cmp", a, b)

    def export(self, layer):
        out = self.path("plain.raw")
        thinply("export", "--force", layer, out)
        return out

    def round_trip(self, point, shares):
        """Everything twice as large again unless it is shared; the same bytes in any case."""
        raw, layer, out = self.disk(point / "disk.raw"), point / "base.tply", point / "out.raw"
        original = self.path("original")
        run("cp", raw, original)
        before = taken(point)

        def grown(least):
            nonlocal before
            now = taken(point)
            if shares:
                self.assertLess(now - before, LITTLE)
            else:
                self.assertGreater(now - before, least)
            before = now

        thinply("import", raw, layer)
        grown(50 * MiB)
        thinply("check", layer)
        self.equal(self.export(layer), original)
        thinply("export", layer, out)
        grown(50 * MiB)
        self.equal(out, original)

        # Whoever writes to one of them changes nothing else.
        with open(raw, "r+b") as file:
            file.write(bytes(MiB))
        with open(out, "r+b") as file:
            file.seek(120 * MiB)
            file.write(bytes(MiB))
        self.equal(self.export(layer), original)

        top = point / "top.tply"
        thinply("create", "--parent", layer, top)
        with Server(top) as server:
            self.write(server, [(MiB + 100, pattern(5 * MiB, "a")), (130 * MiB, bytes(MiB))])
        seen = self.path("seen")
        run("cp", self.export(top), seen)
        before = taken(point)
        for options, least in ([], 50 * MiB), (["--onto", layer], 5 * MiB):
            flat = point / f"flat-{len(options)}.tply"
            thinply("flatten", *options, top, flat)
            grown(least)
            thinply("check", "--chain", flat)
            self.equal(self.export(flat), seen)

    def test_xfs_shares(self):
        with mounted("mkfs.xfs", "-q", "-m", "reflink=1") as point:
            self.round_trip(point, shares=True)

    def test_btrfs_shares(self):
        with mounted("mkfs.btrfs", "-q") as point:
            self.round_trip(point, shares=True)

    def test_xfs_without_reflinks_copies(self):
        with mounted("mkfs.xfs", "-q", "-m", "reflink=0") as point:
            self.round_trip(point, shares=False)

    def test_ext4_copies(self):
        with mounted("mkfs.ext4", "-q") as point:
            self.round_trip(point, shares=False)

    def test_another_file_system_is_copied_from_and_to(self):
        raw = self.disk(self.path("disk.raw"))
        with mounted("mkfs.xfs", "-q", "-m", "reflink=1") as point:
            thinply("import", raw, point / "a.tply")
            self.equal(self.export(point / "a.tply"), raw)

    def test_shared_blocks_survive_a_full_file_system(self):
        with mounted("mkfs.xfs", "-q", "-m", "reflink=1") as point:
            raw = self.disk(point / "disk.raw")
            thinply("import", raw, point / "a.tply")
            subprocess.run(["dd", "if=/dev/zero", f"of={point}/fill", "bs=1M"], capture_output=True)
            thinply("import", raw, point / "b.tply", status=None)
            self.equal(self.export(point / "a.tply"), raw)


if __name__ == "__main__":
    unittest.main()

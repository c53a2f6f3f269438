"""Two containers of one XFS image, mounted side by side: the second needs `-o nouuid`
(docs/host-filesystems.md). Real loop mounts over what `serve --all` shows.
"""

import os
import subprocess
import sys
import unittest
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))

from support import MiB, Case, Server, insist, need, run, thinply  # noqa: E402
from test_loopmount import as_file, as_loop_device  # noqa: E402
from test_loopmount import setUpModule as need_mounts  # noqa: E402


def setUpModule():
    need_mounts()
    need("mkfs.xfs", "xfs_admin")


class Export:
    """One of a server's exports, as what `as_file` wants."""

    def __init__(self, server, name):
        self.uri = server.uri.replace(":///", f":///{name}")


@contextmanager
def mounted(device, point, *options):
    point.mkdir(exist_ok=True)
    run("mount", "-t", "xfs", *options, device, point)
    try:
        yield point
    finally:
        insist("umount", point)


class Siblings(Case):
    def test_a_second_container_of_one_xfs_image(self):
        raw = self.path("raw")
        with open(raw, "wb") as file:
            file.truncate(320 * MiB)
        run("mkfs.xfs", "-q", raw)
        with mounted(raw, self.path("base"), "-o", "loop") as base:
            (base / "name").write_text("image")
        store = ("--root", self.path("store"))
        thinply("image", "import", *store, raw, "image")
        for name in ("one", "two"):
            thinply("container", "create", *store, "image", "--name", name)
        with Server("--all", *store) as server, \
                as_file(Export(server, "container/one")) as first, \
                as_file(Export(server, "container/two")) as second, \
                as_loop_device(first) as first, as_loop_device(second) as second:
            with mounted(first, self.path("one")) as one:
                (one / "name").write_text("one")
                refused = subprocess.run(["mount", "-t", "xfs", second, self.path("base")],
                                         capture_output=True)
                self.assertNotEqual(refused.returncode, 0, "the kernel takes one UUID twice")
                with mounted(second, self.path("two"), "-o", "nouuid") as two:
                    self.assertEqual((two / "name").read_text(), "image")
                    (two / "name").write_text("two")
                    os.sync()
                    self.assertEqual((one / "name").read_text(), "one")
            # With a UUID of its own it needs no option.
            run("xfs_admin", "-U", "generate", second)
            with mounted(first, self.path("one")) as one, \
                    mounted(second, self.path("two")) as two:
                names = [Path(point / "name").read_text() for point in (one, two)]
            self.assertEqual(names, ["one", "two"])
        thinply("store", "check", *store)


if __name__ == "__main__":
    unittest.main()

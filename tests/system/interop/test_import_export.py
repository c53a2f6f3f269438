"""Raw disks in and out by `thinply import` and `export`, seen by others' tools."""

import unittest

from support import MiB, Case, Server, need, pattern, run, thinply, used


def setUpModule():
    need("qemu-img", bindings=True)


class ImportExport(Case):
    SIZE = 64 * MiB

    def setUp(self):
        super().setUp()
        self.disk = bytearray(self.SIZE)
        for offset, length in [(0, MiB), (20 * MiB + 100, 3 * MiB), (self.SIZE - 700, 700)]:
            self.disk[offset:offset + length] = pattern(length, offset)
        self.raw = self.path("disk.raw")
        self.raw.write_bytes(self.disk)

    def test_import(self):
        file = self.path("disk.tply")
        thinply("import", self.raw, file)
        self.assertLess(used(file), 7 * MiB)
        with Server(file, read_only=True) as server:
            self.assert_disk(server.connect(), self.disk)
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", self.raw, server.uri)
        self.assert_clean(file)
        # Frozen: containers stand on it as it is.
        before = file.read_bytes()
        top = self.create("top.tply", parent=file)
        with Server(top) as server:
            server.connect().pwrite(b"changed", 5)
        self.assertEqual(file.read_bytes(), before)

    def test_import_writable(self):
        file = self.path("disk.tply")
        thinply("import", self.raw, file, "--writable")
        with Server(file) as server:
            self.assert_disk(server.connect(), self.disk)
            server.connect().pwrite(b"changed", 5)

    def test_export_of_an_overlay(self):
        file, out = self.path("disk.tply"), self.path("out.raw")
        thinply("import", self.raw, file)
        top = self.create("top.tply", parent=file)
        with Server(top) as server:
            handle = server.connect()
            data = pattern(MiB, "top")
            handle.pwrite(data, 10 * MiB + 5)
            handle.zero(MiB, 20 * MiB)
        self.disk[10 * MiB + 5:11 * MiB + 5] = data
        self.disk[20 * MiB:21 * MiB] = bytes(MiB)
        thinply("export", top, out)
        self.assertEqual(out.read_bytes(), self.disk)
        self.assertLess(used(out), 8 * MiB)


if __name__ == "__main__":
    unittest.main()

"""nbdcopy both ways: bit-identical, sparse, over one connection and several."""

import unittest

from support import KiB, MiB, Case, Server, need, pattern, run, used


def setUpModule():
    need("nbdcopy", bindings=True)


class Nbdcopy(Case):
    SIZE = 256 * MiB + 512

    def setUp(self):
        super().setUp()
        # Data in islands of odd sizes and places, in a sea of holes.
        self.islands = [(0, 3 * MiB + 5), (20 * MiB + 4097, 100), (64 * MiB, 33 * MiB),
                        (130 * MiB - 7, 2 * MiB), (self.SIZE - 1000, 1000)]
        self.disk = bytearray(self.SIZE)
        for offset, length in self.islands:
            self.disk[offset:offset + length] = pattern(length, offset)
        self.raw = self.path("source.raw")
        with open(self.raw, "wb") as raw:
            raw.truncate(self.SIZE)
            for offset, length in self.islands:
                raw.seek(offset)
                raw.write(self.disk[offset:offset + length])

    def same(self, path):
        with open(path, "rb") as file:
            self.assert_bytes(file.read(), self.disk, path.name)

    def test_in_and_out(self):
        variants = [[], ["--connections=1"], ["--connections=4", "--requests=16"],
                    ["--synchronous"], ["--no-extents"], ["--request-size=4096"],
                    ["--sparse=0"], ["--allocated"], ["--request-size=33554432"]]
        for number, options in enumerate(variants):
            with self.subTest(options=options):
                file = self.create(f"copy{number}.tply", self.SIZE)
                copy = self.path(f"copy{number}.raw")
                with Server(file) as server:
                    run("nbdcopy", "--flush", *options, self.raw, server.uri)
                    self.assert_disk(server.connect(), self.disk)
                    if "--allocated" not in options:
                        self.assertLess(used(file), used(self.raw) + 2 * MiB)
                    run("nbdcopy", *options, server.uri, copy)
                self.same(copy)
                if not {"--no-extents", "--sparse=0", "--allocated"} & set(options):
                    self.assertLess(used(copy), used(self.raw) + 2 * MiB)
                # After the restart too, from the file alone.
                with Server(file, read_only=True) as server:
                    self.assert_disk(server.connect(), self.disk)
                copy.unlink()
                file.unlink()

    def test_onto_an_overlay_with_other_data(self):
        """The holes of the source must hide what the base holds there."""
        top = self.overlay("disk", self.SIZE, [(10 * MiB, pattern(80 * MiB, "other"))])
        base = self.path("disk-base.tply")
        before = base.read_bytes()
        with Server(top) as server:
            run("nbdcopy", "--flush", self.raw, server.uri)
            self.assert_disk(server.connect(), self.disk)
        self.assert_clean(top)
        self.assertEqual(base.read_bytes(), before)

    def test_from_server_to_server(self):
        one, other = self.create("one.tply", self.SIZE), self.create("other.tply", self.SIZE)
        with Server(one) as source, Server(other, tcp=True) as target:
            run("nbdcopy", self.raw, source.uri)
            run("nbdcopy", "--flush", source.uri, target.uri)
            self.assert_disk(target.connect(), self.disk)
        self.assertLess(used(other), used(one) + 2 * MiB)

    def test_null(self):
        file = self.create("one.tply", 64 * KiB)
        with Server(file) as server:
            run("nbdcopy", server.uri, "null:")


if __name__ == "__main__":
    unittest.main()

"""QEMU's block layer as the client: qemu-img and qemu-io."""

import json
import unittest

from support import KiB, MiB, Case, Server, need, pattern, run, used


def setUpModule():
    need("qemu-img", "qemu-io", bindings=True)


class QemuImg(Case):
    SIZE = 64 * MiB

    def setUp(self):
        super().setUp()
        self.disk = bytearray(self.SIZE)
        for offset, length in [(0, 100 * KiB), (5 * MiB + 512, MiB), (40 * MiB, 7 * MiB + 4096)]:
            self.disk[offset:offset + length] = pattern(length, offset)
        self.raw = self.path("disk.raw")
        self.raw.write_bytes(self.disk)

    def loaded(self, name):
        file = self.create(name, self.SIZE)
        with Server(file) as server:
            self.write(server, [(at, bytes(self.disk[at:at + 64 * KiB]))
                                for at in range(0, self.SIZE, 64 * KiB)
                                if any(self.disk[at:at + 64 * KiB])])
        return file

    def test_info(self):
        with Server(self.loaded("disk.tply")) as server:
            facts = json.loads(run("qemu-img", "info", "--output=json", server.uri))
            self.assertEqual((facts["format"], facts["virtual-size"]), ("raw", self.SIZE))
            self.assertIn("64 MiB", run("qemu-img", "info", server.uri))

    def test_map(self):
        with Server(self.loaded("disk.tply")) as server:
            rows = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", server.uri))
        at = 0
        for row in rows:
            self.assertEqual(row["start"], at)
            at += row["length"]
            if row["zero"]:
                self.assertFalse(any(self.disk[row["start"]:at]), row)
        self.assertEqual(at, self.SIZE)
        data = sum(row["length"] for row in rows if not row["zero"])
        self.assertLess(data, 10 * MiB)

    def test_convert_in(self):
        qcow2 = self.path("disk.qcow2")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.raw, qcow2)
        for number, (source, form, options) in enumerate([
            (self.raw, "raw", []),
            (qcow2, "qcow2", []),
            (qcow2, "qcow2", ["-W", "-m", "16"]),
            (self.raw, "raw", ["-S", "0"]),
            (self.raw, "raw", ["--target-is-zero"]),
            (self.raw, "raw", ["-t", "none"]),
        ]):
            with self.subTest(form=form, options=options):
                file = self.create(f"in{number}.tply", self.SIZE)
                with Server(file) as server:
                    run("qemu-img", "convert", "-n", "-f", form, "-O", "raw", *options, source,
                        server.uri)
                    self.assert_disk(server.connect(), self.disk)
                if "0" not in options:
                    self.assertLess(used(file), 12 * MiB)
                self.assert_clean(file)

    def test_convert_over_other_data(self):
        top = self.overlay("disk", self.SIZE, [(MiB, pattern(50 * MiB, "other"))])
        with Server(top) as server:
            run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", self.raw, server.uri)
            self.assert_disk(server.connect(), self.disk)

    def test_convert_out_and_compare(self):
        with Server(self.loaded("disk.tply")) as server:
            for form in ("raw", "qcow2"):
                out = self.path(f"out.{form}")
                run("qemu-img", "convert", "-f", "raw", "-O", form, server.uri, out)
                run("qemu-img", "compare", "-f", form, "-F", "raw", out, server.uri)
                self.assertLess(used(out), 12 * MiB)
            self.assertEqual(self.path("out.raw").read_bytes(), self.disk)
            run("qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", server.uri, server.uri)
            run("qemu-io", "-f", "raw", "-c", "write -P 1 41M 512", server.uri)
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", self.raw, server.uri, status=1)

    def test_dd_and_bench(self):
        file = self.create("disk.tply", self.SIZE)
        with Server(file) as server:
            run("qemu-img", "dd", "-f", "raw", "-O", "raw", "bs=1M", "count=2", f"if={server.uri}",
                f"of={self.path('dd.raw')}")
            self.assertEqual(self.path("dd.raw").read_bytes(), bytes(2 * MiB))
            run("qemu-img", "bench", "-f", "raw", "-w", "-c", "2000", "-d", "32", "--pattern=7",
                "--flush-interval=64", server.uri)
            self.assert_bytes(server.connect().pread(2000 * 4096, 0), b"\7" * (2000 * 4096))

    def test_backing_file_over_nbd(self):
        """A qcow2 overlay whose backing image is ours."""
        with Server(self.loaded("disk.tply"), read_only=True) as server:
            top = self.path("top.qcow2")
            run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", server.uri, top)
            run("qemu-io", "-f", "qcow2", "-c", "write -P 9 10M 64k", top)
            self.disk[10 * MiB:10 * MiB + 64 * KiB] = b"\t" * (64 * KiB)
            self.raw.write_bytes(self.disk)
            run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", top, self.raw)


class QemuIo(Case):
    """Pattern writes and reads over an overlay whose base is full of 0xb5."""

    SIZE = 32 * MiB

    def setUp(self):
        super().setUp()
        self.file = self.overlay("disk", self.SIZE, [(0, b"\xb5" * (16 * MiB))])
        self.base = self.path("disk-base.tply")
        self.before = self.base.read_bytes()

    def io(self, server, *commands, options=(), status=0):
        words = [word for command in commands for word in ("-c", command)]
        out = run("qemu-io", "-f", "raw", *options, *words, server.uri, status=status)
        if status == 0:
            self.assertNotIn("failed", out)
        return out

    def test_patterns(self):
        writes = ["write -P 0x11 0 64k", "write -P 0x12 1M 1", "write -P 0x13 1048575 1",
                  "write -f -P 0x14 2M 12345", "writev -P 0x15 3M 4k 8k 512",
                  "aio_write -P 0x16 4M 1M", "aio_write -f -P 0x17 5M 64k", "aio_flush",
                  "write -z 6M 64k", "write -z -u 7M 64k", "write -z 8388608 1000",
                  "write -z -u -f 9M 1M", "write -z -n -u 10M 128k", "discard 11M 1M",
                  "write -P 0x18 20M 3M", "discard 21M 1M", "write -P 0x19 33553920 512", "flush"]
        reads = ["read -P 0x11 0 64k", "read -P 0xb5 64k 100k", "read -P 0x12 1M 1",
                 "read -P 0xb5 1048577 4095", "read -P 0x13 1048575 1", "read -P 0xb5 1044480 4095",
                 "read -P 0x14 2M 12345", "read -P 0xb5 2109497 8135",
                 "read -P 0x15 3M 12800", "read -P 0x16 4M 1M", "read -P 0x17 5M 64k",
                 "read -P 0 6M 64k", "read -P 0xb5 6356992 64k", "read -P 0 7M 64k",
                 "read -P 0 8M 1000", "read -P 0xb5 8389608 3096", "read -P 0 9M 1M",
                 "read -P 0 10M 128k", "read -P 0xb5 10616832 64k",
                 "read -P 0 11M 1M", "read -P 0xb5 12M 4M", "read -P 0 16M 4M",
                 "read -P 0x18 20M 1M", "read -P 0 21M 1M", "read -P 0x18 22M 1M",
                 "read -P 0 23M 8M",
                 "read -P 0x19 33553920 512"]
        with Server(self.file) as server:
            self.io(server, *writes)
            self.io(server, *reads)
            self.io(server, *reads, options=["-n"])
        with Server(self.file, read_only=True) as server:
            self.io(server, *reads, options=["-r"])
        self.assert_clean(self.file)
        self.assertEqual(self.base.read_bytes(), self.before)

    def test_a_wrong_pattern_is_noticed(self):
        with Server(self.file) as server:
            out = self.io(server, "read -P 0xb6 0 64k", status=None)
            self.assertIn("Pattern verification failed", out)

    def test_fua_survives_a_kill(self):
        with Server(self.file) as server:
            self.io(server, "write -f -P 0x21 1M 64k", "write -P 0x22 2M 64k", "flush")
            server.kill()
        with Server(self.file) as server:
            self.io(server, "read -P 0x21 1M 64k", "read -P 0x22 2M 64k", "read -P 0xb5 3M 64k")

    def test_read_only(self):
        with Server(self.file, read_only=True) as server:
            self.io(server, "write -P 1 0 512", status=1)
            self.io(server, "read -P 0xb5 0 512", options=["-r"])


if __name__ == "__main__":
    unittest.main()

"""Importing disks of other formats: images that qemu-img made, whole and damaged, and NBD servers."""

import contextlib
import random
import socket
import struct
import subprocess
import unittest

from support import KiB, MiB, THINPLY, Case, die_with_parent, need, pattern, run, thinply, used, wait_for

SIZE = 40 * MiB


class Foreign(Case):
    def setUp(self):
        super().setUp()
        need("qemu-img", "qemu-io", "qemu-nbd")
        # Data, zeros that are written, holes, and a part that compresses.
        content = bytearray(SIZE)
        content[:3 * MiB] = pattern(3 * MiB, 1)
        content[10 * MiB:11 * MiB] = b"text " * (MiB // 5) + b"t"
        content[SIZE - 5 * KiB:] = pattern(5 * KiB, 2)
        self.raw = self.file("disk.raw", content)

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content)
        return path

    def convert(self, name, *options, source=None, format="qcow2"):
        path = self.folder / name
        run("qemu-img", "convert", "-f", "raw", "-O", format, *options, source or self.raw, path)
        return path

    def image(self, name, *options, size=None):
        path = self.folder / name
        run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, *([size] if size else []))
        return path

    def write(self, path, offset, length, byte=7):
        """Writes a byte over and over, or zeros where it is None."""
        what = f"-z {offset} {length}" if byte is None else f"-P {byte} {offset} {length}"
        run("qemu-io", "-f", "qcow2", "-c", f"write {what}", path)

    def content(self, layer):
        out = self.folder / "out"
        thinply("export", "--force", layer, out)
        return out.read_bytes()

    def seen_by_qemu(self, image, *options):
        out = self.folder / "qemu"
        run("qemu-img", "convert", *options, "-O", "raw", image, out)
        return out.read_bytes()

    def imported(self, image, *options, name="a.tply"):
        """The content of an import, whose layer must be sound."""
        layer = self.folder / name
        layer.unlink(missing_ok=True)
        thinply("import", *options, image, layer)
        thinply("check", "--chain", layer)
        return self.content(layer)

    def refused(self, *words):
        """Standard error of an import that must fail and leave nothing."""
        before = sorted(self.folder.iterdir())
        done = subprocess.run(
            [THINPLY, "import", *map(str, words), self.folder / "no.tply"],
            capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        self.assertEqual(done.returncode, 2, done)
        self.assertNotIn("panicked", done.stderr)
        self.assertEqual(sorted(self.folder.iterdir()), before)
        return done.stderr

    def with_with(self, *files):
        return [word for file in files for word in ("--with", file)]


class Qcow2(Foreign):
    def test_every_kind_that_is_read_comes_in_bit_by_bit(self):
        kinds = {
            "v2": ["-o", "compat=0.10"],
            "v3": [],
            "small-clusters": ["-o", "cluster_size=512"],
            "large-clusters": ["-o", "cluster_size=2M"],
            "compressed": ["-c"],
            "compressed-v2": ["-c", "-o", "compat=0.10"],
            "compressed-large": ["-c", "-o", "cluster_size=2M"],
            "preallocated": ["-o", "preallocation=metadata"],
            "refcounts-of-a-bit": ["-o", "refcount_bits=1"],
        }
        expected = self.raw.read_bytes()
        for kind, options in kinds.items():
            with self.subTest(kind):
                image = self.convert(f"{kind}.qcow2", *options)
                before = image.read_bytes()
                self.assertEqual(self.imported(image), expected)
                self.assertEqual(image.read_bytes(), before)

    def test_zeros_and_holes_take_no_space(self):
        image = self.image("a.qcow2", size="1T")
        self.write(image, 500 * 1024 * MiB, 64 * KiB)
        self.write(image, 0, 10 * MiB, None)
        layer = self.folder / "a.tply"
        thinply("import", image, layer)
        self.assertLess(used(layer), 256 * KiB)

    def test_a_backing_file_is_followed_only_by_the_name_that_the_user_gave(self):
        base = self.convert("base.qcow2")
        middle = self.image("middle.qcow2", "-b", base, "-F", "qcow2")
        top = self.image("top.qcow2", "-b", "middle.qcow2", "-F", "qcow2", size=str(SIZE + 7 * MiB))
        self.write(middle, MiB + 512, 100 * KiB)
        self.write(middle, 2 * MiB, MiB, None)
        self.write(top, 12345 * 512, 70 * KiB, 9)
        self.write(top, SIZE, 512, 3)
        message = self.refused(top)
        self.assertIn("middle.qcow2", message)
        self.assertIn("--with", message)
        self.assertIn("base.qcow2", self.refused(*self.with_with(middle), top))
        named = self.with_with(base, middle)
        self.assertEqual(self.imported(top, *named), self.seen_by_qemu(top))
        # The path in the image means nothing; the file that the user named does.
        (self.folder / "moved").mkdir()
        moved = base.rename(self.folder / "moved/base.qcow2")
        self.assertEqual(
            self.imported(top, *self.with_with(moved, middle)),
            self.content(self.folder / "a.tply"))

    def test_a_backing_chain_becomes_a_chain_of_layers(self):
        for cluster in ("512", "64k"):
            with self.subTest(cluster):
                self.chain_of_layers(self.folder / cluster, ["-o", f"cluster_size={cluster}"])

    def chain_of_layers(self, folder, options):
        folder.mkdir()
        raw = folder / "base.raw"
        raw.write_bytes(self.raw.read_bytes()[:SIZE - 3 * KiB])
        middle = self.image(folder / "middle.qcow2", *options, "-b", raw, "-F", "raw")
        top = self.image(
            folder / "top.qcow2", *options, "-b", middle, "-F", "qcow2", size=str(SIZE - MiB))
        self.write(middle, MiB + 512, 100 * KiB)
        self.write(middle, 0, 64 * KiB, None)
        self.write(top, 12345 * 512, 70 * KiB, 9)
        self.write(top, 2 * MiB, MiB, None)
        named = self.with_with(middle, raw)
        layer = folder / "disk.tply"
        thinply("import", "--chain", "--writable", *named, top, layer)
        self.assertEqual(
            sorted(path.name for path in folder.glob("*.tply")),
            ["base.tply", "disk.tply", "middle.tply"])
        for path, image, format in [
            (layer, top, "qcow2"), (folder / "middle.tply", middle, "qcow2"),
        ]:
            thinply("check", "--chain", path)
            self.assertEqual(self.content(path), self.seen_by_qemu(image, "-f", format))
        self.assertEqual(self.content(folder / "base.tply"), raw.read_bytes())
        # The top has its own blocks and no others.
        owned = thinply("map", layer)
        self.assertIn(str(12345 * 512 // 4096 * 4096), owned)
        self.assertLess(used(layer), 256 * KiB)

    def test_a_chain_that_fails_leaves_none_of_its_layers(self):
        base = self.convert("base.qcow2")
        top = self.image("top.qcow2", "-b", base, "-F", "qcow2")
        self.write(top, 0, MiB)
        named = self.with_with(base)
        table = struct.unpack(">Q", top.read_bytes()[40:48])[0]
        with open(top, "r+b") as file:
            # An L2 table far beyond the end of the file.
            file.seek(table)
            file.write(struct.pack(">Q", 1 << 40))
        self.assertIn("top.qcow2", self.refused("--chain", *named, top))
        self.file("base.tply", b"")
        self.assertIn("is there already", self.refused("--chain", *named, top))

    def test_references_that_go_round_end(self):
        a, b = self.image("a.qcow2", size="1M"), self.image("b.qcow2", size="1M")
        run("qemu-img", "rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", a)
        run("qemu-img", "rebase", "-u", "-b", "a.qcow2", "-F", "qcow2", b)
        for options in ([], ["--chain"]):
            message = self.refused(*options, *self.with_with(a, b), a)
            self.assertIn("goes round", message)

    def test_a_data_file_is_read_if_it_is_named(self):
        data = self.folder / "data.raw"
        image = self.convert("a.qcow2", "-o", f"data_file={data}")
        self.assertIn("data.raw", self.refused(image))
        self.assertEqual(self.imported(image, "--with", data), self.raw.read_bytes())

    def test_snapshots_inside_are_left_out(self):
        image = self.convert("a.qcow2")
        run("qemu-img", "snapshot", "-c", "before", image)
        self.write(image, 0, MiB)
        self.assertEqual(self.imported(image), self.seen_by_qemu(image))

    def test_what_is_not_read_is_refused_with_the_way_round(self):
        secret = ["--object", "secret,id=s,data=x"]
        encrypted = self.folder / "encrypted.qcow2"
        run("qemu-img", "create", "-q", *secret, "-f", "qcow2",
            "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", encrypted, "1M")
        message = self.refused(encrypted)
        for part in ("encryption", "qemu-nbd", "nbd+unix:///"):
            self.assertIn(part, message)

    def test_the_bytes_of_a_disk_never_say_what_it_is(self):
        secret = self.file("secret", b"s" * MiB)
        image = self.image("guest.qcow2", "-b", secret, "-F", "raw")
        disk = image.rename(self.folder / "guest.raw")
        message = self.refused(disk)
        self.assertIn("--format raw", message)
        self.assertNotIn("guest.qcow2", message)
        with open(disk, "rb") as stdin:
            piped = subprocess.run(
                [THINPLY, "import", "-", self.folder / "no.tply"], stdin=stdin,
                capture_output=True, text=True, timeout=60)
        self.assertEqual(piped.returncode, 2, piped)
        self.assertIn("--format raw", piped.stderr)
        content = self.imported(disk, "--format", "raw")
        self.assertEqual(content, disk.read_bytes().ljust(len(content), b"\0"))
        self.assertIn("secret", self.refused("--format", "qcow2", disk))

    def test_a_backing_file_of_unknown_format_is_not_probed(self):
        base = self.convert("base.img")
        top = self.image("top.qcow2", "-b", base, "-F", "qcow2")
        run("qemu-img", "rebase", "-u", "-b", "base.img", "-F", "", top, status=None)
        data = bytearray(top.read_bytes())
        # The extension that names the backing format becomes one that nobody knows.
        at = data.find(struct.pack(">I", 0xE2792ACA))
        if at > 0:
            data[at:at + 4] = struct.pack(">I", 0x12345678)
            top.write_bytes(data)
        self.assertIn("what format", self.refused("--with", base, top))

    def test_a_parent_takes_the_difference(self):
        base = self.convert("base.qcow2")
        top = self.image("top.qcow2", "-b", base, "-F", "qcow2")
        self.write(top, 0, MiB)
        self.write(top, 2 * MiB, MiB, None)
        thinply("import", base, self.folder / "base.tply")
        layer = self.folder / "a.tply"
        thinply("import", "--parent", self.folder / "base.tply", "--with", base, top, layer)
        self.assertEqual(self.content(layer), self.seen_by_qemu(top))
        self.assertLess(used(layer), 2 * MiB)

    def test_damaged_images_never_panic_hang_or_fill_the_disk(self):
        base = self.convert("base.qcow2")
        plain = self.convert("plain.qcow2", "-o", "cluster_size=4k")
        packed = self.convert("packed.qcow2", "-c")
        over = self.image("over.qcow2", "-b", base, "-F", "qcow2")
        self.write(over, MiB, 3 * MiB)
        chance = random.Random(7)
        target = self.folder / "damaged.qcow2"
        layer = self.folder / "damaged.tply"
        codes = set()
        for number in range(240):
            source = chance.choice([plain, packed, over])
            data = bytearray(source.read_bytes())
            self.damage(data, chance)
            target.write_bytes(data)
            options = chance.choice([[], ["--chain"]]) if source is over else []
            done = subprocess.run(
                ["prlimit", "--as=600000000", THINPLY, "import", *options, "--with", base, target,
                 layer],
                capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
            self.assertIn(done.returncode, (0, 2), (number, done))
            self.assertNotIn("panicked", done.stderr, number)
            codes.add(done.returncode)
            for made in (layer, self.folder / "base.tply"):
                if made.exists():
                    self.assertLess(used(made), 64 * MiB)
                    made.unlink()
            self.assertEqual(list(self.folder.glob(".thinply-*")), [])
        self.assertEqual(codes, {0, 2}, "some are read and some are refused")

    def damage(self, data, chance):
        cluster = 1 << struct.unpack(">I", data[20:24])[0]
        table = struct.unpack(">Q", data[40:48])[0]
        kind = chance.randrange(5)
        if kind == 0:
            del data[chance.randrange(len(data)):]
        elif kind == 1:
            data[chance.randrange(8, 112)] = chance.randrange(256)
        elif kind == 2:
            at = chance.randrange(104, min(cluster, 1024))
            data[at] = chance.randrange(256)
        else:
            # An entry of the first or a second level.
            entries = struct.unpack(">I", data[36:40])[0]
            at = table + 8 * chance.randrange(entries)
            if kind == 4:
                second = struct.unpack(">Q", data[at:at + 8])[0] & 0xFFFFFFFFFFFE00
                at = second + 8 * chance.randrange(cluster // 8) if second else at
            value = chance.choice([
                chance.getrandbits(64), chance.getrandbits(32), 1 << 62 | chance.getrandbits(30),
                (1 << 63) | chance.randrange(64) * cluster, chance.randrange(len(data)),
            ])
            if at + 8 <= len(data):
                data[at:at + 8] = struct.pack(">Q", value)

    def test_a_small_image_does_not_become_a_large_disk(self):
        image = self.image("bomb.qcow2", size="1G")
        self.write(image, 0, 64 * KiB)
        data = bytearray(image.read_bytes())
        table = struct.unpack(">Q", data[40:48])[0]
        second = struct.unpack(">Q", data[table:table + 8])[0] & 0xFFFFFFFFFFFE00
        # Every cluster of the disk is the one that was written.
        data[second:second + 65536] = data[second:second + 8] * 8192
        data[table + 8:table + 16] = data[table:table + 8]
        image.write_bytes(data)
        self.assertIn("holds more than", self.refused(image))

    def test_a_table_that_was_cut_off_is_no_hole(self):
        image = self.convert("a.qcow2")
        data = image.read_bytes()
        for length in (len(data) // 2, 5 * 65536, 3 * 65536 + 8):
            image.write_bytes(data[:length])
            self.refused(image)


class Vmdk(Foreign):
    def test_flat_extents_are_read_if_they_are_named(self):
        flat = self.convert("flat.vmdk", "-o", "subformat=monolithicFlat", format="vmdk")
        extent = self.folder / "flat-flat.vmdk"
        self.assertTrue(extent.exists())
        message = self.refused(flat)
        self.assertIn("flat-flat.vmdk", message)
        self.assertIn("--with", message)
        self.assertEqual(self.imported(flat, "--with", extent), self.raw.read_bytes())
        with open(extent, "r+b") as file:
            file.truncate(SIZE - 512)
        self.assertIn("flat.vmdk", self.refused("--with", extent, flat))

    def test_paths_in_a_descriptor_lead_nowhere(self):
        for path in ("/etc/passwd", "../../etc/passwd", "/dev/zero", ""):
            self.file("evil.vmdk", (
                "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
                f'createType="monolithicFlat"\nRW 8 FLAT "{path}" 0\n').encode())
            self.refused(self.folder / "evil.vmdk")


class Nbd(Foreign):
    @contextlib.contextmanager
    def served(self, image, format, *options):
        path = self.folder / "socket"
        server = subprocess.Popen(
            ["qemu-nbd", "--read-only", f"--socket={path}", f"--format={format}", *options, image],
            stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        try:
            wait_for(path.exists, "the server's socket")
            yield f"nbd+unix:///?socket={path}"
        finally:
            server.kill()
            server.wait()
            path.unlink(missing_ok=True)

    def test_what_qemu_serves_comes_in_bit_by_bit(self):
        sparse = {
            "vhdx": self.convert("a.vhdx", format="vhdx"),
            "vmdk": self.convert("a.vmdk", format="vmdk"),
            "vdi": self.convert("a.vdi", format="vdi"),
            "qcow2": self.convert("a.qcow2", "-c", "-o", "compression_type=zstd"),
        }
        for format, image in sparse.items():
            with self.subTest(format), self.served(image, format) as uri:
                # A few formats have a size of their own; the rest is zeros.
                content = self.imported(uri)
                self.assertEqual(content[:SIZE], self.raw.read_bytes())
                self.assertFalse(any(content[SIZE:]))
                self.assertLess(used(self.folder / "a.tply"), 6 * MiB)

    def test_holes_are_skipped_not_read(self):
        image = self.image("a.qcow2", size="8T")
        self.write(image, 5 * 1024 * 1024 * MiB, 64 * KiB)
        with self.served(image, "qcow2") as uri:
            run(THINPLY, "import", uri, self.folder / "a.tply", timeout=120)

    def test_named_exports_over_tcp_and_servers_without_structured_replies(self):
        need("nbdkit")
        for options in ([], ["--no-sr"], ["--mask-handshake=1"]):
            with self.subTest(options):
                uri = self.nbdkit(options)
                self.assertEqual(self.imported(uri), self.raw.read_bytes())

    def nbdkit(self, options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = subprocess.Popen(
            ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), *options, "file", self.raw],
            stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        uri = f"nbd://127.0.0.1:{port}/any%20name"
        info = ["nbdinfo", "--size", uri]
        wait_for(lambda: subprocess.run(info, capture_output=True).returncode == 0, "nbdkit")
        return uri

    def test_our_own_server_serves_an_import(self):
        layer = self.folder / "own.tply"
        thinply("import", self.raw, layer)
        server = subprocess.Popen(
            [THINPLY, "serve", "--read-only", layer, "--socket", self.folder / "socket"],
            stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent)
        self.addCleanup(server.stdout.close)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        uri = server.stdout.readline().strip()
        self.assertEqual(self.imported(uri), self.raw.read_bytes())

    def test_a_server_that_is_not_there_or_says_no_is_named(self):
        self.assertIn("nothing", self.refused(f"nbd+unix:///?socket={self.folder}/nothing"))
        self.assertIn("nbds", self.refused("nbds://host/x"))
        with self.served(self.raw, "raw", "--export-name=other") as uri:
            self.assertIn("refused", self.refused(uri))


if __name__ == "__main__":
    unittest.main()

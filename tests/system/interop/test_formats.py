"""Images of every format that comes in, made by QEMU's tools, against what `qemu-img convert` makes of
them, bit by bit.

A few dozen of them; all of them, some hundreds, if THINPLY_IMAGES is "full".
"""

import itertools
import os
import random
import unittest

from support import BLOCK, GiB, KiB, MiB, Case, need, run, thinply

FULL = os.environ.get("THINPLY_IMAGES") == "full"

# What qemu-img is told to make: format and options.
KINDS = {
    "qcow2": ("qcow2", []),
    "qcow2-zlib": ("qcow2", ["-c"]),
    "qcow2-zstd": ("qcow2", ["-c", "-o", "compression_type=zstd"]),
    "qcow2-zstd-4k": ("qcow2", ["-c", "-o", "compression_type=zstd,cluster_size=4k"]),
    "qcow2-zstd-2m": ("qcow2", ["-c", "-o", "compression_type=zstd,cluster_size=2M"]),
    "qcow2-zstd-plain": ("qcow2", ["-o", "compression_type=zstd"]),
    "qcow2-l2": ("qcow2", ["-o", "extended_l2=on"]),
    "qcow2-l2-16k": ("qcow2", ["-o", "extended_l2=on,cluster_size=16k"]),
    "qcow2-l2-2m": ("qcow2", ["-o", "extended_l2=on,cluster_size=2M"]),
    "qcow2-l2-zstd": ("qcow2", ["-c", "-o", "extended_l2=on,compression_type=zstd"]),
    "qcow2-data": ("qcow2", ["-o", "data_file={data},extended_l2=on"]),
    "vmdk-sparse": ("vmdk", ["-o", "subformat=monolithicSparse"]),
    "vmdk-stream": ("vmdk", ["-o", "subformat=streamOptimized"]),
    "vmdk-flat": ("vmdk", ["-o", "subformat=monolithicFlat"]),
    "vmdk-split": ("vmdk", ["-o", "subformat=twoGbMaxExtentSparse"]),
    "vmdk-split-flat": ("vmdk", ["-o", "subformat=twoGbMaxExtentFlat"]),
    "vmdk-zeroed": ("vmdk", ["-o", "subformat=monolithicSparse,zeroed_grain=on"]),
    "vhd": ("vpc", ["-o", "subformat=dynamic"]),
    "vhd-fixed": ("vpc", ["-o", "subformat=fixed"]),
    "vhd-exact": ("vpc", ["-o", "subformat=dynamic,force_size=on"]),
    "vhd-fixed-exact": ("vpc", ["-o", "subformat=fixed,force_size=on"]),
    "vhdx": ("vhdx", ["-o", "subformat=dynamic"]),
    "vhdx-1m": ("vhdx", ["-o", "subformat=dynamic,block_size=1M"]),
    "vhdx-fixed": ("vhdx", ["-o", "subformat=fixed"]),
    "vdi": ("vdi", []),
    "vdi-static": ("vdi", ["-o", "static=on"]),
}
SUFFIXES = {"vpc": "vhd"}

SIZES = [512, 64 * KiB, MiB, MiB + 512, 3 * MiB - 512, 5 * MiB + 300, 40 * MiB + 3 * BLOCK, 130 * MiB]
# What is in the disk, and what offsets and lengths are multiples of.
LAYOUTS = [("holes", 512), ("holes", BLOCK), ("holes", 64 * KiB), ("full", 1), ("empty", 512)]


def content(file, size, layout, grain, chance):
    """Fills a sparse file: noise, text, zeros that are written, and holes."""
    file.truncate(size)
    if layout == "full":
        file.write(chance.randbytes(min(size, 8 * MiB)))
    for _ in range(12 if layout == "holes" else 0):
        at = chance.randrange(size) // grain * grain
        length = min(size - at, chance.choice([1, 3, 16, 100]) * grain, 3 * MiB)
        file.seek(at)
        file.write(chance.choice([
            chance.randbytes, bytes, lambda n: b"words and words " * (n // 16) + b"." * (n % 16),
        ])(length))
    if layout != "empty":
        file.seek(size - 1)
        file.write(b"!")


class Formats(Case):
    def setUp(self):
        super().setUp()
        need("qemu-img", "qemu-io", "qemu-nbd")
        self.chance = random.Random(self.id())

    def raw(self, size, layout="holes", grain=512):
        path = self.path("source.raw")
        with open(path, "wb") as file:
            content(file, size, layout, grain, self.chance)
        return path

    def make(self, kind, source, name="image"):
        """An image of a kind; answers its path, format, and the other files that it has."""
        format, options = KINDS[kind]
        folder = self.path(name)
        folder.mkdir()
        path = folder / f"{name}.{SUFFIXES.get(format, format)}"
        data = folder / f"{name}-data.raw"
        options = [option.format(data=data) for option in options]
        run("qemu-img", "convert", "-f", "raw", "-O", format, *options, source, path)
        return path, format, sorted(set(folder.iterdir()) - {path})

    def check(self, path, format, others, *options, what=""):
        """Imports an image and compares it with what QEMU makes of it."""
        layer, out, want = self.path("a.tply"), self.path("a.raw"), self.path("want.raw")
        for old in (layer, out, want):
            old.unlink(missing_ok=True)
        named = [word for other in others for word in ("--with", other)]
        before = path.read_bytes() if path.stat().st_size < 64 * MiB else None
        thinply("import", *options, *named, path, layer)
        thinply("check", "--chain", layer)
        thinply("export", layer, out)
        run("qemu-img", "convert", "-f", format, "-O", "raw", path, want)
        self.assertEqual(out.stat().st_size, want.stat().st_size, what)
        run("cmp", out, want)
        name = {"vpc": "vhd"}.get(format, format)
        thinply("compare", "-F", name, *named, layer, path)
        if before is not None:
            self.assertEqual(path.read_bytes(), before, what)
        for file in self.path(".").glob("*.tply"):
            file.unlink()

    def each(self, cases):
        count = 0
        for kind, size, (layout, grain) in cases:
            with self.subTest(kind, size=size, layout=layout, grain=grain):
                image = self.make(kind, self.raw(size, layout, grain))
                self.check(*image, what=kind)
                run("rm", "-r", self.path("image"))
                count += 1
        return count

    def test_every_kind_in_a_size_and_a_layout(self):
        turns = zip(itertools.cycle(SIZES[1:]), itertools.cycle(LAYOUTS))
        cases = [(kind, size, layout) for kind, (size, layout) in zip(KINDS, turns)]
        self.assertEqual(self.each(cases), len(KINDS))

    @unittest.skipUnless(FULL, "takes minutes; THINPLY_IMAGES=full runs it")
    def test_every_kind_in_every_size(self):
        layouts = itertools.cycle(LAYOUTS)
        cases = [
            (kind, size, next(layouts)) for kind in KINDS for size in SIZES for _ in range(2)
            # Two layouts more would be the same in so little.
            if size > 512 or _ == 0]
        self.assertGreater(self.each(cases), 300)

    def test_disks_of_several_extents(self):
        source = self.path("source.raw")
        for kind in ["vmdk-split", "vmdk-split-flat"]:
            with open(source, "wb") as file:
                content(file, 4 * GiB + 5 * MiB, "holes", 64 * KiB, self.chance)
                # Over the seams.
                for seam in (2 * GiB, 4 * GiB):
                    for at in (seam - 2 * MiB, seam - 64 * KiB, seam - 512):
                        file.seek(at)
                        file.write(self.chance.randbytes(70 * KiB))
            path, format, others = self.make(kind, source)
            self.assertEqual(len(others), 3)
            self.check(path, format, others, what=kind)
            run("rm", "-r", self.path("image"))

    def writes(self, path, format, size):
        """Changes an image here and there, also to zeros."""
        commands = []
        for at in sorted(self.chance.sample(range(0, size - 300 * KiB, 64 * KiB), 6)):
            length = self.chance.choice([512, 4096, 70 * KiB, 200 * KiB])
            commands += ["-c", f"write -P {self.chance.randrange(1, 256)} {at + 512} {length}"]
        zeros = self.chance.randrange(0, size - 300 * KiB, 64 * KiB)
        commands += ["-c", f"write -z {zeros} 256k", "-c", f"write -P 1 {size - 512} 512"]
        run("qemu-io", "-f", format, *commands, path)

    # What lies under what, from the base up: kinds, and options of the upper ones.
    CHAINS = [
        ("raw", "qcow2-l2"),
        ("qcow2", "qcow2-l2"),
        ("qcow2-l2", "qcow2"),
        ("qcow2-zstd", "qcow2"),
        ("qcow2-zlib", "qcow2-l2", "qcow2"),
        ("vmdk-sparse", "qcow2"),
        ("vmdk-stream", "qcow2-l2"),
        ("vhdx", "qcow2"),
        ("vhd-exact", "qcow2"),
        ("vhd-fixed-exact", "qcow2-l2"),
        ("vdi", "qcow2"),
        ("vmdk-sparse", "vmdk-sparse"),
        ("vmdk-sparse", "vmdk-zeroed", "vmdk-sparse"),
        ("vmdk-sparse", "vmdk-split"),
        ("vmdk-stream", "vmdk-sparse"),
        ("vmdk-sparse", "vmdk-sparse", "qcow2-l2"),
    ]

    def test_images_over_others_flat_and_as_layers(self):
        bases = [20 * MiB, 20 * MiB + 64 * KiB, 7 * MiB + 512]
        for kinds, base_size in zip(self.CHAINS, itertools.cycle(bases)):
            with self.subTest(kinds, base=base_size):
                source = self.raw(base_size)
                files = []
                if kinds[0] == "raw":
                    folder = self.path("image0")
                    folder.mkdir()
                    path, format = source.rename(folder / "base.raw"), "raw"
                else:
                    path, format, files = self.make(kinds[0], source, "image0")
                for number, kind in enumerate(kinds[1:], 1):
                    below, below_format = path, format
                    files = [*files, below]
                    format, options = KINDS[kind]
                    folder = self.path(f"image{number}")
                    folder.mkdir()
                    path = folder / f"image{number}.{format}"
                    # A qcow2 image may be longer than what it stands on.
                    size = [str(24 * MiB)] if format == "qcow2" else []
                    run("qemu-img", "create", "-q", "-f", format, *options,
                        "-b", below, "-F", below_format, path, *size)
                    self.writes(path, format, 24 * MiB if size else base_size // (64 * KiB) * 64 * KiB)
                    files = [*files, *(set(folder.iterdir()) - {path})]
                self.check(path, format, files)
                self.check(path, format, files, "--chain")
                for number in range(len(kinds)):
                    run("rm", "-r", self.path(f"image{number}"))

    def test_an_image_that_a_writer_has_changed_again_and_again(self):
        for kind in ["qcow2-l2", "qcow2-zstd-plain", "vmdk-sparse", "vmdk-zeroed", "vhd-exact", "vhdx", "vdi"]:
            with self.subTest(kind):
                path, format, others = self.make(kind, self.raw(30 * MiB, "empty"))
                for _ in range(3):
                    self.writes(path, format, 30 * MiB)
                    self.check(path, format, others)
                run("rm", "-r", self.path("image"))


if __name__ == "__main__":
    unittest.main()

"""What qemu-nbd can do while it reads an image for thinply: nothing but decode. And that no name which
stands in an image is opened by anybody."""

import os
import re
import signal
import struct
import subprocess
import unittest

from support import KiB, MiB, THINPLY, Case, need, pattern, run, thinply, wait_for

HANGS = os.environ.get("THINPLY_IMAGES") == "full"
SIZE = 4 * MiB


class Confined(Case):
    def setUp(self):
        super().setUp()
        need("qemu-img", "qemu-io", "qemu-nbd")
        # So that nobody would get at what is in it.
        self.folder.chmod(0o755)
        self.raw = self.file("disk.raw", pattern(SIZE - 64 * KiB, 1).ljust(SIZE, b"\0"))
        self.canary = self.file("canary", b"c" * MiB)
        self.canary.chmod(0o644)

    def file(self, name, content):
        path = self.path(name)
        path.write_bytes(content)
        return path

    def convert(self, name, *options, format):
        path = self.path(name)
        run("qemu-img", "convert", "-f", "raw", "-O", format, *options, self.raw, path)
        return path

    def over(self, name, below, *options, format="vmdk"):
        path = self.path(name)
        run("qemu-img", "create", "-q", "-f", format, "-b", below, "-F", format, *options, path)
        return path

    def changed(self, path, at, data):
        content = bytearray(path.read_bytes())
        content[at:at + len(data)] = data
        path.write_bytes(content)
        return path

    def descriptor(self, name, lines, parent="ffffffff"):
        head = f"# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID={parent}\n"
        return self.file(name, (head + "\n".join(lines) + "\n").encode())

    def refused(self, *words, **options):
        layer = self.path("no.tply")
        done = subprocess.run(
            [THINPLY, "import", *map(str, words), layer], capture_output=True, text=True,
            timeout=150, stdin=subprocess.DEVNULL, **options)
        self.assertEqual(done.returncode, 2, done)
        self.assertNotIn("panicked", done.stderr)
        self.assertFalse(layer.exists())
        return done.stderr

    def traced(self, *words):
        """Exit code of an import, and the paths that each program opened or connected to."""
        need("strace")
        log = self.path("trace")
        done = subprocess.run(
            ["strace", "-f", "-o", log, "-e", "trace=execve,%file,connect,socket", THINPLY, "import",
             *map(str, words), self.path("traced.tply")],
            capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        program, opened = {}, {}
        for line in log.read_text(errors="replace").splitlines():
            pid, call = line.split(None, 1)
            if call.startswith("execve(") and call.endswith(" = 0"):
                program[pid] = re.match(r'execve\("([^"]*)"', call)[1]
            whose = "qemu-nbd" if "qemu-nbd" in program.get(pid, "") else "thinply"
            opened.setdefault(whose, []).append(call)
        self.path("traced.tply").unlink(missing_ok=True)
        return done, opened

    # Each names the canary where the format has a place for a name.
    def images_that_name_the_canary(self):
        canary = str(self.canary)
        inside = f'# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\nRW 2048 FLAT "{canary}" 0\n'
        sparse = self.convert("sparse.vmdk", format="vmdk")
        # The whole image with a descriptor inside whose extent is another file.
        yield True, self.changed(sparse, 512, inside.encode().ljust(1024, b"\0"))
        for kind in ("FLAT", "SPARSE", "VMFS"):
            yield False, self.descriptor(f"{kind}.vmdk", [f'RW 2048 {kind} "{canary}"'])
        yield False, self.descriptor("json.vmdk", [
            'RW 2048 FLAT "json:{\\"driver\\":\\"file\\",\\"filename\\":\\"%s\\"}"' % canary])
        yield False, self.descriptor("url.vmdk", ['RW 2048 FLAT "nbd+unix:///?socket=%s"' % canary])
        yield False, self.descriptor(
            "parent.vmdk", [f'parentFileNameHint="{canary}"', "RW 2048 ZERO"], parent="1")
        base = self.convert("base.vmdk", format="vmdk")
        delta = self.over("delta.vmdk", base)
        content = delta.read_bytes()
        self.assertIn(str(base).encode(), content)
        yield False, self.file("moved.vmdk", content.replace(str(base).encode(), canary.encode()))
        for name, options in {"l2": ["-o", "extended_l2=on"], "zstd": ["-o", "compression_type=zstd"]}.items():
            top = self.path(f"{name}.qcow2")
            run("qemu-img", "create", "-q", "-f", "qcow2", *options, "-b", self.canary, "-F", "raw", top)
            yield False, top
        data = self.path("data.raw")
        image = self.convert(
            "data.qcow2", "-o", f"data_file={data},extended_l2=on", format="qcow2")
        content = image.read_bytes()
        data.unlink()
        name = canary[-len(str(data)):].rjust(len(str(data)), "/")
        yield False, self.file("file.qcow2", content.replace(str(data).encode(), name.encode()))

    def test_no_name_that_stands_in_an_image_is_opened(self):
        count = 0
        for comes_in, image in self.images_that_name_the_canary():
            with self.subTest(image.name):
                done, opened = self.traced(image)
                self.assertEqual(done.returncode, 0 if comes_in else 2, done)
                self.assertTrue(opened["thinply"])
                for calls in opened.values():
                    self.assertFalse([call for call in calls if "canary" in call])
                count += 1
        self.assertEqual(count, 11)

    def test_the_program_opens_no_file_of_an_image_not_even_one_that_was_named(self):
        base = self.convert("base.vmdk", format="vmdk")
        split = self.convert("split.vmdk", "-o", "subformat=twoGbMaxExtentSparse", format="vmdk")
        data = self.path("data.raw")
        qcow2 = self.convert("a.qcow2", "-o", f"data_file={data},extended_l2=on", format="qcow2")
        for image, *named in [
            (self.over("delta.vmdk", base), base),
            (split, self.path("split-s001.vmdk")),
            (qcow2, data),
            (self.convert("a.vhdx", format="vhdx"),),
            (self.convert("a.vhd", format="vpc"),),
        ]:
            done, opened = self.traced(*(word for file in named for word in ("--with", file)), image)
            self.assertEqual(done.returncode, 0, done)
            files = [call for call in opened["qemu-nbd"] if re.match(r"open|stat|access|readlink", call)]
            self.assertTrue(files)
            # Its own libraries, and nothing of ours. It makes no connection either.
            for call in opened["qemu-nbd"]:
                self.assertNotIn(str(self.folder), call)
                self.assertFalse(call.startswith("connect("), call)

    def program(self, script):
        """A folder with another program of that name in it."""
        folder = self.path("bin")
        folder.mkdir(exist_ok=True)
        path = folder / "qemu-nbd"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        return {**os.environ, "PATH": f"{folder}"}

    def test_what_the_program_may_do(self):
        image = self.convert("a.vhdx", format="vhdx")
        environment = self.program(
            'PATH=/usr/bin:/bin; s=/proc/self/status\n'
            'echo "id $(id -u) $(id -G) cwd $(pwd) core $(ulimit -c) file $(ulimit -f) '
            'memory $(ulimit -v) $(grep -E "NoNewPrivs|CapEff" $s | tr -d "\\n\\t") '
            'devices $(grep -c : /proc/net/dev) env $(env | grep -c THINPLY_SECRET) '
            'fds $(ls /proc/self/fd | wc -l)." >&2\nexit 3\n')
        environment["THINPLY_SECRET"] = "x"
        message = self.refused(image, env=environment)
        for part in ["cwd / ", "core 0 ", "file 0 ", "memory 2097152 ", "NoNewPrivs:1", "env 0 "]:
            self.assertIn(part, message)
        self.assertIn("CapEff:0000000000000000", message)
        if os.getuid() == 0:
            self.assertIn("id 65534 65534 ", message)
            # The one that leads nowhere.
            self.assertIn("devices 1 ", message)
        # The three that everybody has, two sockets, and what `ls` itself opens.
        self.assertIn("fds 6.", message)

    def test_what_the_program_says_last_is_told_as_plain_text(self):
        image = self.convert("a.vhdx", format="vhdx")
        script = "printf 'one\\ntwo\\nthree\\033[2J\\nfour %s\\n' \"$7\" >&2; exit 1\n"
        message = self.refused(image, env=self.program(script))
        self.assertIn("qemu-nbd, which reads this vhdx image", message)
        self.assertIn(r"it said last: two; three\u{1b}[2J; four", message)
        self.assertNotIn("\x1b", message)
        # More than anybody reads, for which it must not wait.
        loud = "i=0; while [ $i -lt 30000 ]; do echo loud; i=$((i+1)); done >&2 2>/dev/null; exit 1\n"
        self.assertIn("it said last: loud", self.refused(image, env=self.program(loud)))

    def test_the_program_ends_with_thinply(self):
        image = self.convert("a.vhdx", format="vhdx")
        # It can write no file, but be found by what it is called.
        mark = f"{os.getpid()}77"
        environment = self.program(f"exec /bin/sleep {mark}\n")
        child = subprocess.Popen(
            [THINPLY, "import", image, self.path("a.tply")], env=environment,
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)

        def running():
            return subprocess.run(["pgrep", "-f", f"^/bin/sleep {mark}$"], capture_output=True).stdout

        wait_for(running, "the program")
        child.send_signal(signal.SIGKILL)
        wait_for(lambda: not running(), "its end")

    @unittest.skipUnless(HANGS, "takes a minute; THINPLY_IMAGES=full runs it")
    def test_a_program_that_hangs_is_ended_and_named(self):
        image = self.convert("a.vhdx", format="vhdx")
        environment = self.program("echo waiting >&2; exec /bin/sleep 1000\n")
        message = self.refused(image, env=environment)
        self.assertIn("keeps silent", message)
        self.assertIn("it said last: waiting", message)

    def test_without_the_program_it_is_said_what_to_install(self):
        environment = {**os.environ, "PATH": str(self.path("nothing"))}
        split = self.convert("split.vmdk", "-o", "subformat=twoGbMaxExtentSparse", format="vmdk")
        for image, what in [
            ([self.convert("a.vhdx", format="vhdx")], "a vhdx image"),
            ([self.convert("a.vhd", format="vpc")], "a vhd image"),
            ([self.convert("a.vmdk", format="vmdk")], "a vmdk image"),
            (["--with", self.path("split-s001.vmdk"), split], "a vmdk image"),
            ([self.convert("a.qcow2", "-o", "extended_l2=on", format="qcow2")], "a qcow2 image"),
        ]:
            message = self.refused(*image, env=environment)
            self.assertIn(what, message)
            self.assertIn("qemu-utils", message)
        # What needs none comes in without.
        flat = self.convert("flat.vmdk", "-o", "subformat=monolithicFlat", format="vmdk")
        for words in (["--with", self.path("flat-flat.vmdk"), flat],
                      [self.convert("b.qcow2", format="qcow2")]):
            layer = self.path("a.tply")
            layer.unlink(missing_ok=True)
            thinply("import", *words, layer, env=environment)

    def test_what_would_be_misread_is_refused(self):
        vhd = self.convert("a.vhd", format="vpc")
        self.changed(vhd, 60, struct.pack(">I", 4))
        self.assertIn("differs from another", self.refused(vhd))
        fixed = self.convert("b.vhd", "-o", "subformat=fixed", format="vpc")
        self.changed(fixed, fixed.stat().st_size - 512 + 60, struct.pack(">I", 4))
        self.assertIn("differs from another", self.refused(fixed))
        split = self.convert("split.vmdk", "-o", "subformat=twoGbMaxExtentSparse", format="vmdk")
        extent = self.path("split-s001.vmdk")
        self.assertIn("import its descriptor", self.refused(extent))
        text = split.read_text()
        longer = self.file("longer.vmdk", text.replace("RW 8192", "RW 8193").encode())
        self.assertIn("expected", self.refused("--with", extent, longer))
        base = self.convert("base.vmdk", format="vmdk")
        delta = self.over("delta.vmdk", base)
        run("qemu-io", "-f", "vmdk", "-c", "write 0 4k", base)
        self.assertIn("was written to since", self.refused("--with", base, delta))
        cut = self.file("cut.vhdx", self.convert("a.vhdx", format="vhdx").read_bytes()[:100 * KiB])
        self.assertIn("it said last", self.refused(cut))
        empty = self.convert("empty.vmdk", format="vmdk")
        self.assertIn("0 sectors", self.refused(self.changed(empty, 12, bytes(8))))

    # All formats, with what QEMU would show zeros for if it were asked alone.
    CUT_OFF = {
        "a.vdi": ("vdi", []),
        "static.vdi": ("vdi", ["-o", "static=on"]),
        "a.vmdk": ("vmdk", ["-o", "subformat=monolithicSparse"]),
        "stream.vmdk": ("vmdk", ["-o", "subformat=streamOptimized"]),
        "l2.qcow2": ("qcow2", ["-o", "extended_l2=on"]),
        "zstd.qcow2": ("qcow2", ["-o", "compression_type=zstd"]),
        "packed.qcow2": ("qcow2", ["-c", "-o", "compression_type=zstd"]),
        "a.vhd": ("vpc", []),
        "fixed.vhd": ("vpc", ["-o", "subformat=fixed"]),
        "a.vhdx": ("vhdx", []),
    }

    def test_an_image_that_is_cut_off_is_refused(self):
        for name, (format, options) in self.CUT_OFF.items():
            with self.subTest(name):
                image = self.convert(name, *options, format=format)
                # In the middle of a sector, at a multiple of all clusters, and with nothing but tables.
                for length in (3 * MiB + 300, 2 * MiB, 512 * KiB):
                    os.truncate(image, length)
                    message = self.refused(image)
                    self.assertIn(name, message)
                    if format in ("vdi", "qcow2") or name == "a.vmdk":
                        self.assertRegex(message, rf"is cut off: .* up to \d+, the file has {length}\b")

    def test_a_file_beside_an_image_that_is_cut_off_is_refused(self):
        split = self.convert("split.vmdk", "-o", "subformat=twoGbMaxExtentSparse", format="vmdk")
        data = self.path("data.raw")
        image = self.convert("a.qcow2", "-o", f"data_file={data},extended_l2=on", format="qcow2")
        for image, other in [(split, self.path("split-s001.vmdk")), (image, data)]:
            os.truncate(other, 2 * MiB)
            message = self.refused("--with", other, image)
            self.assertIn(f"{other.name}: the image is cut off", message)

    def test_what_is_called_an_image_and_is_none_is_no_raw_disk(self):
        for name in ("a.qcow2", "a.vmdk", "a.vhd", "a.vhdx", "a.vdi"):
            self.refused(self.file(name, bytes(MiB)))
        image = self.convert("a.vhdx", format="vhdx")
        thinply("import", image.rename(self.path("a.img")), self.path("a.tply"))
        self.assertIn("--format vhdx", self.refused(self.path("a.img").rename(self.path("b.raw"))))


if __name__ == "__main__":
    unittest.main()

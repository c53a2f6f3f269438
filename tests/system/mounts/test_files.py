"""Disks as regular files: what programs that know nothing of thinply do with them."""

import ctypes
import errno
import hashlib
import json
import os
import random
import stat
import subprocess
import unittest
from pathlib import Path

from files import Files, is_mounted, loop_device, mounted, need_mounts

from support import (
    BLOCK, THINPLY, GiB, MiB, Case, insist, pattern, run, thinply, used, wait_for)

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16
LIBC = ctypes.CDLL(None, use_errno=True)


def setUpModule():
    need_mounts("qemu-img", "qemu-io", "tar", "setpriv", "fstrim", "mkfs.xfs")


def fallocate(file, mode, offset, length):
    arguments = [ctypes.c_int(file), ctypes.c_int(mode), ctypes.c_long(offset), ctypes.c_long(length)]
    if LIBC.fallocate(*arguments):
        raise OSError(ctypes.get_errno(), "fallocate")


def fill(folder):
    """Takes all the space that there is left."""
    with open(folder / "ballast", "wb", buffering=0) as ballast:
        for size in (MiB, BLOCK):
            while True:
                try:
                    ballast.write(bytes(size))
                    os.fsync(ballast.fileno())
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    break


def copy_all(source, start, target, to, length):
    """`copy_file_range` of all of a range, which takes several calls; answers how many bytes there were."""
    done = 0
    while done < length:
        count = os.copy_file_range(source, target, length - done, start + done, to + done)
        if count == 0:
            break
        done += count
    return done


def digest(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


class DisksAsFiles(Case):
    def refused(self, number, act, *words):
        with self.assertRaises(OSError) as caught:
            act(*words)
        self.assertEqual(errno.errorcode[caught.exception.errno], errno.errorcode[number])

    def test_programs_find_a_regular_file(self):
        layer = self.create("disk.tply", 256 * MiB)
        os.chmod(layer, 0o640)
        os.chown(layer, 0, 4)
        with Files(layer) as files:
            disk = files.folder / "disk.tply"
            self.assertEqual(os.listdir(files.folder), ["disk.tply"])
            found = os.stat(disk)
            self.assertTrue(stat.S_ISREG(found.st_mode))
            self.assertEqual((found.st_size, found.st_mode & 0o777, found.st_gid), (256 * MiB, 0o640, 4))
            self.assertGreater(found.st_blocks, 0)
            run("mkfs.ext4", "-q", disk)
            tree = self.path("tree")
            run("mkdir", tree)
            (tree / "file").write_bytes(pattern(3 * MiB, 1))
            commands = self.path("commands")
            commands.write_text(f"write {tree}/file file\n")
            run("debugfs", "-w", "-f", commands, disk)
            run("e2fsck", "-fn", disk)
            self.assertLess(used(disk), 64 * MiB)
            # Each way to copy it gives the same bytes, and finds the holes.
            self.assertEqual(os.stat(disk).st_blocks * 512, used(layer))
            run("cp", "--sparse=auto", disk, self.path("copy"))
            run("tar", "-C", files.folder, "-Scf", self.path("copy.tar"), "disk.tply")
            self.assertLess(used(self.path("copy.tar")), 64 * MiB)
            run("tar", "-C", self.folder, "-xf", self.path("copy.tar"), "--transform=s/disk.tply/tar/")
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", disk, self.path("qemu"))
            run("qemu-io", "-f", "raw", "-c", "read 0 256M", disk)
        thinply("export", layer, self.path("export"))
        want = digest(self.path("export"))
        for copy in ("copy", "tar", "qemu"):
            self.assertEqual(digest(self.path(copy)), want, copy)
            self.assertLess(used(self.path(copy)), 64 * MiB, copy)
        self.assert_clean(layer)

    def test_content_is_that_of_a_file_of_one_size(self):
        size = 8 * MiB + 512
        layer = self.overlay("disk", 4 * MiB, [(0, pattern(MiB, 2)), (3 * MiB, pattern(MiB, 3))], size)
        want = bytearray(pattern(MiB, 2) + bytes(2 * MiB) + pattern(MiB, 3) + bytes(size - 4 * MiB))
        chance = random.Random(4)
        with Files(layer) as files:
            disk = files.folder / "disk.tply"
            file = os.open(disk, os.O_RDWR)
            for number in range(400):
                offset = chance.randrange(size)
                length = min(chance.choice([1, 511, 4096, 70_000, 1_500_000]), size - offset)
                match chance.randrange(8):
                    case 0 | 1:
                        data = pattern(length, number)
                        self.assertEqual(os.pwrite(file, data, offset), length)
                        want[offset:offset + length] = data
                    case 2:
                        fallocate(file, PUNCH_HOLE | KEEP_SIZE, offset, length)
                        want[offset:offset + length] = bytes(length)
                    case 3:
                        fallocate(file, ZERO_RANGE, offset, length)
                        want[offset:offset + length] = bytes(length)
                    case 4:
                        os.fsync(file)
                    case 5:
                        fallocate(file, chance.choice([0, KEEP_SIZE]), offset, length)
                    case 6:
                        source = chance.randrange(size)
                        length = min(length, size - source)
                        if abs(source - offset) < length:
                            self.refused(errno.EINVAL, os.copy_file_range, file, file, length, source, offset)
                            continue
                        self.assertEqual(copy_all(file, source, file, offset, length), length)
                        want[offset:offset + length] = want[source:source + length]
                    case 7:
                        self.assert_bytes(os.pread(file, length, offset), want[offset:offset + length])
            self.assert_bytes(os.pread(file, size + BLOCK, 0), want)
            self.check_holes(file, want)
            # The end is that of a block device.
            self.assertEqual(os.pread(file, 10, size), b"")
            self.assertEqual(os.pwrite(file, b"end" * 10, size - 5), 5)
            want[size - 5:] = b"enden"
            self.refused(errno.ENOSPC, os.pwrite, file, b"x", size)
            self.refused(errno.ENOSPC, fallocate, file, ZERO_RANGE, size - 10, 20)
            fallocate(file, PUNCH_HOLE | KEEP_SIZE, size - 3, 2 * MiB)
            want[size - 3:] = bytes(3)
            self.refused(errno.ENOSPC, fallocate, file, 0, size - 10, 20)
            fallocate(file, KEEP_SIZE, size - 3, 2 * MiB)
            self.refused(errno.EOPNOTSUPP, fallocate, file, COLLAPSE_RANGE, 0, BLOCK)
            self.refused(errno.EPERM, os.ftruncate, file, size + 1)
            # What is cut off is gone, and the size stays.
            os.ftruncate(file, 5 * MiB + 7)
            want[5 * MiB + 7:] = bytes(size - 5 * MiB - 7)
            self.assertEqual(os.fstat(file).st_size, size)
            self.assert_bytes(os.pread(file, size, 0), want)
            os.close(file)
            with open(disk, "wb"):
                pass
            self.assertEqual(disk.read_bytes(), bytes(size))
        self.assert_clean(layer)

    def check_holes(self, file, want):
        """Where it is said to be a hole it reads as zeros; what is not zero is said to be data."""
        at, size = 0, len(want)
        while at < size:
            try:
                data = os.lseek(file, at, os.SEEK_DATA)
            except OSError as error:
                self.assertEqual(error.errno, errno.ENXIO)
                data = size
            self.assertFalse(any(want[at:data]), f"a hole at {at}")
            if data == size:
                break
            at = os.lseek(file, data, os.SEEK_HOLE)
            self.assertGreater(at, data)
        self.refused(errno.ENXIO, os.lseek, file, size, os.SEEK_DATA)

    def test_allocated_space_is_there_when_the_host_is_full(self):
        host = self.path("host.ext4")
        host.touch()
        os.truncate(host, 96 * MiB)
        run("mkfs.ext4", "-q", "-b", "4096", "-m", "0", host)
        with loop_device(host) as device, mounted(device, self.path("host")) as folder:
            data = pattern(2 * MiB, 1)
            layer = self.overlay("host/disk", 64 * MiB, [(MiB, data), (40 * MiB, data)])
            with Files(layer, "--full", "error") as files:
                disk = files.folder / "disk.tply"
                before, taken = digest(disk), used(layer)
                with open(disk, "r+b", buffering=0) as file:
                    os.posix_fallocate(file.fileno(), 512, 16 * MiB)
                    self.assertGreaterEqual(used(layer), taken + 16 * MiB)
                    self.assertEqual(digest(disk), before)
                    fill(folder)
                    for _ in range(3):
                        self.assertEqual(os.pwrite(file.fileno(), pattern(16 * MiB, 2), 512), 16 * MiB)
                        os.fsync(file.fileno())
                    self.refused(errno.ENOSPC, os.pwrite, file.fileno(), b"x", 30 * MiB)
                    self.refused(errno.ENOSPC, fallocate, file.fileno(), 0, 30 * MiB, MiB)
                    os.fsync(file.fileno())
                    self.assert_bytes(os.pread(file.fileno(), 16 * MiB, 512), pattern(16 * MiB, 2))
            rows = json.loads(thinply("map", "--json", layer))["extents"]
            own = [row for row in rows if row["depth"] == 0]
            self.assertEqual([(row["offset"], row["length"]) for row in own], [(0, 16 * MiB + BLOCK)])
            self.assert_clean(layer)

    def test_a_host_without_fallocate_says_so(self):
        # NFS, FAT and FUSE of others have no fallocate; the kernel's ext4 without extents has none either.
        host = self.path("host.ext3")
        host.touch()
        os.truncate(host, 64 * MiB)
        run("mkfs.ext4", "-q", "-b", "4096", "-O", "^extents,^64bit,^has_journal", host)
        with loop_device(host) as device, mounted(device, self.path("host")):
            layer = self.overlay("host/disk", 4 * MiB, [(0, pattern(MiB, 3))])
            with Files(layer) as files, open(files.folder / "disk.tply", "r+b", buffering=0) as file:
                self.refused(errno.EOPNOTSUPP, fallocate, file.fileno(), 0, 0, MiB)
                # As the C library does it then: by hand.
                os.posix_fallocate(file.fileno(), 0, 2 * MiB)
                self.assertEqual(os.pread(file.fileno(), MiB, 0), pattern(MiB, 3))
            self.assert_clean(layer)

    def test_ranges_are_copied_between_disks_and_within_one(self):
        size = GiB + 64 * MiB + 512
        environment = {"THINPLY_ROOT": str(self.path("store"))}

        def store(*words):
            return thinply(*words, env={**os.environ, **environment})

        want = {0: pattern(3 * MiB, 1), 5 * MiB + 512: pattern(MiB, 2), size - 512: pattern(512, 3)}
        with open(self.path("base.raw"), "wb") as base:
            for offset, data in want.items():
                base.seek(offset)
                base.write(data)
        store("image", "import", self.path("base.raw"), "base:1")
        store("container", "create", "base:1", "--name", "source")
        for name in ("target", "second", "third"):
            store("volume", "create", name, "--size", str(size))
        with Files("--all", environment=environment) as files:
            source, target = files.folder / "container/source", files.folder / "volume/target"
            with open(source, "r+b", buffering=0) as file, open(target, "r+b", buffering=0) as other:
                one, two = file.fileno(), other.fileno()
                os.pwrite(two, pattern(8 * MiB, 4), 0)
                self.assertEqual(copy_all(one, 0, two, 0, size + GiB), size)
                for offset, data in want.items():
                    self.assertEqual(os.pread(two, len(data), offset), data, offset)
                # What was there has gone where the source has a hole, and no hole takes space.
                self.assertEqual(os.pread(two, 2 * MiB, 3 * MiB), bytes(2 * MiB))
                self.assertLess(used(target), 8 * MiB)
                self.assertEqual(os.lseek(two, 3 * MiB, os.SEEK_DATA), 5 * MiB)
                # Within one disk, from any byte to any other.
                self.assertEqual(copy_all(one, 0, one, GiB + 77, 8 * MiB), 8 * MiB)
                expected = want[0] + bytes(2 * MiB + 512) + want[5 * MiB + 512] + bytes(2 * MiB - 512)
                self.assert_bytes(os.pread(one, 8 * MiB, GiB + 77), expected)
                for offset in (0, 1, MiB - 1):
                    self.refused(errno.EINVAL, os.copy_file_range, one, one, MiB, 0, offset)
                # The ends are those of a read and of a write.
                self.assertEqual(os.copy_file_range(one, two, MiB, size, 0), 0)
                self.refused(errno.ENOSPC, os.copy_file_range, one, two, MiB, 0, size)
                self.assertEqual(copy_all(one, 0, two, size - 700, 700), 700)
                self.assertEqual(os.pread(two, 700, size - 700), want[0][:700])
                with open(source, "rb") as reader:
                    self.refused(errno.EBADF, os.copy_file_range, two, reader.fileno(), 10, 0, 0)
            with open(source, "rb") as reader, open(files.folder / "image/base:1", "rb") as image:
                fresh = os.open(files.folder / "volume/second", os.O_RDWR | os.O_SYNC)
                self.assertEqual(copy_all(image.fileno(), 0, fresh, 0, size), size)
                self.assertEqual(os.pread(fresh, MiB, 5 * MiB + 512), want[5 * MiB + 512])
                os.close(fresh)
                self.assertEqual(reader.read(MiB), want[0][:MiB])
            run("cp", source, files.folder / "volume/third")
            run("cmp", source, files.folder / "volume/third")
            self.assertLess(used(files.folder / "volume/third"), 16 * MiB)
        self.assertEqual(store("store", "check"), "clean\n")

    def test_nothing_but_content_changes(self):
        with Files(self.create("disk.tply", MiB)) as files:
            disk, other = files.folder / "disk.tply", files.folder / "other"
            for act, words in (
                (os.unlink, (disk,)), (os.mkdir, (other,)), (os.rename, (disk, other)),
                (os.symlink, ("x", other)), (os.link, (disk, other)), (os.mknod, (other,)),
                (open, (other, "w")), (os.chmod, (disk, 0o777)), (os.chown, (disk, 1, 1)),
                (os.setxattr, (disk, "user.x", b"y")),
            ):
                self.refused(errno.EPERM, act, *words)
            self.refused(errno.ENOENT, os.stat, other)
            os.utime(disk)

    def test_a_layer_that_may_only_be_read(self):
        layer = self.overlay("disk", MiB, [(0, pattern(MiB, 5))])
        with Files(layer, "--read-only") as files:
            disk = files.folder / "disk.tply"
            self.assertEqual(disk.read_bytes(), pattern(MiB, 5))
            self.refused(errno.EROFS, open, disk, "r+b")
            with loop_device(disk) as device:
                self.assertEqual(Path(device).read_bytes(), pattern(MiB, 5))
        with Files(self.path("disk-base.tply"), "--read-only") as files:
            self.assertEqual((files.folder / "disk-base.tply").read_bytes(), pattern(MiB, 5))

    def test_the_disks_of_a_store_come_and_go(self):
        environment = {"THINPLY_ROOT": str(self.path("store"))}

        def store(*words, **options):
            return thinply(*words, env={**os.environ, **environment}, **options)

        base = self.path("base.raw")
        base.write_bytes(pattern(MiB, 6))
        store("image", "import", base, "team/base:1")
        store("volume", "create", "data", "--size", "64M")
        with Files("--all", environment=environment) as files:
            def names(folder=""):
                return sorted(os.listdir(files.folder / folder))

            self.assertEqual(names(), ["container", "image", "volume"])
            self.assertEqual((names("container"), names("volume")), ([], ["data"]))
            image = files.folder / "image/team/base:1"
            self.assertEqual(names("image/team"), ["base:1"])
            self.assertEqual(image.read_bytes(), base.read_bytes())
            self.refused(errno.EROFS, open, image, "r+b")
            self.refused(errno.ENOENT, os.stat, files.folder / "image/team/base")
            store("container", "create", "team/base:1", "--name", "web")
            web = files.folder / "container/web"
            self.assertEqual(names("container"), ["web"])
            self.assertEqual(web.read_bytes(), base.read_bytes())
            writer = os.open(web, os.O_RDWR)
            # A second writer is kept out; readers share what the first one sees.
            self.refused(errno.EBUSY, open, web, "r+b")
            os.pwrite(writer, b"changed", BLOCK)
            with open(web, "rb") as reader:
                reader.seek(BLOCK)
                self.assertEqual(reader.read(7), b"changed")
            store("container", "rm", "web", status=2)
            store("container", "commit", "web", "team/base:2")
            store("container", "snapshot", "web", "first")
            self.assertEqual(names("image/team"), ["base:1", "base:2"])
            self.assertEqual(names("container"), ["web", "web@first"])
            os.pwrite(writer, b"again", BLOCK)
            first = (files.folder / "container/web@first").read_bytes()
            self.assertEqual(first[BLOCK:BLOCK + 7], b"changed")
            store("resize", "container/web", "2M")
            self.assertEqual(os.stat(web).st_size, 2 * MiB)
            os.close(writer)
            wait_for(lambda: self.removed(store), "the container's removal")
            self.assertEqual(names("container"), [])
            self.refused(errno.ENOENT, os.stat, web)
        self.assertEqual(store("store", "check"), "clean\n")

    def removed(self, store):
        """A file's last user is gone a moment after it has closed it."""
        try:
            store("container", "rm", "web")
        except AssertionError:
            return False
        return True

    def test_file_systems_on_loop_devices(self):
        for kind, options in (("ext4", ["-q"]), ("xfs", ["-q", "-m", "bigtime=1"])):
            layer = self.create(f"{kind}.tply", GiB)
            with Files(layer) as files, loop_device(files.folder / f"{kind}.tply") as device:
                run(f"mkfs.{kind}", *options, device)
                with mounted(device, self.path("fs")) as folder:
                    (folder / "file").write_bytes(pattern(40 * MiB, 7))
                    run("cp", "-a", Path(os.__file__).parent / "json", folder)
                    run("sync", "-f", folder)
                    full = used(layer)
                    self.assertGreater(full, 40 * MiB)
                with mounted(device, self.path("fs")) as folder:
                    self.assertEqual((folder / "file").read_bytes(), pattern(40 * MiB, 7))
                    (folder / "file").unlink()
                # XFS frees what was removed some time later, or on the way out.
                with mounted(device, self.path("fs")) as folder:
                    run("fstrim", folder)
                self.assertLess(used(layer), full - 35 * MiB, kind)
                if kind == "ext4":
                    run("e2fsck", "-fn", device)
            self.assert_clean(layer)

    def test_nobody_else_gets_in(self):
        with Files(self.create("disk.tply", MiB)) as files:
            os.chmod(files.folder.parent, 0o755)
            for command in (["ls", files.folder], ["cat", files.folder / "disk.tply"]):
                other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
                done = subprocess.run(list(map(str, other)), capture_output=True, text=True)
                self.assertNotEqual(done.returncode, 0)
                self.assertIn("Permission denied", done.stderr)

    def test_whoever_unmounts_ends_the_server(self):
        layer = self.create("disk.tply", MiB)
        with Files(layer) as files:
            with open(files.folder / "disk.tply", "r+b") as disk:
                disk.write(pattern(MiB, 8))
            insist("umount", files.folder)
            files.process.wait(timeout=60)
            self.assertEqual(files.errors(), "")
        self.assert_clean(layer)

    def test_an_end_makes_all_durable_and_lets_go(self):
        layer = self.create("disk.tply", MiB)
        with Files(layer) as files:
            file = os.open(files.folder / "disk.tply", os.O_RDWR)
            os.pwrite(file, pattern(MiB, 9), 0)
            files.end(status=0)
            self.assertFalse(is_mounted(files.folder))
            self.refused(errno.ENOTCONN, os.pread, file, 1, 0)
            os.close(file)
        thinply("export", layer, self.path("out"))
        self.assertEqual(self.path("out").read_bytes(), pattern(MiB, 9))

    def test_what_can_not_be_mounted_is_said(self):
        layer = self.create("disk.tply", MiB)
        for folder in (self.path("missing"), layer):
            command = [THINPLY, "serve", layer, "--fuse", folder]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            self.assertEqual(done.returncode, 2)
            self.assertIn(str(folder), done.stderr)
        self.assert_clean(layer)


if __name__ == "__main__":
    unittest.main()

"""Disks as regular files: what programs that know nothing of thinply do with them."""

import ctypes
import errno
import hashlib
import os
import random
import stat
import subprocess
import unittest
from pathlib import Path

from files import Files, is_mounted, loop_device, mounted, need_mounts

from support import (
    BLOCK, THINPLY, GiB, MiB, Case, insist, pattern, run, thinply, used, wait_for)

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
LIBC = ctypes.CDLL(None, use_errno=True)


def setUpModule():
    need_mounts("qemu-img", "qemu-io", "tar", "setpriv", "fstrim", "mkfs.xfs")


def fallocate(file, mode, offset, length):
    arguments = [ctypes.c_int(file), ctypes.c_int(mode), ctypes.c_long(offset), ctypes.c_long(length)]
    if LIBC.fallocate(*arguments):
        raise OSError(ctypes.get_errno(), "fallocate")


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
                match chance.randrange(6):
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
            self.refused(errno.EOPNOTSUPP, fallocate, file, 0, 0, BLOCK)
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

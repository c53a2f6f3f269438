"""A host without space: what is written under a mount waits for some, and nothing breaks."""

import errno
import json
import os
import signal
import socket
import subprocess
import threading
import time
import unittest
from contextlib import contextmanager

from files import Files, loop_device, mounted, need_mounts
from test_files import KEEP_SIZE, PUNCH_HOLE, fallocate

from support import (
    BLOCK, GiB, MiB, Case, Server, insist, pattern, run, thinply, wait_for)

BEGINS, ENDS = "waits for space on the host", "waits for space no more"


def setUpModule():
    need_mounts("fio", "mkfs.xfs", "mkfs.btrfs", "xfs_repair", "btrfs", "blkdiscard", "qemu-io",
                "dd")


class Writing(threading.Thread):
    """A write by a thread of its own; `got` is what came of it."""

    def __init__(self, file, data, offset=0, sync=False):
        super().__init__(daemon=True)
        self.file, self.data, self.offset, self.sync = file, data, offset, sync
        self.got = None
        self.start()

    def run(self):
        done = 0
        try:
            while done < len(self.data):
                done += os.pwrite(self.file, self.data[done:done + MiB], self.offset + done)
                if self.sync:
                    os.fsync(self.file)
            self.got = done
        except OSError as error:
            self.got = errno.errorcode[error.errno]

    def result(self):
        self.join(timeout=60)
        return self.got


class FullHost(Case):
    @contextmanager
    def host(self, size, make=("mkfs.ext4", "-q", "-m", "0")):
        """A small file system of the host's; without a command to make it, a tmpfs."""
        image, folder = self.path("image"), self.path("host")
        folder.mkdir(exist_ok=True)
        if make:
            image.unlink(missing_ok=True)
            image.touch()
            os.truncate(image, size)
            run(*make, image)
            run("mount", "-o", "loop", image, folder)
        else:
            run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder)
        try:
            yield folder
        finally:
            insist("umount", folder)

    def fill(self, folder, leave=0):
        """Takes all space there but `leave` bytes."""
        ballast = os.open(folder / "ballast", os.O_RDWR | os.O_CREAT)
        at = os.fstat(ballast).st_size
        for part in (MiB, BLOCK):
            try:
                while True:
                    at += os.pwrite(ballast, b"x" * part, at)
            except OSError as error:
                self.assertEqual(error.errno, errno.ENOSPC)
        os.ftruncate(ballast, at - leave)
        os.fsync(ballast)
        os.close(ballast)

    def empty(self, folder):
        (folder / "ballast").unlink()

    def wait_for_line(self, files, line, count=1):
        wait_for(lambda: files.errors().count(line) >= count, f"{count} times {line!r}")

    def layer(self, folder, size):
        file = folder / "disk.tply"
        thinply("create", "--size", size, file)
        return file

    def assert_content(self, layer, data):
        self.assert_clean(layer)
        self.path("out").unlink(missing_ok=True)
        thinply("export", layer, self.path("out"))
        with open(self.path("out"), "rb") as out:
            self.assert_bytes(out.read(len(data)), data)

    def under(self, make, check):
        with self.host(256 * MiB) as host:
            layer = self.layer(host, GiB)
            with Files(layer) as files, loop_device(files.folder / "disk.tply") as device:
                run(*make, device)
                with mounted(device, self.path("fs")) as folder:
                    self.fill(host, leave=8 * MiB)
                    fio = subprocess.Popen(
                        ["fio", "--name=v", f"--directory={folder}", "--rw=randwrite", "--bs=4k",
                         "--iodepth=16", "--ioengine=libaio", "--direct=1", "--size=32M",
                         "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"],
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                    self.wait_for_line(files, BEGINS)
                    files.kill_server()
                    self.wait_for_line(files, BEGINS, 2)
                    time.sleep(2)
                    self.assertIsNone(fio.poll(), "fio has ended on a full disk")
                    self.empty(host)
                    said, _ = fio.communicate(timeout=120)
                    self.assertEqual(fio.returncode, 0, said)
                    self.wait_for_line(files, ENDS)
                    # The file system goes on as if nothing had been.
                    (folder / "file").write_bytes(pattern(MiB, 1))
                    run("sync", "-f", folder)
                with mounted(device, self.path("fs")) as folder:
                    self.assertEqual((folder / "file").read_bytes(), pattern(MiB, 1))
                run(*check, device)
            self.assert_clean(layer)

    def test_ext4(self):
        self.under(["mkfs.ext4", "-q"], ["e2fsck", "-fn"])

    def test_xfs(self):
        self.under(["mkfs.xfs", "-q"], ["xfs_repair", "-n"])

    def test_deaths_while_writes_wait(self):
        """More of them than may be due to one request."""
        data = pattern(16 * MiB, 2)
        with self.host(64 * MiB) as host:
            layer = self.layer(host, 64 * MiB)
            with Files(layer) as files:
                file = os.open(files.folder / "disk.tply", os.O_RDWR)
                self.fill(host, leave=4 * MiB)
                writing = Writing(file, data)
                for death in range(1, 6):
                    self.wait_for_line(files, BEGINS, death)
                    files.kill_server()
                self.assertIsNone(writing.got)
                # The part that was answered is there.
                self.assert_bytes(os.pread(file, 2 * MiB, 0), data[:2 * MiB])
                self.empty(host)
                self.assertEqual(writing.result(), len(data))
                os.close(file)
            self.assert_content(layer, data)

    def test_other_file_systems_of_the_host(self):
        data = pattern(24 * MiB, 10)
        for make in (["mkfs.xfs", "-q"], ["mkfs.btrfs", "-q"], None):
            with self.subTest(make=make), self.host(512 * MiB, make) as host:
                layer = self.layer(host, 64 * MiB)
                with Files(layer) as files:
                    file = os.open(files.folder / "disk.tply", os.O_RDWR)
                    self.fill(host, leave=8 * MiB)
                    writing = Writing(file, data, sync=True)
                    self.wait_for_line(files, BEGINS)
                    time.sleep(1)
                    self.assertIsNone(writing.got)
                    self.empty(host)
                    self.assertEqual(writing.result(), len(data))
                    os.close(file)
                self.assert_content(layer, data)

    def test_a_quota_is_the_same(self):
        data = pattern(24 * MiB, 11)
        with self.host(512 * MiB, ["mkfs.btrfs", "-q"]) as host:
            own = host / "own"
            run("btrfs", "quota", "enable", host)
            run("btrfs", "subvolume", "create", own)
            run("btrfs", "qgroup", "limit", "8M", own)
            layer = self.layer(own, 64 * MiB)
            with Files(layer) as files:
                file = os.open(files.folder / "disk.tply", os.O_RDWR)
                writing = Writing(file, data, sync=True)
                self.wait_for_line(files, BEGINS)
                self.assertIn(os.strerror(errno.EDQUOT), files.errors())
                self.assertIsNone(writing.got)
                run("btrfs", "qgroup", "limit", "80M", own)
                self.assertEqual(writing.result(), len(data))
                os.close(file)
            self.assert_content(layer, data)

    def test_other_disks_go_on(self):
        """While all requests of a loop device wait."""
        with self.host(96 * MiB) as host:
            root = host / "store"
            for name in ("full", "other"):
                self.store(root, "volume", "create", name, "--size", "64M")
            with Files("--all", environment={"THINPLY_ROOT": str(root)}) as files, \
                    loop_device(files.folder / "volume/full") as full, \
                    loop_device(files.folder / "volume/other") as other:
                run("dd", "if=/dev/urandom", f"of={other}", "bs=1M", "count=4", "oflag=direct")
                self.fill(host)
                fio = subprocess.Popen(
                    ["fio", "--name=v", f"--filename={full}", "--rw=write", "--bs=64k",
                     "--iodepth=300", "--ioengine=libaio", "--direct=1", "--size=32M"],
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                wait_for(lambda: self.waiting(root, "volume/full") >= 100, "a full queue")
                # Nothing new to the host: neither has to wait for space.
                for words in (["iflag=direct", f"if={other}", "of=/dev/null"],
                              ["oflag=direct", "if=/dev/zero", f"of={other}"]):
                    run("timeout", "20", "dd", "bs=4k", "count=100", *words)
                self.assertIsNone(fio.poll())
                self.empty(host)
                said, _ = fio.communicate(timeout=60)
                self.assertEqual(fio.returncode, 0, said)
            self.assertEqual(self.store(root, "store", "check"), "clean\n")

    def test_a_trim_gets_through_and_gives_the_space(self):
        old, data = pattern(24 * MiB, 3), pattern(16 * MiB, 4)
        with self.host(64 * MiB) as host:
            layer = self.layer(host, 128 * MiB)
            with Files(layer) as files, loop_device(files.folder / "disk.tply") as device:
                file = os.open(files.folder / "disk.tply", os.O_RDWR)
                self.assertEqual(Writing(file, old, 64 * MiB).result(), len(old))
                self.fill(host)
                self.path("data").write_bytes(data)
                dd = subprocess.Popen(
                    ["dd", f"if={self.path('data')}", f"of={device}", "bs=1M", "oflag=direct",
                     "status=none"])
                self.wait_for_line(files, BEGINS)
                self.assert_bytes(os.pread(file, MiB, 64 * MiB), old[:MiB])
                os.fsync(file)
                self.assertIsNone(dd.poll())
                run("blkdiscard", "-f", "-o", 64 * MiB, "-l", 12 * MiB, device)
                self.wait_for_line(files, BEGINS, 1)
                time.sleep(1)
                fallocate(file, PUNCH_HOLE | KEEP_SIZE, 76 * MiB, 12 * MiB)
                self.assertEqual(dd.wait(timeout=60), 0)
                os.close(file)
            self.empty(host)
            self.assert_content(layer, data)

    def test_an_end_does_not_wait(self):
        data = pattern(16 * MiB, 5)
        with self.host(64 * MiB) as host:
            layer = self.layer(host, 64 * MiB)
            with Files(layer) as files:
                file = os.open(files.folder / "disk.tply", os.O_RDWR)
                self.fill(host, leave=4 * MiB)
                writing = Writing(file, data)
                self.wait_for_line(files, BEGINS)
                begun = time.monotonic()
                files.end(status=0)
                self.assertLess(time.monotonic() - begun, 8)
                self.assertEqual(writing.result(), "ENOSPC")
                os.close(file)
            self.assert_content(layer, data[:2 * MiB])

    def test_who_waits_can_be_killed(self):
        with self.host(64 * MiB) as host:
            layer = self.layer(host, 64 * MiB)
            with Files(layer) as files:
                self.fill(host)
                dd = subprocess.Popen(
                    ["dd", "if=/dev/urandom", f"of={files.folder / 'disk.tply'}", "bs=1M",
                     "conv=notrunc", "status=none"])
                self.wait_for_line(files, BEGINS)
                dd.kill()
                self.assertEqual(dd.wait(timeout=20), -signal.SIGKILL)
                self.wait_for_line(files, ENDS)
            self.assert_clean(layer)

    def test_who_prefers_the_error_gets_it(self):
        with self.host(64 * MiB) as host:
            layer = self.layer(host, 64 * MiB)
            with Files(layer, "--full", "error") as files:
                file = os.open(files.folder / "disk.tply", os.O_RDWR)
                self.fill(host)
                self.assertEqual(Writing(file, pattern(MiB, 6)).result(), "ENOSPC")
                self.empty(host)
                self.assertEqual(Writing(file, pattern(MiB, 6)).result(), MiB)
                os.fsync(file)
                os.close(file)
                self.assertNotIn(BEGINS, files.errors())
            self.assert_content(layer, pattern(MiB, 6))

    def test_over_nbd_it_is_the_clients_affair(self):
        with self.host(64 * MiB) as host:
            layer = self.layer(host, 64 * MiB)
            write = ["qemu-io", "-f", "raw", "-c", "write -P 7 0 8M", "-c", "flush"]
            with Server(layer) as server:
                self.fill(host)
                done = subprocess.run([*write, server.uri], capture_output=True, text=True, timeout=60)
                self.assertIn("No space left", done.stdout + done.stderr)
            with Server(layer, "--full=wait") as server:
                client = subprocess.Popen([*write, server.uri], stdout=subprocess.PIPE, text=True)
                self.wait_for_line(server, BEGINS)
                time.sleep(1)
                self.assertIsNone(client.poll())
                self.empty(host)
                said, _ = client.communicate(timeout=60)
                self.assertEqual((client.returncode, "wrote 8388608/8388608" in said), (0, True), said)
            self.assert_content(layer, bytes([7]) * 8 * MiB)

    def store(self, root, *words):
        return thinply(*words, env={**os.environ, "THINPLY_ROOT": str(root)}, timeout=60)

    def waiting(self, root, name):
        """How many requests of a disk wait, as the server of the store says."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(30)
            control.connect(str(root / "control"))
            control.sendall(b'{"version":1,"verb":"list"}\n')
            answer = json.loads(control.makefile().readline())
        return {disk["name"]: disk["waiting"] for disk in answer["done"]["disks"]}[name]

    def test_removal_gives_space_to_who_waits(self):
        data = pattern(24 * MiB, 7)
        self.path("raw").write_bytes(pattern(12 * MiB, 8))
        with self.host(96 * MiB) as host:
            root = host / "store"
            self.store(root, "image", "import", self.path("raw"), "base:1")
            self.store(root, "container", "create", "base:1", "--name", "web")
            self.store(root, "container", "create", "base:1", "--name", "old")
            self.store(root, "volume", "create", "data", "--size", "64M")
            with Files("--all", environment={"THINPLY_ROOT": str(root)}) as files:
                old = os.open(files.folder / "container/old", os.O_RDWR)
                self.assertEqual(Writing(old, pattern(10 * MiB, 9)).result(), 10 * MiB)
                os.close(old)
                file = os.open(files.folder / "volume/data", os.O_RDWR)
                self.fill(host, leave=6 * MiB)
                writing = Writing(file, data)
                wait_for(lambda: self.waiting(root, "volume/data") == 1, "a write that waits")
                self.assertEqual(self.waiting(root, "container/web"), 0)
                # Each removal is worth a part of what is to be written.
                self.store(root, "container", "rm", "old")
                wait_for(lambda: os.pread(file, 1, 12 * MiB) != b"\0", "more of the data")
                time.sleep(1)
                self.assertIsNone(writing.got)
                for words in (["container", "rm", "web"], ["image", "rm", "base:1"], ["gc"]):
                    self.store(root, *words)
                self.assertEqual(writing.result(), len(data))
                wait_for(lambda: self.waiting(root, "volume/data") == 0, "none that waits")
                os.fsync(file)
                self.assert_bytes(os.pread(file, len(data), 0), data)
                os.close(file)
            self.assertEqual(self.store(root, "store", "check"), "clean\n")


if __name__ == "__main__":
    unittest.main()

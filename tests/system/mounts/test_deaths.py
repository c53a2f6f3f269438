"""A mount outlives its server: deaths of the server, of its holder, and of both.

THINPLY_DEATHS says how often a server is killed under each file system (default 7).
"""

import errno
import os
import random
import shutil
import signal
import statistics
import subprocess
import threading
import time
import unittest

from files import Files, is_mounted, loop_device, mounted, need_mounts

from support import (
    BLOCK, THINPLY, GiB, MiB, Case, insist, missing, pattern, run, thinply, wait_for)

DEATHS = int(os.environ.get("THINPLY_DEATHS", "7"))


def setUpModule():
    need_mounts("fio", "mkfs.xfs", "mkfs.btrfs", "xfs_repair", "btrfs")
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < (6, 9):
        missing("a kernel that sends requests again (Linux 6.9)")


class Probe:
    """Writes and syncs again and again; keeps how long each took."""

    def __init__(self, file):
        self.file, self.ended, self.took, self.error = file, False, [], None
        self.thread = threading.Thread(target=self.run)

    def run(self):
        try:
            file = os.open(self.file, os.O_RDWR | os.O_CREAT)
            for number in range(1 << 30):
                if self.ended:
                    break
                begun = time.monotonic()
                os.pwrite(file, b"x" * BLOCK, number % 256 * BLOCK)
                os.fdatasync(file)
                self.took.append(time.monotonic() - begun)
                time.sleep(0.002)
            os.close(file)
        except OSError as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended = True
        self.thread.join()


class Deaths(Case):
    def busy(self, folder, depth):
        """fio with verification: whatever it writes it reads again, again and again."""
        command = [
            "fio", "--name=v", f"--directory={folder}", "--rw=randwrite", "--bs=4k",
            f"--iodepth={depth}", "--ioengine=libaio", "--direct=1", "--size=48M", "--loops=1000",
            "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--time_based",
            "--runtime=600",
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def under(self, kind, depth, make, check):
        chance, layer = random.Random(depth), self.create(f"{kind}.tply", GiB)
        with Files(layer) as files:
            disk = files.folder / f"{kind}.tply"
            with loop_device(disk) as device:
                run(*make, device)
                with mounted(device, self.path("fs")) as folder, Probe(folder / "probe") as probe:
                    fio = self.busy(folder, depth)
                    for _ in range(DEATHS):
                        time.sleep(chance.uniform(0.05, 0.8))
                        files.kill_server()
                    time.sleep(0.5)
                    self.assertIsNone(fio.poll(), "fio has ended")
                    fio.send_signal(signal.SIGINT)
                    said, _ = fio.communicate(timeout=60)
                    self.assertNotIn("verify:", said)
                    self.assertNotIn("error=", said)
                self.assertIsNone(probe.error)
                run(*check, device)
            longest = max(probe.took)
            print(f"\n{kind}, depth {depth}, {DEATHS} deaths: a write and its sync took "
                  f"{statistics.median(probe.took) * 1e3:.1f} ms, the longest {longest * 1e3:.0f} ms")
        self.assert_clean(layer)

    def test_ext4(self):
        self.under("ext4", 16, ["mkfs.ext4", "-q"], ["e2fsck", "-fn"])

    def test_xfs(self):
        self.under("xfs", 64, ["mkfs.xfs", "-q"], ["xfs_repair", "-n"])

    def test_btrfs(self):
        self.under("btrfs", 1, ["mkfs.btrfs", "-q"], ["btrfs", "check"])

    def test_what_was_answered_is_there(self):
        layer, blocks = self.create("disk.tply", 64 * MiB), 64 * MiB // BLOCK
        chance, want = random.Random(1), {}
        with Files(layer) as files:
            file = os.open(files.folder / "disk.tply", os.O_RDWR)
            for number in range(10 * DEATHS):
                for _ in range(60):
                    block = chance.randrange(blocks)
                    want[block] = pattern(BLOCK, number << 20 | block)
                    self.assertEqual(os.pwrite(file, want[block], block * BLOCK), BLOCK)
                if number % 10 == 9:
                    files.kill_server()
                if number % 7 == 6:
                    os.fsync(file)
            for block in range(blocks):
                found = os.pread(file, BLOCK, block * BLOCK)
                self.assert_bytes(found, want.get(block, bytes(BLOCK)), f"block {block}")
            os.close(file)
        self.assert_clean(layer)

    def store(self, *words, **options):
        environment = {**os.environ, "THINPLY_ROOT": str(self.path("store"))}
        return thinply(*words, env=environment, **options)

    def test_a_store_and_the_gap(self):
        """Nobody gets at a disk while its server is dead and the next one not yet there."""
        self.store("volume", "create", "data", "--size", "16M")
        self.store("volume", "create", "idle", "--size", "16M")
        environment = {"THINPLY_ROOT": str(self.path("store"))}
        with Files("--all", environment=environment) as files:
            file = os.open(files.folder / "volume/data", os.O_RDWR)
            reader = os.open(files.folder / "volume/idle", os.O_RDONLY)
            os.pwrite(file, b"before", 0)
            os.pread(reader, 1, 0)
            # The holder can't do anything now, and so the gap lasts.
            files.process.send_signal(signal.SIGSTOP)
            os.kill(files.server, signal.SIGKILL)
            for words in (
                ["volume", "rm", "data"], ["resize", "volume/data", "32M"],
                ["export", self.path("store/volumes/data.tply"), self.path("out")],
                ["serve", "--all", "--socket", self.path("s")],
                ["serve", self.path("store/volumes/data.tply"), "--socket", self.path("s")],
                ["check", self.path("store/volumes/data.tply")],
            ):
                self.store(*words, status=2)
            dead, done = files.server, []
            writing = threading.Thread(target=lambda: done.append(os.pwrite(file, b"in it", 8)))
            writing.start()
            time.sleep(0.2)
            self.assertEqual(done, [])
            files.process.send_signal(signal.SIGCONT)
            files.server = wait_for(
                lambda: (found := files.find_server()) != dead and found, "another server")
            writing.join()
            self.assertEqual(done, [5])
            self.assertEqual(os.pread(file, 13, 0), b"before\0\0in it")
            self.assertEqual(os.pread(reader, 1, 0), b"\0")
            # As before: one writer, and the disk's verbs ask the server.
            with self.assertRaises(OSError) as caught:
                open(files.folder / "volume/data", "r+b")
            self.assertEqual(caught.exception.errno, errno.EBUSY)
            self.store("resize", "volume/data", "32M")
            os.close(reader)
            os.close(file)
        self.assertEqual(self.store("store", "check"), "clean\n")

    def test_an_upgrade_is_a_signal(self):
        program, layer = self.path("program"), self.create("disk.tply", 16 * MiB)
        shutil.copy(THINPLY, program)
        with Files(layer, program=program) as files:
            file = os.open(files.folder / "disk.tply", os.O_RDWR)
            os.pwrite(file, b"before", 0)

            def renew(what):
                """Puts another program in its place."""
                new = self.path("new")
                what(new)
                new.chmod(0o755)
                new.rename(program)
                files.process.send_signal(signal.SIGUSR1)
                old = files.server
                files.server = wait_for(
                    lambda: (found := files.find_server()) != old and found, "another server")

            renew(lambda new: shutil.copy(THINPLY, new))
            self.assertEqual(os.pread(file, 6, 0), b"before")
            self.assertEqual(os.readlink(f"/proc/{files.server}/exe"), str(program))
            self.assertEqual(files.errors(), "")
            # One that can't serve is followed by what the holder itself is.
            renew(lambda new: new.write_text("#!/bin/sh\nexit 3\n"))
            os.pwrite(file, b"behind", 6)
            self.assertEqual(os.pread(file, 12, 0), b"beforebehind")
            os.close(file)
        self.assert_clean(layer)

    def test_a_server_goes_on_without_its_holder(self):
        layer = self.create("disk.tply", MiB)
        files = Files(layer)
        disk = files.folder / "disk.tply"
        file = os.open(disk, os.O_RDWR)
        files.process.kill()
        files.process.wait()
        self.assertEqual(os.pwrite(file, pattern(MiB, 1), 0), MiB)
        self.assertEqual(os.pread(file, MiB, 0), pattern(MiB, 1))
        os.fsync(file)
        # Opened anew, which asks the holder to keep it.
        os.close(file)
        self.assertEqual(disk.read_bytes(), pattern(MiB, 1))
        os.kill(files.server, signal.SIGTERM)
        wait_for(lambda: not is_mounted(files.folder), "the end of the mount")
        wait_for(lambda: not os.path.exists(f"/proc/{files.server}"), "the server's end")
        self.assert_clean(layer)
        self.forget(files)

    def test_a_mount_ends_when_both_are_dead(self):
        layer = self.create("disk.tply", MiB)
        files = Files(layer)
        file = os.open(files.folder / "disk.tply", os.O_RDWR)
        os.pwrite(file, pattern(MiB, 1), 0)
        os.fsync(file)
        os.kill(files.process.pid, signal.SIGKILL)
        os.kill(files.server, signal.SIGKILL)
        files.process.wait()
        wait_for(lambda: not os.path.exists(f"/proc/{files.server}"), "the server's end")
        with self.assertRaises(OSError) as caught:
            os.pread(file, 1, 0)
        self.assertIn(caught.exception.errno, (errno.ENOTCONN, errno.ECONNABORTED))
        os.close(file)
        insist("umount", files.folder)
        thinply("export", layer, self.path("out"))
        self.assertEqual(self.path("out").read_bytes(), pattern(MiB, 1))
        self.forget(files)

    def forget(self, files):
        files.process.stdout.close()
        files.log.close()
        files.scratch.cleanup()

    def test_a_server_that_can_not_go_on_takes_the_mount_away(self):
        self.store("volume", "create", "data", "--size", "16M")
        environment = {"THINPLY_ROOT": str(self.path("store"))}
        files = Files("--all", environment=environment)
        file = os.open(files.folder / "volume/data", os.O_RDWR)
        os.pwrite(file, b"x", 0)
        os.rename(self.path("store"), self.path("elsewhere"))
        self.path("store").write_bytes(b"no store")
        os.kill(files.server, signal.SIGKILL)
        self.assertEqual(files.process.wait(timeout=60), 2)
        self.assertFalse(is_mounted(files.folder))
        with self.assertRaises(OSError):
            os.pread(file, 1, 0)
        os.close(file)
        self.forget(files)


if __name__ == "__main__":
    unittest.main()

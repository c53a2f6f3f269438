"""What FLUSH and FUA promise: what was replied to before them survives the server's sudden end.

SIGKILL leaves the page cache, so this shows that the server asked for what makes new blocks part of
the image, on the connections where it was asked; power loss is the crash tests' matter.
"""

import random
import unittest

from support import BLOCK, KiB, MiB, Case, Server, nbd, need, pattern


def setUpModule():
    need(bindings=True)


class Durability(Case):
    SIZE = 32 * MiB

    def setUp(self):
        super().setUp()
        self.disk = bytearray(self.SIZE)
        self.disk[:4 * MiB] = pattern(4 * MiB, "parent")
        self.file = self.overlay("disk", self.SIZE, [(0, bytes(self.disk[:4 * MiB]))])

    def put(self, handle, offset, data, flags=0):
        handle.pwrite(data, offset, flags)
        self.disk[offset:offset + len(data)] = data

    def check(self, what):
        """Looks without changing anything, then as the next writer does after recovery."""
        for read_only in (True, False):
            with Server(self.file, read_only=read_only) as server:
                self.assert_disk(server.connect(), self.disk, f"{what}, read-only: {read_only}")
        self.assert_clean(self.file)

    def test_flush_on_one_connection_covers_the_others(self):
        for round_ in range(5):
            with Server(self.file) as server:
                handles = [server.connect() for _ in range(4)]
                for number in range(80):
                    at = random.Random(f"{round_} {number}").randrange(self.SIZE - 9 * KiB)
                    length = random.Random(f"{number} {round_}").choice([1, 512, BLOCK, 9 * KiB])
                    self.put(handles[number % 4], at, pattern(length, f"{round_} {number}"))
                handles[round_ % 4].flush()
                server.kill()
            self.check(f"round {round_}")

    def test_flush_of_a_connection_that_wrote_nothing(self):
        with Server(self.file) as server:
            writer, other = server.connect(), server.connect()
            self.assertTrue(writer.can_multi_conn())
            for number in range(20):
                self.put(writer, number * MiB + 5, pattern(5000, number))
            other.flush()
            server.kill()
        self.check("flush by another")

    def test_many_blocks_in_one_flush(self):
        """More new blocks than one journal record holds."""
        with Server(self.file) as server:
            handle = server.connect()
            for number in range(1000):
                self.put(handle, number * 7 % 1000 * 8 * BLOCK, pattern(BLOCK, number))
            handle.flush()
            server.kill()
        self.check("a thousand blocks")

    def test_many_flushes(self):
        """More flushes than the journal has records."""
        with Server(self.file) as server:
            handles = [server.connect(), server.connect()]
            for number in range(600):
                self.put(handles[number % 2], number * 13 * BLOCK + 100, pattern(BLOCK, number))
                handles[number // 2 % 2].flush()
            server.kill()
        self.check("six hundred flushes")

    def test_fua(self):
        with Server(self.file) as server:
            handle = server.connect()
            self.put(handle, 6 * MiB + 100, pattern(10_000, "fua"), nbd.CMD_FLAG_FUA)
            server.kill()
        self.check("write with FUA")
        with Server(self.file) as server:
            handle = server.connect()
            handle.zero(64 * KiB, MiB + 5, nbd.CMD_FLAG_FUA)
            self.disk[MiB + 5:MiB + 5 + 64 * KiB] = bytes(64 * KiB)
            server.kill()
        self.check("zero with FUA")
        with Server(self.file) as server:
            handle = server.connect()
            handle.trim(64 * KiB, 2 * MiB, nbd.CMD_FLAG_FUA)
            self.disk[2 * MiB:2 * MiB + 64 * KiB] = bytes(64 * KiB)
            server.kill()
        self.check("trim with FUA")

    def test_what_was_not_flushed_is_old_or_new(self):
        """Each block of an unflushed write is whole: the parent's bytes or the new ones."""
        with Server(self.file) as server:
            handle = server.connect()
            kept = pattern(64 * KiB, "kept")
            self.put(handle, 8 * MiB, kept)
            handle.flush()
            new = pattern(MiB, "unflushed")
            handle.pwrite(new, MiB)
            server.kill()
        with Server(self.file) as server:
            handle = server.connect()
            self.assert_bytes(handle.pread(64 * KiB, 8 * MiB), kept)
            for at in range(0, MiB, BLOCK):
                got = bytes(handle.pread(BLOCK, MiB + at))
                old = bytes(self.disk[MiB + at:MiB + at + BLOCK])
                self.assertTrue(got in (old, new[at:at + BLOCK]), f"block at {MiB + at}")
        self.assert_clean(self.file)


if __name__ == "__main__":
    unittest.main()

"""Every command and flag, through libnbd's own bindings (what nbdsh runs)."""

import errno
import os
import subprocess
import sys
import unittest

from support import (
    BLOCK, PATIENCE, THINPLY, Case, GiB, KiB, MiB, Server, TiB, die_with_parent, extents, nbd, need,
    pattern, run, used,
)


def setUpModule():
    need("nbdsh", bindings=True)


class Commands(Case):
    SIZE = 64 * MiB

    def setUp(self):
        super().setUp()
        # Parent data under all that the tests do in the first MiB, then holes.
        self.disk = bytearray(self.SIZE)
        self.disk[:MiB] = pattern(MiB, "parent")
        self.file = self.overlay("disk", self.SIZE, [(0, bytes(self.disk[:MiB]))])
        self.server = self.enterContext(Server(self.file))
        self.handle = self.server.connect()

    def put(self, offset, data):
        self.disk[offset:offset + len(data)] = data

    def check(self, what, handle=None):
        self.assert_disk(handle or self.handle, self.disk, what)

    def reopened(self):
        """Stops the server and serves again what is in the file."""
        self.server.stop()
        self.server = self.enterContext(Server(self.file))
        self.handle = self.server.connect()

    def test_what_is_offered(self):
        handle = self.handle
        self.assertEqual(handle.get_size(), self.SIZE)
        self.assertFalse(handle.is_read_only())
        for ability in ["flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn", "df"]:
            self.assertTrue(getattr(handle, f"can_{ability}")(), ability)
        self.assertTrue(handle.can_meta_context("base:allocation"))
        self.assertTrue(handle.get_structured_replies_negotiated())
        self.assertEqual(handle.get_protocol(), "newstyle-fixed")
        sizes = [handle.get_block_size(which) for which in
                 (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
        self.assertEqual(sizes, [1, 4096, 32 * MiB])

    def test_write_and_read_at_any_alignment(self):
        writes = [(0, 1), (4095, 2), (8191, 4098), (3 * MiB + 511, 513), (MiB - 100, 200),
                  (self.SIZE - 1, 1), (10 * MiB, 32 * MiB), (20 * MiB + 7, 5 * BLOCK)]
        for number, (offset, length) in enumerate(writes):
            data = pattern(length, number)
            self.handle.pwrite(data, offset)
            self.put(offset, data)
            self.assert_bytes(self.handle.pread(length, offset), data, f"{length} at {offset}")
        self.check("after the writes")
        self.handle.flush()
        self.reopened()
        self.check("after a restart")

    def test_simple_replies(self):
        plain = self.server.connect(context=False, structured=False)
        self.assertFalse(plain.get_structured_replies_negotiated())
        self.assertFalse(plain.can_df())
        data = pattern(3 * BLOCK, "simple")
        plain.pwrite(data, 2 * MiB + 5)
        self.put(2 * MiB + 5, data)
        self.check("simple replies", plain)

    def test_structured_read_tells_holes(self):
        self.handle.pwrite(pattern(MiB, 1), 8 * MiB)
        self.put(8 * MiB, pattern(MiB, 1))
        chunks = []
        whole = bytearray(b"\xaa" * (8 * MiB))

        def hear(data, offset, kind, _error):
            chunks.append((offset, len(data), kind))
            at = offset - 4 * MiB
            whole[at:at + len(data)] = data

        self.handle.pread_structured(8 * MiB, 4 * MiB, hear)
        self.assertEqual(sorted(chunks), [
            (4 * MiB, 4 * MiB, nbd.READ_HOLE),
            (8 * MiB, MiB, nbd.READ_DATA),
            (9 * MiB, 3 * MiB, nbd.READ_HOLE),
        ])
        self.assert_bytes(whole, self.disk[4 * MiB:12 * MiB])

    def test_df_asks_for_one_chunk(self):
        self.handle.pwrite(pattern(BLOCK, 1), 8 * MiB)
        self.put(8 * MiB, pattern(BLOCK, 1))
        for length in (64 * KiB, 8 * MiB):
            chunks = []

            def hear(data, offset, kind, _error, chunks=chunks):
                chunks.append((offset, bytes(data), kind))

            self.handle.pread_structured(length, 7 * MiB, hear, nbd.CMD_FLAG_DF)
            self.assertEqual(len(chunks), 1)
            self.assertEqual(chunks[0][0], 7 * MiB)
            self.assert_bytes(chunks[0][1], self.disk[7 * MiB:7 * MiB + length])

    def test_flush(self):
        self.handle.pwrite(b"x" * 100, 5)
        self.handle.flush()
        self.handle.flush()

    def test_fua_on_every_command(self):
        data = pattern(BLOCK, "fua")
        self.handle.pwrite(data, 2 * BLOCK, nbd.CMD_FLAG_FUA)
        self.put(2 * BLOCK, data)
        self.handle.trim(2 * BLOCK, 8 * BLOCK, nbd.CMD_FLAG_FUA)
        self.put(8 * BLOCK, bytes(2 * BLOCK))
        self.handle.zero(BLOCK, 16 * BLOCK, nbd.CMD_FLAG_FUA)
        self.put(16 * BLOCK, bytes(BLOCK))
        # "The server MUST accept FUA on all commands": where nothing is written it means nothing.
        self.handle.set_strict_mode(0)
        self.handle.pread(BLOCK, 0, nbd.CMD_FLAG_FUA)
        self.handle.cache(BLOCK, 0, nbd.CMD_FLAG_FUA)
        self.handle.flush(nbd.CMD_FLAG_FUA)
        extents(self.handle, BLOCK, 0, nbd.CMD_FLAG_FUA)
        self.check("after FUA")

    def test_trim(self):
        self.handle.pwrite(pattern(8 * MiB, 1), 16 * MiB)
        self.put(16 * MiB, pattern(8 * MiB, 1))
        self.handle.flush()
        before = used(self.file)
        self.handle.trim(4 * MiB, 18 * MiB)
        self.put(18 * MiB, bytes(4 * MiB))
        # Parent data: the trimmed blocks read as zeros, and it doesn't come back.
        self.handle.trim(64 * KiB, 128 * KiB)
        self.put(128 * KiB, bytes(64 * KiB))
        # Less than a block keeps its bytes: trim is no promise of zeros, but nothing else changes.
        self.handle.trim(100, 300 * KiB + 10)
        self.handle.flush()
        self.assertLessEqual(used(self.file), before - 4 * MiB + 64 * KiB)
        self.check("after trim")
        self.reopened()
        self.check("after trim and a restart")

    def test_zero(self):
        self.handle.pwrite(pattern(8 * MiB, 1), 16 * MiB)
        self.put(16 * MiB, pattern(8 * MiB, 1))
        self.handle.flush()
        before = used(self.file)
        for offset, length in [(18 * MiB, 4 * MiB), (100, 5000), (MiB - 3, 6), (3 * BLOCK, BLOCK),
                               (40 * MiB + 1, 4 * MiB), (self.SIZE - 10, 10)]:
            self.handle.zero(length, offset)
            self.put(offset, bytes(length))
        self.handle.flush()
        self.assertLessEqual(used(self.file), before - 4 * MiB + 64 * KiB)
        self.check("after zero")
        self.reopened()
        self.check("after zero and a restart")

    def test_zero_no_hole_keeps_space(self):
        before = used(self.file)
        self.handle.zero(4 * MiB, 30 * MiB, nbd.CMD_FLAG_NO_HOLE)
        self.handle.zero(64 * KiB, 128 * KiB, nbd.CMD_FLAG_NO_HOLE)
        self.put(128 * KiB, bytes(64 * KiB))
        self.handle.flush()
        self.assertGreaterEqual(used(self.file), before + 4 * MiB + 64 * KiB)
        self.check("after zero with NO_HOLE")

    def test_fast_zero_is_fast_or_refused_without_a_change(self):
        self.handle.zero(256 * KiB, 256 * KiB, nbd.CMD_FLAG_FAST_ZERO)
        self.put(256 * KiB, bytes(256 * KiB))
        self.check("after a fast zero")
        slow = [(100, 5000, 0), (0, 1, 0), (0, 64 * KiB, nbd.CMD_FLAG_NO_HOLE)]
        for offset, length, more in slow:
            try:
                self.handle.zero(length, offset, nbd.CMD_FLAG_FAST_ZERO | more)
            except nbd.Error as error:
                self.assertEqual(error.errnum, errno.ENOTSUP)
            else:
                self.put(offset, bytes(length))
            self.check(f"fast zero of {length} bytes at {offset}")

    def test_a_refusal_of_fast_zero_exists(self):
        with self.assertRaises(nbd.Error) as caught:
            self.handle.zero(64 * KiB, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
        self.assertEqual(caught.exception.errnum, errno.ENOTSUP)

    def test_cache(self):
        self.handle.cache(self.SIZE, 0)
        self.handle.cache(1, 12345)
        self.check("after cache")

    def test_block_status(self):
        self.handle.pwrite(pattern(MiB, 1), 8 * MiB)
        self.handle.trim(256 * KiB, 512 * KiB)
        hole = nbd.STATE_HOLE | nbd.STATE_ZERO
        want = [(512 * KiB, 0), (256 * KiB, hole), (256 * KiB, 0), (7 * MiB, hole), (MiB, 0),
                (55 * MiB, hole)]
        self.assertEqual(extents(self.handle, self.SIZE), want)
        self.assertEqual(extents(self.handle, 2 * MiB, 7 * MiB), [(MiB, hole), (MiB, 0)])
        first = extents(self.handle, self.SIZE, 0, nbd.CMD_FLAG_REQ_ONE)
        self.assertEqual(first, want[:1])
        # REQ_ONE must not say more than was asked about.
        inside = extents(self.handle, 1000, 4096 + 7, nbd.CMD_FLAG_REQ_ONE)
        self.assertEqual(inside, [(1000, 0)])
        for length in (1, 511, 513, 4097):
            found = extents(self.handle, length, 8 * MiB - 1)
            self.assertGreaterEqual(sum(part for part, _ in found), length)
            self.assertEqual(found[0], (1, hole))

    def test_block_status_never_calls_data_a_hole(self):
        for number in range(200):
            offset = (number * 977 + 300) * BLOCK % self.SIZE
            self.handle.pwrite(pattern(BLOCK, number), offset)
            self.put(offset, pattern(BLOCK, number))
        at = 0
        for length, state in extents(self.handle, self.SIZE):
            if state & nbd.STATE_ZERO:
                self.assertFalse(any(self.disk[at:at + length]), f"{length} bytes at {at}")
            at += length
        self.assertEqual(at, self.SIZE)

    def test_commands_in_flight(self):
        """Many requests at once, answered in any order, each with its own bytes."""
        pending = []
        for number in range(300):
            offset = (number * 37 % 300) * 20 * KiB
            data = pattern(20 * KiB, number)
            buffer = nbd.Buffer.from_bytearray(bytearray(data))
            pending.append((self.handle.aio_pwrite(buffer, offset), buffer))
            self.put(offset, data)
        self.finish(pending)
        reads = []
        for number in range(300):
            buffer = nbd.Buffer(20 * KiB)
            reads.append((self.handle.aio_pread(buffer, number * 20 * KiB), buffer))
        self.finish(reads)
        for number, (_, buffer) in enumerate(reads):
            at = number * 20 * KiB
            self.assert_bytes(buffer.to_bytearray(), self.disk[at:at + 20 * KiB], f"read {number}")

    def finish(self, pending):
        for cookie, _ in pending:
            while not self.handle.aio_command_completed(cookie):
                self.handle.poll(-1)

    def test_tcp(self):
        self.server.stop()
        with Server(self.file, tcp=True) as server:
            self.assertRegex(server.uri, r"^nbd://(127\.0\.0\.1|localhost):\d+/?")
            handle = server.connect()
            data = pattern(5 * MiB, "tcp")
            handle.pwrite(data, 12345)
            self.put(12345, data)
            self.check("over TCP", handle)

    def test_socket_activation(self):
        file = self.create("activated.tply", MiB)
        handle = nbd.NBD()
        handle.connect_systemd_socket_activation([THINPLY, "serve", str(file)])
        handle.pwrite(pattern(5000, "activated"), 3)
        self.assert_bytes(handle.pread(5000, 3), pattern(5000, "activated"))
        handle.shutdown()
        # So libnbd ends the server with SIGTERM, and waits for it.
        del handle
        with Server(file) as server:
            self.assert_bytes(server.connect().pread(5000, 3), pattern(5000, "activated"))

    def test_the_uri_of_a_relative_socket_works_from_anywhere(self):
        file = self.create("relative.tply", MiB)
        command = [THINPLY, "serve", file.name, "--socket", "s", "--once"]
        with subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, text=True,
                              preexec_fn=die_with_parent) as server:
            handle = nbd.NBD()
            handle.connect_uri(server.stdout.readline().strip())
            self.assertEqual(handle.get_size(), MiB)
            handle.shutdown()
            self.assertEqual(server.wait(PATIENCE), 0)

    def test_nbdsh(self):
        """The shell itself, as people use it."""
        lines = ["h.pwrite(b'hello', 1000)", "h.flush()", "print(h.pread(5, 1000).decode())",
                 "h.zero(512, 4096)", "h.trim(4096, 8192)", "h.cache(4096, 0)",
                 "print(h.get_size())"]
        words = [word for line in lines for word in ("-c", line)]
        out = run("nbdsh", "-u", self.server.uri, *words)
        self.assertEqual(out, f"hello\n{self.SIZE}\n")
        out = run("nbdsh", "--base-allocation", "-u", self.server.uri, "-c",
                  "h.block_status(4096, 0, lambda c, o, e, err: print(c, e))")
        self.assertEqual(out, "base:allocation [4096, 0]\n")


class Sizes(Case):
    def test_an_overlay_larger_than_its_base_reads_zeros_beyond_it(self):
        data = pattern(MiB + 512, "base")
        file = self.overlay("grown", MiB + 512, [(0, data)], top_size=3 * MiB)
        with Server(file) as server:
            self.assert_disk(server.connect(), data + bytes(2 * MiB - 512))

    def test_odd_and_tiny_sizes(self):
        for size in (512, 4096 + 512, 127 * MiB + 1536):
            file = self.create(f"{size}.tply", size)
            with Server(file) as server:
                handle = server.connect()
                data = pattern(512, size)
                handle.pwrite(data, size - 512)
                want = bytearray(size)
                want[-512:] = data
                self.assert_disk(handle, want)
                self.assertEqual(sum(part for part, _ in extents(handle, size)), size)

    def test_a_huge_disk(self):
        file = self.create("huge.tply", 8 * TiB)
        with Server(file) as server:
            handle = server.connect()
            self.assertEqual(handle.get_size(), 8 * TiB)
            data = pattern(10000, "far")
            for offset in (4 * GiB - 5000, TiB + 3, 8 * TiB - 10000):
                handle.pwrite(data, offset)
                self.assert_bytes(handle.pread(10000, offset), data)
            # The longest status request there is without extended headers.
            hole = nbd.STATE_HOLE | nbd.STATE_ZERO
            found = extents(handle, 2**32 - 1, 5 * GiB)
            self.assertEqual(found[0][1], hole)
            self.assertGreater(found[0][0], GiB)
            self.assertLessEqual(found[0][0], 2**32 - 1)
            handle.trim(2**32 - 1, TiB)
            self.assert_bytes(handle.pread(10000 - 4093, TiB + 4096), bytes(10000 - 4093))
        self.assertLess(used(file), 8 * MiB)
        self.assertEqual(os.stat(file).st_size > 8 * TiB, True)


if __name__ == "__main__":
    unittest.main()

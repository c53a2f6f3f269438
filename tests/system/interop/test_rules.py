"""The rules for what a server refuses and survives: errors, hostile bytes, odd handshakes."""

import errno
import socket
import struct
import time
import unittest

from support import KiB, MiB, Case, Server, extents, nbd, need, pattern, run, wait_for

INIT, OPTION, REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3e889045565a9
REQUEST, SIMPLE = 0x25609513, 0x67446698
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (
    2**31 + 1, 2**31 + 3, 2**31 + 6, 2**31 + 9)


def setUpModule():
    need(bindings=True)


class Raw:
    """A client that says what it likes."""

    def __init__(self, server, flags=3):
        self.peer = socket.socket(socket.AF_UNIX)
        self.peer.settimeout(30)
        self.peer.connect(str(server.socket))
        assert self.take(16) == INIT + OPTION
        assert struct.unpack(">H", self.take(2))[0] == 3
        self.peer.sendall(struct.pack(">I", flags))

    def take(self, length):
        data = b""
        while len(data) < length:
            part = self.peer.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def option(self, code, data=b"", length=None):
        length = len(data) if length is None else length
        self.peer.sendall(OPTION + struct.pack(">II", code, length) + data)

    def reply(self):
        """The next option reply: (option, kind, data)."""
        magic, option, kind, length = struct.unpack(">QIII", self.take(20))
        assert magic == REPLY, hex(magic)
        return option, kind, self.take(length)

    def go(self):
        self.option(7, struct.pack(">IH", 0, 0))
        while self.reply()[1] != 1:
            pass
        return self

    def request(self, kind, offset=0, length=0, flags=0, data=b"", cookie=7):
        self.peer.sendall(
            struct.pack(">IHHQQI", REQUEST, flags, kind, cookie, offset, length) + data)

    def answer(self, length=0):
        """The errno of a simple reply, with its data if there is no error."""
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert magic == SIMPLE and cookie == 7, (hex(magic), cookie)
        return error, self.take(length) if error == 0 else b""

    def gone(self):
        """Whether the server has hung up."""
        try:
            return self.peer.recv(1) == b""
        except ConnectionResetError:
            return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.peer.close()


class Errors(Case):
    SIZE = 64 * MiB

    def setUp(self):
        super().setUp()
        self.data = pattern(2 * MiB, "rules")
        self.file = self.overlay("disk", self.SIZE, [(0, self.data)])

    def serve(self, **options):
        self.server = self.enterContext(Server(self.file, **options))
        self.handle = self.server.connect()
        # libnbd would refuse most of this itself; here the server is asked.
        self.handle.set_strict_mode(0)

    def refused(self, number, call, *words):
        with self.assertRaises(nbd.Error, msg=f"{call.__name__} {words[-2:]}") as caught:
            call(*words)
        self.assertEqual(caught.exception.errnum, number, caught.exception.string)
        # The connection is still in step.
        self.assert_bytes(self.handle.pread(100, 50), self.data[50:150])

    def commands(self, offset, length):
        handle = self.handle
        return {
            "read": (handle.pread, length, offset),
            "write": (handle.pwrite, bytes(min(length, MiB)), offset),
            "zero": (handle.zero, length, offset),
            "trim": (handle.trim, length, offset),
            "cache": (handle.cache, length, offset),
            "status": (handle.block_status, length, offset, lambda *_: 0),
        }

    def test_beyond_the_end(self):
        self.serve()
        far = [(self.SIZE - 512, 513), (self.SIZE, 1), (self.SIZE + 4096, 4096),
               (2**63 - 512, 512), (2**63, 4096), (2**64 - 512, 512), (2**64 - 1, 1)]
        for offset, length in far:
            for name, call in self.commands(offset, length).items():
                wanted = errno.ENOSPC if name in ("write", "zero") else errno.EINVAL
                with self.subTest(command=name, offset=offset, length=length):
                    self.refused(wanted, *call)
        self.assert_bytes(self.handle.pread(512, self.SIZE - 512), bytes(512))

    def test_at_the_very_end(self):
        self.serve()
        for name, call in self.commands(self.SIZE - 1, 1).items():
            with self.subTest(command=name):
                call[0](*call[1:])

    def test_read_only(self):
        self.serve(read_only=True)
        self.assertTrue(self.handle.is_read_only())
        for flags in (0, nbd.CMD_FLAG_FUA):
            self.refused(errno.EPERM, self.handle.pwrite, b"x" * 4096, 0, flags)
            self.refused(errno.EPERM, self.handle.zero, 4096, 0, flags)
            self.refused(errno.EPERM, self.handle.trim, 4096, 0, flags)
        # Still refused, whatever else is wrong with it.
        self.refused(errno.EPERM, self.handle.pwrite, b"x" * 4096, self.SIZE)
        self.handle.flush()
        self.handle.cache(4096, 0)
        self.assertEqual(extents(self.handle, MiB), [(MiB, 0)])
        want = self.data + bytes(self.SIZE - len(self.data))
        self.assert_disk(self.handle, want)
        self.assertFalse(self.handle.can_zero())
        self.assertFalse(self.handle.can_trim())

    def test_read_only_changes_no_byte_of_the_file(self):
        before = self.file.read_bytes()
        self.serve(read_only=True)
        self.assert_disk(self.handle, self.data + bytes(self.SIZE - len(self.data)))
        self.server.stop()
        self.assertEqual(self.file.read_bytes(), before)

    def test_wrong_flags(self):
        self.serve()
        df, one, hole, fast = (nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_NO_HOLE,
                               nbd.CMD_FLAG_FAST_ZERO)
        hear = lambda *_: 0
        for flags in (one, hole, fast, 1 << 5, 1 << 9, 1 << 15):
            self.refused(errno.EINVAL, self.handle.pread, 4096, 0, flags)
        for flags in (df, one, hole, fast, 1 << 15):
            self.refused(errno.EINVAL, self.handle.pwrite, b"x" * 4096, 0, flags)
            self.refused(errno.EINVAL, self.handle.trim, 4096, 0, flags)
            self.refused(errno.EINVAL, self.handle.cache, 4096, 0, flags)
            self.refused(errno.EINVAL, self.handle.flush, flags)
        for flags in (df, one, 1 << 15):
            self.refused(errno.EINVAL, self.handle.zero, 4096, 0, flags)
        for flags in (df, hole, fast, 1 << 15):
            self.refused(errno.EINVAL, self.handle.block_status, 4096, 0, hear, flags)
        self.assert_disk(self.handle, self.data + bytes(self.SIZE - len(self.data)))

    def test_df_needs_structured_replies(self):
        self.serve()
        plain = self.server.connect(context=False, structured=False)
        plain.set_strict_mode(0)
        with self.assertRaises(nbd.Error) as caught:
            plain.pread(4096, 0, nbd.CMD_FLAG_DF)
        self.assertEqual(caught.exception.errnum, errno.EINVAL)

    def test_status_needs_a_context_and_a_length(self):
        self.serve()
        self.refused(errno.EINVAL, self.handle.block_status, 0, 0, lambda *_: 0)
        with Raw(self.server) as raw:
            raw.go()
            raw.request(STATUS, 0, 4096)
            self.assertEqual(raw.answer()[0], errno.EINVAL)

    def test_too_much_in_one_request(self):
        self.serve()
        self.handle.pread(32 * MiB, 0)
        self.refused(errno.EINVAL, self.handle.pread, 32 * MiB + 1, 0)
        self.handle.pwrite(self.data + bytes(30 * MiB), 0)
        self.refused(errno.EINVAL, self.handle.pwrite, bytes(32 * MiB + 1), 0)

    def test_nothing_asked_for(self):
        self.serve()
        for name, call in self.commands(4096, 0).items():
            if name != "status":
                with self.subTest(command=name):
                    call[0](*call[1:])
        self.assert_bytes(self.handle.pread(100, 50), self.data[50:150])

    def test_error_of_a_structured_read_has_its_place(self):
        """A failed read tells through libnbd as an error, never as data."""
        self.serve()
        with self.assertRaises(nbd.Error):
            self.handle.pread_structured(4096, self.SIZE - 100, lambda *_: 0)

    def test_raw_requests(self):
        self.serve()
        with Raw(self.server) as raw:
            raw.go()

            def refused(number, kind, offset=0, length=0, flags=0, data=b""):
                raw.request(kind, offset, length, flags, data)
                self.assertEqual(raw.answer()[0], number, (kind, offset, length))
                raw.request(READ, 10, 20)
                self.assertEqual(raw.answer(20), (0, self.data[10:30]))

            for kind in (8, 9, 77, 0xffff):
                refused(errno.EINVAL, kind)
            refused(errno.EINVAL, FLUSH, 4096, 0)
            refused(errno.EINVAL, FLUSH, 0, 4096)
            # The payload of a refused write is no request.
            refused(errno.ENOSPC, WRITE, self.SIZE, MiB, data=bytes(MiB))
            refused(errno.ENOSPC, WRITE, 2**64 - 4096, 8192, data=bytes(8192))
            refused(errno.EINVAL, WRITE, 0, 4096, 1 << 9, bytes(4096))
            refused(errno.EINVAL, WRITE, 0, 33 * MiB, data=bytes(33 * MiB))
            refused(errno.EINVAL, READ, 0, 2**32 - 1)
            refused(errno.ENOSPC, ZERO, 4096, 2**32 - 1)
            refused(errno.EINVAL, TRIM, 4096, 2**32 - 1)
            raw.request(DISC)
            self.assertTrue(raw.gone())

    def test_the_stream_is_lost(self):
        self.serve()
        with Raw(self.server) as raw:
            raw.go()
            raw.peer.sendall(b"\0" * 28)
            self.assertTrue(raw.gone())
        with Raw(self.server) as raw:
            raw.go().request(WRITE, 0, 2**32 - 1)
            self.assertTrue(raw.gone())
        # Others don't notice.
        self.assert_bytes(self.handle.pread(100, 50), self.data[50:150])


class Handshake(Case):
    def setUp(self):
        super().setUp()
        self.file = self.create("disk.tply", MiB)
        self.server = self.enterContext(Server(self.file))

    def test_options_through_libnbd(self):
        def opt(handle):
            handle.set_opt_mode(True)

        handle = self.server.connect(prepare=opt)
        self.assertTrue(handle.aio_is_negotiating())
        names = []
        self.assertEqual(handle.opt_list(lambda name, _text: names.append(name)), 1)
        self.assertEqual(len(names), 1)
        contexts = []
        handle.opt_list_meta_context(contexts.append)
        self.assertEqual(contexts, ["base:allocation"])
        handle.set_export_name("a" * 3000)
        for wanted in (handle.opt_info, handle.opt_go):
            with self.assertRaises(nbd.Error) as caught:
                wanted()
            self.assertEqual(caught.exception.errnum, errno.ENOENT)
        handle.set_export_name(names[0])
        handle.opt_info()
        self.assertEqual(handle.get_size(), MiB)
        handle.opt_go()
        self.assertEqual(handle.pread(10, 0), bytes(10))
        again = self.server.connect(prepare=opt)
        again.opt_abort()
        self.assertTrue(again.aio_is_closed())

    def test_old_style_export_name(self):
        handle = self.server.connect(
            context=False, structured=False, prepare=lambda h: h.set_handshake_flags(0))
        self.assertEqual(handle.get_protocol(), "newstyle")
        self.assertEqual(handle.get_size(), MiB)
        handle.pwrite(b"x", 5)

    def test_what_it_does_not_know_or_like(self):
        long_name = struct.pack(">I", 3000) + b"a" * 3000 + b"\0\0"
        for code, data, kind in [
            (77, b"", ERR_UNSUP),
            (77, b"x" * 1000, ERR_UNSUP),
            (77, b"x" * (32 * MiB), ERR_TOO_BIG),
            (3, b"surplus", ERR_INVALID),
            (8, b"surplus", ERR_INVALID),
            (7, b"", ERR_INVALID),
            (7, b"\xff" * 4 + b"name\0\0", ERR_INVALID),
            (7, long_name, ERR_UNKNOWN),
            (6, long_name, ERR_UNKNOWN),
            (7, struct.pack(">I", 5000) + b"a" * 5000 + b"\0\0", ERR_TOO_BIG),
            (9, b"\0" * 4 + b"\xff" * 4, ERR_INVALID),
        ]:
            with self.subTest(option=code, data=data[:20], length=len(data)), \
                    Raw(self.server) as raw:
                raw.option(code, data)
                self.assertEqual(raw.reply()[:2], (code, kind))
                raw.go().request(READ, 0, 10)
                self.assertEqual(raw.answer(10), (0, bytes(10)))

    def test_request_before_the_end_of_the_handshake(self):
        with Raw(self.server) as raw:
            raw.request(READ, 0, 10)
            self.assertTrue(raw.gone())

    def test_hanging_up_at_every_byte(self):
        stream = struct.pack(">I", 3) + OPTION + struct.pack(">II", 8, 0) + \
            OPTION + struct.pack(">IIIH", 7, 6, 0, 0) + \
            struct.pack(">IHHQQI", REQUEST, 0, WRITE, 1, 0, 16) + b"x" * 16
        for length in range(len(stream)):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(self.server.socket))
                peer.sendall(stream[:length])
        self.assertEqual(self.server.connect().pread(16, 0), bytes(16))
        self.assertIsNone(self.server.process.poll())


class Company(Case):
    """One client's trouble is nobody else's."""

    def setUp(self):
        super().setUp()
        self.file = self.create("disk.tply", 64 * MiB)
        self.server = self.enterContext(Server(self.file))

    def stalled(self):
        """A client that asks for a lot and reads nothing of it, as many bytes as it can send."""
        raw = Raw(self.server).go()
        raw.peer.settimeout(0.5)
        try:
            for _ in range(10_000):
                raw.request(READ, 0, MiB)
        except TimeoutError:
            pass
        return raw

    def test_a_client_that_never_reads_holds_up_nobody(self):
        stalled = [self.stalled() for _ in range(20)]
        half = Raw(self.server).go()
        half.request(WRITE, 0, MiB, data=b"half")
        start = time.monotonic()
        handle = self.server.connect()
        for number in range(50):
            handle.pwrite(pattern(64 * KiB, number), number * MiB)
        handle.flush()
        self.assertLess(time.monotonic() - start, 15)
        with open(f"/proc/{self.server.process.pid}/status") as status:
            resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        self.assertLess(resident, 400 * KiB, "KiB of memory for 20 stalled clients")
        # Nor does it hold up the end.
        self.server.stop(30)
        for raw in [*stalled, half]:
            raw.peer.close()
        with Server(self.file, read_only=True) as server:
            self.assert_bytes(server.connect().pread(64 * KiB, 49 * MiB), pattern(64 * KiB, 49))

    def test_idle_connections(self):
        idle = [Raw(self.server) for _ in range(300)]
        self.assertEqual(self.server.connect().pread(10, 0), bytes(10))
        for raw in idle:
            raw.peer.close()
        threads = f"/proc/{self.server.process.pid}/status"

        def gone():
            with open(threads) as status:
                return next(int(line.split()[1]) for line in status
                            if line.startswith("Threads")) < 30
        wait_for(gone, "threads of clients that have left")

    def test_the_end_with_clients_connected(self):
        handle = self.server.connect()
        data = pattern(MiB, "end")
        handle.pwrite(data, 0)
        self.server.stop()
        with self.assertRaises(nbd.Error):
            handle.pread(10, 0)
            handle.pread(10, 0)
        # SIGTERM flushes: nobody asked for it, and all is there.
        with Server(self.file, read_only=True) as server:
            self.assert_bytes(server.connect().pread(MiB, 0), data)
        self.assert_clean(self.file)

    def test_a_second_writer_is_refused(self):
        out = run(*[self.server.process.args[0], "serve", self.file, "--socket",
                    self.path("other")], status=None)
        self.assertEqual(out, "")
        self.assertFalse(self.path("other").exists())
        self.assertEqual(self.server.connect().pread(10, 0), bytes(10))


if __name__ == "__main__":
    unittest.main()

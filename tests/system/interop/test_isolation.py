"""Five containers over one frozen base: nobody sees another's writes, the base never changes."""

import hashlib
import random
import threading
import unittest
from contextlib import ExitStack

from support import BLOCK, MiB, Case, Server, need, pattern


def setUpModule():
    need(bindings=True)


class Isolation(Case):
    SIZE, TOPS = 32 * MiB, 5

    def test_five_overlays_over_one_base(self):
        image = bytearray(self.SIZE)
        image[:20 * MiB] = pattern(20 * MiB, "image")
        base = self.create("base.tply", self.SIZE)
        with Server(base) as server:
            self.write(server, [(0, bytes(image[:20 * MiB]))])
        tops = [self.create(f"top{number}.tply", parent=base) for number in range(self.TOPS)]
        before = self.fingerprint(base)
        disks = [bytearray(image) for _ in tops]
        for round_ in range(2):
            with ExitStack() as stack:
                servers = [stack.enter_context(Server(top)) for top in tops]
                # All write at once, to the same places among others.
                errors = []
                threads = [
                    threading.Thread(target=self.scribble,
                                     args=(server, disk, (round_, number), errors))
                    for number, (server, disk) in enumerate(zip(servers, disks))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                self.assertEqual(errors, [])
                for number, (server, disk) in enumerate(zip(servers, disks)):
                    self.assert_disk(server.connect(), disk, f"top {number} round {round_}")
                # One goes without warning; the others don't notice.
                servers[round_].kill()
            self.assertEqual(self.fingerprint(base), before)
        for number, (top, disk) in enumerate(zip(tops, disks)):
            with Server(top, read_only=True) as server:
                self.assert_disk(server.connect(), disk, f"top {number} afterwards")
            self.assert_clean(top)
        with Server(base, read_only=True) as server:
            self.assert_disk(server.connect(), image, "the base")
        self.assertEqual(self.fingerprint(base), before)

    def fingerprint(self, path):
        state = path.stat()
        return (hashlib.sha256(path.read_bytes()).hexdigest(), state.st_mtime_ns, state.st_blocks)

    def scribble(self, server, disk, seed, errors):
        try:
            handle, chance = server.connect(), random.Random(str(seed))
            shared = random.Random("places all of them write to")
            for number in range(400):
                pick = shared if number % 2 else chance
                offset = pick.randrange(self.SIZE - 16 * BLOCK)
                length = pick.choice([1, 512, BLOCK, 5 * BLOCK + 7])
                action = chance.choice(["write", "write", "write", "zero", "flush"])
                if action == "write":
                    data = pattern(length, f"{seed} {number}")
                    handle.pwrite(data, offset)
                    disk[offset:offset + length] = data
                elif action == "zero":
                    handle.zero(length, offset)
                    disk[offset:offset + length] = bytes(length)
                else:
                    handle.flush()
            handle.flush()
        except Exception as error:  # a thread has nobody else to tell
            errors.append(repr(error))


if __name__ == "__main__":
    unittest.main()

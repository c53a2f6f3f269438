"""What serving a large disk takes in memory before anybody reads it."""

import re
import unittest
from pathlib import Path

from support import MiB, TiB, Case, Server, need


def setUpModule():
    need(bindings=True)


class Memory(Case):
    def test_a_tebibyte_overlay_takes_less_than_ten_mebibytes(self):
        base = self.create("base.tply", TiB)
        top = self.create("top.tply", parent=base)
        with Server(top) as server:
            # A client that has negotiated, but not asked for anything yet.
            client = server.connect()
            self.assertEqual(client.get_size(), TiB)
            status = Path(f"/proc/{server.process.pid}/status").read_text()
            resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10
            print(f"\nserving {TiB >> 40} TiB: {resident / MiB:.1f} MiB resident")
            self.assertLess(resident, 10 * MiB)
            client.shutdown()


if __name__ == "__main__":
    unittest.main()

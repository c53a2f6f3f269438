"""Everything nbdinfo lists, and nbd-client's list."""

import json
import unittest
from pathlib import Path

from support import KiB, MiB, Case, Server, need, pattern, run, wait_for


def setUpModule():
    need("nbdinfo", bindings=True)


class Nbdinfo(Case):
    SIZE = 16 * MiB

    def setUp(self):
        super().setUp()
        self.file = self.overlay("disk", self.SIZE, [(MiB, pattern(2 * MiB, "info"))])

    def serve(self, **options):
        self.server = self.enterContext(Server(self.file, **options))
        return self.server.uri

    def test_plain(self):
        out = run("nbdinfo", self.serve())
        for line in ["protocol: newstyle-fixed without TLS, using structured packets",
                     "export-size: 16777216 (16M)", "base:allocation", "is_read_only: false",
                     "can_multi_conn: true", "block_size_minimum: 1", "block_size_preferred: 4096",
                     "block_size_maximum: 33554432"]:
            self.assertIn(line, out)

    def test_json(self):
        facts = json.loads(run("nbdinfo", "--json", self.serve()))
        self.assertEqual(facts["protocol"], "newstyle-fixed")
        self.assertFalse(facts["TLS"])
        self.assertTrue(facts["structured"])
        (export,) = facts["exports"]
        abilities = ["can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua",
                     "can_multi_conn", "can_trim", "can_zero"]
        self.assertEqual({name: export[name] for name in abilities}, dict.fromkeys(abilities, True))
        self.assertEqual(export["export-size"], self.SIZE)
        self.assertEqual(export["contexts"], ["base:allocation"])
        self.assertFalse(export["is_read_only"])
        self.assertFalse(export["is_rotational"])
        self.assertEqual(export["block_size_minimum"], 1)

    def test_read_only(self):
        uri = self.serve(read_only=True)
        (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
        self.assertTrue(export["is_read_only"])
        self.assertFalse(export["can_trim"] or export["can_zero"] or export["can_fast_zero"])
        run("nbdinfo", "--is", "read-only", uri)
        run("nbdinfo", "--can", "write", uri, status=2)

    def test_size(self):
        uri = self.serve()
        self.assertEqual(run("nbdinfo", "--size", uri), f"{self.SIZE}\n")
        self.assertEqual(json.loads(run("nbdinfo", "--size", "--json", uri)), self.SIZE)

    def test_can_and_is(self):
        uri = self.serve()
        for ability in ["cache", "connect", "df", "fast-zero", "flush", "fua", "multi-conn",
                        "read", "trim", "write", "zero", "structured-reply"]:
            with self.subTest(can=ability):
                run("nbdinfo", "--can", ability, uri)
        for trait in ["read-only", "rotational", "tls"]:
            with self.subTest(isnt=trait):
                run("nbdinfo", "--is", trait, uri, status=2)

    def test_map(self):
        uri = self.serve()
        lines = [line.split() for line in run("nbdinfo", "--map", uri).splitlines()]
        self.assertEqual(lines, [
            ["0", str(MiB), "3", "hole,zero"],
            [str(MiB), str(2 * MiB), "0", "data"],
            [str(3 * MiB), str(13 * MiB), "3", "hole,zero"],
        ])
        rows = json.loads(run("nbdinfo", "--map", "--json", uri))
        self.assertEqual([(row["offset"], row["length"], row["type"]) for row in rows],
                         [(0, MiB, 3), (MiB, 2 * MiB, 0), (3 * MiB, 13 * MiB, 3)])
        rows = json.loads(run("nbdinfo", "--map", "--totals", "--json", uri))
        self.assertEqual({row["type"]: row["size"] for row in rows}, {0: 2 * MiB, 3: 14 * MiB})
        self.assertIn("12.5%", run("nbdinfo", "--map", "--totals", uri))
        # A context that isn't there is an error, not an empty map.
        run("nbdinfo", "--map=no:such", uri, status=1)

    def test_list(self):
        uri = self.serve()
        self.assertIn("export-size: 16777216", run("nbdinfo", "--list", uri))
        facts = json.loads(run("nbdinfo", "--list", "--json", uri))
        self.assertEqual([export["export-size"] for export in facts["exports"]], [self.SIZE])

    def test_content(self):
        self.assertIn("content:", run("nbdinfo", "--content", self.serve()))

    def test_an_export_that_is_not_there(self):
        uri = self.serve().replace("///?", "///nothing?")
        self.assertIn("///nothing?", uri)
        run("nbdinfo", uri, status=1)

    def test_tcp(self):
        self.assertEqual(run("nbdinfo", "--size", self.serve(tcp=True)), f"{self.SIZE}\n")


class NbdClient(Case):
    """nbd-client, whose option haggling is its own code."""

    def test_list(self):
        need("nbd-client")
        file = self.create("disk.tply", MiB)
        with Server(file, "--name", "disk", tcp=True) as server:
            port = server.uri.removeprefix("nbd://").split("/")[0].rsplit(":", 1)[1]
            out = run("nbd-client", "-l", "127.0.0.1", port)
            self.assertIn("disk", out)

    def test_kernel(self):
        need("nbd-client")
        if not Path("/dev/nbd0").exists():
            # Not a tool that could be installed: strict mode can't ask for it.
            self.skipTest("this kernel has no nbd device")
        device, data = Path("/dev/nbd0"), pattern(64 * KiB, "kernel")
        file = self.create("disk.tply", 16 * MiB)
        with Server(file, "--name", "disk") as server:
            run("nbd-client", "-unix", server.socket, "-N", "disk", device)
            try:
                wait_for(lambda: Path("/sys/block/nbd0/size").read_text() != "0\n", "the device")
                with open(device, "r+b", buffering=0) as disk:
                    disk.seek(MiB)
                    disk.write(data)
            finally:
                run("nbd-client", "-d", device)
            self.assert_bytes(server.connect().pread(64 * KiB, MiB), data)


if __name__ == "__main__":
    unittest.main()

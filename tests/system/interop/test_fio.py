"""fio's nbd engine with checksums, four jobs, each with a connection of its own."""

import json
import subprocess
import unittest

from support import MiB, Case, Server, missing, need, pattern, run


def setUpModule():
    need("fio", bindings=True)
    if subprocess.run(["fio", "--enghelp=nbd"], capture_output=True).returncode:
        missing("this fio has no nbd engine")


class Fio(Case):
    JOBS, EACH = 4, 24 * MiB

    def fio(self, server, *options):
        out = run(
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}",
            "--verify_state_save=0",
            f"--numjobs={self.JOBS}", f"--size={self.EACH}", f"--offset_increment={self.EACH}",
            "--verify=crc32c", "--verify_fatal=1", "--randrepeat=1", "--iodepth=16",
            "--thread", "--output-format=json", "--bs=4k", *options)
        jobs = json.loads(out[out.index("{"):])["jobs"]
        self.assertEqual(len(jobs), self.JOBS)
        self.assertEqual({job["error"] for job in jobs}, {0})
        return jobs

    def test_random_writes_and_verify(self):
        size = self.JOBS * self.EACH
        # Odd jobs copy up from the base.
        file = self.overlay("disk", size, [(self.EACH, pattern(self.EACH, "base"))])
        with Server(file) as server:
            for options in [["--rw=randwrite"], ["--rw=randwrite", "--bs=3584", "--fsync=64"],
                            ["--rw=write", "--bsrange=512-128k", "--bs_unaligned"]]:
                for job in self.fio(server, *options):
                    self.assertGreaterEqual(job["write"]["io_bytes"], self.EACH * 9 // 10)
                    self.assertGreaterEqual(job["read"]["io_bytes"], self.EACH * 9 // 10)
            self.fio(server, "--rw=randwrite")
        # Another server finds what the first one left.
        with Server(file, read_only=True) as server:
            self.fio(server, "--rw=randread")
        self.assert_clean(file)

    def test_mixed_for_some_seconds(self):
        file = self.create("mixed.tply", self.JOBS * self.EACH)
        with Server(file) as server:
            self.fio(server, "--rw=randrw", "--rwmixread=30", "--time_based", "--runtime=5",
                     "--verify_backlog=256", "--bs=4k")
        self.assert_clean(file)


if __name__ == "__main__":
    unittest.main()

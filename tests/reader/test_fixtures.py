"""The reader on files that earlier versions of thinply made (`tests/fixtures`)."""

import json
import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

from thinply_reader import Chain

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
STRICT = os.environ.get("THINPLY_STRICT") == "1"


@unittest.skipUnless(shutil.which("zstd") or STRICT, "no zstd command")
class Fixtures(unittest.TestCase):
    def test_all_layers(self):
        disks = json.loads((FIXTURES / "manifest.json").read_text())["disks"]
        for name in {disk["set"] for disk in disks}:
            with tempfile.TemporaryDirectory() as folder:
                archive = FIXTURES / f"{name}.tar.zst"
                subprocess.run(["tar", "--zstd", "-C", folder, "-xf", archive], check=True)
                for disk in disks:
                    if disk["set"] == name:
                        with self.subTest(set=name, file=disk["file"]):
                            with Chain(Path(folder) / disk["file"]) as chain:
                                self.assertEqual(chain.sha256(), disk["sha256"])


if __name__ == "__main__":
    unittest.main()

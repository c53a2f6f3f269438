"""Every verb on each kind of host file system, beside what docs/host-filesystems.md says of it.

Fails where a cell is worse than the committed one. THINPLY_HOSTFS=all takes the long form, with file
systems that are less usual. Needs root, FUSE and loop devices; whatever happens, nothing stays
mounted. `table.py` writes the document's tables anew.
"""

import os
import unittest

import filesystems
import table
from support import missing, need

LONG = os.environ.get("THINPLY_HOSTFS") == "all"


def setUpModule():
    need("losetup", "mount", "umount", bindings=True)
    if os.geteuid() != 0:
        missing("mounting needs root")
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            missing(f"this kernel has no {device}")


class HostFilesystems(unittest.TestCase):
    def test_no_cell_is_worse_than_the_document_says(self):
        said_can, said = table.read("abilities"), table.read("verbs")
        for name, mount in filesystems.wanted(LONG):
            with self.subTest(name):
                try:
                    can, does = table.measure(mount)
                except filesystems.Unavailable as reason:
                    missing(f"{name}: {reason}")
                for what, then in said_can[name].items():
                    # That depends on the kernel and on other people's versions.
                    if can[what] != then:
                        print(f"{name}: {what} is {can[what]!r} here, {then!r} in the document")
                worse = {column: (cell, said[name][column]) for column, cell in does.items()
                         if table.is_worse(cell, said[name][column])}
                self.assertFalse(worse, "here, and in the document")

    def test_the_document_has_every_file_system_and_column(self):
        names = [name for name, _, _ in filesystems.ALL]
        for section, columns in [("abilities", table.life.ABILITIES), ("verbs", table.life.COLUMNS)]:
            found = table.read(section)
            self.assertEqual(list(found), names)
            for cells in found.values():
                self.assertEqual(list(cells), list(columns))


if __name__ == "__main__":
    unittest.main()

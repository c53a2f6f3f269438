"""Images built by hand from format-spec.md, and what the reader makes of them.

Run with `python3 -m unittest` in this folder.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import random
import shutil
import struct
import subprocess
import tempfile
import unittest
import zlib

import thinply_reader as t
from thinply_reader import Chain, ReaderError

BLOCK = 4096
UUID = bytes(range(16))


def pattern(seed, size=BLOCK):
    return random.Random(seed).randbytes(size)


def slot(number, **changes):
    """A header slot; `changes` are made to the fields below under a right checksum."""
    fields = {
        "magic": b"TPLYLIVE",
        "version": 1,
        "header_size": 4096,
        "incompatible": 0,
        "compatible": 0,
        "read_only_compatible": 0,
        "uuid": UUID,
        "generation": 1 + number,
        "state": 1,
        "block_size_log2": 12,
        "epoch": 0,
        "journal_tail": 0,
        "virtual_size": 1 << 20,
        "visible_parent_size": 0,
        "journal_offset": 1 << 20,
        "journal_records": 256,
        "record_size": 4096,
        "groups_offset": 2 << 20,
        "group_stride": 128 << 20,
        "group_slot_size": 1 << 20,
        "group_blocks": 32512,
        "freeze_id": bytes(16),
        "parent_kind": 0,
        "hint_length": 0,
        "parent_identity": bytes(32),
        "hint": b"",
        "extensions_length": 0,
        "reserved": b"",
        "extensions": b"",
    }
    assert set(changes) <= set(fields), changes
    fields.update(changes)
    data = t.HEADER.pack(*fields.values(), 0)[:4092]
    return data + struct.pack("<I", zlib.crc32(struct.pack("<I", number) + data))


def record(epoch, sequence, entries, uuid=UUID, **over):
    """A journal record; `entries` are (block, crc)."""
    body = struct.pack("<QQII", epoch, sequence, over.get("count", len(entries)), 0)
    body += b"".join(struct.pack("<QI", *entry) for entry in entries)
    body = body.ljust(4088 - 8, b"\0") + over.get("padding", bytes(8))
    return b"TPJR" + struct.pack("<I", zlib.crc32(uuid + body)) + body


def page(uuid, group, indexes):
    """The bitmap page of a group in which the blocks `indexes` are owned."""
    bits = bytearray(8 * 508)
    for index in indexes:
        bits[index // 8] |= 1 << index % 8
    out = b""
    for sector in range(8):
        part = bytes(bits[sector * 508 : sector * 508 + 508])
        crc = zlib.crc32(uuid + struct.pack("<QI", group, sector) + part) if any(part) else 0
        out += part + struct.pack("<I", crc)
    return out


class Images(unittest.TestCase):
    """A folder, and layers built in it."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name):
        return os.path.join(self.folder, name)

    def put(self, name, offset, data):
        with open(self.path(name), "r+b") as file:
            file.seek(offset)
            file.write(data)

    def layer(self, name, size, blocks=(), bits=None, records=(), places=None, **header):
        """Makes a layer. `blocks`: block to content (None: a hole); `bits`: the owned ones, if not
        just those; `places`: ring places to raw bytes."""
        blocks = dict(blocks)
        header = {"virtual_size": size, **header}
        uuid = header.get("uuid", UUID).ljust(16, b"\0")
        with open(self.path(name), "wb") as file:
            file.truncate(t.file_length(size))
            for number, offset in enumerate((0, 64 << 10)):
                file.seek(offset)
                file.write(slot(number, **header))
            for block, content in blocks.items():
                if content is not None:
                    file.seek(t.block_offset(block))
                    file.write(content)
            groups = {}
            for block in blocks if bits is None else bits:
                groups.setdefault(block // 32512, []).append(block % 32512)
            for group, indexes in groups.items():
                file.seek((2 << 20) + group * (128 << 20))
                file.write(page(uuid, group, indexes))
            for sequence, data in [(struct.unpack_from("<Q", r, 16)[0], r) for r in records]:
                file.seek((1 << 20) + sequence % 256 * 4096)
                file.write(data)
            for place, data in (places or {}).items():
                file.seek((1 << 20) + place * 4096)
                file.write(data)
        return self.path(name)

    def frozen(self, name, size, blocks=(), number=1, **header):
        """A frozen layer, and the fields that make a header its child."""
        uuid, freeze = bytes([number] * 16), bytes([number + 100] * 16)
        header = {"uuid": uuid, "state": 3, "freeze_id": freeze, **header}
        self.layer(name, size, blocks, **header)
        return self.link(name, number)

    def link(self, name, number):
        """The header fields of a child of the layer `number`."""
        return {
            "parent_kind": 1,
            "parent_identity": bytes([number] * 16) + bytes([number + 100] * 16),
            "hint": name.encode(),
            "hint_length": len(name.encode()),
        }

    def content(self, path, folders=()):
        with Chain(path, folders) as chain:
            data = chain.read(0, chain.size)
            self.assertEqual(chain.sha256(), hashlib.sha256(data).hexdigest())
            out = self.path("out.raw")
            chain.copy_to(out)
        with open(out, "rb") as file:
            self.assertEqual(file.read(), data)
        return data

    def refused(self, kind, path, folders=()):
        with self.assertRaises(ReaderError) as caught:
            self.content(path, folders)
        self.assertEqual(caught.exception.kind, kind, str(caught.exception))
        return str(caught.exception)


def image(size, blocks):
    """What a layer without a parent reads as."""
    out = bytearray(t.block_count(size) * BLOCK)
    for block, content in blocks.items():
        out[block * BLOCK : (block + 1) * BLOCK] = content or bytes(BLOCK)
    return bytes(out[:size])


class Vectors(unittest.TestCase):
    def test_the_spec_s_vectors(self):
        self.assertEqual(slot(0)[4092:], struct.pack("<I", 0x3939241A))
        self.assertEqual(slot(1)[4092:], struct.pack("<I", 0x7F94D54F))
        entry = (5, zlib.crc32(bytes(BLOCK)))
        self.assertEqual(entry[1], 0xC71C0011)
        self.assertEqual(record(1, 0, [entry])[4:8], struct.pack("<I", 0xF878A8C4))
        self.assertEqual(page(UUID, 3, [5])[508:512], struct.pack("<I", 0xC0CC8A7E))
        self.assertEqual(t.slot_checksum(1, slot(1)), 0x7F94D54F)
        self.assertEqual(t.record_checksum(UUID, record(1, 0, [entry])), 0xF878A8C4)
        self.assertEqual(t.parse_page(UUID, 3, page(UUID, 3, [5])), 1 << 5)

    def test_the_spec_s_worked_examples(self):
        self.assertEqual(
            [t.block_offset(b) for b in (0, 32511, 32512, 262143)],
            [3145728, 136310784, 137363456, 1085272064],
        )
        self.assertEqual([t.bitmap_offset(g) for g in (0, 1)], [2097152, 136314880])
        self.assertEqual([t.record_offset(s) for s in (0, 257)], [1048576, 1052672])
        self.assertEqual(
            [t.file_length(v) for v in (512, 133169152, 133169664, 1073741824)],
            [3149824, 136314880, 137367552, 1085276160],
        )


class Single(Images):
    def test_blocks_holes_and_a_tail(self):
        size = 40 * BLOCK + 512
        blocks = {0: pattern(0), 1: pattern(1), 7: None, 9: bytes(BLOCK), 40: pattern(40)}
        path = self.layer("a", size, blocks)
        self.assertEqual(self.content(path), image(size, blocks))

    def test_groups_and_every_place_of_a_word(self):
        size = (2 * 32512 + 100) * BLOCK
        blocks = {b: pattern(b) for b in (63, 64, 4063, 4064, 32511, 32512, 2 * 32512, 65123)}
        path = self.layer("a", size, blocks)
        with Chain(path) as chain:
            for block, content in blocks.items():
                self.assertEqual(chain.read(block * BLOCK, BLOCK), content)
            self.assertEqual(
                chain.read(32511 * BLOCK + 7, 2 * BLOCK),
                (blocks[32511] + blocks[32512] + bytes(7))[7:],
            )
            found = sorted(
                at // BLOCK + n for at, part in chain.data() for n in range(len(part) // BLOCK)
            )
            self.assertEqual(found, sorted(blocks))

    def test_what_is_not_owned_is_not_seen(self):
        path = self.layer("a", 1 << 20, {3: pattern(3), 4: pattern(4)}, bits=[4])
        self.assertEqual(self.content(path), image(1 << 20, {4: pattern(4)}))

    def test_bits_and_bytes_beyond_the_size_mean_nothing(self):
        size = 2 * BLOCK
        path = self.layer("a", size, {1: pattern(1)}, bits=[1, 2, 900])
        self.put("a", t.block_offset(2), pattern(2))
        self.assertEqual(self.content(path), image(size, {1: pattern(1)}))

    def test_a_longer_file_is_legal_and_a_shorter_one_is_not(self):
        path = self.layer("a", 1 << 20, {3: pattern(3)})
        os.truncate(path, t.file_length(1 << 30))
        self.assertEqual(self.content(path), image(1 << 20, {3: pattern(3)}))
        os.truncate(path, t.file_length(1 << 20) - 1)
        self.refused("corrupt", path)
        for length in (70000, 65536, 5000, 4096):
            os.truncate(path, length)
            self.refused("corrupt", path)
        for length in (4095, 8):
            os.truncate(path, length)
            self.refused("corrupt", path)
        for length in (7, 0):
            os.truncate(path, length)
            self.refused("not an image", path)

    def test_memory_and_time_follow_the_file_and_not_its_claims(self):
        size = 1 << 43
        path = self.layer("a", size, {0: pattern(0), size // BLOCK - 1: pattern(1)})
        with Chain(path) as chain:
            extents = [(at, length) for at, _layer, length in chain.extents()]
            self.assertEqual(extents, [(0, BLOCK), (size - BLOCK, BLOCK)])

    def test_a_bitmap_sector_with_a_wrong_checksum_or_place(self):
        good = page(UUID, 0, [3, 5000])
        path = self.layer("a", 1 << 20)
        for bad in (
            page(bytes(16), 0, [3]),
            page(UUID, 1, [3]),
            good[512:1024] + good[512:],
            b"\1",
        ):
            self.put("a", 2 << 20, bad.ljust(4096, b"\0"))
            self.refused("corrupt", path)
        empty = zlib.crc32(UUID + struct.pack("<QI", 0, 2) + bytes(508))
        self.put("a", 2 << 20, good)
        self.put("a", (2 << 20) + 3 * 512 - 4, struct.pack("<I", empty))
        self.content(path)


class Headers(Images):
    def test_the_newer_valid_slot_counts(self):
        path = self.layer("a", 1 << 20, {3: pattern(3)})
        self.put("a", 0, slot(0, generation=7, virtual_size=16384))
        self.assertEqual(len(self.content(path)), 16384)
        for at in (0, 60, 513, 4095):
            self.put("a", 0, slot(0, generation=7, virtual_size=16384))
            self.put("a", at, bytes([slot(0, generation=7, virtual_size=16384)[at] ^ 4]))
            self.assertEqual(len(self.content(path)), 1 << 20)
        self.put("a", 64 << 10, slot(0, generation=9))
        self.assertIn("neither", self.refused("corrupt", path))

    def test_contradicting_slots(self):
        path = self.layer("a", 1 << 20)
        self.put("a", 0, slot(0, generation=2))
        self.refused("corrupt", path)
        self.put("a", 0, slot(0, uuid=bytes(16)))
        self.refused("corrupt", path)

    def test_what_is_refused_under_a_right_checksum(self):
        extension = struct.pack("<IIII", 7, 1, 0, 0)
        parent = {"parent_kind": 1, "parent_identity": b"x", "hint": b"base", "hint_length": 4}
        refusals = [
            ("unsupported", {"version": 2}),
            ("unsupported", {"header_size": 512}),
            ("unsupported", {"incompatible": 1}),
            ("unsupported", {"incompatible": 1 << 40}),
            ("unsupported", {"block_size_log2": 16}),
            ("unsupported", {"journal_records": 0}),
            ("unsupported", {"group_stride": (1 << 64) - 1}),
            ("unsupported", {"parent_kind": 3}),
            ("unsupported", {"extensions_length": 16, "extensions": extension}),
            ("corrupt", {"extensions_length": 8, "extensions": extension}),
            ("corrupt", {"extensions_length": 24, "extensions": struct.pack("<IIII", 7, 0, 9, 0)}),
            ("corrupt", {"extensions_length": 1 << 31}),
            ("corrupt", {"extensions": b"\1"}),
            ("corrupt", {"reserved": b"\1"}),
            ("corrupt", {"state": 0}),
            ("corrupt", {"state": 4}),
            ("corrupt", {"freeze_id": b"\1"}),
            ("corrupt", {"virtual_size": 0}),
            ("corrupt", {"virtual_size": 513}),
            ("corrupt", {"virtual_size": (1 << 56) + 512}),
            ("corrupt", {"visible_parent_size": 1}),
            ("corrupt", {"epoch": 1 << 63}),
            ("corrupt", {"generation": 1 << 63}),
            ("corrupt", {"journal_tail": 1 << 63}),
            ("corrupt", {"hint": b"a", "hint_length": 1}),
            ("corrupt", {"parent_identity": b"x"}),
            ("corrupt", {**parent, "hint_length": 3}),
            ("corrupt", {**parent, "hint_length": 1 << 31}),
            ("corrupt", {**parent, "visible_parent_size": (1 << 20) + 1}),
        ]
        names = ["", ".", "..", "a/b", "a\\b", "nbd:x", "a\0b", "a\nb", "\x7f", "\u0085", "x" * 256]
        for hint in [name.encode() for name in names] + [b"\xff"]:
            refusals.append(("corrupt", {**parent, "hint": hint, "hint_length": len(hint)}))
        for kind, changes in refusals:
            with self.subTest(changes=changes):
                path = (
                    self.layer("a", 1 << 20, **changes) if "virtual_size" not in changes else None
                )
                if path is None:
                    path = self.layer("a", 1 << 20)
                    self.put("a", 0, slot(0, **changes))
                self.refused(kind, path)

    def test_what_may_be_ignored(self):
        extension = struct.pack("<IIII", 7, 6, 3, 9) + b"abcdefgh"
        path = self.layer(
            "a",
            1 << 20,
            compatible=1 << 63,
            read_only_compatible=1,
            extensions=extension,
            extensions_length=24,
        )
        self.content(path)

    def test_neither_slot_has_the_magic(self):
        path = self.path("a")
        with open(path, "wb") as file:
            file.write(bytes(1 << 20))
        self.refused("not an image", path)


class Journals(Images):
    SIZE = 64 * BLOCK

    def unclean(self, records, blocks=(), bits=(), **header):
        header = {"state": 2, "epoch": 5, "journal_tail": 300, **header}
        return self.layer("a", self.SIZE, blocks, bits=bits, records=records, **header)

    def entry(self, block, seed=None):
        return (block, zlib.crc32(pattern(block if seed is None else seed)))

    def test_a_good_last_record(self):
        blocks = {1: pattern(1), 2: pattern(2), 3: None}
        entries = [self.entry(1), self.entry(2), (3, zlib.crc32(bytes(BLOCK)))]
        path = self.unclean([record(5, 300, entries)], blocks)
        self.assertEqual(self.content(path), image(self.SIZE, blocks))

    def test_of_the_last_record_only_what_arrived_counts(self):
        blocks = {b: pattern(b) for b in (1, 2, 3, 4)}
        blocks[4] = pattern(4)[:512] + bytes(BLOCK - 512)
        records = [
            record(5, 300, [(1, 12345)]),
            record(5, 301, [self.entry(2), self.entry(3, seed=77), self.entry(4)]),
        ]
        path = self.unclean(records, blocks)
        self.assertEqual(self.content(path), image(self.SIZE, {1: pattern(1), 2: pattern(2)}))

    def test_a_torn_record_is_absent(self):
        blocks = {b: pattern(b) for b in (1, 2)}
        whole = record(5, 301, [self.entry(2)] + [(b, b) for b in range(3, 64)])
        places = [whole[:512].ljust(4096, b"\0"), bytes(512) + whole[512:], b"\1" * 4096]
        for torn in places:
            path = self.unclean([record(5, 300, [self.entry(1)])], blocks)
            self.put("a", t.record_offset(301), torn)
            self.assertEqual(self.content(path), image(self.SIZE, {1: pattern(1)}))

    def test_an_empty_record_confirms_its_predecessor(self):
        path = self.unclean([record(5, 300, [(1, 9)]), record(5, 301, [])], {1: pattern(1)})
        self.assertEqual(self.content(path), image(self.SIZE, {1: pattern(1)}))

    def test_a_mismatch_takes_no_bit_away(self):
        path = self.unclean([record(5, 300, [(1, 9)])], {1: pattern(1)}, bits=[1])
        self.assertEqual(self.content(path), image(self.SIZE, {1: pattern(1)}))

    def test_what_is_older_means_nothing(self):
        blocks = {b: pattern(b) for b in (1, 2)}
        records = [
            record(5, 299, [self.entry(1), (5000, 1)]),
            record(4, 301, [self.entry(1)]),
            record(5, 300, [self.entry(2)]),
        ]
        path = self.unclean(records, blocks)
        self.assertEqual(self.content(path), image(self.SIZE, {2: pattern(2)}))
        for state in (1, 3):
            path = self.unclean(
                [record(5, 299, [self.entry(1)]), record(4, 300, [])], blocks, state=state
            )
            self.assertEqual(self.content(path), bytes(self.SIZE))

    def test_another_layer_s_record_and_one_in_the_wrong_place(self):
        theirs = record(5, 300, [self.entry(1)], uuid=bytes(16))
        path = self.unclean([theirs], {1: pattern(1)})
        self.assertEqual(self.content(path), bytes(self.SIZE))
        self.layer(
            "a",
            self.SIZE,
            {1: pattern(1)},
            bits=[],
            state=2,
            epoch=5,
            journal_tail=300,
            places={45: record(5, 300, [self.entry(1)])},
        )
        self.assertEqual(self.content(path), bytes(self.SIZE))

    def test_losses(self):
        for sequences in ([(5, 301)], [(5, 300), (5, 302)], [(6, 10)], [(5, 300), (6, 301)]):
            path = self.unclean([record(epoch, s, []) for epoch, s in sequences])
            self.refused("loss", path)
        for state in (1, 3):
            path = self.unclean([record(5, 300, [])], state=state)
            self.refused("loss", path)

    def test_impossible_records_under_a_right_checksum(self):
        for bad in (
            record(5, 300, [(2, 0), (1, 0)]),
            record(5, 300, [(1, 0), (1, 0)]),
            record(5, 300, [(64, 0)]),
            record(5, 300, [(1 << 63, 0)]),
            record(5, 300, [], count=339),
            record(5, 300, [(1, 0)], count=0),
            record(5, 300, [], padding=b"\1".ljust(8, b"\0")),
            record(3, 300, [], count=1 << 31),
        ):
            path = self.unclean([bad])
            os.truncate(path, t.file_length(1 << 30))
            self.refused("corrupt", path)

    def test_a_full_ring(self):
        blocks = {b: pattern(b) for b in range(64)}
        records = [record(5, 300 + n, [self.entry(n)] if n < 64 else []) for n in range(256)]
        path = self.unclean(records, blocks)
        self.assertEqual(self.content(path), image(self.SIZE, blocks))

    def test_a_parent_that_was_not_closed_is_refused(self):
        link = self.frozen("base", self.SIZE, state=2, freeze_id=b"")
        path = self.layer("top", self.SIZE, uuid=b"t", **link)
        self.refused("parent mismatch", path)

    def test_a_frozen_parent_with_a_record_is_refused(self):
        link = self.frozen("base", self.SIZE, records=[record(0, 0, [], uuid=b"\1" * 16)])
        path = self.layer("top", self.SIZE, uuid=b"t", **link)
        self.refused("loss", path)


class Chains(Images):
    def test_the_newest_owner_answers(self):
        size = 16 * BLOCK
        base = {b: pattern(b) for b in range(12)}
        top = {2: pattern(102), 3: None, 12: pattern(112)}
        link = self.frozen("base", size, base)
        path = self.layer("top", size, top, uuid=b"t", visible_parent_size=size, **link)
        self.assertEqual(self.content(path), image(size, {**base, **top}))

    def test_bytes_beyond_the_visible_size_are_zero(self):
        size = 16 * BLOCK
        base = {b: pattern(b) for b in range(16)}
        link = self.frozen("base", size, base)
        for visible in (0, 512, 5 * BLOCK, 5 * BLOCK + 1536, size):
            path = self.layer(
                "top", size, {9: pattern(9)}, uuid=b"t", visible_parent_size=visible, **link
            )
            expected = bytearray(image(size, base)[:visible].ljust(size, b"\0"))
            expected[9 * BLOCK : 10 * BLOCK] = pattern(9)
            self.assertEqual(self.content(path), bytes(expected))

    def test_a_parent_s_tail_block_shows_up_to_its_size(self):
        parent_size = 2 * BLOCK + 512
        base = {b: pattern(b) for b in range(3)}
        link = self.frozen("base", parent_size, base)
        fields = {"uuid": b"t", "visible_parent_size": parent_size, **link}
        path = self.layer("top", 8 * BLOCK, **fields)
        self.assertEqual(self.content(path), image(parent_size, base).ljust(8 * BLOCK, b"\0"))
        fields["visible_parent_size"] += 512
        self.refused("corrupt", self.layer("top", 8 * BLOCK, **fields))

    def test_every_level_clips(self):
        size, rng = 24 * BLOCK, random.Random(7)
        for case in range(30):
            link, below = {}, b""
            for level in range(4):
                own = size if level == 3 else 512 * rng.randrange(1, size // 512)
                visible = 512 * rng.randrange(0, min(own, len(below)) // 512 + 1) if link else 0
                blocks = {
                    b: rng.choice([None, pattern((case, level, b).__repr__())])
                    for b in range(t.block_count(own))
                    if rng.random() < 0.3
                }
                content = bytearray(below[:visible].ljust(t.block_count(own) * BLOCK, b"\0"))
                for block, data in blocks.items():
                    content[block * BLOCK : (block + 1) * BLOCK] = data or bytes(BLOCK)
                below = bytes(content[:own])
                fields = {"visible_parent_size": visible, **link}
                link = self.frozen(f"{level}.tply", own, blocks, level + 1, **fields)
            self.assertEqual(self.content(self.path("3.tply")), below, f"case {case}")

    def test_identity_decides_and_folders_are_asked_in_order(self):
        size = 4 * BLOCK
        link = self.frozen("base", size, {1: pattern(1)})
        os.mkdir(self.path("elsewhere"))
        path = self.layer("top", size, uuid=b"t", visible_parent_size=size, **link)
        os.rename(self.path("base"), self.path("elsewhere/base"))
        self.refused("not found", path)
        self.assertEqual(
            self.content(path, [self.path("none"), self.path("elsewhere")]),
            image(size, {1: pattern(1)}),
        )
        for impostor in (
            {"number": 2},
            {"freeze_id": b"other"},
            {"uuid": b"other"},
            {"state": 1, "freeze_id": b""},
        ):
            self.frozen("base", size, {1: pattern(9)}, **impostor)
            self.refused("parent mismatch", path)
            self.assertEqual(
                self.content(path, [self.path("elsewhere")]), image(size, {1: pattern(1)})
            )

    def test_links_pipes_and_folders_are_no_parents(self):
        size = 4 * BLOCK
        link = self.frozen("base", size)
        path = self.layer("top", size, uuid=b"t", **link)
        os.rename(self.path("base"), self.path("real"))
        for make in (
            lambda at: os.symlink("real", at),
            lambda at: os.mkfifo(at),
            lambda at: os.mkdir(at),
        ):
            make(self.path("base"))
            self.refused("parent mismatch", path)
            os.rename(self.path("base"), self.path(f"was{make.__code__.co_firstlineno}"))

    def test_cycles_depth_and_packed_parents(self):
        size = BLOCK
        self.frozen("a", size, number=1, **self.link("b", 2))
        self.frozen("b", size, number=2, **self.link("a", 1))
        self.assertIn("twice", self.refused("corrupt", self.path("a")))
        self.frozen("own", size, number=3, **self.link("own", 3))
        self.assertIn("twice", self.refused("corrupt", self.path("own")))
        packed = {"parent_kind": 2, "parent_identity": b"r", "hint": b"base", "hint_length": 4}
        self.refused("not found", self.layer("top", size, **packed))

    def test_a_chain_may_have_1024_layers(self):
        size, link = BLOCK, {}
        for level in range(1025):
            name = f"{level}"
            identity = {
                "uuid": struct.pack("<QQ", level, 1),
                "freeze_id": struct.pack("<QQ", level, 2),
            }
            self.layer(name, size, state=3, **identity, **link)
            link = {
                "parent_kind": 1,
                "parent_identity": identity["uuid"] + identity["freeze_id"],
                "hint": name.encode(),
                "hint_length": len(name),
            }
        soft, hard = t.resource.getrlimit(t.resource.RLIMIT_NOFILE)
        t.resource.setrlimit(t.resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        self.addCleanup(t.resource.setrlimit, t.resource.RLIMIT_NOFILE, (soft, hard))
        self.assertEqual(self.content(self.path("1023")), bytes(size))
        self.refused("limit", self.path("1024"))


def zstd_frame(data):
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout


class Packed(Images):
    """Packed layers built by hand, with frames of two blocks; hashes are left zero."""

    def packed(self, name, size, blocks, compress=False, root=b"r" * 32, **link):
        fields = {
            "magic": b"TPLYPACK",
            "version": 1,
            "header_size": 4096,
            "incompatible": 0,
            "compatible": 0,
            "virtual_size": size,
            "visible_parent_size": 0,
            "block_size_log2": 12,
            "frame_blocks": 2,
            "parent_kind": 0,
            "hint_length": 0,
            "parent_identity": b"",
            "hint": b"",
            "extensions_length": 0,
            "reserved": b"",
            "extensions": b"",
        }
        assert set(link) <= set(fields), link
        fields.update(link)
        header = t.PACKED_HEADER.pack(*fields.values(), 0)[:4092]
        header += struct.pack("<I", zlib.crc32(header))
        out, directory, counts = bytearray(header), b"", [0, 0]
        for group in sorted({block // 32512 for block in blocks}):
            own = {b % 32512: c for b, c in sorted(blocks.items()) if b // 32512 == group}
            directory += self.group(out, group, own, compress, counts)
        start = len(out)
        footer = struct.pack(
            "<8sQQQQ32sII44x",
            b"TPLYFOOT",
            start,
            len(directory) // 56,
            *counts,
            root,
            zlib.crc32(directory),
            zlib.crc32(header),
        )
        out += directory + footer + struct.pack("<I", zlib.crc32(footer))
        with open(self.path(name), "wb") as file:
            file.write(out)
        return self.path(name)

    def group(self, out, group, own, compress, counts):
        """Appends a group to `out`; answers its directory entry."""
        if not compress:
            out += bytes(-len(out) % 4096)
        frames_offset = len(out)
        data = [content for content in own.values() if content]
        frames = [data[at : at + 2] for at in range(0, len(data), 2)]
        entries = []
        for frame in frames:
            raw = b"".join(frame)
            stored = min(raw, zstd_frame(raw), key=len) if compress else raw
            out += stored
            entries.append(struct.pack("<32xII", len(out) - frames_offset, zlib.crc32(stored)))
        chunks_offset = len(out)
        for number, at in enumerate(range(0, len(frames), 64)):
            chunk = b"".join(entries[at : at + 64])
            for block in sum(frames[at : at + 64], []):
                chunk += struct.pack("<I", zlib.crc32(block))
            salt = struct.pack("<QI", group, number)
            out += chunk + struct.pack("<I", zlib.crc32(salt + chunk))
        words = {}
        for index, content in own.items():
            present, stored = words.get(index // 64, (0, 0))
            bit = 1 << index % 64
            words[index // 64] = (present | bit, stored | (bit if content else 0))
        occupied = sum(1 << word for word in words).to_bytes(64, "little")
        where = (group, frames_offset, chunks_offset, len(words), len(data))
        text = struct.pack("<QQQII", *where) + occupied
        text += b"".join(struct.pack("<QQ", *word) for word in words.values())
        text += bytes(32 * -(-len(frames) // 64))
        text += struct.pack("<I", zlib.crc32(text))
        entry = struct.pack("<QQII32x", group, len(out), len(text), len(data))
        out += text
        counts[0] += len(data)
        counts[1] += len(own) - len(data)
        return entry

    BLOCKS = {0: pattern(1), 1: None, 2: pattern(2), 63: b"x" * BLOCK, 64: b"y" * BLOCK, 65: None}

    def test_raw_and_compressed_frames_and_zero_blocks(self):
        size = 70 * BLOCK
        path = self.packed("a", size, self.BLOCKS)
        self.assertEqual(self.content(path), image(size, self.BLOCKS))
        if not shutil.which("zstd"):
            self.skipTest("no zstd command")
        path = self.packed("a", size, self.BLOCKS, compress=True)
        self.assertLess(os.stat(path).st_size, 4 * BLOCK + 4096)
        self.assertEqual(self.content(path), image(size, self.BLOCKS))

    def test_several_chunks_and_groups(self):
        size = (32512 + 10) * BLOCK
        blocks = {b: pattern(b) for b in range(0, 400, 2)} | {32512 + 9: pattern(7)}
        path = self.packed("a", size, blocks)
        self.assertEqual(self.content(path), image(size, blocks))

    def test_layouts_mix_in_a_chain(self):
        size = 70 * BLOCK
        link = self.frozen("base", size, {1: pattern(11), 5: pattern(12), 63: pattern(13)})
        self.packed("middle", size, self.BLOCKS, visible_parent_size=size, **link)
        above = {
            "parent_kind": 2,
            "parent_identity": b"r" * 32,
            "hint": b"middle",
            "hint_length": 6,
            "visible_parent_size": 64 * BLOCK,
        }
        path = self.layer("top", size, {2: pattern(14)}, uuid=b"t", **above)
        expected = {5: pattern(12)} | self.BLOCKS | {2: pattern(14), 64: None, 65: None}
        self.assertEqual(self.content(path), image(size, expected))
        self.packed("middle", size, self.BLOCKS, root=b"s" * 32)
        self.refused("parent mismatch", path)

    def test_a_flipped_bit_of_any_byte_of_the_index_is_refused(self):
        size = 8 * BLOCK
        path = self.packed("a", size, {1: pattern(1), 3: None})
        with open(path, "rb") as file:
            good = file.read()
        for at in [*range(0, 520), *range(4000, 4200), *range(8000, len(good))]:
            bad = bytearray(good)
            bad[at] ^= 1 << at % 8
            with open(path, "wb") as file:
                file.write(bad)
            with self.assertRaises(ReaderError, msg=f"byte {at}") as caught:
                with Chain(path) as chain:
                    chain.sha256()
            expected = "not an image" if at < 8 else "unsupported"
            self.assertIn(caught.exception.kind, ("corrupt", expected), f"byte {at}")

    def test_a_file_cut_anywhere_is_refused(self):
        path = self.packed("a", 8 * BLOCK, {1: pattern(1), 3: None})
        with open(path, "r+b") as file:
            for length in [*range(os.stat(path).st_size - 1, 8000, -1), 4096, 4095, 8, 7, 0]:
                file.truncate(length)
                self.refused("corrupt" if length >= 8 else "not an image", path)


class CommandLine(Images):
    def run_it(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = t.main(list(arguments))
        return code, out.getvalue(), err.getvalue()

    def test_it_prints_the_hash_or_writes_a_sparse_file(self):
        size = 64 << 20
        path = self.layer("a", size, {16000: pattern(1), 16001: bytes(BLOCK)})
        code, out, err = self.run_it(path)
        expected = image(size, {16000: pattern(1)})
        self.assertEqual((code, out, err), (0, hashlib.sha256(expected).hexdigest() + "\n", ""))
        self.assertEqual(self.run_it(path, "-o", self.path("raw")), (0, "", ""))
        with open(self.path("raw"), "rb") as file:
            self.assertEqual(file.read(), expected)
        self.assertLess(os.stat(self.path("raw")).st_blocks * 512, 1 << 20)

    def test_folders_of_layers(self):
        size = 4 * BLOCK
        link = self.frozen("base", size, {1: pattern(1)})
        os.mkdir(self.path("d"))
        os.rename(self.path("base"), self.path("d/base"))
        path = self.layer("top", size, uuid=b"t", visible_parent_size=size, **link)
        code, out, err = self.run_it(path)
        self.assertEqual((code, out), (2, ""))
        self.assertIn("not found", err)
        self.assertEqual(
            self.run_it(path, "--layers", "/nowhere", "--layers", self.path("d"))[0], 0
        )

    def test_a_refusal_leaves_nothing_and_changes_nothing(self):
        path = self.layer("a", 1 << 20, {3: pattern(3)})
        self.put("a", 2 << 20, b"\1")
        before = sorted(os.listdir(self.folder))
        code, out, err = self.run_it(path, "-o", self.path("raw"))
        self.assertEqual((code, out), (2, ""))
        self.assertIn(f"{path}: corrupt: bitmap sector 0 of group 0", err)
        self.assertEqual(sorted(os.listdir(self.folder)), before)
        self.assertEqual(self.run_it(self.path("missing"))[0], 2)

    def test_the_output_never_replaces_a_layer(self):
        size = 4 * BLOCK
        link = self.frozen("base", size)
        path = self.layer("top", size, uuid=b"t", **link)
        for name in ("top", "base"):
            self.assertEqual(self.run_it(path, "-o", self.path(name))[0], 2)

    def test_a_layer_that_is_being_written_is_in_use(self):
        path = self.layer("a", 1 << 20)
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        with open(path, "r+b") as writer:
            fcntl.fcntl(writer, fcntl.F_OFD_SETLK, lock)
            code, _out, err = self.run_it(path)
        self.assertEqual(code, 2)
        self.assertIn("in use", err)
        self.assertEqual(self.run_it(path)[0], 0)


if __name__ == "__main__":
    unittest.main()

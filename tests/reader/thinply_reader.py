#!/usr/bin/env python3
"""A second reader of thinply images, written from format-spec.md and nothing else.

    thinply_reader.py FILE [--layers DIR]... [-o OUT]

Prints the SHA-256 of the image that FILE is the top of, or writes it sparsely to OUT.
Exits with 2 and a message on stderr where the spec refuses. Changes no layer.
Needs Python 3.9 on Linux and nothing beyond its standard library, but for the zstd command where a
packed layer has compressed frames. Of packed layers it checks every CRC-32 and every place; the
BLAKE3 hashes, which the standard library lacks, it takes as they stand.
"""

import argparse
import errno
import fcntl
import functools
import hashlib
import os
import re
import resource
import stat
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from typing import NamedTuple

# "Units and terms"
SECTOR_SIZE = 512
BLOCK_SIZE = 4096
SLOT_OFFSETS = (0, 65536)
JOURNAL_OFFSET = 1048576
JOURNAL_RECORDS = 256
RECORD_CAPACITY = 338
GROUPS_OFFSET = 2097152
GROUP_STRIDE = 134217728
GROUP_SLOT_SIZE = 1048576
GROUP_BLOCKS = 32512
MAX_VIRTUAL_SIZE = 1 << 56
MAX_HINT = 255
HEADER_SIZE = 4096
MAX_LAYERS = 1024
HEADER_MAGIC = b"TPLYLIVE"
RECORD_MAGIC = b"TPJR"
WRITABLE, IN_USE, FROZEN = 1, 2, 3

HEADER = struct.Struct("<8sIIQQQ16sQIIQQQQQIIQQII16sII32s256sI52s3580sI")
PACKED_MAGIC, FOOTER_MAGIC = b"TPLYPACK", b"TPLYFOOT"
PACKED_HEADER = struct.Struct("<8sIIQQQQIIII32s256sI156s3580sI")
FOOTER = struct.Struct("<8sQQQQ32sII44sI")
DIRECTORY_ENTRY = struct.Struct("<QQII32s")
GROUP_MAP = struct.Struct("<QQQII64s")
MAP_WORD = struct.Struct("<QQ")
FRAME_ENTRY = struct.Struct("<32sII")
CHUNK_FRAMES = 64
EXTENSION = struct.Struct("<IIII")
RECORD = struct.Struct("<4sIQQII")
ENTRY = struct.Struct("<QI")
assert HEADER.size == PACKED_HEADER.size == 4096 and FOOTER.size == 128
assert RECORD.size + RECORD_CAPACITY * ENTRY.size + 8 == 4096

CHUNK = 1 << 20
PIECE = 64 << 10
ZEROS = bytes(CHUNK)


class ReaderError(Exception):
    """A refusal; `kind` is a name from the spec's section "Errors"."""

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Header(NamedTuple):
    """The fields of a header slot, in the order of the spec's table."""

    magic: bytes
    version: int
    header_size: int
    incompatible: int
    compatible: int
    read_only_compatible: int
    uuid: bytes
    generation: int
    state: int
    block_size_log2: int
    epoch: int
    journal_tail: int
    virtual_size: int
    visible_parent_size: int
    journal_offset: int
    journal_records: int
    record_size: int
    groups_offset: int
    group_stride: int
    group_slot_size: int
    group_blocks: int
    freeze_id: bytes
    parent_kind: int
    hint_length: int
    parent_identity: bytes
    hint: bytes
    extensions_length: int
    reserved: bytes
    extensions: bytes
    crc: int

    def identity(self):
        """What children link to: only a frozen layer has one."""
        return self.uuid + self.freeze_id if self.state == FROZEN else None

    def hint_name(self):
        return self.hint[: self.hint_length].decode()


class Record(NamedTuple):
    epoch: int
    sequence: int
    entries: list  # of (block, crc)


# "Live layout"


def block_count(size):
    return -(-size // BLOCK_SIZE)


def group_count(size):
    return -(-block_count(size) // GROUP_BLOCKS)


def bitmap_offset(group):
    return GROUPS_OFFSET + group * GROUP_STRIDE


def block_offset(block):
    group, index = divmod(block, GROUP_BLOCKS)
    return bitmap_offset(group) + GROUP_SLOT_SIZE + index * BLOCK_SIZE


def file_offset(guest):
    return block_offset(guest // BLOCK_SIZE) + guest % BLOCK_SIZE


def record_offset(sequence):
    return JOURNAL_OFFSET + sequence % JOURNAL_RECORDS * BLOCK_SIZE


def file_length(size):
    return block_offset(block_count(size) - 1) + BLOCK_SIZE


# "Checksums"


def slot_checksum(slot, data):
    return zlib.crc32(struct.pack("<I", slot) + data[:4092])


def record_checksum(uuid, data):
    return zlib.crc32(uuid + data[8:4096])


def sector_checksum(uuid, group, sector, bits):
    return zlib.crc32(uuid + struct.pack("<QI", group, sector) + bits)


# "Header"


def is_plain_name(raw):
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        return False
    return (
        1 <= len(raw) <= MAX_HINT
        and name not in (".", "..")
        and not any(c in "/\\:" or unicodedata.category(c) == "Cc" for c in name)
    )


def check_extensions(header):
    used = header.extensions[: header.extensions_length]
    if header.extensions_length > len(header.extensions) or any(
        header.extensions[header.extensions_length :]
    ):
        raise ReaderError("corrupt", "bytes behind the extensions")
    at = 0
    while at < len(used):
        if at + EXTENSION.size > len(used):
            raise ReaderError("corrupt", "an extension is cut short")
        kind, flags, length, _reserved = EXTENSION.unpack_from(used, at)
        if flags & 1:
            raise ReaderError("unsupported", f"header extension {kind:#x} must be understood")
        at += EXTENSION.size + -(-length // 8) * 8
    if at > len(used):
        raise ReaderError("corrupt", "an extension reaches too far")


def check_parent(header):
    if header.hint_length > len(header.hint) or any(header.hint[header.hint_length :]):
        raise ReaderError("corrupt", "bytes behind the parent hint")
    if header.parent_kind > 2:
        raise ReaderError("unsupported", f"parent kind {header.parent_kind}")
    if header.parent_kind == 0:
        if header.hint_length or any(header.parent_identity):
            raise ReaderError("corrupt", "a parent identity or hint without a parent")
    elif not is_plain_name(header.hint[: header.hint_length]):
        raise ReaderError("corrupt", "the parent hint is no plain file name")


def check_version(header):
    if (header.version, header.header_size) != (1, 4096):
        raise ReaderError("unsupported", f"version {header.version}")
    if header.incompatible:
        bit = (header.incompatible & -header.incompatible).bit_length() - 1
        name = {0: "encryption", 1: "external data file"}.get(bit, "unknown")
        raise ReaderError("unsupported", f"incompatible feature bit {bit} ({name})")


def check_sizes(header):
    size = header.virtual_size
    if size % SECTOR_SIZE or not SECTOR_SIZE <= size <= MAX_VIRTUAL_SIZE:
        raise ReaderError("corrupt", f"virtual size {size}")
    if header.visible_parent_size > (size if header.parent_kind else 0):
        raise ReaderError("corrupt", f"visible parent size {header.visible_parent_size}")


def check_header(header):
    """The rules of "Header validation", in their order."""
    check_version(header)
    if any(header.reserved):
        raise ReaderError("corrupt", "reserved header bytes are set")
    geometry = (12, 1048576, 256, 4096, 2097152, 134217728, 1048576, 32512)
    found = (
        header.block_size_log2,
        header.journal_offset,
        header.journal_records,
        header.record_size,
        header.groups_offset,
        header.group_stride,
        header.group_slot_size,
        header.group_blocks,
    )
    if found != geometry:
        raise ReaderError("unsupported", f"geometry {found}")
    if header.state not in (WRITABLE, IN_USE, FROZEN):
        raise ReaderError("corrupt", f"state {header.state}")
    if header.state != FROZEN and any(header.freeze_id):
        raise ReaderError("corrupt", "a freeze id in a layer that is not frozen")
    check_parent(header)
    check_extensions(header)
    check_sizes(header)
    if max(header.generation, header.epoch, header.journal_tail) >= 1 << 63:
        raise ReaderError("corrupt", "generation, epoch or journal tail from 2^63 on")


def choose_header(slots):
    """The header that counts; `slots` are the bytes of both, short where the file ends."""
    if not any(data.startswith(HEADER_MAGIC) for data in slots):
        raise ReaderError("not an image", "no magic in either header slot")
    valid = []
    for slot, data in enumerate(slots):
        if len(data) == 4096 and data.startswith(HEADER_MAGIC):
            header = Header._make(HEADER.unpack(data))
            if header.crc == slot_checksum(slot, data):
                check_header(header)
                valid.append(header)
    if not valid:
        raise ReaderError("corrupt", "neither header slot has the right checksum")
    if len(valid) == 2 and (
        valid[0].uuid != valid[1].uuid or valid[0].generation == valid[1].generation
    ):
        raise ReaderError("corrupt", "the header slots contradict each other")
    return max(valid, key=lambda header: header.generation)


# "Journal" and "Recovery"


def parse_record(uuid, place, data):
    """The valid record in a ring place, or None."""
    magic, crc, epoch, sequence, count, reserved = RECORD.unpack_from(data)
    if magic != RECORD_MAGIC or crc != record_checksum(uuid, data):
        return None
    if count > RECORD_CAPACITY or reserved or any(data[RECORD.size + count * ENTRY.size :]):
        raise ReaderError("corrupt", f"journal record {sequence}: impossible count or set padding")
    used = data[RECORD.size : RECORD.size + count * ENTRY.size]
    entries = list(ENTRY.iter_unpack(used))
    if any(a[0] >= b[0] for a, b in zip(entries, entries[1:])):
        raise ReaderError("corrupt", f"journal record {sequence}: blocks do not ascend")
    return Record(epoch, sequence, entries) if sequence % JOURNAL_RECORDS == place else None


def accept_records(header, records):
    """The records that count, in order: rules 1 to 4 of "Recovery"."""
    for record in records:
        if record.epoch > header.epoch:
            raise ReaderError(
                "loss", f"a record of epoch {record.epoch} under a header of epoch {header.epoch}"
            )
    current = {r.sequence: r for r in records if r.epoch == header.epoch}
    accepted = []
    following = header.journal_tail
    while following in current:
        accepted.append(current[following])
        following += 1
    beyond = [sequence for sequence in current if sequence >= following]
    if beyond:
        raise ReaderError("loss", f"record {following} is missing, record {min(beyond)} is there")
    if accepted and header.state != IN_USE:
        raise ReaderError("loss", "records in a layer that was closed")
    blocks = block_count(header.virtual_size)
    for record in accepted:
        if record.entries and record.entries[-1][0] >= blocks:
            raise ReaderError(
                "corrupt", f"journal record {record.sequence}: a block beyond {blocks}"
            )
    return accepted


# "Bitmap"


def parse_page(uuid, group, page):
    """The bits of a group as one integer, bit i for the block with index i."""
    joined = bytearray()
    for sector in range(8):
        bits = page[sector * 512 : sector * 512 + 508]
        (crc,) = struct.unpack_from("<I", page, sector * 512 + 508)
        if (crc or any(bits)) and crc != sector_checksum(uuid, group, sector, bits):
            raise ReaderError("corrupt", f"bitmap sector {sector} of group {group}: bad checksum")
        joined += bits
    return int.from_bytes(joined, "little")


def runs(bits):
    """Runs of set bits as (first, end), lowest first."""
    for match in re.finditer("1+", format(bits, "b")[::-1]):
        yield match.span()


def open_layer(path, follow=True):
    """The layer at `path`, of either layout, under a shared lock."""
    # O_NONBLOCK: a pipe under the name must not hold us up.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            kind = "not an image" if follow else "parent mismatch"
            raise ReaderError(kind, "not a regular file")
        lock_shared(fd)
        packed = os.pread(fd, 8, 0) == PACKED_MAGIC
        return PackedLayer(path, fd) if packed else LiveLayer(path, fd)
    except BaseException:
        os.close(fd)
        raise


def lock_shared(fd):
    """ "Locks": shared, on the whole file, without waiting."""
    whole = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ReaderError("in use", "somebody writes it") from None
        raise


class Layer:
    """One layer file, open for reading under a shared lock."""

    def __init__(self, path, fd):
        self.path, self.fd = path, fd

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def pread(self, offset, length):
        parts = []
        while length:
            part = os.pread(self.fd, length, offset)
            if not part:
                raise ReaderError("corrupt", f"{self.path}: the file ends at byte {offset}")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class LiveLayer(Layer):
    """A layer of the live layout."""

    def __init__(self, path, fd):
        super().__init__(path, fd)
        self.header = choose_header([os.pread(fd, 4096, at) for at in SLOT_OFFSETS])
        self.replayed = {}

    def identity(self):
        """(parent kind, identity) as children name it; None unless frozen."""
        identity = self.header.identity()
        return identity and (1, identity)

    def check(self):
        """All that the spec demands of a layer beyond its header; recovers in memory."""
        expected = file_length(self.header.virtual_size)
        length = os.fstat(self.fd).st_size
        if length < expected:
            raise ReaderError("corrupt", f"{length} bytes long, expected {expected}")
        if self.header.state == IN_USE:
            os.fsync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        accepted = accept_records(self.header, self._records())
        for record in accepted[:-1]:
            for block, _crc in record.entries:
                self._own(block)
        for block, crc in accepted[-1].entries if accepted else ():
            if zlib.crc32(self.pread(block_offset(block), BLOCK_SIZE)) == crc:
                self._own(block)

    def _own(self, block):
        group, index = divmod(block, GROUP_BLOCKS)
        if group not in self.replayed:
            self.replayed[group] = self._page(group)
        self.replayed[group] |= 1 << index

    def _records(self):
        end = JOURNAL_OFFSET + JOURNAL_RECORDS * BLOCK_SIZE
        if self.next_data(JOURNAL_OFFSET, end) is None:
            return []
        ring = self.pread(JOURNAL_OFFSET, end - JOURNAL_OFFSET)
        places = (ring[at : at + BLOCK_SIZE] for at in range(0, len(ring), BLOCK_SIZE))
        found = (parse_record(self.header.uuid, n, data) for n, data in enumerate(places))
        return [record for record in found if record]

    def _page(self, group):
        return parse_page(self.header.uuid, group, self.pread(bitmap_offset(group), BLOCK_SIZE))

    def next_data(self, offset, end):
        """Start of the first data in offset..end, None where there is only a hole."""
        try:
            at = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
        return at if at < end else None

    def read(self, guest, length):
        """Bytes of owned blocks of one group."""
        return self.pread(file_offset(guest), length)

    def data(self, guest, length):
        """The parts of such a range that are no holes, as (guest offset, bytes)."""
        offset = file_offset(guest)
        shift, end = guest - offset, offset + length
        while offset < end:
            offset = self.next_data(offset, end)
            if offset is None:
                return
            hole = min(os.lseek(self.fd, offset, os.SEEK_HOLE), end)
            while offset < hole:
                part = self.pread(offset, min(CHUNK, hole - offset))
                yield offset + shift, part
                offset += len(part)

    def groups(self, limit):
        """Groups below `limit` bytes that may own a block."""
        found = set(self.replayed)
        count, group = group_count(limit), 0
        while group < count:
            at = self.next_data(bitmap_offset(group), bitmap_offset(count))
            if at is None:
                break
            if at < bitmap_offset(group) + BLOCK_SIZE:
                found.add(group)
                group += 1
            else:
                group = max(group + 1, (at - GROUPS_OFFSET) // GROUP_STRIDE)
        return sorted(group for group in found if group < count)

    def bits(self, group):
        known = self.replayed.get(group)
        return self._page(group) if known is None else known


# "Packed layout"


class PackedHeader(NamedTuple):
    """The fields of a packed header, in the order of the spec's table."""

    magic: bytes
    version: int
    header_size: int
    incompatible: int
    compatible: int
    virtual_size: int
    visible_parent_size: int
    block_size_log2: int
    frame_blocks: int
    parent_kind: int
    hint_length: int
    parent_identity: bytes
    hint: bytes
    extensions_length: int
    reserved: bytes
    extensions: bytes
    crc: int

    def hint_name(self):
        return self.hint[: self.hint_length].decode()


class PackedGroup(NamedTuple):
    """The map of a group. `present` and `data` have bit i for the block with index i."""

    number: int
    frames_offset: int
    chunks_offset: int
    data_blocks: int
    present: int
    data: int


def parse_packed_header(data):
    if len(data) < 4096:
        raise ReaderError("corrupt", f"a header of {len(data)} bytes")
    header = PackedHeader._make(PACKED_HEADER.unpack(data))
    if header.crc != zlib.crc32(data[:4092]):
        raise ReaderError("corrupt", "the header has not the right checksum")
    check_version(header)
    if any(header.reserved):
        raise ReaderError("corrupt", "reserved header bytes are set")
    if header.block_size_log2 != 12 or not 1 <= header.frame_blocks <= 64:
        geometry = (header.block_size_log2, header.frame_blocks)
        raise ReaderError("unsupported", f"geometry {geometry}")
    check_parent(header)
    check_extensions(header)
    check_sizes(header)
    return header


def parse_map(data, group):
    """A group's map, as far as it can be judged by itself, and how many chunks it lists."""
    number, frames, chunks, word_count, data_blocks, occupied = GROUP_MAP.unpack_from(data)
    occupied = int.from_bytes(occupied, "little")
    words = [word for word in range(512) if occupied >> word & 1]
    if number != group or word_count != len(words) or any(word >= 508 for word in words):
        raise ReaderError("corrupt", f"the map of group {group}: impossible numbers")
    hashes = len(data) - 4 - GROUP_MAP.size - MAP_WORD.size * word_count
    if hashes < 0 or hashes % 32:
        raise ReaderError("corrupt", f"the map of group {group} has a wrong length")
    present = stored = 0
    for place, word in enumerate(words):
        at = GROUP_MAP.size + MAP_WORD.size * place
        here, with_data = MAP_WORD.unpack_from(data, at)
        if here == 0 or with_data & ~here:
            raise ReaderError("corrupt", f"the map of group {group}: word {word}")
        present |= here << word * 64
        stored |= with_data << word * 64
    if format(stored, "b").count("1") != data_blocks:
        raise ReaderError("corrupt", f"the map of group {group}: wrong count of data blocks")
    return PackedGroup(number, frames, chunks, data_blocks, present, stored), hashes // 32


def unzstd(stored, length):
    """One zstd frame that must decode to `length` bytes; a longer one isn't decoded further."""
    with tempfile.TemporaryFile() as source:
        source.write(stored)
        source.seek(0)
        command = ["zstd", "--decompress", "--stdout", "--quiet"]
        try:
            process = subprocess.Popen(
                command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except FileNotFoundError:
            raise ReaderError("unsupported", "a compressed frame, and no zstd command") from None
        with process:
            out = process.stdout.read(length + 1)
            if len(out) > length:
                process.kill()
    if len(out) != length or process.returncode:
        raise ReaderError("corrupt", f"a frame does not decode to {length} bytes")
    return out


class PackedLayer(Layer):
    """A layer of the packed layout."""

    def __init__(self, path, fd):
        super().__init__(path, fd)
        header = os.pread(fd, 4096, 0)
        self.header = parse_packed_header(header)
        self.end = os.fstat(fd).st_size - FOOTER.size
        if self.end < len(header):
            raise ReaderError("corrupt", "too short for a footer")
        self._read_footer(header)
        self._read_maps()
        self._frame = functools.lru_cache(64)(self._read_frame)

    def identity(self):
        """(parent kind, identity) as children name it."""
        return 2, self.root

    def check(self):
        """Opening has checked everything but the frames and the chunks."""

    def _read_footer(self, header):
        data = self.pread(self.end, FOOTER.size)
        magic, start, count, self.data_blocks, self.zero_blocks, self.root, *rest = FOOTER.unpack(
            data
        )
        directory_crc, header_crc, reserved, crc = rest
        if magic != FOOTER_MAGIC or crc != zlib.crc32(data[:124]) or any(reserved):
            raise ReaderError("corrupt", "the footer is damaged, or the file was cut short")
        if header_crc != zlib.crc32(header):
            raise ReaderError("corrupt", "header and footer are not of one layer")
        if start + count * DIRECTORY_ENTRY.size != self.end:
            raise ReaderError("corrupt", f"a directory at {start} with {count} entries")
        directory = self.pread(start, self.end - start)
        if directory_crc != zlib.crc32(directory):
            raise ReaderError("corrupt", "the directory has not the right checksum")
        self.directory_offset = start
        self.directory = list(DIRECTORY_ENTRY.iter_unpack(directory))
        groups = [entry[0] for entry in self.directory]
        limit = group_count(self.header.virtual_size)
        if any(a >= b for a, b in zip(groups, groups[1:] + [limit])):
            raise ReaderError("corrupt", "the directory's groups do not ascend below the end")

    def _read_maps(self):
        """Reads all maps, and checks that the parts stand one behind the other."""
        self.maps, at, zero_blocks = {}, HEADER_SIZE, 0
        for group, offset, length, data_blocks, _hash in self.directory:
            if length < GROUP_MAP.size + 4 or offset + length > self.directory_offset:
                raise ReaderError("corrupt", f"the map of group {group} reaches too far")
            data = self.pread(offset, length)
            if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
                raise ReaderError("corrupt", f"the map of group {group}: bad checksum")
            found, chunks = parse_map(data, group)
            frames = -(-data_blocks // self.header.frame_blocks)
            places = (at <= found.frames_offset < at + 4096) and (
                found.frames_offset <= found.chunks_offset
                and found.chunks_offset + 40 * frames + 4 * data_blocks + 4 * chunks == offset
            )
            if not places or found.data_blocks != data_blocks or chunks != -(-frames // CHUNK_FRAMES):
                raise ReaderError("corrupt", f"the map of group {group}: wrong places or counts")
            if any(self.pread(at, found.frames_offset - at)):
                raise ReaderError("corrupt", f"padding before group {group} is not zero")
            if found.present >> max(0, block_count(self.header.virtual_size) - group * GROUP_BLOCKS):
                raise ReaderError("corrupt", f"group {group} has blocks beyond the end")
            zero_blocks += format(found.present ^ found.data, "b").count("1")
            self.maps[group] = found
            at = offset + length
        data_blocks = sum(found.data_blocks for found in self.maps.values())
        if (at, data_blocks, zero_blocks) != (
            self.directory_offset,
            self.data_blocks,
            self.zero_blocks,
        ):
            raise ReaderError("corrupt", "the footer's numbers are not those of the groups")

    def groups(self, limit):
        """Groups below `limit` bytes that own a block."""
        return [group for group in self.maps if group < group_count(limit)]

    def bits(self, group):
        return self.maps[group].present

    def _chunk(self, group, number):
        """The (hash, end, crc) of a chunk's frames, and the CRCs of their blocks."""
        found, frame_blocks = self.maps[group], self.header.frame_blocks
        blocks_before = number * CHUNK_FRAMES * frame_blocks
        blocks = min(found.data_blocks - blocks_before, CHUNK_FRAMES * frame_blocks)
        frames = -(-blocks // frame_blocks)
        full = CHUNK_FRAMES * (FRAME_ENTRY.size + 4 * frame_blocks) + 4
        at, entries = found.chunks_offset + number * full, FRAME_ENTRY.size * frames
        data = self.pread(at, entries + 4 * blocks + 4)
        salted = struct.pack("<QI", group, number) + data[:-4]
        if zlib.crc32(salted) != int.from_bytes(data[-4:], "little"):
            raise ReaderError("corrupt", f"chunk {number} of group {group}: bad checksum")
        crcs = struct.unpack_from(f"<{blocks}I", data, entries)
        return list(FRAME_ENTRY.iter_unpack(data[:entries])), crcs

    def _read_frame(self, group, frame):
        """The decoded bytes of a frame, every block checked."""
        found, frame_blocks = self.maps[group], self.header.frame_blocks
        chunk, place = divmod(frame, CHUNK_FRAMES)
        frames, crcs = self._chunk(group, chunk)
        start = 0
        if place:
            start = frames[place - 1][1]
        elif chunk:
            start = self._chunk(group, chunk - 1)[0][-1][1]
        _hash, end, crc = frames[place]
        blocks = min(frame_blocks, found.data_blocks - frame * frame_blocks)
        length, room = blocks * BLOCK_SIZE, found.chunks_offset - found.frames_offset
        last = (frame + 1) * frame_blocks >= found.data_blocks
        if not start < end <= min(start + length, room) or last and end != room:
            raise ReaderError("corrupt", f"frame {frame} of group {group} is in a wrong place")
        stored = self.pread(found.frames_offset + start, end - start)
        if zlib.crc32(stored) != crc:
            raise ReaderError("corrupt", f"frame {frame} of group {group}: bad checksum")
        out = stored if len(stored) == length else unzstd(stored, length)
        for number in range(blocks):
            block = out[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
            if zlib.crc32(block) != crcs[place * frame_blocks + number]:
                raise ReaderError("corrupt", f"block {number} of frame {frame} of group {group}")
        return out

    def data(self, guest, length):
        """The parts of a range of owned blocks of one group that have data."""
        group, index = divmod(guest // BLOCK_SIZE, GROUP_BLOCKS)
        stored, at, end = self.maps[group].data, guest, guest + length
        rank = format(stored & ((1 << index) - 1), "b").count("1")
        while at < end:
            within = at % BLOCK_SIZE
            size = min(BLOCK_SIZE - within, end - at)
            if stored >> index & 1:
                frame, place = divmod(rank, self.header.frame_blocks)
                start = place * BLOCK_SIZE + within
                yield at, self._frame(group, frame)[start : start + size]
                rank += 1
            at, index = at + size, index + 1

    def read(self, guest, length):
        """Bytes of owned blocks of one group."""
        out = bytearray(length)
        for at, part in self.data(guest, length):
            out[at - guest : at - guest + len(part)] = part
        return bytes(out)


# "Parents"


def find_parent(child, folders):
    """The layer that the child's link names, checked; "The parent gate"."""
    header, hint = child.header, child.header.hint_name()
    refused = None
    for folder in [os.path.dirname(child.path) or ".", *folders]:
        path = os.path.join(folder, hint)
        try:
            with in_file(path):
                return open_parent(path, (header.parent_kind, header.parent_identity))
        except FileNotFoundError:
            continue
        except (ReaderError, OSError) as error:
            refused = refused or error
    raise refused or ReaderError("not found", f"{child.path}: no parent {hint!r} in any folder")


def open_parent(path, identity):
    """The layer at `path`, if it is the one with this identity and in order."""
    try:
        layer = open_layer(path, follow=False)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise ReaderError("parent mismatch", "a symbolic link, or no regular file") from None
    try:
        if layer.identity() != identity:
            raise ReaderError("parent mismatch", "another layer than the link names, or not frozen")
        layer.check()
    except BaseException:
        layer.close()
        raise
    return layer


class Chain:
    """The stack of layers below a top; the content of the image."""

    def __init__(self, path, folders=()):
        self.layers = []
        self.members = {}
        try:
            self._open(os.fspath(path), [os.fspath(folder) for folder in folders])
            self._index()
        except BaseException:
            self.close()
            raise
        self._runs = functools.lru_cache(16)(self._group_runs)

    def _index(self):
        """How much of each layer shows, and which layers may own something in a group."""
        self.size = self.layers[0].header.virtual_size
        self.limits = [self.size]
        for above in self.layers[:-1]:
            self.limits.append(min(self.limits[-1], above.header.visible_parent_size))
        for number, (layer, limit) in enumerate(zip(self.layers, self.limits)):
            with in_file(layer.path):
                for group in layer.groups(limit):
                    self.members.setdefault(group, []).append(number)

    def _open(self, path, folders):
        with in_file(path):
            layer = open_layer(path)
            self.layers.append(layer)
            layer.check()
        seen = set()
        while True:
            with in_file(layer.path):
                identity = layer.identity()
                if identity in seen:
                    raise ReaderError("corrupt", "the chain has this layer twice")
                if identity:
                    seen.add(identity)
                if layer.header.parent_kind == 0:
                    return
                if len(self.layers) == MAX_LAYERS:
                    raise ReaderError("limit", f"more than {MAX_LAYERS} layers")
            child, layer = layer, find_parent(layer, folders)
            self.layers.append(layer)
            if child.header.visible_parent_size > layer.header.virtual_size:
                with in_file(child.path):
                    raise ReaderError("corrupt", "shows more of its parent than there is")

    def close(self):
        for layer in self.layers:
            layer.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _group_runs(self, group):
        """Who answers in a group: (guest offset, layer, length), ascending."""
        found, taken = [], 0
        first = group * GROUP_BLOCKS
        for number in self.members.get(group, ()):
            layer, limit = self.layers[number], self.limits[number]
            with in_file(layer.path):
                bits = layer.bits(group)
            bits &= (1 << min(GROUP_BLOCKS, max(0, block_count(limit) - first))) - 1
            for start, end in runs(bits & ~taken):
                guest = (first + start) * BLOCK_SIZE
                length = min((end - start) * BLOCK_SIZE, limit - guest)
                found.append((guest, layer, length))
            taken |= bits
        return sorted(found, key=lambda run: run[0])

    def extents(self):
        """All that some layer answers for, ascending; the rest are zeros."""
        for group in sorted(self.members):
            yield from self._runs(group)

    def data(self):
        """All bytes that are stored, as (guest offset, bytes), ascending; the rest are zeros."""
        for guest, layer, length in self.extents():
            with in_file(layer.path):
                yield from layer.data(guest, length)

    def read(self, offset, length):
        """The bytes of a guest range."""
        end = offset + length
        if not 0 <= offset <= end <= self.size:
            raise ValueError("a range beyond the image")
        out = bytearray(length)
        span = GROUP_BLOCKS * BLOCK_SIZE
        for group in range(offset // span, -(-end // span)):
            for guest, layer, size in self._runs(group):
                a, b = max(offset, guest), min(end, guest + size)
                if a < b:
                    with in_file(layer.path):
                        out[a - offset : b - offset] = layer.read(a, b - a)
        return bytes(out)

    def sha256(self):
        """SHA-256 of the whole content, in hexadecimal."""
        sha, done = hashlib.sha256(), 0
        for guest, part in self.data():
            hash_zeros(sha, guest - done)
            sha.update(part)
            done = guest + len(part)
        hash_zeros(sha, self.size - done)
        return sha.hexdigest()

    def copy_to(self, out):
        """Writes the content to a new sparse file under the name `out`, replacing a file there."""
        if os.path.exists(out):
            if not os.path.isfile(out):
                raise ReaderError("invalid", f"{out}: not a regular file")
            if any(os.path.samestat(os.stat(out), os.fstat(l.fd)) for l in self.layers):
                raise ReaderError("invalid", f"{out}: a layer of the image itself")
        part_name = f"{out}.{os.getpid()}.part"
        fd = os.open(part_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(fd, "wb", buffering=0) as file:
                file.truncate(self.size)
                for guest, part in self.data():
                    for at in range(0, len(part), PIECE):
                        piece = part[at : at + PIECE]
                        if piece.count(0) != len(piece):
                            write_all(file.fileno(), piece, guest + at)
            os.replace(part_name, out)
        except BaseException:
            os.unlink(part_name)
            raise


def write_all(fd, data, offset):
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def hash_zeros(sha, count):
    while count > 0:
        step = min(count, CHUNK)
        sha.update(memoryview(ZEROS)[:step])
        count -= step


class in_file:
    """Puts the file's name in front of a refusal's message."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, _type, error, _trace):
        if isinstance(error, ReaderError) and not getattr(error, "named", False):
            error.args = (f"{self.path}: {error}",)
            error.named = True


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Reads a thinply image.")
    parser.add_argument("file", metavar="FILE", help="the top layer")
    parser.add_argument(
        "--layers", metavar="DIR", action="append", default=[], help="a folder to look for parents"
    )
    parser.add_argument("-o", metavar="OUT", dest="out", help="write the content here, sparsely")
    options = parser.parse_args(arguments)
    # A deep chain needs a descriptor a layer.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * MAX_LAYERS)), hard))
    try:
        with Chain(options.file, options.layers) as chain:
            if options.out:
                chain.copy_to(options.out)
            else:
                print(chain.sha256())
    except (ReaderError, OSError) as error:
        print(f"thinply_reader: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measures thinply's tools against qemu-img, cp and tar: the same content, in turn, in one run.

Writes Markdown tables of medians and ratios. Needs qemu-utils, and for the parts that want them
xfsprogs, debootstrap, e2fsprogs, dpkg and root; builds nothing: `cargo build --release --workspace`
and `cargo build --release --example bench-load -p thinply` come first. THINPLY_BEFORE names another
build of the command, which then does all that this one does, in turn.

Each contender starts with its input in the page cache and an empty output. Where the result has to
be durable, all are followed by a sync of what they wrote.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THINPLY = ROOT / "target/release/thinply"
# Another build of the command, to be measured beside this one.
BEFORE = os.environ.get("THINPLY_BEFORE")
LOAD = ROOT / "target/release/examples/bench-load"
MIB = 1 << 20
GIB = 1 << 30
# Of qcow2, unless told otherwise.
CLUSTER = 64 << 10
ZSTD = ["-c", "-o", "compression_type=zstd"]
# Real packages for three changes, there in any Debian.
CHANGES = [["git"], ["vim-runtime"], ["libc6-dev", "linux-libc-dev", "make"]]


def run(*command, **options):
    done = subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True, **options)
    return done.stdout


def timed(*commands):
    """Seconds on the clock and on the processors that commands take, one after the other."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    for command in commands:
        run(*command)
    clock = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def before(contender):
    """The same by the build of before, where there is one and it is about thinply."""
    name, output, commands = contender
    old = [[BEFORE if word == THINPLY else word for word in command] for command in commands]
    return [(f"{name}, before", output, old)] if BEFORE and old != commands else []


def read_all(path):
    with open(path, "rb") as file:
        while file.read(MIB):
            pass


def table(title, head, lines):
    print(f"\n## {title}\n")
    print(f"| {' | '.join(head)} |")
    print("| --- " * len(head) + "|")
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)


def contest(title, rounds, inputs, contenders, base=0):
    """Runs (name, output, commands) in turn; a table of medians against the contender `base`.

    The first round does not count: it differs from the others by far more than they do.
    """
    contenders = [each for contender in contenders for each in (contender, *before(contender))]
    clocks = [[] for _ in contenders]
    processors = [[] for _ in contenders]
    for number in range(rounds + 1):
        for (_, output, commands), clock, processor in zip(contenders, clocks, processors):
            if output:
                Path(output).unlink(missing_ok=True)
            for path in inputs:
                read_all(path)
            run("sync", "-f", inputs[0])
            took = timed(*commands)
            if number:
                clock.append(took[0])
                processor.append(took[1])
    first = statistics.median(clocks[base])
    rows = []
    for (name, *_), clock, processor in zip(contenders, clocks, processors):
        median = statistics.median(clock)
        spread = f"{min(clock):.3f} to {max(clock):.3f}"
        rows.append((name, f"{median:.3f}", spread, f"{statistics.median(processor):.3f}",
                     f"{first / median:.2f}"))
    label = contenders[base][0]
    table(title, ["what", "seconds", "spread", "processor seconds", f"times as fast as {label}"],
          rows)


def qcow2(source, target, *options):
    return ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, source, target]


def make_disk(path, size):
    """A disk three quarters full: noise and text in runs of 1 MiB, holes between."""
    chance = random.Random(1)
    with open(path, "wb") as file:
        file.truncate(size)
        for offset in range(0, size, MIB):
            kind = chance.randrange(4)
            if kind:
                file.seek(offset)
                file.write(chance.randbytes(MIB) if kind > 1 else b"some text, again\n" * 61681)
    run("sync", path)


def copying(folder, options):
    raw, size = folder / "disk.raw", options.size_mib * MIB
    make_disk(raw, size)
    layer, image, copy = folder / "in.tply", folder / "in.qcow2", folder / "in.raw"
    synced = [(name, out, [command, ["sync", out]]) for name, out, command in [
        ("thinply import", layer, [THINPLY, "import", raw, layer]),
        ("qemu-img convert to qcow2", image, qcow2(raw, image)),
        ("cp --reflink=never", copy, ["cp", "--reflink=never", raw, copy]),
    ]]
    contest(f"Import of {options.size_mib} MiB, raw, durable", options.rounds, [raw], synced)
    out = folder / "out.raw"
    exports = [(name, out, [command, ["sync", out]]) for name, command in [
        ("thinply export", [THINPLY, "export", layer, out]),
        ("qemu-img convert from qcow2",
         ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, out]),
        ("cp --reflink=never", ["cp", "--reflink=never", raw, out]),
    ]]
    contest(f"Export of {options.size_mib} MiB, raw, durable", options.rounds,
            [raw, layer, image], exports)


def comparing(folder, options):
    raw = folder / "disk.raw"
    make_disk(raw, options.size_mib * MIB)
    layer, again = folder / "a.tply", folder / "b.tply"
    image, other = folder / "a.qcow2", folder / "b.qcow2"
    for path in (layer, again):
        run(THINPLY, "import", raw, path)
    for path in (image, other):
        run(*qcow2(raw, path))

    def compare(title, ours, theirs):
        contenders = [
            ("thinply compare", None, [[THINPLY, "compare", *ours]]),
            ("qemu-img compare", None,
             [["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", *theirs]]),
        ]
        contest(title, options.rounds, [layer, again, image, other], contenders)

    size = f"{options.size_mib} MiB"
    compare(f"Compare of two equal disks of {size} that share nothing", [layer, again],
            [image, other])
    # The same 16 MiB changed twice over one base.
    with open(raw, "r+b") as file:
        file.write(b"7" * 16 * MIB)
    tops = [(folder / f"{name}.tply", folder / f"{name}.qcow2") for name in ("c", "d")]
    for ours, theirs in tops:
        run(THINPLY, "import", "--parent", layer, raw, ours)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", theirs)
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -P {ord('7')} 0 16M", theirs)
    compare(f"Compare of two equal disks of {size} over one base", *zip(*tops))


@contextlib.contextmanager
def mounted(image, mkfs=None):
    point = image.with_suffix(".mnt")
    point.mkdir(exist_ok=True)
    if mkfs:
        run(*mkfs, image)
    run("mount", "-o", "loop", image, point)
    try:
        yield point
    finally:
        run("umount", point)


def make_large_disk(raw, size):
    """A disk without holes that shares no extent with any file: the same noise, written again and
    again."""
    chance = random.Random(3)
    noise = b"".join(chance.randbytes(MIB) for _ in range(64))
    with open(raw, "wb") as file:
        for offset in range(0, size, len(noise)):
            file.write(noise[:size - offset])


def reflinks(folder, options):
    size = options.reflink_mib * MIB
    image = folder / "xfs"
    with open(image, "wb") as file:
        file.truncate(2 * size + GIB)
    rows = []
    with mounted(image, ["mkfs.xfs", "-q", "-m", "reflink=1"]) as point:
        raw = point / "disk.raw"
        make_large_disk(raw, size)
        run("sync", "-f", point)

        def used():
            run("sync", "-f", point)
            state = os.statvfs(point)
            return (state.f_blocks - state.f_bfree) * state.f_frsize

        for verb in ("import", "export"):
            times, grown = [], []
            for _ in range(options.rounds):
                layer, out = point / "disk.tply", point / "out.raw"
                source, target = (raw, layer) if verb == "import" else (layer, out)
                target.unlink(missing_ok=True)
                before = used()
                times.append(timed([THINPLY, verb, source, target])[0])
                grown.append(used() - before)
            rows.append((f"thinply {verb}", f"{statistics.median(times):.3f}",
                         f"{min(times):.3f} to {max(times):.3f}", f"{max(grown):,}"))
    image.unlink()
    table(f"{options.reflink_mib} MiB without holes, and shared with no file, on XFS with reflinks",
          ["what", "seconds", "spread", "new bytes at most"], rows)


def archive():
    """Where this machine's packages come from, and its release."""
    lines = run("apt-get", "indextargets", "--format", "$(CREATED_BY) $(SITE) $(CODENAME)")
    words = [line.split() for line in lines.splitlines() if line.startswith("Packages ")]
    return words[0][1:] if words else (None, None)


def make_root(folder, options):
    tree = Path(options.tree) if options.tree else folder / "tree"
    if not tree.exists():
        site, release = archive()
        run("debootstrap", "--variant=minbase", release, tree, site)
    disk = folder / "root.raw"
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, disk, f"{options.root_mib}M")
    return disk


def change(disk, folder, packages):
    """Unpacks packages into the file system; the changes as a tar.gz, like an image's layer."""
    debs, content = folder / "debs", folder / "content"
    debs.mkdir()
    content.mkdir()
    run("apt-get", "download", *packages, cwd=debs)
    for deb in sorted(debs.iterdir()):
        run("dpkg-deb", "-x", deb, content)
    with mounted(disk) as point:
        run("cp", "-a", f"{content}/.", point)
    archive = folder / "changes.tar.gz"
    run("tar", "-C", content, "-czf", archive, ".")
    size = archive.stat().st_size
    for path in (debs, content):
        shutil.rmtree(path)
    archive.unlink()
    return size


def overlay(folder, image, base, before, after):
    """A qcow2 over `base` with the clusters that a guest's changes have touched, compressed."""
    plain, piece = folder / "plain.qcow2", folder / "piece"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", plain)
    with open(before, "rb") as old, open(after, "rb") as new:
        for offset in range(0, after.stat().st_size, MIB):
            a, b = old.read(MIB), new.read(MIB)
            if a == b:
                continue
            for at in range(0, len(b), CLUSTER):
                if a[at:at + CLUSTER] != b[at:at + CLUSTER]:
                    piece.write_bytes(b[at:at + CLUSTER])
                    where = f"{offset + at} {len(b[at:at + CLUSTER])}"
                    run("qemu-io", "-f", "qcow2", "-c", f"write -q -s {piece} {where}", plain)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", *ZSTD, "-B", base, "-F", "qcow2",
        plain, image)
    plain.unlink()


def root_file_system(folder, options):
    """A base and three changes: each as a packed layer, a compressed qcow2 and a tar.gz."""
    disk = make_root(folder, options)
    base_tar = folder / "base.tar.gz"
    tree = Path(options.tree) if options.tree else folder / "tree"
    run("tar", "-C", tree, "-czf", base_tar, ".")
    steps = [("base: a Debian root", base_tar.stat().st_size)]
    layers, images, rows = [], [], []
    before = folder / "before.raw"
    for number in range(len(CHANGES) + 1):
        if number:
            tar = change(disk, folder, CHANGES[number - 1])
            steps.append((f"change {number}: {', '.join(CHANGES[number - 1])}", tar))
        layer, packed = folder / f"{number}.tply", folder / f"{number}.packed.tply"
        image = folder / f"{number}.qcow2"
        parent = ["--parent", layers[-1]] if layers else []
        run(THINPLY, "import", *parent, disk, layer)
        run(THINPLY, "pack", layer, packed)
        if images:
            overlay(folder, image, images[-1], before, disk)
        else:
            run(*qcow2(disk, image, *ZSTD))
        run("cp", disk, before)
        layers.append(layer)
        images.append(image)
        name, tar = steps[-1]
        ours, theirs = packed.stat().st_size, image.stat().st_size
        rows.append((name, f"{ours:,}", f"{theirs:,}", f"{tar:,}", f"{ours / theirs:.2f}"))
    table("Sizes in bytes of a Debian root file system (ext4) and three changes",
          ["layer", "thinply pack", "qemu-img convert -c, zstd", "tar.gz", "ratio to qcow2"], rows)

    layer, packed, image = layers[0], folder / "p.tply", folder / "p.qcow2"
    packs = [(name, out, [command, ["sync", out]]) for name, out, command in [
        ("thinply pack", packed, [THINPLY, "pack", layer, packed]),
        ("qemu-img convert -c, zstd", image, qcow2(disk, image, *ZSTD)),
    ]]
    # The disk has moved on; the contenders pack what the base was.
    run(THINPLY, "export", "--force", layer, disk)
    contest("Packing the base", options.rounds, [layer, disk], packs)
    out = folder / "out.raw"
    unpacks = [
        ("thinply export of the packed layer", out, [[THINPLY, "export", packed, out]]),
        ("qemu-img convert of the compressed qcow2", out,
         [["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, out]]),
    ]
    contest("Unpacking the base", options.rounds, [packed, image], unpacks)
    # Without the free space, which costs nobody anything.
    for path in (packed, image, layer):
        path.unlink()
    run("e2fsck", "-fy", disk)
    run("resize2fs", "-M", disk)
    run(THINPLY, "import", disk, layer)
    run(THINPLY, "pack", layer, packed)
    run(*qcow2(disk, image, *ZSTD))
    random_reads(folder, options, packed, image)


def random_reads(folder, options, packed, image):
    socket = folder / "socket"
    servers = [
        ("thinply serve, packed",
         [THINPLY, "serve", "--read-only", packed, "--socket", socket]),
        ("qemu-nbd, compressed clusters",
         ["qemu-nbd", "-r", "-f", "qcow2", "-k", socket, "-t", "-e", "16", image]),
    ]
    rates = {(name, depth): [] for name, _ in servers for depth in (1, 16)}
    for number in range(options.rounds):
        for name, command in servers:
            read_all(packed)
            read_all(image)
            for depth in (1, 16):
                with serving(command, socket):
                    load = ["load", socket, "randread", 4096, depth, 1, options.seconds, 1 << 60]
                    done, took = run(LOAD, *load, number + 1).split()
                rates[name, depth].append(int(done) / float(took))
    rows = []
    for (name, depth), column in rates.items():
        ours = statistics.median(rates[servers[0][0], depth])
        rows.append((name, str(depth), f"{statistics.median(column):,.0f}",
                     f"{ours / statistics.median(column):.2f}"))
    table("Random reads of 4 KiB from the packed base, shrunk to its data",
          ["server", "queue depth", "reads a second", "ratio"], rows)


@contextlib.contextmanager
def serving(command, socket):
    socket.unlink(missing_ok=True)
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while not socket.exists():
        if server.poll() is not None:
            sys.exit(f"{command[0]} did not start")
        time.sleep(0.005)
    try:
        yield
    finally:
        server.terminate()
        server.wait()
    socket.unlink(missing_ok=True)


def sparse_layer(folder, options):
    """1 TiB of disk with 1 GiB of data in four places."""
    raw = folder / "sparse.raw"
    chance = random.Random(2)
    with open(raw, "wb") as file:
        file.truncate(1 << 40)
        for offset in (0, 1 << 37, 1 << 39, (1 << 40) - 256 * MIB):
            file.seek(offset)
            for _ in range(256):
                file.write(chance.randbytes(MIB))
    layer = folder / "sparse.tply"
    run(THINPLY, "import", raw, layer)
    raw.unlink()
    rows = []
    for name, words in ("uncompressed", ["--uncompressed"]), ("zstd", []):
        packed = folder / f"sparse-{name}.tply"
        run(THINPLY, "pack", *words, layer, packed)
        length = packed.stat().st_size
        data = json.loads(run(THINPLY, "info", "--json", packed))
        stored = GIB
        opened = sorted(float(word) for word in run(LOAD, "open", packed, 200).split())
        rows.append((name, f"{length:,}", f"{(length - stored) / GIB:.3%}",
                     f"{statistics.median(opened):.0f}", f"{opened[-1]:.0f}"))
        assert data["virtual_size"] == 1 << 40
    table("A packed layer of 1 TiB with 1 GiB of noise in four places",
          ["form", "bytes of the file", "index to data", "median open in µs", "longest"], rows)


PARTS = {
    "copying": copying,
    "comparing": comparing,
    "reflinks": reflinks,
    "root": root_file_system,
    "sparse": sparse_layer,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="of: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--reflink-mib", type=int, default=10240)
    parser.add_argument("--root-mib", type=int, default=1024)
    parser.add_argument("--tree", help="a file tree to take for the Debian root")
    parser.add_argument("--dir", help="a folder for the images, on the disk to be measured")
    options = parser.parse_args()
    print("# Measured: the tools\n")
    print("By `tests/bench/tools.py`, with:\n")
    for tool in (THINPLY, "qemu-img"):
        print(f"- {run(tool, '--version').splitlines()[0]}")
    print(f"- Linux {platform.release()}, {os.cpu_count()} processors")
    for part in options.parts.split(","):
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            PARTS[part](Path(folder), options)


if __name__ == "__main__":
    main()

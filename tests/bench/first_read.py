#!/usr/bin/env python3
"""thinply against qemu-nbd on qcow2: 4 KiB random reads and writes over chains of the same content.

Builds the chains, then runs both servers in turn on this machine, several times, and prints a table
of medians and ratios as Markdown. Needs qemu-utils, libnbd-bin and fio; the first argument is the
thinply binary. Writes go to a fresh overlay each time and are not synced.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
BLOCK = 4096
WORKLOADS = [
    ("random read 4 KiB, QD 1", "randread", "4k", 1),
    ("random read 4 KiB, QD 16", "randread", "4k", 16),
    ("sequential read 256 KiB, QD 4", "read", "256k", 4),
    ("random write 4 KiB, QD 1", "randwrite", "4k", 1),
    ("random write 4 KiB, QD 16", "randwrite", "4k", 16),
]


def run(*command):
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


class Thinply:
    """Chains of thinply layers, one folder a depth."""

    def __init__(self, binary, folder):
        self.binary, self.folder = binary, folder
        os.makedirs(folder)

    def create(self, name, parent=None, size=None):
        arguments = ["--parent", f"{self.folder}/{parent}"] if parent else ["--size", size]
        run(self.binary, "create", *arguments, f"{self.folder}/{name}")

    @contextlib.contextmanager
    def serve(self, name, read_only=False):
        socket = f"{self.folder}/sock"
        command = [self.binary, "serve", f"{self.folder}/{name}", "--socket", socket]
        server = subprocess.Popen(
            command + ["--read-only"] * read_only, stdout=subprocess.PIPE
        )
        server.stdout.readline()
        yield f"nbd+unix:///?socket={socket}"
        server.terminate()
        if server.wait() != 0:
            sys.exit("thinply serve failed")


class Qcow2:
    """Chains of qcow2 images, served by qemu-nbd."""

    def __init__(self, folder):
        self.folder = folder
        os.makedirs(folder)

    def create(self, name, parent=None, size=None):
        backing = ["-b", parent, "-F", "qcow2"] if parent else []
        size = [size] if size else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{self.folder}/{name}", *size)

    @contextlib.contextmanager
    def serve(self, name, read_only=False):
        socket = f"{self.folder}/sock"
        command = ["qemu-nbd", "-f", "qcow2", "-k", socket, "-t", "-e", "16"]
        server = subprocess.Popen(command + ["-r"] * read_only + [f"{self.folder}/{name}"])
        while not os.path.exists(socket):
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
        server.terminate()
        server.wait()
        with contextlib.suppress(FileNotFoundError):
            os.remove(socket)


def fill(contender, depth, size):
    """Layer 0 holds every block, each other layer its share at random places: the same in both."""
    previous = None
    for level in range(depth):
        name = f"layer{level}"
        contender.create(name, previous, size)
        with contender.serve(name) as uri:
            if level == 0:
                pattern = ["--rw=write", "--bs=1m", f"--size={size}"]
            else:
                pattern = [
                    "--rw=randwrite", "--bs=4k", f"--size={size}", f"--randseed={level}",
                    f"--io_size={max(size // depth, BLOCK)}",
                ]
            fio(uri, pattern + ["--iodepth=16", f"--buffer_pattern=0x{level + 1:02x}"])
        previous = name
    return previous


def fio(uri, arguments):
    command = ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"]
    done = subprocess.run(command + arguments, check=True, capture_output=True, text=True)
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    return job["read"]["iops"] + job["write"]["iops"]


def measure(contender, last, rw, bs, depth, size, seconds, number):
    name, read_only = last, True
    if "write" in rw:
        name, read_only = f"fresh{number}", False
        contender.create(name, last)
    with contender.serve(name, read_only) as uri:
        run("nbdcopy", uri, "null:")
        return fio(uri, [
            f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", f"--size={size}",
            "--time_based", f"--runtime={seconds}",
        ])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("thinply")
    parser.add_argument("--depths", default="1,64")
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="a folder for the images, on the disk to be measured")
    options = parser.parse_args()
    size = options.size_mib * MIB
    print("| depth | workload | thinply IOPS | qemu-nbd IOPS | ratio | spread of the ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    number = 0
    for depth in map(int, options.depths.split(",")):
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            contenders = [
                Thinply(os.path.abspath(options.thinply), f"{folder}/thinply"),
                Qcow2(f"{folder}/qcow2"),
            ]
            lasts = [fill(contender, depth, size) for contender in contenders]
            for label, rw, bs, queue in WORKLOADS:
                pairs = []
                for _ in range(options.rounds):
                    number += 1
                    pairs.append([
                        measure(c, last, rw, bs, queue, size, options.seconds, number)
                        for c, last in zip(contenders, lasts)
                    ])
                ours, theirs = (statistics.median(column) for column in zip(*pairs))
                ratios = sorted(a / b for a, b in pairs)
                print(
                    f"| {depth} | {label} | {ours:,.0f} | {theirs:,.0f} "
                    f"| {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""The figures of tests/bench/run: kept as JSON, shown as Markdown tables and SVG plots."""

import html
import json
import math
from statistics import median

QEMU, EXTENDED = "qemu-nbd qcow2", "qemu-nbd qcow2, extended_l2"
RAW, SAME = "nbdkit file (raw)", "raw file, thinply's server"
OURS, BEFORE = "thinply", "thinply before"
READ_1, READ_16 = "random read 4 KiB, QD 1", "random read 4 KiB, QD 16"
SEQUENTIAL, COPY = "sequential read 256 KiB, QD 4", "nbdcopy of the whole disk, in MiB"
DURABLE, TAIL = "write 4 KiB and flush, random", "write 4 KiB and flush, the same block"
MEMORY = "peak memory after 1 GiB of random 4 KiB, 70/30, MiB"

# Aims: workload, depth, against whom, at least.
AIMS = [
    (READ_1, 1, QEMU, 1.7), (READ_1, 8, QEMU, 1.8), (READ_1, 64, QEMU, 3.5),
    (READ_16, 1, QEMU, 2.1), (READ_16, 8, QEMU, 2.2), (READ_16, 64, QEMU, 6),
    (SEQUENTIAL, 1, QEMU, 2), (COPY, 1, QEMU, 2.2),
    (READ_1, 1, RAW, 1), (READ_16, 1, RAW, 1), (SEQUENTIAL, 1, RAW, 1), (COPY, 1, RAW, 1),
    ("random write 4 KiB, QD 1", 8, QEMU, 5), ("random write 4 KiB, QD 16", 8, QEMU, 6),
    ("random write 4 KiB, QD 1", 8, EXTENDED, 2), ("random write 4 KiB, QD 16", 8, EXTENDED, 2.5),
    ("sequential write 256 KiB, QD 4", 8, QEMU, 1.3), ("sequential write 256 KiB, QD 4", 8, SAME, 0.9),
    (DURABLE, 8, QEMU, 2.5), (DURABLE, 8, SAME, 0.85), (TAIL, 8, QEMU, 1.4),
    ("4 connections, 70/30 random 4 KiB, QD 8", 8, QEMU, 2.5),
    ("random read 4 KiB, QD 16, cold cache", 1, QEMU, 1.2),
]
# The same, where less is better: how many times less.
LESS = [
    ("create an overlay, ms", 64, QEMU, 5), ("space of a new overlay, KiB", 64, QEMU, 10),
    (MEMORY, None, QEMU, 1),
]
# thinply at a depth against itself at depth 1, on disks of one size.
DEPTHS = [(READ_1, 64, 0.95), (READ_16, 64, 0.95), (READ_1, 512, 0.85), (READ_16, 512, 0.85)]

INTRODUCTION = """# Measured

By `tests/bench/run`, which also wrote this page and keeps every round in `results.json`. All servers
of a row were measured in turn in one run, over a Unix socket, on chains of the same content: layer 0
holds every block, each other layer its share of blocks at random places. The page cache is warm
unless a row says cold. Writes go to a fresh overlay over the chain, which for a raw file is an empty
sparse file; they are flushed only where the row says so. Figures are medians of the rounds; a ratio is
that of the medians, its spread that of the single rounds, above 1 where thinply is better.
"""


class Results:
    """Rows in a JSON file; a row for the same thing replaces the older one."""

    KEY = ("part", "workload", "depth", "containers")

    def __init__(self, path):
        self.path = path
        stored = json.loads(path.read_text()) if path.exists() else {"versions": [], "rows": []}
        self.versions, self.rows = stored["versions"], stored["rows"]

    def add(self, row):
        key = [row.get(name) for name in self.KEY]
        kept = [r for r in self.rows if [r.get(name) for name in self.KEY] != key]
        self.rows = [*kept, row]

    def save(self, versions):
        self.versions = versions
        rows = sorted(self.rows, key=lambda row: str([row.get(name) for name in self.KEY]))
        lines = ",\n".join(json.dumps(row) for row in rows)
        text = f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n'
        self.path.write_text(text)

    def find(self, workload, depth=None, parts=("io", "create", "memory")):
        """The rounds of each server, empty where it was not measured."""
        for row in self.rows:
            if row["workload"] == workload and row.get("depth") == depth and row["part"] in parts:
                return row["servers"]
        return {}


def figure(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(row):
    """Prints a row while it is measured."""
    figures = ", ".join(f"{name} {figure(median(v))}" for name, v in row["servers"].items())
    where = " ".join(f"{k} {row[k]}" for k in ("depth", "containers") if k in row)
    servers = row["servers"]
    if OURS in servers and BEFORE in servers:
        pairs = [now / before for now, before in zip(servers[OURS], servers[BEFORE])]
        if row["part"] not in ("io", "files"):
            # Less is better.
            pairs = [1 / pair for pair in pairs]
        figures += f"; median of the paired ratios {median(pairs):.3f}"
        spent = row.get("processor", {OURS: [], BEFORE: []})
        if pairs := [before / now for now, before in zip(spent[OURS], spent[BEFORE])]:
            figures += f", of the processor time {median(pairs):.3f}"
    print(f"{row['workload']} {where}: {figures}", flush=True)


def ratio(ours, theirs):
    """Ratio of the medians and its spread over the rounds."""
    rounds = [a / b for a, b in zip(ours, theirs)]
    return median(ours) / median(theirs), min(rounds), max(rounds)


def table(head, rows):
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def aims(results):
    rows = []
    for workload, depth, other, aim in [*AIMS, *LESS]:
        servers = results.find(workload, depth)
        if OURS in servers and other in servers:
            pair = servers[OURS], servers[other]
            less = (workload, depth, other, aim) in LESS
            rows.append((workload, depth or "", other, *judged(pair[::-1] if less else pair, aim)))
    for workload, depth, aim in DEPTHS:
        rounds = results.find(workload, parts=("depths",))
        if rounds:
            pair = rounds[f"depth {depth}"], rounds["depth 1"]
            rows.append((workload, depth, "thinply at depth 1", *judged(pair, aim)))
    return table(("workload", "depth", "against", "ratio", "spread", "aim", ""), rows)


def judged(pair, aim):
    value, low, high = ratio(*pair)
    verdict = "" if value >= aim else "missed"
    return f"{value:.2f}", f"{low:.2f} to {high:.2f}", aim, verdict


def everything(results, part):
    """A table of one part, a column for each server."""
    rows = [row for row in results.rows if row["part"] == part]
    names = list(dict.fromkeys(name for row in rows for name in row["servers"]))
    told = {"io": ["size_mib", "depth"], "containers": ["containers"]}.get(part, [])
    rows.sort(key=lambda row: [row[key] for key in told])
    cells = [
        (row["workload"], *(row[key] for key in told))
        + tuple(figure(median(v)) if (v := row["servers"].get(name)) else "" for name in names)
        for row in rows
    ]
    return table(("workload", *told, *names), cells)


PARTS = {
    "io": "Operations a second",
    "files": "Operations a second of a disk as a file, by fio past the page cache",
    "depths": "Operations a second of thinply, all depths in turn",
    "null": "Operations a second where the server has nothing to do: the limit of client and socket",
    "create": "Creating an overlay, the whole process",
    "memory": "Memory",
    "containers": "Many containers over one image, a client on each",
}


def write(results, folder):
    """Writes README.md and the plots."""
    text = [INTRODUCTION, "Versions: " + "; ".join(results.versions) + ".\n"]
    text += ["## Against the aims\n", aims(results)]
    for name, lines, axes in plots(results):
        (folder / name).write_text(svg(lines, *axes))
        text.append(f"![{axes[0]}]({name})\n")
    for part, title in PARTS.items():
        if any(row["part"] == part for row in results.rows):
            text += [f"## {title}\n", everything(results, part)]
    (folder / "README.md").write_text("\n".join(text))


def plots(results):
    """File name, lines of points by name, and (title, x axis, y axis) of each plot."""
    for name, workload in (("depth-qd1.svg", READ_1), ("depth-qd16.svg", READ_16)):
        rows = [r for r in results.rows if r["workload"] == workload and r["part"] == "io"]
        yield name, lines(rows, "depth"), (workload, "layers in the chain", "operations a second")
    costs = [row for row in results.rows if row["part"] == "containers"]
    for label in dict.fromkeys(row["workload"] for row in costs):
        rows = [row for row in costs if row["workload"] == label]
        name = f"containers-{label.split()[0]}.svg"
        yield name, lines(rows, "containers"), (label, "containers", label.rsplit(", ")[-1])


def lines(rows, key):
    found = {}
    for row in sorted(rows, key=lambda row: row[key]):
        for name, values in row["servers"].items():
            found.setdefault(name, []).append((row[key], median(values)))
    return found


COLOURS = ["#0b6e4f", "#c1121f", "#e76f51", "#8d5a97", "#1d70a2", "#6c757d", "#b08900"]
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 80, 40, 220, 50


def svg(series, title, x_label, y_label):
    """A plot with logarithmic axes."""
    points = [point for line in series.values() for point in line]
    if not points:
        return '<svg xmlns="http://www.w3.org/2000/svg"/>\n'
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    high = max(high, low + 1)

    def place(x, y):
        across = math.log(x / xs[0]) / (math.log(xs[-1] / xs[0]) or 1)
        up = (math.log10(y) - low) / (high - low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
        )

    def text(x, y, words, anchor="middle", more=""):
        words = html.escape(words)
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" {more}>{words}</text>'

    end = WIDTH - RIGHT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text((LEFT + end) / 2, 20, title, more='font-weight="bold"'),
        text((LEFT + end) / 2, HEIGHT - 10, x_label),
        text(0, 0, y_label, more=f'transform="translate(16 {HEIGHT / 2}) rotate(-90)"'),
    ]
    for power in range(low, high + 1):
        _, y = place(xs[0], 10.0**power)
        out.append(f'<path d="M{LEFT} {y:.1f}H{end}" stroke="#ddd"/>')
        out.append(text(LEFT - 6, y + 4, f"{10.0**power:,g}", "end"))
    for x in xs:
        out.append(text(place(x, 10.0**low)[0], HEIGHT - BOTTOM + 18, f"{x}"))
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        spots = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        out.append(text(end + 12, TOP + 20 * number, name, "start", f'fill="{colour}"'))
    return "\n".join([*out, "</svg>"]) + "\n"

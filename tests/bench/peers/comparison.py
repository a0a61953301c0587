"""The mesh compared with other servers: calls a second in a closed loop, latency in an open loop, and CPU per call.

All servers run during the whole part, each with the same two models; rounds alternate between them. A closed loop sends
the next call when the last one is answered, so it finds the maximum of calls a second. An open loop sends calls at
given times, whether the server is ready or not, and counts a call's time from when it was due (`client`).
"""

import asyncio
import random
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.bench import generators
from tests.bench.client import PERCENTILES, Order, Outcome, call
from tests.bench.door import Door, Kind
from tests.bench.peers import starting
from tests.bench.peers.servers import PAYLOADS, Server
from tests.bench.plan import Plan
from tests.bench.processes import Meter
from tests.bench.results import Comparison, Results, Row
from tests.support.localmesh import LocalMesh


@dataclass(frozen=True, slots=True)
class Closed:
    """A row of the closed loop."""

    kind: Kind
    payload: str
    callers: int
    binary: bool = False
    rounds: int = 100  # at most: fewer where calls take seconds

    @property
    def what(self) -> str:
        form = "gRPC" if self.kind == "grpc" else "REST, binary tensors" if self.binary else "REST, JSON"
        return f"{form}, {self.payload}, {self.callers} {'caller' if self.callers == 1 else 'callers'}"


CLOSED = (
    (Closed("grpc", "1 KB", 64), Closed("rest", "1 KB", 16)),
    (Closed("grpc", "100 KB", 8), Closed("rest", "100 KB", 8), Closed("rest", "100 KB", 8, binary=True)),
    (Closed("grpc", "4 MB", 8), Closed("rest", "4 MB", 1, rounds=3), Closed("rest", "4 MB", 4, binary=True, rounds=3)),
)
"""Groups of rows that take turns. Long calls have few callers, because a queue would only lengthen them."""

KINDS: tuple[Kind, ...] = ("grpc", "rest")
LIMIT = 15 * 60.0
"""Seconds for the complete part, after which only the first round of each row is still taken. On two quiet cores the
part takes 13 minutes."""
PAUSE = 1.0  # seconds between two loads, in which generators start and connect
FAILED = "calls failed in a round; that round is not counted"


class Bar:
    """The progress of the part: one bar, by expected seconds, or lines if the output is not a terminal."""

    def __init__(self, progress: Progress, seconds: float) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=seconds)
        self._lines = not progress.console.is_terminal
        self._total, self._passed = seconds, 0.0
        self._last = ""
        self._limit = time.monotonic() + LIMIT
        self.cut = False  # rounds were left out for lack of time

    def more(self, number: int) -> bool:
        """Returns whether there is time for another round. The first round is always run."""
        self.cut = self.cut or (number > 0 and time.monotonic() > self._limit)
        return not self.cut or not number

    def doing(self, stage: str, what: str) -> None:
        self._progress.update(self._task, description=what)
        if self._lines and stage != self._last:
            self._progress.console.print(f"{self._passed:4.0f} of {self._total:.0f} s: {stage}", highlight=False)
        self._last = stage

    def failed(self, what: str, system: str, error: Exception) -> None:
        self._progress.console.print(f"[bold red]{what}: {system} FAILED: {error}")

    def done(self, seconds: float) -> None:
        """Advances the bar by the seconds that were planned for a load."""
        self._passed += seconds
        self._progress.advance(self._task, seconds)


async def run(mesh: LocalMesh, folder: Path, results: Results, plan: Plan) -> None:
    """Makes the environments, starts the peers, measures, and adds the comparisons."""
    columns = (TextColumn("{task.description:48}"), BarColumn(30), TimeElapsedColumn(), TextColumn("left:"))
    with Progress(*columns, TimeRemainingColumn(), console=results.console) as progress:
        async with starting.running(mesh, folder, results, progress) as running:
            loads = sum(
                min(plan.closed, row.rounds)
                for rows in CLOSED
                for row in rows
                for server in running
                if _takes(server, row)
            )
            opens = sum(len(server.doors) for server in running) * len(plan.rates)
            bar = Bar(
                progress,
                loads * (plan.closed_seconds + PAUSE) + opens * plan.open * (plan.open_seconds + PAUSE),
            )
            closed = [pair for rows in CLOSED for pair in await _closed(rows, running, plan, bar)]
            opened = [
                row for kind in KINDS for rate in plan.rates for row in await _open(kind, rate, running, plan, bar)
            ]
    names = [server.name for server in running]
    base = "MLServer" if "MLServer" in names else names[-1]
    rates, costs = [rate for rate, _ in closed], [cost for _, cost in closed]
    rounds = (
        f"{plan.closed} rounds of {plan.closed_seconds:.0f} s alternate between the systems, or 3 rounds where calls "
        "take seconds."
    )
    payloads = (
        "1 KB stands for calls of a logistic regression of 64 floats, whose requests have 1 KB as JSON and 0.3 KB over "
        "gRPC. 100 KB and 4 MB are the sizes of a tensor that is sent, and returned unchanged."
    )
    ours = running[0]
    doors = [ours.door(row.kind, PAYLOADS[row.payload], binary=row.binary) for rows in CLOSED for row in rows]
    notes = [payloads, rounds, f"The calls are sent by {' and '.join(dict.fromkeys(map(generators.named, doors)))}."]
    if bar.cut:
        notes.append(
            f"Some rounds were left out, because the machine was too slow for all in {LIMIT / 60:.0f} minutes."
        )
    if base != "MLServer":
        for row in rates:
            row.reach = ""  # the goals are ratios to MLServer
    results.add(Comparison("throughput", "Calls a second, closed loop", names, base, rates, notes))
    more = [
        "The figures include all processes of a server: for Mesh, those are Envoy, router, agent and model server.",
        "They were measured in the same rounds as the calls a second.",
    ]
    results.add(Comparison("cpu", "CPU of a call", names, base, costs, more))
    results.add(_forms(rates, rounds))
    notes = [
        "The latency of a call begins when the call was due, even if it was sent later. "
        f"{plan.open} rounds of {plan.open_seconds:.0f} s alternate between the systems. Calls are due at random "
        "times, the same for each system. They are sent by grpc.aio, or over REST by an HTTP/1.1 client of Mesh.",
        "One call in a thousand takes longer than p99.9.",
    ]
    results.add(Comparison("latency", "Latency, open loop, 1 KB", names, base, opened, notes))


def _forms(rates: Sequence[Row], rounds: str) -> Comparison:
    """Returns the comparison of Mesh's REST with its gRPC, from the rounds of both."""
    grpc, rest, binary = "Mesh, gRPC", "Mesh, REST as JSON", "Mesh, REST as binary"
    found = Comparison("forms", "REST compared with gRPC", [rest, binary, grpc], grpc, [], [rounds])
    ours = {row.what: row.figures["Mesh"] for row in rates}
    for rows in CLOSED:
        names = {(row.kind, row.binary): row.what for row in rows}
        figures = {
            system: ours.get(names.get(form, ""), [])
            for system, form in ((rest, ("rest", False)), (binary, ("rest", True)), (grpc, ("grpc", False)))
        }
        goal = ">= 0.6" if rows is CLOSED[0] else ""
        found.rows.append(Row(rows[0].payload, "calls/s", figures, more_is_better=True, reach=goal, judged=False))
    return found


def _takes(server: Server, row: Closed) -> bool:
    return row.kind in server.doors and (server.binary_rest or not row.binary)


async def _closed(rows: Sequence[Closed], running: Sequence[Server], plan: Plan, bar: Bar) -> list[tuple[Row, Row]]:
    """Measures the calls a second and the CPU per call of a group of rows."""
    measured = [
        (
            Row(row.what, "calls/s", {server.name: [] for server in running}, more_is_better=True, reach=_goal(row)),
            Row(row.what, "us", {server.name: [] for server in running}),
        )
        for row in rows
    ]
    for row, pair in zip(rows, measured, strict=True):
        for server in running:
            if not _takes(server, row):
                lacks = "has no REST" if row.kind not in server.doors else "does not support binary tensors over REST"
                for one in pair:
                    one.remarks[server.name] = lacks
    turns = [
        (row, rates, costs, server)
        for row, (rates, costs) in zip(rows, measured, strict=True)
        for server in running
        if _takes(server, row)
    ]
    order = random.Random(rows[0].what)
    for number in range(plan.closed):
        if not bar.more(number):
            break
        order.shuffle(turns)  # the order changes, so that no system always follows the same one
        for row, rates, costs, server in [turn for turn in turns if number < turn[0].rounds]:
            bar.doing(f"{row.payload}, round {number + 1}", f"{row.what}: {server.name}")
            door = server.door(row.kind, PAYLOADS[row.payload], binary=row.binary)
            try:
                if not number:
                    await asyncio.to_thread(generators.throughput, door, seconds=1.0, callers=row.callers)
                meter = Meter.begin({"all": server.pids()})
                done = await asyncio.to_thread(
                    generators.throughput, door, seconds=plan.closed_seconds, callers=row.callers
                )
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                bar.failed(row.what, server.name, error)
                rates.remarks[server.name] = costs.remarks[server.name] = FAILED
            else:
                rates.figures[server.name].append(done.rate)
                costs.figures[server.name].append(meter.spent()["all"] / done.calls * 1e6)
                if done.share > generators.BOUND:
                    rates.remarks[server.name] = _bounded(door, done)
            bar.done(plan.closed_seconds + PAUSE)
    return measured


def _goal(row: Closed) -> str:
    """Returns the goal for the ratio of Mesh to MLServer, or "" for rows without a goal."""
    return ">= 5" if (row.kind, row.payload) == ("rest", "1 KB") else ""


def _bounded(door: Door, done: Outcome) -> str:
    return f"bounded by the generator: {generators.named(door)} took {done.share:.0%} of a core"


async def _open(kind: Kind, rate: int, running: Sequence[Server], plan: Plan, bar: Bar) -> list[Row]:
    """Measures the latencies of calls at one rate. Returns a row for each percentile."""
    form = "gRPC" if kind == "grpc" else "REST, JSON"
    rows = [
        Row(f"{form}, {rate:,} calls/s, p{share * 100:g}", "ms", {server.name: [] for server in running})
        for share in PERCENTILES
    ]
    takes = [server for server in running if kind in server.doors]
    for number in range(plan.open):
        if not bar.more(number):
            break
        for server in takes:
            bar.doing(f"{form}, {rate:,} calls/s", f"{form}, {rate:,} calls/s: {server.name}")
            door = server.door(kind, PAYLOADS["1 KB"])
            try:
                done = await asyncio.to_thread(call, Order(door, plan.open_seconds, rate=rate, seed=number))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                bar.failed(f"{form}, {rate:,} calls/s", server.name, error)
                for row in rows:
                    row.remarks[server.name] = FAILED
                bar.done(plan.open_seconds + PAUSE)
                continue
            for row, value in zip(rows, done.percentiles or (None,) * len(rows), strict=True):
                if value is not None:
                    row.figures[server.name].append(value * 1e3)
                if done.behind:
                    row.remarks[server.name] = "does not keep up: the latencies grow as long as calls are sent"
                elif done.share > generators.BOUND:
                    row.remarks[server.name] = f"bounded by the generator: it took {done.share:.0%} of a core"
                elif done.lag * 1e3 > 1.0 and server.name not in row.remarks:
                    row.remarks[server.name] = (
                        f"includes a delay: the generator sent calls late (p99 {done.lag * 1e3:.1f} ms)"
                    )
            bar.done(plan.open_seconds + PAUSE)
    for server in running:
        if server not in takes:
            for row in rows:
                row.remarks[server.name] = "has no REST"
    return rows

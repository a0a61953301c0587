"""`mesh top`: a live view of the mesh, or one frame of it for scripts.

Each frame is made from two samples. Counters only grow, so their differences give rates. Sampling (network calls),
comparing (`compare`, pure) and drawing (`draw`) are separate. With several routers behind one endpoint, two samples may
come from different routers. If a counter is then lower than before, the frame shows no calls instead of a negative
number.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from mesh.cli import options, output
from mesh.cli.client import Client
from mesh.cli.exits import Exit, MeshRefusal, MeshUnreachable
from mesh.cli.pods import number, overview

HOTTEST = 10
"""Number of models shown, which fits a screen together with a few pods."""

PATIENCE = 5.0
"""Time limit of an answer, in seconds: an error is better than old figures."""

MAX_COPIES = 20_000
"""Number of copies in all pods above which the hottest models are not shown, because reading the counters of so many
copies would cost too much."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters and pods of the mesh at one moment."""

    at: float  # seconds on this process's monotonic clock
    stats: Mapping[str, Any]
    pods: tuple[Mapping[str, Any], ...]
    calls: Mapping[str, int] = field(default_factory=dict)  # for each resident model, over all its copies


@dataclass(frozen=True, slots=True)
class Frame:
    """Rates per second between two samples, and the state at the second sample."""

    calls: float
    errors: float
    hits: float
    cold_starts: float
    loads: float
    latency_ms: Mapping[str, Mapping[str, Any]]
    resident: int
    pods: tuple[Mapping[str, Any], ...]
    hottest: tuple[tuple[str, float], ...]
    aliases: tuple[tuple[str, str, float, float], ...] = ()  # alias, model, calls and errors a second; most calls first

    @property
    def hit_rate(self) -> float | None:
        """Share of hits among the calls that found a model, or None without calls."""
        total = self.hits + self.cold_starts
        return self.hits / total if total else None


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("top", rich_help_panel=options.MESH)(top)


def top(
    context: typer.Context,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.2, metavar="SECONDS", help="Time between two frames, in seconds.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Shows calls, hits, latencies, pods, and the hottest models and aliases, live. Press q or Ctrl-C to quit.

    A cold start is the load of a model that a call found not loaded. The hit rate is the share of calls that found
    their model loaded. `mesh pods --help` explains the table of pods.

    Examples:

    - `mesh top`
    - `mesh top --once --json`
    """

    async def command(client: Client) -> None:
        before = await sample(client)
        if once or as_json or not output.console().is_terminal:
            await asyncio.sleep(interval)
            frame = compare(before, await sample(client))
            if as_json:
                output.print_json(_as_json(frame))
            else:
                output.console().print(draw(frame, client.endpoint))
            return
        await _watch(client, before, interval)

    try:
        options.run(context, command, endpoint=endpoint, as_json=as_json, timeout=PATIENCE)
    except typer.Exit as end:
        if end.exit_code != Exit.INTERRUPTED:  # Ctrl-C is a normal way to quit
            raise


async def _watch(client: Client, before: Sample, interval: float) -> None:
    loop = asyncio.get_running_loop()
    quit_asked = asyncio.Event()
    screen = output.console()
    with _keys(loop, quit_asked), Live(console=screen, screen=True, auto_refresh=False) as live:
        live.update(Text("measuring", style="dim"), refresh=True)
        while not quit_asked.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(quit_asked.wait(), interval)
                return
            try:
                after = await sample(client)
            except MeshUnreachable as error:  # it may be restarting: show the error and keep trying
                live.update(Text(error.text, style="red"), refresh=True)
                continue
            live.update(draw(compare(before, after), client.endpoint, hint="q quits"), refresh=True)
            before = after


async def sample(client: Client) -> Sample:
    """Takes a sample. Asks the pods for the counters of their copies, unless the mesh has more than `MAX_COPIES`.
    Raises MeshUnreachable or MeshRefusal if the router does not answer."""
    stats, listed = await asyncio.gather(client.get("/mesh/v1/stats"), client.get("/mesh/v1/pods"))
    pods = tuple(listed["pods"])
    at = time.monotonic()
    calls: dict[str, int] = {}
    if sum(number(dict(pod), "copies") for pod in pods) <= MAX_COPIES:
        for answer in await asyncio.gather(*(_describe(client, str(pod["pod"])) for pod in pods)):
            for copy in answer.get("copies") or ():
                model = str(copy.get("model_id", ""))
                calls[model] = calls.get(model, 0) + number(copy, "calls")
    return Sample(at, stats, pods, calls)


async def _describe(client: Client, pod: str) -> dict[str, Any]:
    """Returns a pod's current state, or an empty one if the pod does not answer, so that a mesh in trouble can still be
    shown."""
    try:
        return await client.request("GET", f"/mesh/v1/pods/{quote(pod, safe='')}", timeout=2.0)
    except (MeshRefusal, MeshUnreachable):
        return {}


def compare(before: Sample, after: Sample) -> Frame:
    """Returns the frame between two samples."""
    seconds = max(after.at - before.at, 1e-9)

    def rate(old: float, new: float) -> float:
        return max(0.0, new - old) / seconds

    def of(name: str) -> float:
        return rate(number(dict(before.stats), name), number(dict(after.stats), name))

    ok_before, failed_before = _outcomes(before.stats)
    ok_after, failed_after = _outcomes(after.stats)
    # A new copy has no earlier count: all its calls belong to this frame.
    rates = [(model, rate(before.calls.get(model, 0), calls)) for model, calls in after.calls.items()]
    hottest = sorted((item for item in rates if item[1] > 0), key=lambda item: (-item[1], item[0]))[:HOTTEST]
    errors = rate(failed_before, failed_after)
    return Frame(
        calls=rate(ok_before, ok_after) + errors,
        errors=errors,
        hits=of("hits"),
        cold_starts=of("cold_starts"),
        loads=of("loads"),
        latency_ms=after.stats.get("latency_ms") or {},
        resident=number(dict(after.stats), "resident"),
        pods=after.pods,
        hottest=tuple(hottest),
        aliases=_aliases(before.stats, after.stats, rate),
    )


def _aliases(
    before: Mapping[str, Any], after: Mapping[str, Any], rate: Callable[[float, float], float]
) -> tuple[tuple[str, str, float, float], ...]:
    """Returns the rates of calls by the aliases that were called, for each model of an alias."""
    old = {(one["alias"], one["model"]): one for one in before.get("aliases") or ()}
    rates = []
    for one in after.get("aliases") or ():
        earlier = old.get((one["alias"], one["model"]), {})
        calls, errors = (rate(earlier.get(name, 0), one[name]) for name in ("calls", "errors"))
        if calls:
            rates.append((str(one["alias"]), str(one["model"]), calls, errors))
    return tuple(sorted(rates, key=lambda one: (-one[2], one[:2]))[:HOTTEST])


def _outcomes(stats: Mapping[str, Any]) -> tuple[int, int]:
    """Counts the calls of all methods that ended with OK, and those that failed."""
    ok = failed = 0
    for codes in (stats.get("calls") or {}).values():
        for code, count in codes.items():
            if code == "OK":
                ok += int(count)
            else:
                failed += int(count)
    return ok, failed


def draw(frame: Frame, endpoint: str, *, hint: str = "") -> RenderableType:
    """Renders the frame for a terminal."""
    head = Text.assemble(("mesh ", "bold"), endpoint, (f"   {hint}" if hint else "", "dim"))
    errors = f"[red]{frame.errors:.1f} errors/s[/]" if frame.errors else "no errors"
    hit_rate = "-" if frame.hit_rate is None else f"{100 * frame.hit_rate:.1f} %"
    numbers = Text.from_markup(
        f"[bold]{frame.calls:,.0f}[/] calls/s   {errors}   hit rate [bold]{hit_rate}[/]   "
        f"{frame.cold_starts:.1f} cold starts/s   {frame.loads:.1f} loads/s   {frame.resident:,} copies resident"
    )
    parts: list[RenderableType] = [head, numbers]
    if frame.latency_ms:
        times = output.table("LATENCY", ">P50", ">P90", ">P99", ">CALLS")
        for name, of in frame.latency_ms.items():
            times.add_row(
                output.plain(name),
                *(output.duration(of.get(p)) for p in ("p50", "p90", "p99")),
                str(of.get("count", "")),
            )
        parts += ["", times]
    parts += ["", overview([dict(pod) for pod in frame.pods])]
    if frame.hottest:
        models = output.table("HOTTEST MODELS", ">CALLS/S")
        for model, rate in frame.hottest:
            models.add_row(output.plain(model), f"{rate:,.1f}")
        parts += ["", models]
    if frame.aliases:
        named = output.table("ALIAS", "MODEL", ">CALLS/S", ">ERRORS/S")
        for alias, model, calls, failed in frame.aliases:
            named.add_row(output.plain(alias), output.plain(model), f"{calls:,.1f}", f"{failed:,.1f}" if failed else "")
        parts += ["", named]
    return Group(*parts)


def _as_json(frame: Frame) -> dict[str, Any]:
    return {
        "calls_per_second": round(frame.calls, 3),
        "errors_per_second": round(frame.errors, 3),
        "hit_rate": None if frame.hit_rate is None else round(frame.hit_rate, 4),
        "cold_starts_per_second": round(frame.cold_starts, 3),
        "loads_per_second": round(frame.loads, 3),
        "latency_ms": frame.latency_ms,
        "resident": frame.resident,
        "pods": list(frame.pods),
        "hottest": [{"id": model, "calls_per_second": round(rate, 3)} for model, rate in frame.hottest],
        "aliases": [
            {"alias": alias, "model": model, "calls_per_second": round(calls, 3), "errors_per_second": round(failed, 3)}
            for alias, model, calls, failed in frame.aliases
        ],
    }


@contextlib.contextmanager
def _keys(loop: asyncio.AbstractEventLoop, quit_asked: asyncio.Event) -> Iterator[None]:
    """Sets the event when q is pressed. Restores the terminal when the block ends."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed() -> None:
        typed = os.read(descriptor, 64)
        if not typed or b"q" in typed.lower():
            quit_asked.set()

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, pressed)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

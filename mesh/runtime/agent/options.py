"""The groups of options that `python -m mesh.runtime` takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mesh.host import memory
from mesh.options import checked, tls
from mesh.options.values import format_bytes
from mesh.runtime.agent.settings import SERVER
from mesh.runtime.cache.books import demand
from mesh.runtime.cache.evictions import capacity
from mesh.telemetry import logs
from placement import policies
from puller.proxies import Proxies

log = logs.get("mesh.runtime")

_BODY_BYTES = 512 << 20  # large requests are admitted up to half of it, which is what may wait (`server.calls.runs`)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a pod answers, and how others reach it."""

    data: Annotated[
        str,
        typer.Option(envvar="MESH_DATA", help="Address that routers send inference to, HOST:PORT; port 0: a free one."),
    ] = "127.0.0.1:0"
    control: Annotated[str, typer.Option(envvar="MESH_CONTROL", help="Address that routers ask for loads.")] = (
        "127.0.0.1:0"
    )
    probe: Annotated[str, typer.Option(envvar="MESH_PROBE", help="Address of /ready, /live and /metrics.")] = (
        "127.0.0.1:0"
    )
    internal_tls: tls.Internal = None
    advertise: Annotated[
        str, typer.Option(envvar="MESH_ADVERTISE", help="Host by which others reach this pod; default: found out.")
    ] = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """What models may take, and what makes room for them."""

    capacity: Annotated[
        str, typer.Option(envvar="MESH_CAPACITY", help="Memory for models; auto: most of what there is.")
    ] = "auto"
    device: Annotated[str, typer.Option(envvar="MESH_DEVICE", help="What models run on: auto, cpu or cuda.")] = "auto"
    device_capacity: Annotated[
        str,
        typer.Option(
            envvar="MESH_DEVICE_CAPACITY",
            help="Memory of the GPU for models; auto: a good part of what is free.",
        ),
    ] = "auto"
    eviction: Annotated[
        str, typer.Option(envvar="MESH_EVICTION", help=f"Which copies make way first: {', '.join(policies.NAMES)}.")
    ] = "lru"
    demand_window: Annotated[
        float,
        typer.Option(
            envvar="MESH_DEMAND_WINDOW",
            min=1.0,
            help="Time for which a model counts as in use after its last call, for the metric mesh_pods_wanted, in "
            "seconds.",
        ),
    ] = demand.WINDOW

    def check(self) -> None:
        """Raises BadParameter for a device or a policy that does not exist."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise typer.BadParameter(f"{self.device!r} is neither auto, cpu nor cuda", param_hint="--device")
        try:
            policies.check(self.eviction)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--eviction") from error

    def split(self) -> tuple[int, int]:
        """Returns bytes for models, and for the model server in all. Raises BadParameter where they are not there."""
        there = memory.whole()
        try:
            if self.capacity == "auto":
                capacity.check_least(there)
                at_hand = memory.available_bytes()
                return capacity.auto_capacity(at_hand), capacity.auto_limit(at_hand)
            models = checked.size(self.capacity, "--capacity")
            limit = capacity.server_limit(models, there)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--capacity") from error
        if limit < capacity.limit(models):
            log.warning(
                "little memory is left for calls beside the models",
                models=format_bytes(models),
                server=format_bytes(limit),
            )
        return models, limit


@dataclass(frozen=True, slots=True)
class Storage:
    """Where model files come from, and where they are kept."""

    model_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_MODEL_DIR",
            help="Folder for pulled files, of this pod alone; whole files in it are used again after a restart.",
        ),
    ] = None
    file_root: Annotated[
        list[Path] | None,
        typer.Option(envvar="MESH_FILE_ROOT", help="Folder that file: paths may lie in; may be repeated."),
    ] = None
    http_allow_private: Annotated[
        bool,
        typer.Option(envvar="MESH_HTTP_ALLOW_PRIVATE", help="Allow models from loopback and private networks."),
    ] = False
    storage_config: Annotated[
        Path | None,
        typer.Option(
            envvar=["MESH_STORAGE_CONFIG", "STORAGE_CONFIG_DIR"],
            help="Folder with the storage secret, one JSON file for each storage_key; read again at each pull.",
        ),
    ] = None
    storage_ca: Annotated[
        Path | None,
        typer.Option(envvar="MESH_STORAGE_CA", help="PEM file with the authorities that stores are trusted by."),
    ] = None
    pvc_root: Annotated[
        Path | None,
        typer.Option(envvar="MESH_PVC_ROOT", help="Folder in which volumes for pvc: paths are mounted, by name."),
    ] = None
    disk_budget: Annotated[
        str,
        typer.Option(envvar="MESH_DISK_BUDGET", help="Disk space for pulled files; auto: what the disk has room for."),
    ] = "auto"
    pull_bandwidth: Annotated[
        str, typer.Option(envvar="MESH_PULL_BANDWIDTH", help="Bytes a second for all pulls together; 0: no limit.")
    ] = "0"
    pull_connections: Annotated[
        int, typer.Option(envvar="MESH_PULL_CONNECTIONS", min=1, help="Connections to stores at once.")
    ] = 32

    def proxies(self) -> Proxies:
        """Returns the proxies that the environment names. Raises BadParameter."""
        try:
            return Proxies.of()
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="environment") from error


@dataclass(frozen=True, slots=True)
class Work:
    """What bounds loads, calls and the model server."""

    load_timeout: Annotated[
        float,
        typer.Option(
            envvar="MESH_LOAD_TIMEOUT", min=0.1, help="Longest time for one load in the model server, in seconds."
        ),
    ] = 90.0
    load_concurrency: Annotated[
        int, typer.Option(envvar="MESH_LOAD_CONCURRENCY", min=0, help="Loads at once; 0: one for each CPU, at least 2.")
    ] = 0
    threads: Annotated[
        int,
        typer.Option(envvar="MESH_THREADS", min=0, help="Threads for calls that are not short; 0: one for each CPU."),
    ] = 0
    max_message: Annotated[
        str, typer.Option(envvar="MESH_MAX_MESSAGE", help="Size of the largest request or reply.")
    ] = "16MiB"
    max_body_bytes: Annotated[
        str,
        typer.Option(
            envvar="MESH_MAX_BODY_BYTES",
            help="Bytes of requests and replies that the model server holds; at half of them large requests are "
            "refused, with 429. auto: 512 MiB, or four times --max-message where that is more.",
        ),
    ] = "auto"
    hang_timeout: Annotated[
        float,
        typer.Option(
            envvar="MESH_HANG_TIMEOUT",
            min=1.0,
            help="Silence of the model server after which it is replaced, in seconds; at least 3. A stopped one is "
            "replaced after 3 seconds.",
        ),
    ] = 12.0
    server_module: Annotated[
        str,
        # For tests, which fake the server: no operator needs it.
        typer.Option(envvar="MESH_SERVER_MODULE", hidden=True, help="Python module run as the model server."),
    ] = SERVER
    drain_timeout: Annotated[
        float,
        typer.Option(
            envvar="MESH_DRAIN_TIMEOUT",
            min=0.0,
            help="Time for loads and calls in flight to end at SIGTERM, in seconds.",
        ),
    ] = 20.0

    def body_bytes(self) -> int:
        """Returns what the model server may hold in bodies. Raises BadParameter where that is too little for one."""
        return checked.body_bytes(self.max_body_bytes, least=_BODY_BYTES, max_message=self.max_message)


@dataclass(frozen=True, slots=True)
class Membership:
    """How the pod stays known to the mesh, and what it does while it is not."""

    lease_ttl: Annotated[
        int,
        typer.Option(
            envvar="MESH_LEASE_TTL", min=2, help="Lease time to live, after which a dead pod is gone, in seconds."
        ),
    ] = 10
    serve_without_etcd: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVE_WITHOUT_ETCD",
            metavar="SECONDS|forever",
            help="Time for which resident models are served after etcd was last reached, in seconds, or 'forever'.",
        ),
    ] = "forever"
    check_interval: Annotated[
        float,
        typer.Option(
            envvar="MESH_CHECK_INTERVAL", min=0.1, help="Time between comparisons with the registry, in seconds."
        ),
    ] = 30.0

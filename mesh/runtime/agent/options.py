"""The groups of options that `python -m mesh.runtime` takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from mesh.host import memory
from mesh.modelservers import availability, kinds
from mesh.options import checked, servers, tls
from mesh.options.values import format_bytes
from mesh.process import find_binary
from mesh.runtime.agent.settings import SERVER
from mesh.runtime.cache.books import demand
from mesh.runtime.cache.evictions import capacity
from mesh.telemetry import logs
from placement import policies
from puller.proxies import Proxies

log = logs.get("mesh.runtime")

ONNX = "onnx"
"""The model type that Mesh's own server accepts."""

_BODY_BYTES = 512 << 20  # large requests are admitted up to half of it, and may wait (`server.calls.runs`)


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of a pod, and the host by which others reach it."""

    data: Annotated[
        str,
        typer.Option(envvar="MESH_DATA", help="Address for inference calls of routers, HOST:PORT; port 0: a free one."),
    ] = "127.0.0.1:0"
    control: Annotated[
        str,
        typer.Option(
            envvar="MESH_CONTROL",
            help="Address where routers request loads and unloads, HOST:PORT; port 0: a free one.",
        ),
    ] = "127.0.0.1:0"
    probe: Annotated[
        str,
        typer.Option(
            envvar="MESH_PROBE", help="Address of the health checks /ready and /live, and of /metrics, HOST:PORT."
        ),
    ] = "127.0.0.1:0"
    internal_tls: tls.Internal = None
    advertise: Annotated[
        str,
        typer.Option(
            envvar="MESH_ADVERTISE", help="Host name or address by which routers reach this pod; default: detected."
        ),
    ] = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """The options for the memory for models, and for the policy by which copies are evicted."""

    capacity: Annotated[
        str,
        typer.Option(
            envvar="MESH_CAPACITY",
            help=(
                "Memory for models, in bytes or with a unit such as GiB; auto: most of the available memory, or "
                "the capacity that the server of --server reports."
            ),
        ),
    ] = "auto"
    device: Annotated[str, typer.Option(envvar="MESH_DEVICE", help="Device that models run on: auto, cpu or cuda.")] = (
        "auto"
    )
    device_capacity: Annotated[
        str,
        typer.Option(
            envvar="MESH_DEVICE_CAPACITY",
            help="Memory of the GPU for models, in bytes or with a unit such as GiB; auto: most of its free memory.",
        ),
    ] = "auto"
    eviction: Annotated[
        str,
        typer.Option(
            envvar="MESH_EVICTION",
            metavar="|".join(policies.NAMES),
            help=f"Policy that chooses the copies to evict. {policies.EXPLAINED}.",
        ),
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
        """Raises BadParameter for an unknown device or policy."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise typer.BadParameter(f"{self.device!r} is not a device: use auto, cpu or cuda", param_hint="--device")
        try:
            policies.check(self.eviction)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--eviction") from error

    def split(self, *, foreign: bool, at_hand: int = 0) -> tuple[int, int]:
        """Returns two numbers of bytes: for models, and for the whole model server, where 0 means no limit. With a
        foreign server, the capacity auto gives 0 for models, because the server reports its capacity; a server with an
        adapter reports none, and gets most of the `at_hand` bytes. Raises BadParameter for a size that is not valid, or
        if there is too little memory."""
        if at_hand and self.capacity == "auto":
            return capacity.auto_capacity(at_hand), 0
        if foreign:
            return 0 if self.capacity == "auto" else checked.size(self.capacity, "--capacity"), 0
        there = memory.whole()
        try:
            if self.capacity == "auto":
                capacity.check_least(there)
                free = memory.available_bytes()
                return capacity.auto_capacity(free), capacity.auto_limit(free)
            models = checked.size(self.capacity, "--capacity")
            limit = capacity.server_limit(models, there)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--capacity") from error
        if limit < capacity.limit(models):
            log.warning(
                "little memory is left for calls besides the models",
                models=format_bytes(models),
                server=format_bytes(limit),
            )
        return models, limit


@dataclass(frozen=True, slots=True)
class Storage:
    """The options for the sources of model files, and for the folder where pulled files are kept."""

    model_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_MODEL_DIR",
            help="Folder for the pulled files of this pod only; complete files in it are used again after a restart. "
            "Default: a temporary folder.",
        ),
    ] = None
    file_root: Annotated[
        list[Path] | None,
        typer.Option(
            envvar="MESH_FILE_ROOT", help="Folder from which file: paths may be read; may be repeated. Default: none."
        ),
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
        typer.Option(envvar="MESH_STORAGE_CA", help="PEM file with the authorities to trust for stores."),
    ] = None
    pvc_root: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_PVC_ROOT", help="Folder where volumes for pvc: paths are mounted, each under its name."
        ),
    ] = None
    disk_budget: Annotated[
        str,
        typer.Option(
            envvar="MESH_DISK_BUDGET",
            help=(
                "Disk space for pulled files, in bytes or with a unit such as GiB; auto: all but a tenth of the disk, "
                "or all but 10 GiB if that is more."
            ),
        ),
    ] = "auto"
    pull_bandwidth: Annotated[
        str,
        typer.Option(
            envvar="MESH_PULL_BANDWIDTH", help="Bandwidth of all pulls together, in bytes a second; 0: no limit."
        ),
    ] = "0"
    pull_connections: Annotated[
        int, typer.Option(envvar="MESH_PULL_CONNECTIONS", min=1, help="Number of concurrent connections to stores.")
    ] = 32

    def proxies(self) -> Proxies:
        """Returns the proxies that the environment names. Raises BadParameter."""
        try:
            return Proxies.of()
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="environment") from error


@dataclass(frozen=True, slots=True)
class Work:
    """The limits on loads, on calls and on the model server."""

    load_timeout: Annotated[
        float,
        typer.Option(
            envvar="MESH_LOAD_TIMEOUT", min=0.1, help="Time limit of one load in the model server, in seconds."
        ),
    ] = 90.0
    load_concurrency: Annotated[
        int,
        typer.Option(
            envvar="MESH_LOAD_CONCURRENCY", min=0, help="Number of concurrent loads; 0: one for each CPU, at least 2."
        ),
    ] = 0
    threads: Annotated[
        int,
        typer.Option(envvar="MESH_THREADS", min=0, help="Number of threads for long calls; 0: one for each CPU."),
    ] = 0
    max_message: Annotated[
        str, typer.Option(envvar="MESH_MAX_MESSAGE", help="Size of the largest request or reply, in bytes.")
    ] = "16MiB"
    max_body_bytes: Annotated[
        str,
        typer.Option(
            envvar="MESH_MAX_BODY_BYTES",
            help="Bytes of requests and replies that the model server may hold; once half is used, large requests are "
            "refused with 429. auto: 512 MiB, or four times --max-message if that is more.",
        ),
    ] = "auto"
    hang_timeout: Annotated[
        float,
        typer.Option(
            envvar="MESH_HANG_TIMEOUT",
            min=1.0,
            help="Silence of the model server after which it is replaced, in seconds; less than 3 counts as 3. A "
            "server that a signal has stopped is replaced after 3 seconds.",
        ),
    ] = 12.0
    server_module: Annotated[
        str,
        # Only for tests, which replace the server.
        typer.Option(envvar="MESH_SERVER_MODULE", hidden=True, help="Python module run as the model server."),
    ] = SERVER
    drain_timeout: Annotated[
        float,
        typer.Option(
            envvar="MESH_DRAIN_TIMEOUT",
            min=0.0,
            help="Time for loads and calls in flight to end after SIGTERM, in seconds.",
        ),
    ] = 20.0

    def body_bytes(self) -> int:
        """Returns the number of bytes of bodies that the model server may have in memory. Raises BadParameter if a
        message of the largest size does not fit."""
        return checked.body_bytes(self.max_body_bytes, least=_BODY_BYTES, max_message=self.max_message)


@dataclass(frozen=True, slots=True)
class ModelServer:
    """The options for a foreign model server."""

    server: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVER",
            metavar="ADDRESS",
            help="Address of a model server that speaks ModelMesh's API (mmesh.ModelRuntime) or has an --adapter, "
            "HOST:PORT or unix:/PATH; default: Mesh's own ONNX server.",
        ),
    ] = ""
    server_command: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVER_COMMAND",
            metavar="COMMAND",
            help="Command that starts a model server as a child of this pod. {socket} in it becomes the path of a unix "
            "socket to listen on, {port} a free port, {models} the folder from which a server with an adapter reads "
            "models; without the first two, the server listens on --server.",
        ),
    ] = ""

    adapter: Annotated[
        str,
        typer.Option(
            envvar="MESH_ADAPTER",
            metavar="|".join(kinds.KINDS),
            help="Kind of a model server that does not speak mmesh.ModelRuntime. Without --server and "
            "--server-command, this pod starts the server itself, if `mesh servers` lists it as installed.",
        ),
    ] = ""

    server_models: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_SERVER_MODELS",
            metavar="DIR",
            help="Folder for the models of a server with an adapter, which reads the subfolder `models`. Needed with "
            "--server; default: a folder of this pod.",
        ),
    ] = None

    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            envvar="MESH_ALLOW_CODE",
            help="Allow models that run code when loaded, such as scikit-learn pickles. Every caller who may register "
            "models can then run any program in this pod.",
        ),
    ] = False

    server_rest: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVER_REST",
            metavar="HOST:PORT",
            help="Address of the REST API by which the server of --adapter ovms is managed.",
        ),
    ] = ""

    server_calls: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVER_CALLS",
            metavar="ADDRESS",
            help="Address at which the server of --server or --server-command answers inference calls, HOST:PORT or "
            "unix:/PATH; default: the same as for mmesh.ModelRuntime.",
        ),
    ] = ""

    egress: Annotated[
        str,
        typer.Option(
            envvar="MESH_EGRESS",
            metavar="envoy|grpc|auto",
            help=(
                "Program that carries calls to the server of --server or --server-command: envoy (an Envoy of "
                "this pod), grpc (grpc.aio: slower, but without another process) or auto (envoy if it is "
                "installed)."
            ),
        ),
    ] = "auto"

    direct_calls: Annotated[
        bool,
        typer.Option(
            envvar="MESH_DIRECT_CALLS",
            help=(
                "Send calls of one message to the server of --server or --server-command over an HTTP/2 connection of "
                "the relay's own, which costs less. Other calls, or all with --no-direct-calls, go through the egress."
            ),
        ),
    ] = True

    server_memory: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVER_MEMORY",
            metavar="auto|none",
            help=(
                "Measurement of the memory of the server of --server or --server-command: auto (if its processes "
                "are visible) or none."
            ),
        ),
    ] = "auto"
    server_memory_limit: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVER_MEMORY_LIMIT",
            help="Memory that the server of --server may use, such as the limit of its container, in bytes or with a "
            "unit such as GiB; auto: as much as this pod.",
        ),
    ] = "auto"
    server_metrics: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVER_METRICS",
            metavar="ADDRESS",
            help="Address of the metrics of the server of --server or --server-command, HOST:PORT, which contain the "
            "memory of its GPUs, as Triton's do; default: none.",
        ),
    ] = ""
    types: Annotated[
        str,
        typer.Option(
            envvar="MESH_TYPES",
            metavar="TYPE,...",
            help="List of the model types that the server takes, NAME or NAME:VERSION, separated by commas, or 'any'; "
            "default: onnx, those of the --adapter, or any with another server.",
        ),
    ] = ""

    @property
    def foreign(self) -> bool:
        """True if the model server is a foreign one."""
        return bool(self.server or self.server_command or self.adapter)

    @property
    def installed(self) -> bool:
        """True if the pod starts a server that Mesh has installed."""
        return bool(self.adapter) and not (self.server or self.server_command)

    def memory_limit(self) -> int:
        """Returns the bytes that the server may take, or 0 if the option does not say. Raises BadParameter."""
        limit = self.server_memory_limit
        return 0 if limit == "auto" else checked.size(limit, "--server-memory-limit")

    def at_hand(self) -> int:
        """Returns the bytes that a server with an adapter may take, or 0 if they are unknown, or if the server has no
        adapter and so decides itself. Raises BadParameter."""
        if not self.adapter:
            return 0
        neighbour = bool(self.server) and not self.server_command
        return self.memory_limit() or (0 if neighbour else memory.available_bytes())

    def metrics(self) -> str:
        """Returns the address of the server's metrics, or "" if none is given. Raises BadParameter."""
        if self.server_metrics and not (self.server or self.server_command):
            text = "it needs --server or --server-command"
            raise typer.BadParameter(text, param_hint="--server-metrics")
        return checked.address(self.server_metrics, "--server-metrics") if self.server_metrics else ""

    def served(self, *, ours: bool) -> tuple[str, ...]:
        """Returns the model types that the server accepts, or an empty tuple if it accepts all. `ours` is True for the
        ONNX server."""
        if not self.types:
            if self.adapter:
                return kinds.KINDS[self.adapter].served(allow_code=self.allow_code, installed=self.installed)
            return (ONNX,) if ours else ()
        return () if self.types == "any" else tuple(one.strip() for one in self.types.split(",") if one.strip())

    def carrier(self) -> Literal["envoy", "grpc"]:
        """Returns the egress to use. For `auto`, this is Envoy if it is installed. Raises BadParameter."""
        if self.egress not in ("envoy", "grpc", "auto"):
            raise typer.BadParameter(
                f"{self.egress!r} is not an egress: use envoy, grpc or auto", param_hint="--egress"
            )
        if self.egress == "grpc" or not self.foreign:
            return "grpc"
        try:
            find_binary("envoy")
        except FileNotFoundError as error:
            if self.egress == "envoy":
                raise typer.BadParameter(f"{error}, or use --egress grpc", param_hint="--egress") from error
            log.info("Envoy is not installed: grpc.aio carries calls to the model server", because=str(error))
            return "grpc"
        return "envoy"

    def check(self) -> None:
        """Checks the options. Raises BadParameter for unknown values, and for options that need or exclude others."""
        if self.adapter and self.adapter not in kinds.KINDS:
            known = " or ".join(kinds.KINDS)
            raise typer.BadParameter(f"{self.adapter!r} is not an adapter: use {known}", param_hint="--adapter")
        if self.installed and (lacks := availability.missing(self.adapter)):
            other = "" if "--server" in lacks else ", or name one that is running with --server"
            raise typer.BadParameter(f"{lacks}{other}", param_hint="--adapter")
        if self.adapter and self.server and not self.server_command and self.server_models is None:
            text = "--adapter and --server need it: name the folder for models that the server and this pod share"
            raise typer.BadParameter(text, param_hint="--server-models")
        if (self.server_models is not None or self.allow_code) and not self.adapter:
            option = "--allow-code" if self.allow_code else "--server-models"
            raise typer.BadParameter("it needs --adapter", param_hint=option)
        if (self.adapter == kinds.OVMS.name) != bool(self.server_rest):
            lacks = "--adapter ovms needs it: name the REST port of OVMS, HOST:PORT"
            text = "it needs --adapter ovms" if self.server_rest else lacks
            raise typer.BadParameter(text, param_hint="--server-rest")
        if self.server_memory_limit != "auto" and not self.server:
            raise typer.BadParameter("it needs --server", param_hint="--server-memory-limit")
        if self.adapter and not self.types and not self.served(ours=False):
            text = f"this pod's {self.adapter} serves only models that run code"
            text += ": add this option if all who may register models are trusted"
            raise typer.BadParameter(text, param_hint="--allow-code")
        if self.server_memory not in ("auto", "none"):
            raise typer.BadParameter(f"{self.server_memory!r} is neither auto nor none", param_hint="--server-memory")

    def address(self) -> str:
        """Returns the server's address in gRPC's notation, or "" if no address is given. Raises BadParameter."""
        return _target(self.server, "--server")

    def rest(self) -> str:
        """Returns the address of the REST API by which the server is managed, or "" if it has none. Raises
        BadParameter."""
        return checked.address(self.server_rest, "--server-rest") if self.server_rest else ""

    def calls(self) -> str:
        """Returns the address for inference calls in gRPC's notation, or "" if it is the same as `address`. Raises
        BadParameter."""
        if self.server_calls and not (self.server or self.server_command):
            text = "it needs --server or --server-command"
            raise typer.BadParameter(text, param_hint="--server-calls")
        return _target(self.server_calls, "--server-calls")


def _target(text: str, option: str) -> str:
    try:
        return servers.target(text) if text else ""
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


@dataclass(frozen=True, slots=True)
class Membership:
    """The pod's lease, its comparisons with the registry, and its behaviour without etcd."""

    lease_ttl: Annotated[
        int,
        typer.Option(
            envvar="MESH_LEASE_TTL", min=2, help="Lease time to live, after which a dead pod is removed, in seconds."
        ),
    ] = 10
    serve_without_etcd: Annotated[
        str,
        typer.Option(
            envvar="MESH_SERVE_WITHOUT_ETCD",
            metavar="SECONDS|forever",
            help="Time for which loaded models are served without contact to etcd, in seconds, or 'forever'.",
        ),
    ] = "forever"
    check_interval: Annotated[
        float,
        typer.Option(
            envvar="MESH_CHECK_INTERVAL",
            min=0.1,
            help="Time between two comparisons of this pod's copies with the registry, in seconds.",
        ),
    ] = 30.0

"""Settings of `mesh up`, and their defaults."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh.host import cgroups, memory
from mesh.modelservers import availability, kinds
from mesh.options.values import format_address, parse_address
from mesh.schema import auth

LOOPBACK = "127.0.0.1"

MOST_PODS = 64
"""Maximum number of pods of one kind."""

MEMORY_SHARE = 0.5
"""Share of the free memory that all pods together may use; the rest is for calls and other programs."""


class UpError(Exception):
    """The reason why a mesh cannot run; the text says what to do."""


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A foreign model server, started by a pod of its own."""

    types: str  # of the models that it takes, separated by commas
    command: str  # with {socket} or {port} for the address to listen on

    @classmethod
    def parse(cls, text: str) -> "LocalServer":
        """Parses `TYPE,...=COMMAND`. Raises ValueError."""
        types, separator, command = (part.strip() for part in text.partition("="))
        if not separator or not types or not command or " " in types:
            raise ValueError(
                f"{text!r} does not say which types a server takes, and how to start it: write TYPE,...=COMMAND"
            )
        return cls(types, command)


def counted(texts: Sequence[str]) -> dict[str, int]:
    """Returns the number of pods of each kind of server, from texts such as `mlserver` and `onnx=2`. Raises
    ValueError."""
    counts: dict[str, int] = {}
    for text in texts:
        name, separator, number = text.partition("=")
        if name != kinds.ONNX and name not in kinds.KINDS:
            known = ", ".join((kinds.ONNX, *kinds.KINDS))
            raise ValueError(f"{name!r} is not a kind of server: use {known}")
        if separator and not (number.isascii() and number.isdigit() and int(number) <= MOST_PODS):
            raise ValueError(f"{text!r}: the number of pods must be from 0 to {MOST_PODS}")
        counts[name] = counts.get(name, 0) + (int(number) if separator else 1)
    return counts


@dataclass(frozen=True, slots=True)
class UpSettings:
    """Settings of one mesh on this machine. Times are in seconds."""

    listen: str = "127.0.0.1:8033"  # clients: gRPC and REST
    rest_listen: str = "127.0.0.1:8008"  # REST, if the edge is grpc
    probe: str = "127.0.0.1:8089"  # /ready, /live, /metrics of the router
    edge: str = "envoy"
    workers: str = "auto"
    pods: int = 2  # with our ONNX server
    adapted: tuple[str, ...] = ()  # kinds of servers that Mesh has installed, each in a further pod
    allow_code: bool = False  # those servers load models that run code, such as pickles
    servers: tuple[LocalServer, ...] = ()  # that are not ours, each in a further pod
    capacity: int = 0  # bytes of each pod; 0: a share of the free memory
    device: str = "auto"
    threads: int = 0  # of a pod's model server; 0: the server's default
    base: str = "mm/mesh"  # prefix in etcd, no trailing slash
    etcd_port: int = 0  # 0: a free one
    data_dir: Path = Path(".mesh")
    file_roots: tuple[Path, ...] = ()  # besides the folder of the sample models
    http_allow_private: bool = False
    storage_config: Path | None = None  # folder with the storage secret
    storage_ca: Path | None = None  # PEM file
    pvc_root: Path | None = None
    eviction: str = "lru"
    disk_budget: int | None = None  # bytes of each pod; None: what the disk has room for
    router_limits: tuple[str, ...] = ()  # options for the command line of the router
    runtime_limits: tuple[str, ...] = ()  # options for the command line of runtime pods
    auth: str = "off"  # which requests need a key; the admin's key is in `admin_key_file`
    lease_ttl: int = 10
    log_level: str = "info"
    start_timeout: float = 60.0
    drain_timeout: float = 5.0  # for calls in flight to end when the mesh is stopped

    def check(self) -> None:
        """Checks the settings before anything is started. Raises UpError if they cannot work."""
        for option, address in (
            ("--listen", self.listen),
            ("--probe", self.probe),
            ("--rest-listen", self.rest_listen),
        ):
            try:
                _, port = parse_address(address)
            except ValueError as error:
                raise UpError(f"{option}: {error}") from error
            if port == 0 and option != "--rest-listen":
                raise UpError(f"{option}: port 0 cannot be used here, because clients must know the port: name one")
        if self.own_pods < 1:
            raise UpError("--pods: a mesh needs at least 1 runtime pod with a server that Mesh starts itself, not 0")
        for kind in dict.fromkeys(self.adapted):
            if lacks := availability.missing(kind):
                raise UpError(f"--server: {lacks}")
            if not kinds.KINDS[kind].served(allow_code=self.allow_code, installed=True):
                raise UpError(f"--server: {kind} serves only models that run code: add --allow-code")
        if self.allow_code and not self.adapted:
            raise UpError("--allow-code applies only to pods of other servers: add one, such as --server mlserver")
        for option, folder in (("--storage-config", self.storage_config), ("--pvc-root", self.pvc_root)):
            if folder is not None and not folder.is_dir():
                raise UpError(f"{option}: {folder} is not a folder: name an existing one")
        if self.storage_ca is not None and not self.storage_ca.is_file():
            raise UpError(f"--storage-ca: {self.storage_ca} is not a file: name one with certificates in PEM")

    @property
    def own_pods(self) -> int:
        """The number of runtime pods whose servers come from Mesh, which share the free memory."""
        return self.pods + len(self.adapted)

    @property
    def all_pods(self) -> int:
        """The number of runtime pods."""
        return self.own_pods + len(self.servers)

    @property
    def rest_address(self) -> str:
        """The address of REST, as this machine reaches it."""
        return reachable(self.listen if self.edge == "envoy" else self.rest_listen)

    @property
    def grpc_address(self) -> str:
        """The address of gRPC, as this machine reaches it."""
        return reachable(self.listen)

    @property
    def admin_key_file(self) -> Path:
        """The file of the admin's key, if requests need one."""
        return self.data_dir / "admin.key"

    def admin_key(self) -> str:
        """Returns the admin's key, and creates it when it is first needed. Returns "" if no requests need a key. Raises
        UpError."""
        if self.auth == "off":
            return ""
        file = self.admin_key_file
        try:
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)
                file.write_text(auth.fresh() + "\n")
            return file.read_text().split()[-1]
        except LookupError as error:
            raise UpError(f"{file} contains no key: remove it, and the next start creates one") from error
        except OSError as error:
            raise UpError(
                f"{file}, the file of the admin's key, cannot be used ({error.strerror}): let this user read and "
                "write it"
            ) from error

    @property
    def samples_dir(self) -> Path:
        """The folder of the sample models."""
        return self.data_dir / "samples"


def reachable(address: str) -> str:
    """Returns the address to connect to, given an address to listen on. If the server listens on all interfaces, this
    is a loopback address."""
    host, port = parse_address(address)
    if host in ("0.0.0.0", "::", ""):
        host = LOOPBACK if host != "::" else "::1"
    return format_address(host, port)


def default_capacity(pods: int, *, meminfo: Path = memory.MEMINFO, cgroup: Path = cgroups.ROOT) -> int:
    """Returns the capacity of each pod in bytes: an equal part of half of the free memory, within the limits of this
    machine and container, and at least 64 MiB."""
    free = memory.available_bytes(meminfo=meminfo, cgroup=cgroup)
    return max(int(free * MEMORY_SHARE / pods) // 2**20, 64) * 2**20

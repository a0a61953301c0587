"""The settings of an agent, as one frozen object. Only `mesh.runtime.__main__` reads the environment."""

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mesh.options.etcdsettings import EtcdSettings
from mesh.options.values import parse_address
from mesh.runtime.cache.books import demand
from puller.proxies import DIRECT, Proxies

MIB = 1 << 20
SERVER = "mesh.runtime.server"
"""The module of Mesh's own ONNX server. A replacement must take the same command line."""


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """The settings of one runtime pod. Times are in seconds, sizes in bytes."""

    name: str  # of the pod, unique in the mesh
    base: str = "mm/mesh"  # prefix of all keys, no trailing slash
    install_id: str = ""  # the owner of that prefix; empty: not checked
    data: str = "127.0.0.1:0"  # inference, gRPC over HTTP/1.1; port 0: a free one
    control: str = "127.0.0.1:0"  # requests of routers to the agent, gRPC
    probe: str = "127.0.0.1:0"  # /ready, /live, /metrics
    internal_tls: Path | None = None  # folder of this process's identity in the mesh; None: routers use no TLS
    advertise: str = ""  # host by which others reach this pod; empty: that of `data`, or this host's own address
    capacity: int = 1024 * MIB  # for models; 0: what the model server reports
    memory_limit: int = 0  # of the whole model server; 0: derived from the capacity
    etcd: EtcdSettings = field(default_factory=EtcdSettings)
    labels: tuple[str, ...] = ()
    types: tuple[str, ...] = ()  # of models that the model server takes; none: any
    zone: str = ""
    model_dir: Path | None = None  # pulled files; None: within the run directory
    file_roots: tuple[Path, ...] = ()
    http_allow_private: bool = False
    storage_config: Path | None = None  # folder of the storage secret, one JSON file per key
    pvc_root: Path | None = None  # volumes that pvc: paths may name, a folder each
    storage_ca: bytes | None = None  # PEM, trusted in addition to the system's
    proxies: Proxies = DIRECT  # the operator's, to stores
    disk_budget: int | None = None  # for pulled files; None: as much as the disk has room for
    pull_bandwidth: int = 0  # bytes a second, all pulls together; 0: no limit
    pull_connections: int = 32
    load_timeout: float = 90.0  # for one load in the model server
    load_concurrency: int = 2
    threads: int = 2  # threads of the model server for long calls
    device: str = "auto"
    device_capacity: int = 0  # for models, of the device's memory; 0: most of what is free there
    lease_ttl: int = 10
    serve_without_etcd: float | None = None  # for this long after the last contact to etcd; None: without limit
    drain_timeout: float = 20.0
    demand_window: float = demand.WINDOW  # time for which a model counts as in use after its last call
    eviction: str = "lru"  # policy of `placement` that chooses the copies to evict
    max_message: int = 16 * MIB
    max_body_bytes: int = 512 * MIB  # of requests and replies that the model server holds, together
    server_module: str = SERVER  # run as the model server
    server: str = ""  # address of a model server that is not ours, as gRPC names it
    server_command: str = ""  # starts that server; {socket}, {port} and {models} are filled in
    adapter: str = ""  # the kind of a server that does not speak the SPI; "": it does
    server_models: Path | None = None  # the folder from which such a server reads its models; None: one of this pod
    allow_code: bool = False  # models may run code when they are loaded
    server_rest: str = ""  # HOST:PORT of the REST API by which a server with an adapter is managed
    server_calls: str = ""  # address at which it answers inference calls; "": the same
    egress: Literal["envoy", "grpc"] = "grpc"  # what carries calls from the relay to that server
    direct_calls: bool = True  # calls of one message go over a connection of the relay's own instead
    server_metrics: str = ""  # address of such a server's metrics, which contain the memory of its GPUs; "": none
    server_memory_limit: int = 0  # memory that such a server may take; 0: what this pod can see
    server_memory: str = "auto"  # whether the memory of a server that is not ours is observed; or "none"
    hang_timeout: float = 12.0  # silence of the model server after which it is killed
    check_interval: float = 30.0  # between two comparisons with the registry
    log_format: str = "text"
    log_level: str = "info"

    @property
    def foreign(self) -> bool:
        """True if the model server is a foreign one."""
        return bool(self.server or self.server_command or self.adapter)

    @property
    def slots(self) -> int:
        """The number of slots of the use board: the number of the smallest models that the capacity can hold, within
        limits, or 8192 if the model server is yet to report the capacity."""
        return min(max(self.capacity // (32 << 10), 1024), 32768) if self.capacity else 8192

    def reachable(self, address: str) -> str:
        """Returns the host by which other machines reach an address at which this pod listens."""
        host, _ = parse_address(address)
        if self.advertise:
            return self.advertise
        return host if host not in ("0.0.0.0", "::", "") else own_address()


def own_address() -> str:
    """Returns this host's address for other machines: that of the outgoing interface, or else loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address; nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"

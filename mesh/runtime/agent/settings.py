"""What an agent is told, as one frozen object. Nothing below `__main__` reads the environment."""

import socket
from dataclasses import dataclass, field
from pathlib import Path

from mesh.options.etcdsettings import EtcdSettings
from mesh.options.values import parse_address
from mesh.runtime.cache.books import demand
from puller.proxies import DIRECT, Proxies

MIB = 1 << 20
SERVER = "mesh.runtime.server"
"""Our ONNX server. Another module must take its command line."""


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """One runtime pod. Times in seconds, sizes in bytes."""

    name: str  # of the pod, unique in the mesh
    base: str = "mm/mesh"  # prefix of all keys, no trailing slash
    install_id: str = ""  # whose prefix that is; empty: nobody asks
    data: str = "127.0.0.1:0"  # inference, gRPC over HTTP/1.1; port 0: a free one
    control: str = "127.0.0.1:0"  # what routers ask of the agent, gRPC
    probe: str = "127.0.0.1:0"  # /ready, /live, /metrics
    internal_tls: Path | None = None  # folder of the identity among the mesh's processes; None: no TLS from routers
    advertise: str = ""  # host that others reach this pod by; empty: that of `data`, or this host's own address
    capacity: int = 1024 * MIB  # for models
    memory_limit: int = 0  # of the model server in all; 0: what the capacity makes of it
    etcd: EtcdSettings = field(default_factory=EtcdSettings)
    labels: tuple[str, ...] = ()
    zone: str = ""
    model_dir: Path | None = None  # pulled files; None: within the run directory
    file_roots: tuple[Path, ...] = ()
    http_allow_private: bool = False
    storage_config: Path | None = None  # folder of the storage secret, one JSON file a key
    pvc_root: Path | None = None  # volumes that pvc: paths may name, a folder each
    storage_ca: bytes | None = None  # PEM, trusted besides the system's
    proxies: Proxies = DIRECT  # the operator's, to stores
    disk_budget: int | None = None  # for pulled files; None: what the disk has room for
    pull_bandwidth: int = 0  # bytes a second, all pulls together; 0: no limit
    pull_connections: int = 32
    load_timeout: float = 90.0  # of the model server, for one load
    load_concurrency: int = 2
    threads: int = 2  # of the model server, for calls that are not short
    device: str = "auto"
    device_capacity: int = 0  # for models, of the device's memory; 0: a good part of what is free there
    lease_ttl: int = 10
    serve_without_etcd: float | None = None  # for so long after etcd was last reached; None: without end
    drain_timeout: float = 20.0
    demand_window: float = demand.WINDOW  # after its last call a model counts as in use for so long
    eviction: str = "lru"  # which copies make way first: a policy of `placement`
    max_message: int = 16 * MIB
    max_body_bytes: int = 512 * MIB  # of all requests and replies that the model server holds
    server_module: str = SERVER  # what is run as the model server
    hang_timeout: float = 12.0  # silence of the model server after which it is killed
    check_interval: float = 30.0  # between two comparisons with the registry
    log_format: str = "text"
    log_level: str = "info"

    @property
    def slots(self) -> int:
        """Of the use board: as many as the smallest models that the capacity holds, within reason."""
        return min(max(self.capacity // (32 << 10), 1024), 32768)

    def reachable(self, address: str) -> str:
        """The host that others reach an address of ours by."""
        host, _ = parse_address(address)
        if self.advertise:
            return self.advertise
        return host if host not in ("0.0.0.0", "::", "") else own_address()


def own_address() -> str:
    """This host's address as others see it: that of the interface which leads outside, else loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address; nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"

"""The router's settings: one frozen object from the command line and the environment, passed to the workers as a file.

Only `__main__` reads the environment. The file is in the run directory, to which only this user has access, because it
contains the password for etcd. (Command lines are visible to all users of the machine.)
"""

import base64
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mesh.options.etcdsettings import EtcdFiles, EtcdSettings
from mesh.tokens.settings import TokenSettings

MiB = 1 << 20

_SECRETS = ("ca", "certificate", "private_key")  # bytes in EtcdSettings: JSON has none


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """The settings of one router pod. Times are in seconds, sizes in bytes."""

    name: str
    base: str = "mm/mesh"  # prefix of all keys, no trailing slash
    install_id: str = ""  # the prefix's owner; empty: not checked
    listen: str = "127.0.0.1:8033"
    edge: str = "envoy"  # or "grpc"
    tls_certificate: str = ""  # path of a PEM file; empty: no TLS for clients
    tls_key: str = ""
    tls_client_ca: str = ""  # path of a PEM file: clients' certificates must be signed by these authorities
    tls_client_auth: str = "require"  # with tls_client_ca; or "optional": clients need no certificate
    internal_tls: str = ""  # folder of the certificate for calls within the mesh; empty: no TLS to runtime pods
    connection_age: float = 0.0  # after which clients are asked to reconnect; 0: never
    management_listen: str = ""  # address for management, which `listen` then does not serve; empty: none
    rest_listen: str = "127.0.0.1:8008"  # only with the grpc edge; with Envoy REST shares the port of gRPC
    probe: str = "127.0.0.1:8089"
    workers: int = 1  # 0: by the CPUs granted
    run_dir: str = ""
    etcd: EtcdSettings = field(default_factory=EtcdSettings)
    max_message: int = 16 * MiB
    max_forwarded_message: int = 0  # of a message that is passed on in pieces; 0: no limit
    max_body_bytes: int = 256 * MiB  # of all requests and replies that one worker holds
    min_body_rate: int = 32 * 1024  # lowest rate at which a body may arrive or be read, bytes a second; 0: no limit
    edge_memory: int = 384 * MiB  # near which Envoy refuses new connections; 0: no limit
    max_connections_per_pod: int = 1024  # of one worker: HTTP/1.1 takes one for each call in flight
    connect_timeout: float = 1.0

    load_wait: float = 120.0  # longest wait of a caller for a load
    max_waiters: int = 20_000  # calls that wait for loads, in one worker
    max_waiters_per_model: int = 2_000
    max_waiting_bytes: int = 256 * MiB  # of their messages
    failure_expiry: float = 900.0  # how long a failed load counts
    registry_timeout: float = 3.0  # of one read of a record
    verify_timeout: float = 0.5  # of the read that lets a suspect copy answer
    registry_cache: int = 10_000  # records
    unload_wait: float = 10.0  # longest wait for the agents when unregistering
    reregister_after: float | None = 600.0  # longest wait for a pod that is cut off; None: no limit
    multi_parallelism: int = 4  # calls in flight of one call with several ids
    dataplane: str = ""  # JSON of a data-plane configuration; empty: none, or the file's
    dataplane_path: str = ""  # file with it, which is watched
    default_vmodel_owner: str = ""  # of vmodels that are created without an owner

    auth: str = "off"  # callers that must be known: those of "management", or all ("required")
    audit: str = "off"  # the trail of changes: "log", or the path of a file
    admin_key_file: str = ""  # path of a file with the key of an admin; empty: none
    tokens: TokenSettings = field(default_factory=TokenSettings)
    grants_file: str = ""  # path of a file with grants, which is watched; empty: none

    drain: float = 20.0  # time for calls in flight when the router stops
    log_format: str = "text"
    log_level: str = "info"

    def socket(self, kind: str, worker: int) -> str:
        """Returns the path of a worker's socket. `kind` is one of those in `router.process.sockets`."""
        return f"{self.run_dir}/{kind}{worker}"

    @property
    def feed(self) -> str:
        """The path of the socket of the feed from the pod to its workers."""
        return f"{self.run_dir}/feed"

    @property
    def dataplane_published(self) -> Path:
        """The file by which the pod passes the data-plane configuration to its workers."""
        return Path(self.run_dir) / "dataplane.json"

    @property
    def grants_published(self) -> Path:
        """The file by which the pod passes the grants of the followed file to its workers."""
        return Path(self.run_dir) / "grants.json"

    def write(self, path: Path) -> None:
        """Writes the settings to a file that only this user can read."""
        data = asdict(self)
        for name in _SECRETS:
            if data["etcd"][name] is not None:
                data["etcd"][name] = base64.b64encode(data["etcd"][name]).decode()
        path.touch(mode=0o600)
        path.write_text(json.dumps(data))

    @classmethod
    def read(cls, path: Path) -> "RouterSettings":
        """Reads the settings from a file that `write` has written."""
        data: dict[str, Any] = json.loads(path.read_text())
        etcd: dict[str, Any] = data.pop("etcd")
        for name in _SECRETS:
            if etcd[name] is not None:
                etcd[name] = base64.b64decode(etcd[name])
        etcd["endpoints"] = tuple(etcd["endpoints"])
        etcd["files"] = EtcdFiles(**etcd["files"])
        tokens = TokenSettings.of(data.pop("tokens"))
        return cls(etcd=EtcdSettings(**etcd), tokens=tokens, **data)

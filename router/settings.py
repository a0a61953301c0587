"""The router's settings: one frozen object from the command line and the environment, handed to the workers as a file.

Nothing below `__main__` reads the environment. The file lies in the run directory, which only this user can enter,
because it holds the password for etcd; command lines are visible to everybody on the machine.
"""

import base64
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mesh.options.etcdsettings import EtcdFiles, EtcdSettings

MiB = 1 << 20

_SECRETS = ("ca", "certificate", "private_key")  # bytes in EtcdSettings: JSON has none


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """How one router pod runs. Times in seconds, sizes in bytes."""

    name: str
    base: str = "mm/mesh"  # prefix of all keys, no trailing slash
    install_id: str = ""  # whose prefix that is; empty: nobody asks
    listen: str = "127.0.0.1:8033"
    edge: str = "envoy"  # or "grpc"
    tls_certificate: str = ""  # path of a PEM file; empty: no TLS for clients
    tls_key: str = ""
    tls_client_ca: str = ""  # path of a PEM file: a certificate that clients show must be one that it signed
    tls_client_auth: str = "require"  # with it; or "optional": clients may show none
    internal_tls: str = ""  # folder of the identity among the mesh's processes; empty: no TLS to runtime pods
    connection_age: float = 0.0  # after which clients are asked to connect anew; 0: never
    rest_listen: str = "127.0.0.1:8008"  # REST has a port of its own only with the grpc edge
    probe: str = "127.0.0.1:8089"
    workers: int = 1  # 0: by the CPUs granted
    run_dir: str = ""
    etcd: EtcdSettings = field(default_factory=EtcdSettings)
    max_message: int = 16 * MiB
    max_body_bytes: int = 256 * MiB  # of all requests and replies that one worker holds
    min_body_rate: int = 32 * 1024  # bytes a second that a body has to come or be taken with; 0: any
    edge_memory: int = 384 * MiB  # at which Envoy refuses new connections; 0: any
    max_connections_per_pod: int = 1024  # of one worker: HTTP/1.1 takes one for each call in flight
    connect_timeout: float = 1.0

    load_wait: float = 120.0  # longest that a caller waits for a load
    max_waiters: int = 20_000  # calls that wait for loads, in one worker
    max_waiters_per_model: int = 2_000
    max_waiting_bytes: int = 256 * MiB  # of their messages
    failure_expiry: float = 900.0  # a failed load counts for so long
    registry_timeout: float = 3.0  # of one read of a record
    verify_timeout: float = 0.5  # of the read that lets a suspect copy answer
    registry_cache: int = 10_000  # records
    unload_wait: float = 10.0  # longest that unregistering waits for the agents
    reregister_after: float | None = 600.0  # after which a pod that is cut off is not waited for; None: it always is

    drain: float = 20.0  # calls in flight get so long when the router stops
    log_format: str = "text"
    log_level: str = "info"

    def socket(self, kind: str, worker: int) -> str:
        """Path of a worker's socket; `kind` is grpc or rest."""
        return f"{self.run_dir}/{kind}{worker}"

    @property
    def feed(self) -> str:
        """Path of the socket over which the pod tells its workers what is where."""
        return f"{self.run_dir}/feed"

    def write(self, path: Path) -> None:
        """To a file that only this user can read."""
        data = asdict(self)
        for name in _SECRETS:
            if data["etcd"][name] is not None:
                data["etcd"][name] = base64.b64encode(data["etcd"][name]).decode()
        path.touch(mode=0o600)
        path.write_text(json.dumps(data))

    @classmethod
    def read(cls, path: Path) -> "RouterSettings":
        """From the file that `write` has written."""
        data: dict[str, Any] = json.loads(path.read_text())
        etcd: dict[str, Any] = data.pop("etcd")
        for name in _SECRETS:
            if etcd[name] is not None:
                etcd[name] = base64.b64decode(etcd[name])
        etcd["endpoints"] = tuple(etcd["endpoints"])
        etcd["files"] = EtcdFiles(**etcd["files"])
        return cls(etcd=EtcdSettings(**etcd), **data)

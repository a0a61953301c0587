"""Settings for the connection to etcd: addresses, credentials, timeouts.

Each process builds one frozen settings object from its command line and environment, at its entry point.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EtcdFiles:
    """The sources of EtcdSettings, as absolute paths; "" means no file. If `config` is set, it is the only source."""

    config: str = ""  # ModelMesh's JSON, which may name files beside it
    root_prefix: str = ""  # from that file: the prefix of the keys, fixed for the life of the process
    password: str = ""
    ca: str = ""
    certificate: str = ""
    private_key: str = ""


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """The settings for a connection to etcd. Times are in seconds."""

    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)  # http:// or https://, one for each member
    user: str = ""
    password: str = ""
    ca: bytes | None = None  # PEM; None with https: the system's authorities
    certificate: bytes | None = None  # PEM, for mutual TLS
    private_key: bytes | None = None
    files: EtcdFiles = EtcdFiles()  # the sources, read again when they change
    server_name: str = ""  # the name that etcd's certificates must have; empty: the endpoint's host
    timeout: float = 5.0  # for all attempts at one request together
    connect_timeout: float = 2.0

    def __repr__(self) -> str:  # keeps secrets out of logs
        return f"EtcdSettings(endpoints={self.endpoints!r}, user={self.user!r})"

"""How to reach etcd: addresses, credentials, time-outs.

Each process builds one frozen settings object from its command line and environment and hands parts of it down; nothing
below a process's entry point reads the environment.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EtcdFiles:
    """What EtcdSettings were read from, absolute paths; empty: from no file. With `config` there are no others."""

    config: str = ""  # ModelMesh's JSON, which may name files beside it
    root_prefix: str = ""  # that stood there: where the keys are, for as long as the process lives
    password: str = ""
    ca: str = ""
    certificate: str = ""
    private_key: str = ""


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """How to reach etcd. All times in seconds."""

    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)  # http:// or https://, one for each member
    user: str = ""
    password: str = ""
    ca: bytes | None = None  # PEM; None with https: the system's trust
    certificate: bytes | None = None  # PEM, for mutual TLS
    private_key: bytes | None = None
    files: EtcdFiles = EtcdFiles()  # where it stands, to be read again as it changes
    server_name: str = ""  # that its certificates are checked against; empty: the endpoint's host
    timeout: float = 5.0  # of one request, all attempts together
    connect_timeout: float = 2.0

    def __repr__(self) -> str:  # secrets stay out of logs
        return f"EtcdSettings(endpoints={self.endpoints!r}, user={self.user!r})"

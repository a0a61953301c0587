"""Settings that several processes share, and how their texts are read.

Each process builds one frozen settings object from its command line and environment and hands parts of it down; nothing
below a process's entry point reads the environment.
"""

import re
from dataclasses import dataclass

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from `67108864`, `64MiB`, `1.5Gi`, `200MB`. Raises ValueError with a text for the user."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write bytes or a number with a unit, such as 64MiB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: float) -> str:
    """A size for people, in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_span(text: str, unlimited: str) -> float | None:
    """Seconds from `600` or `0.5`; None for the word that stands for no limit. Raises ValueError with a text for the
    user."""
    if text.strip().lower() == unlimited:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < 1e9:
        raise ValueError(f"{text!r} is neither a number of seconds nor '{unlimited}'")
    return seconds


def parse_address(text: str) -> tuple[str, int]:
    """Host and port from `127.0.0.1:8033`, `[::1]:8033`, `:8033` (all interfaces) or `8033` (loopback)."""
    host, colon, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address: write HOST:PORT, such as 127.0.0.1:8033")
    if not colon:
        host = "127.0.0.1"
    elif not host:
        host = "0.0.0.0"
    return host.strip("[]"), int(port)


def parse_urls(text: str) -> tuple[str, ...]:
    """The URLs of a list that is separated by commas; spaces and empty entries do not count."""
    return tuple(url.strip() for url in text.split(",") if url.strip())


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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

"""The command line of Mesh's ONNX server, or of a module that takes the same one."""

from dataclasses import dataclass
from pathlib import Path

from mesh import process


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """The command line without the socket, which differs in each life. Times are in seconds, sizes in bytes."""

    module: str
    data: str  # the address to answer on
    incarnation: str  # of the agent
    board: Path
    capacity: int
    threads: int
    load_timeout: float
    load_concurrency: int
    device: str
    max_message: int
    max_body_bytes: int
    internal_tls: Path | None
    memory_limit: int
    log_format: str
    log_level: str

    def argv(self) -> tuple[str, ...]:
        """Returns the words of the command line."""
        options = {
            "data": self.data,
            "incarnation": self.incarnation,
            "board": str(self.board),
            "capacity": str(self.capacity),
            "threads": str(self.threads),
            "load-timeout": f"{self.load_timeout:g}",
            "load-concurrency": str(self.load_concurrency),
            "device": self.device,
            "max-message": str(self.max_message),
            "max-body-bytes": str(self.max_body_bytes),
            "memory-limit": str(self.memory_limit),
            "log-format": self.log_format,
            "log-level": self.log_level,
        }
        if self.internal_tls is not None:
            options["internal-tls"] = str(self.internal_tls)
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return tuple(process.python(self.module, *words))

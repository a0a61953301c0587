"""The command lines of the processes that answer on a data port: the ONNX server, and the relay to a foreign server."""

from dataclasses import dataclass
from pathlib import Path

from mesh import process


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """A command line without the path of the SPI's socket, which is different at each start of the process. Times are
    in seconds, sizes in bytes."""

    module: str
    data: str  # the address to answer on
    incarnation: str  # incarnation of the agent
    board: Path
    max_message: int
    max_body_bytes: int
    internal_tls: Path | None
    log_format: str
    log_level: str

    def argv(self) -> tuple[str, ...]:
        """Returns the words of the command line."""
        options = {
            "data": self.data,
            "incarnation": self.incarnation,
            "board": str(self.board),
            "max-message": str(self.max_message),
            "max-body-bytes": str(self.max_body_bytes),
            "log-format": self.log_format,
            "log-level": self.log_level,
            **self._own(),
        }
        if self.internal_tls is not None:
            options["internal-tls"] = str(self.internal_tls)
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return tuple(process.python(self.module, *words))

    def _own(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxLine(CommandLine):
    """The command line of the ONNX server, or of a module that takes the same options."""

    capacity: int
    threads: int
    load_timeout: float
    load_concurrency: int
    device: str
    memory_limit: int

    def _own(self) -> dict[str, str]:
        return {
            "capacity": str(self.capacity),
            "threads": str(self.threads),
            "load-timeout": f"{self.load_timeout:g}",
            "load-concurrency": str(self.load_concurrency),
            "device": self.device,
            "memory-limit": str(self.memory_limit),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLine(CommandLine):
    """The command line of the relay."""

    server: str  # its address in gRPC's notation
    calls: str  # its address for inference calls
    journal: Path
    egress: str  # "envoy" or "grpc"
    data_socket: int  # descriptor of the listening socket of the data port
    load_timeout: float  # 0: the server's own
    hang_timeout: float
    adapter: str = ""  # "": the server speaks the SPI
    server_models: Path | None = None  # the folder from which a server with an adapter reads its models
    metrics: str = ""  # address of the server's metrics
    allow_code: bool = False
    server_rest: str = ""  # address of the REST API by which a server with an adapter is managed
    direct_calls: bool = True

    def argv(self) -> tuple[str, ...]:
        """Returns the words of the command line."""
        flags = ["--allow-code"] if self.allow_code else []
        flags += [] if self.direct_calls else ["--no-direct-calls"]
        return (*CommandLine.argv(self), *flags)

    def _own(self) -> dict[str, str]:
        adapted = {"adapter": self.adapter, "server-models": str(self.server_models)} if self.adapter else {}
        if self.server_rest:
            adapted["server-rest"] = self.server_rest
        if self.metrics:
            adapted["metrics"] = self.metrics
        return adapted | {
            "server": self.server,
            "calls": self.calls,
            "journal": str(self.journal),
            "egress": self.egress,
            "data-socket": str(self.data_socket),
            "load-timeout": f"{self.load_timeout:g}",
            "hang-timeout": f"{self.hang_timeout:g}",
        }

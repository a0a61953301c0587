"""The command line of the model server. Its options have no environment variables."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mesh.runtime.port import commandline


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The settings of a model server. Sizes are in bytes, times in seconds."""

    spi: Path  # the unix socket of mmesh.ModelRuntime
    host: str = "127.0.0.1"  # of the data port
    port: int = 0  # 0: any free one; runtimeStatus names it in its metadata
    incarnation: str = ""  # the agent's; must equal the board's
    board: Path | None = None  # None: a private board that nothing reads
    capacity: int = 1 << 30  # for models; reported by runtimeStatus, enforced by the agent
    threads: int = 2  # threads for long calls
    load_timeout: float = 90.0
    load_concurrency: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_message: int = 16 << 20
    max_body_bytes: int = 512 << 20  # of all requests and replies in the data port
    internal_tls: Path | None = None  # folder of the certificates; None: the data port has no TLS
    memory_limit: int = 0  # limit of the whole process's private memory; 0: none
    log_format: Literal["text", "json"] = "text"
    log_level: str = "info"


def parse(argv: Sequence[str]) -> ServerSettings:
    """Parses a command line. If it is wrong, ends the process with a message and status 2, as argparse does."""
    parser = commandline.parser(
        "python -m mesh.runtime.server", "The ONNX model server. Normally started by its agent."
    )
    add, size = parser.add_argument, commandline.size
    add("--capacity", type=size, default=1 << 30, metavar="BYTES", help="Memory for models, in bytes.")
    add("--threads", type=_positive, default=2, metavar="N", help="Number of threads for long calls.")
    add(
        "--load-timeout",
        type=float,
        default=90.0,
        metavar="S",
        help="Time limit of a load and its warm-up call, in seconds.",
    )
    add("--load-concurrency", type=_positive, default=2, metavar="N", help="Maximum number of concurrent loads.")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Device that models run on.")
    add("--memory-limit", type=size, default=0, metavar="BYTES", help="Hard limit of the process, in bytes; 0: none.")
    given = vars(parser.parse_args(argv))
    host, port = given.pop("data")
    return ServerSettings(host=host, port=port, **given)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)

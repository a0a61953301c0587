"""The command line of the model server. It reads no environment variables."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mesh.options.values import parse_address, parse_bytes


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
    """Parses a command line. Like argparse, ends the process with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m mesh.runtime.server", description="The ONNX model server. Normally started by its agent."
    )
    add = parser.add_argument
    add("--spi", type=Path, required=True, metavar="PATH", help="Unix socket of mmesh.ModelRuntime.")
    add(
        "--data",
        type=_address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="Address of the data port; port 0: any free one.",
    )
    add("--incarnation", default="", help="Incarnation of the agent; must equal the board's.")
    add("--board", type=Path, metavar="PATH", help="Use board made by the agent; default: none.")
    add("--capacity", type=_bytes, default=1 << 30, metavar="BYTES", help="Memory for models, in bytes.")
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
    add(
        "--max-message",
        type=_bytes,
        default=16 << 20,
        metavar="BYTES",
        help=("Size of the largest request or reply, in bytes."),
    )
    add(
        "--max-body-bytes",
        type=_bytes,
        default=512 << 20,
        metavar="BYTES",
        help="Total of requests and replies held at once, in bytes.",
    )
    add("--internal-tls", type=Path, metavar="DIR", help="Folder of ca.crt, tls.crt, tls.key for mutual TLS.")
    add("--memory-limit", type=_bytes, default=0, metavar="BYTES", help="Hard limit of the process, in bytes; 0: none.")
    add("--log-format", choices=("text", "json"), default="text")
    add("--log-level", default="info")
    given = vars(parser.parse_args(argv))
    host, port = given.pop("data")
    return ServerSettings(host=host, port=port, **given)


def _address(text: str) -> tuple[str, int]:
    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)

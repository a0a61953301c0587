"""The options that every process with a data port has. None of them has an environment variable."""

import argparse
from pathlib import Path

from mesh.options.values import parse_address, parse_bytes


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that all these processes have. The value of `--data` is parsed to a host and a
    port."""
    made = argparse.ArgumentParser(prog=prog, description=description)
    add = made.add_argument
    add("--spi", type=Path, required=True, metavar="PATH", help="Unix socket of mmesh.ModelRuntime.")
    add(
        "--data",
        type=address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="Address of the data port, HOST:PORT; port 0: any free one.",
    )
    add("--incarnation", default="", help="Incarnation of the agent, which must equal the board's.")
    add("--board", type=Path, metavar="PATH", help="Use board made by the agent; default: none.")
    add("--max-message", type=size, default=16 << 20, metavar="BYTES", help="Largest message, in bytes.")
    add(
        "--max-body-bytes",
        type=size,
        default=512 << 20,
        metavar="BYTES",
        help="Total size of requests and replies in flight, in bytes.",
    )
    add("--internal-tls", type=Path, metavar="DIR", help="Folder with ca.crt, tls.crt and tls.key for mutual TLS.")
    add("--log-format", choices=("text", "json"), default="text")
    add("--log-level", default="info")
    return made


def address(text: str) -> tuple[str, int]:
    """Parses HOST:PORT for argparse. Raises ArgumentTypeError."""
    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """Parses a number of bytes, which may have a unit, for argparse. Raises ArgumentTypeError."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

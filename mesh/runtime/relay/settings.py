"""The command line of the relay. Its options have no environment variables."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mesh.modelservers import kinds
from mesh.options.servers import target
from mesh.runtime.port import commandline


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """The settings of a relay. Sizes are in bytes, times in seconds."""

    spi: Path  # the unix socket of mmesh.ModelRuntime for the agent
    server: str  # address of the foreign server, as gRPC names it: host:port or unix:/path
    calls: str = ""  # address at which it answers inference calls; "": the same
    host: str = "127.0.0.1"  # of the data port
    port: int = 0  # 0: any free one
    data_socket: int | None = None  # descriptor of a socket that listens there already; None: none
    incarnation: str = ""  # the agent's, which must equal the board's
    board: Path | None = None  # None: a private board that nothing reads
    journal: Path | None = None  # file from which a later relay of this pod continues
    egress: Literal["envoy", "grpc"] = "grpc"  # what carries calls to the server
    direct_calls: bool = True  # calls of one message go over a connection of the relay's own
    adapter: str = ""  # the kind of a server that does not speak the SPI
    server_models: Path | None = None  # the folder from which a server with an adapter reads its models
    metrics: str = ""  # address of the server's metrics, which contain the memory of its GPUs; "": none
    allow_code: bool = False  # models may run code when they are loaded
    server_rest: str = ""  # HOST:PORT of the REST API by which OVMS is managed
    load_timeout: float = 0.0  # time limit of one load; 0: the server's own
    hang_timeout: float = 12.0  # silence of the server after which it counts as hung
    max_message: int = 16 << 20
    max_body_bytes: int = 512 << 20  # total of all requests and replies in the data port
    internal_tls: Path | None = None  # folder of the certificates; None: the data port has no TLS
    log_format: Literal["text", "json"] = "text"
    log_level: str = "info"


def parse(argv: Sequence[str]) -> RelaySettings:
    """Parses a command line. If it is wrong, ends the process with a message and status 2, as argparse does."""
    parser = commandline.parser(
        "python -m mesh.runtime.relay", "Relays a pod's calls to a model server. Normally started by the pod's agent."
    )
    add = parser.add_argument
    add(
        "--server",
        type=_target,
        required=True,
        metavar="ADDRESS",
        help=("Address of the model server, HOST:PORT or unix:/PATH."),
    )
    add(
        "--calls",
        type=_target,
        metavar="ADDRESS",
        help="Address at which the model server answers inference calls; default: that of --server.",
    )
    add(
        "--data-socket",
        type=int,
        metavar="FD",
        help="Descriptor of an inherited socket that listens on the address of --data; default: none.",
    )
    add(
        "--egress",
        choices=("envoy", "grpc"),
        default="grpc",
        help="Carrier of calls to the model server: an Envoy of this relay, or grpc.aio; default: grpc.",
    )
    add(
        "--no-direct-calls",
        dest="direct_calls",
        action="store_false",
        help="Send calls of one message through the egress too, instead of over a connection of the relay's own.",
    )
    add(
        "--adapter",
        choices=tuple(kinds.KINDS),
        default="",
        help="Kind of a model server that does not speak mmesh.ModelRuntime; default: it does.",
    )
    add(
        "--server-models",
        type=Path,
        metavar="DIR",
        help="Folder from which a server with an --adapter reads its models; needed with --adapter.",
    )
    add(
        "--metrics",
        default="",
        metavar="ADDRESS",
        help="Address of the server's metrics, HOST:PORT, which contain the memory of its GPUs; default: none.",
    )
    add(
        "--server-rest",
        default="",
        metavar="HOST:PORT",
        help="Address of the REST API by which OVMS is managed; needed with --adapter ovms.",
    )
    add("--allow-code", action="store_true", help="Allow models that run code when they are loaded, such as pickles.")
    add("--journal", type=Path, metavar="PATH", help="File from which a later relay continues; default: none.")
    add(
        "--load-timeout",
        type=float,
        default=0.0,
        metavar="S",
        help="Time limit of a load, in seconds; 0: the limit that the server reports.",
    )
    add(
        "--hang-timeout",
        type=float,
        default=12.0,
        metavar="S",
        help="Silence of the model server after which it counts as hung, in seconds.",
    )
    given = vars(parser.parse_args(argv))
    if given["adapter"] and given["server_models"] is None:
        parser.error("--adapter needs --server-models")
    if given["adapter"] == kinds.OVMS.name and not given["server_rest"]:
        parser.error("--adapter ovms needs --server-rest")
    host, port = given.pop("data")
    calls = given.pop("calls") or ""  # argparse would also parse a default of ""
    return RelaySettings(host=host, port=port, calls=calls, **given)


def _target(text: str) -> str:
    try:
        return target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

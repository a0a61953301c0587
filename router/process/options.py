"""The groups of options that `python -m router` takes, and the checks that need several of them."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mesh.options import checked, tls, values
from router.access import adminkeys
from router.access import audit as audits
from router.access.guard import MODES

_BODY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Edge:
    """The addresses, TLS and program that clients connect to."""

    listen: Annotated[str, typer.Option(envvar="MESH_LISTEN", help="Address that clients call, HOST:PORT.")] = (
        "127.0.0.1:8033"
    )
    edge: Annotated[
        str,
        typer.Option(
            envvar="MESH_EDGE",
            help="Program that terminates clients' connections: envoy, or grpc where Envoy cannot run.",
        ),
    ] = "envoy"
    rest_listen: Annotated[
        str, typer.Option(envvar="MESH_REST_LISTEN", help="Address that REST clients call, with --edge grpc.")
    ] = "127.0.0.1:8008"
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_TLS_CERT",
            help="PEM file with the certificate for clients; read again when it is replaced.",
        ),
    ] = None
    tls_key: Annotated[
        Path | None, typer.Option(envvar="MESH_TLS_KEY", help="PEM file with the key of --tls-cert.")
    ] = None
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_TLS_CLIENT_CA",
            help="PEM file with the authorities that sign clients' certificates; clients must present one.",
        ),
    ] = None
    tls_client_auth: Annotated[
        str,
        typer.Option(
            envvar="MESH_TLS_CLIENT_AUTH",
            metavar="require|optional",
            help="Policy for clients' certificates with --tls-client-ca: require, or optional, which also admits "
            "clients without a certificate.",
            show_default="require",
        ),
    ] = ""
    internal_tls: tls.Internal = None
    connection_age: Annotated[
        float,
        typer.Option(
            envvar="MESH_CONNECTION_AGE",
            min=0.0,
            help="Age of a connection, in seconds, at which its client is asked to reconnect, so that it finds new "
            "routers; up to a fifth is added at random. 0: never.",
        ),
    ] = 0.0
    probe: Annotated[str, typer.Option(envvar="MESH_PROBE", help="Address of /ready, /live and /metrics.")] = (
        "127.0.0.1:8089"
    )

    def check(self) -> None:
        """Raises BadParameter for options that contradict each other."""
        if self.edge not in ("envoy", "grpc"):
            raise typer.BadParameter(f"{self.edge!r} is neither envoy nor grpc", param_hint="--edge")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise typer.BadParameter("give both --tls-cert and --tls-key, or neither", param_hint="--tls-cert")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise typer.BadParameter("--tls-client-ca needs --tls-cert and --tls-key", param_hint="--tls-client-ca")
        if self.tls_client_auth not in ("", "require", "optional"):
            text = f"{self.tls_client_auth!r} is neither require nor optional"
            raise typer.BadParameter(text, param_hint="--tls-client-auth")
        if self.tls_client_auth and self.tls_client_ca is None:
            text = "--tls-client-auth needs --tls-client-ca"
            raise typer.BadParameter(text, param_hint="--tls-client-auth")
        if self.edge == "grpc" and (self.tls_cert is not None or self.connection_age):
            raise typer.BadParameter("TLS and --connection-age need Envoy: use --edge envoy", param_hint="--edge")


@dataclass(frozen=True, slots=True)
class AccessControl:
    """The control of access (docs/security.md)."""

    auth: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH",
            metavar="off|management|required",
            help="Kind of requests that need a key: none, those of management, or all.",
        ),
    ] = "off"
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_ADMIN_KEY_FILE",
            help="File with the key of an admin who may do everything; read again when it is replaced.",
        ),
    ] = None

    audit: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUDIT",
            metavar="auto|off|log|FILE",
            help="Place of the lines about changes: the log, or a file to append to. auto: the log, with --auth.",
        ),
    ] = "auto"

    def trail(self) -> str:
        """Returns the place of the audit trail: off, log, or the absolute path of a file."""
        if self.audit == audits.AUTO:
            return audits.OFF if self.auth == "off" else audits.LOG
        return self.audit if self.audit in (audits.OFF, audits.LOG) else str(Path(self.audit).absolute())

    def check(self) -> None:
        """Raises BadParameter for options that cannot work."""
        try:
            audits.Audit(self.trail()).close()
        except OSError as error:
            text = f"{self.audit} cannot be written: {error.strerror}"
            raise typer.BadParameter(text, param_hint="--audit") from error
        if self.auth not in MODES:
            raise typer.BadParameter(f"{self.auth!r} is none of {', '.join(MODES)}", param_hint="--auth")
        if self.admin_key_file is not None:
            try:
                adminkeys.read(self.admin_key_file)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--admin-key-file") from error

    def warning(self, *addresses: str) -> str:
        """Returns a warning if requests without a key are answered on an address beyond this machine, or else ""."""
        open_to = [one for one in addresses if not _is_loopback(one)]
        if self.auth != "off" or not open_to:
            return ""
        return (
            f"anybody who reaches {open_to[0]} may call, register and delete every model: "
            "set --auth (MESH_AUTH) to management or required"
        )


def _is_loopback(address: str) -> bool:
    host, _ = values.parse_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """Limits of calls and of the memory that they take (docs/limits.md)."""

    max_message: Annotated[
        str, typer.Option(envvar="MESH_MAX_MESSAGE", help="Size of the largest request or reply, in bytes.")
    ] = "16MiB"
    max_forwarded_message: Annotated[
        str,
        typer.Option(
            envvar="MESH_MAX_FORWARDED_MESSAGE",
            help="Size of the largest message that is forwarded in pieces (over 1 MiB, model id in the metadata), in "
            "bytes; 0: no limit.",
        ),
    ] = "0"
    max_body_bytes: Annotated[
        str,
        typer.Option(
            envvar="MESH_MAX_BODY_BYTES",
            help="Bytes of requests and replies that a worker may hold; once half is used, large requests are refused "
            "with 429. auto: 256 MiB, or four times --max-message if that is more.",
        ),
    ] = "auto"
    min_body_rate: Annotated[
        str,
        typer.Option(
            envvar="MESH_MIN_BODY_RATE",
            help="Lowest rate at which a body may arrive or be read after 10 s, in bytes a second; 0: no limit.",
        ),
    ] = "32KiB"
    edge_memory: Annotated[
        str,
        typer.Option(
            envvar="MESH_EDGE_MEMORY",
            help="Bytes that Envoy may hold; close to the limit it resets the largest streams and refuses new "
            "connections. 0: no limit.",
        ),
    ] = "384MiB"
    max_connections_per_pod: Annotated[
        int,
        typer.Option(
            envvar="MESH_MAX_CONNECTIONS_PER_POD",
            min=2,
            help="Connections of one worker to one pod, and so its calls in flight there; each model gets a share.",
        ),
    ] = 1024
    load_wait: Annotated[
        float,
        typer.Option(envvar="MESH_LOAD_WAIT", min=0.1, help="Longest wait of a caller for a load, in seconds."),
    ] = 120.0
    unload_wait: Annotated[
        float,
        typer.Option(
            envvar="MESH_UNLOAD_WAIT",
            min=0.1,
            help="Longest wait for pods to unload copies when a model is unregistered, or its id is registered again, "
            "in seconds.",
        ),
    ] = 10.0
    max_waiters: Annotated[
        int, typer.Option(envvar="MESH_MAX_WAITERS", min=1, help="Calls of one worker that may wait for loads.")
    ] = 20_000
    max_waiters_per_model: Annotated[
        int,
        typer.Option(
            envvar="MESH_MAX_WAITERS_PER_MODEL", min=1, help="Calls of one worker that may wait for one model."
        ),
    ] = 2_000
    max_waiting_bytes: Annotated[
        str,
        typer.Option(
            envvar="MESH_MAX_WAITING_BYTES", help=("Total bytes of the calls of one worker that wait for loads.")
        ),
    ] = "256MiB"
    reregister_after: Annotated[
        str,
        typer.Option(
            envvar="MESH_REREGISTER_AFTER",
            metavar="SECONDS|never",
            help="Time after which an id may be registered with other attributes even though a pod cut off from "
            "etcd may still answer for its earlier registration, in seconds, or 'never'.",
        ),
    ] = "600"
    drain_timeout: Annotated[
        float,
        typer.Option(
            envvar="MESH_DRAIN_TIMEOUT", min=0.0, help="Time for calls in flight to end after SIGTERM, in seconds."
        ),
    ] = 20.0

    def body_bytes(self) -> int:
        """Returns the bytes that a worker may hold in bodies. Raises BadParameter if one message does not fit."""
        return checked.body_bytes(self.max_body_bytes, least=_BODY_BYTES, max_message=self.max_message)


@dataclass(frozen=True, slots=True)
class Methods:
    """The methods that clients may call, and calls of several models."""

    dataplane_config: Annotated[
        str,
        typer.Option(
            envvar=["MESH_DATAPLANE_CONFIG", "MM_DATAPLANE_CONFIG"],
            metavar="JSON",
            help="Data-plane configuration: the methods that clients may call, and where each request has the model's "
            "id (docs/servers.md). Default: all methods.",
        ),
    ] = ""
    dataplane_config_path: Annotated[
        Path | None,
        typer.Option(
            envvar=["MESH_DATAPLANE_CONFIG_PATH", "MM_DATAPLANE_CONFIG_PATH"],
            help="File with the data-plane configuration, instead of --dataplane-config; read again when it changes.",
        ),
    ] = None
    multi_parallelism: Annotated[
        int,
        typer.Option(
            envvar=["MESH_MULTI_PARALLELISM", "MM_MULTI_PARALLELISM"],
            min=1,
            help="Models that are called at the same time for one call with several model ids.",
        ),
    ] = 4

    def check(self) -> None:
        """Raises BadParameter for options that contradict each other."""
        if self.dataplane_config and self.dataplane_config_path is not None:
            text = "give --dataplane-config or --dataplane-config-path, not both"
            raise typer.BadParameter(text, param_hint="--dataplane-config")


def workers(text: str) -> int:
    """Returns the number of workers, 0 for auto. Raises BadParameter."""
    if text == "auto":
        return 0
    if not text.isdigit() or not 0 < int(text) <= 256:
        raise typer.BadParameter(f"{text!r} is neither auto nor a number from 1 to 256", param_hint="--workers")
    return int(text)

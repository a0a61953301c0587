"""`python -m router`: the command line of a router pod. Each option can be given by the environment, as MESH_OPTION."""

import os
import socket
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from mesh.options import etcd as etcdoptions
from mesh.options import startup
from mesh.options import tls as tlsoptions
from mesh.options import values as texts
from mesh.telemetry import logs
from router.process import pod
from router.settings import RouterSettings

log = logs.get("router")
_BODY_BYTES = 256 << 20
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _size(text: str) -> int:
    try:
        return texts.parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _body_bytes(text: str, max_message: str) -> int:
    message = _size(max_message)
    if text == "auto":
        return max(_BODY_BYTES, 4 * message)
    size = _size(text)
    if size < 2 * message + 1024:  # half of it is for large requests
        least = texts.format_bytes(2 * message + 1024)
        text = f"{texts.format_bytes(size)} cannot hold a message of --max-message: give {least} or more"
        raise typer.BadParameter(text, param_hint="--max-body-bytes")
    return size


def _address(text: str) -> str:
    try:
        return texts.format_address(*texts.parse_address(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _span(text: str) -> float | None:
    try:
        return texts.parse_span(text, "never")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--reregister-after") from error


def _workers(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdigit() or not 0 < int(text) <= 256:
        raise typer.BadParameter(f"{text!r} is neither auto nor a number from 1 to 256")
    return int(text)


@app.command()
def main(
    listen: Annotated[
        str, typer.Option(envvar="MESH_LISTEN", help="Where clients call, HOST:PORT.")
    ] = "127.0.0.1:8033",
    edge: Annotated[str, typer.Option(envvar="MESH_EDGE", help="envoy, or grpc where Envoy cannot run.")] = "envoy",
    rest_listen: Annotated[
        str, typer.Option(envvar="MESH_REST_LISTEN", help="Where REST clients call, with the grpc edge.")
    ] = "127.0.0.1:8008",
    tls_cert: Annotated[
        Path | None,
        typer.Option(envvar="MESH_TLS_CERT", help="PEM file: clients call over TLS. Read anew when it is replaced."),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="MESH_TLS_KEY", help="PEM file.")] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(envvar="MESH_TLS_CLIENT_CA", help="PEM file: clients must show a certificate that it signed."),
    ] = None,
    tls_client_auth: Annotated[
        str,
        typer.Option(
            envvar="MESH_TLS_CLIENT_AUTH",
            metavar="require|optional",
            help="With --tls-client-ca: optional lets clients in that show no certificate; a wrong one never.",
            show_default="require",
        ),
    ] = "",
    internal_tls: tlsoptions.Internal = None,
    connection_age: Annotated[
        float,
        typer.Option(
            envvar="MESH_CONNECTION_AGE",
            min=0.0,
            help="After so long, and up to a fifth more, clients are asked to connect anew, and so find new routers, "
            "s; 0: never.",
        ),
    ] = 0.0,
    probe: Annotated[str, typer.Option(envvar="MESH_PROBE", help="/ready, /live and /metrics.")] = "127.0.0.1:8089",
    workers: Annotated[str, typer.Option(envvar="MESH_WORKERS", help="auto: one for every two CPUs granted.")] = "auto",
    name: Annotated[str, typer.Option(envvar="MESH_NAME", help="Name of this router; default: the host's.")] = "",
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    install_id: etcdoptions.InstallId = "",
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    etcd_config: etcdoptions.Config = None,
    etcd_user: etcdoptions.User = "",
    etcd_password_file: etcdoptions.PasswordFile = None,
    etcd_ca: etcdoptions.Ca = None,
    etcd_cert: etcdoptions.Cert = None,
    etcd_key: etcdoptions.Key = None,
    run_dir: Annotated[
        str, typer.Option(envvar="MESH_RUN_DIR", help="For sockets; short, for this user only; default: a fresh one.")
    ] = "",
    max_message: Annotated[str, typer.Option(envvar="MESH_MAX_MESSAGE", help="Largest message.")] = "16MiB",
    max_body_bytes: Annotated[
        str,
        typer.Option(
            envvar="MESH_MAX_BODY_BYTES",
            help="Bytes of requests and replies that a worker holds; at half of them large requests are refused, with "
            "429. auto: 256 MiB, or four times --max-message where that is more.",
        ),
    ] = "auto",
    min_body_rate: Annotated[
        str,
        typer.Option(
            envvar="MESH_MIN_BODY_RATE",
            help="Bytes a second that a body has to come or be read with, after 10 s; 0: any.",
        ),
    ] = "32KiB",
    edge_memory: Annotated[
        str,
        typer.Option(
            envvar="MESH_EDGE_MEMORY",
            help="Bytes that Envoy may hold; near them it resets streams that hold much, and refuses new connections. "
            "0: any.",
        ),
    ] = "384MiB",
    max_connections_per_pod: Annotated[
        int,
        typer.Option(
            envvar="MESH_MAX_CONNECTIONS_PER_POD",
            min=2,
            help="Connections of one worker to one pod, and so its calls in flight there; a model gets a share.",
        ),
    ] = 1024,
    load_wait: Annotated[
        float, typer.Option(envvar="MESH_LOAD_WAIT", min=0.1, help="Longest wait of a caller for a load, s.")
    ] = 120.0,
    unload_wait: Annotated[
        float,
        typer.Option(
            envvar="MESH_UNLOAD_WAIT",
            min=0.1,
            help="Longest wait for pods to unload a model that is unregistered, and for its former copies when its id "
            "is registered again, in seconds.",
        ),
    ] = 10.0,
    max_waiters: Annotated[
        int, typer.Option(envvar="MESH_MAX_WAITERS", min=1, help="Calls that wait for loads, in one worker.")
    ] = 20_000,
    max_waiters_per_model: Annotated[int, typer.Option(envvar="MESH_MAX_WAITERS_PER_MODEL", min=1)] = 2_000,
    max_waiting_bytes: Annotated[
        str, typer.Option(envvar="MESH_MAX_WAITING_BYTES", help="What their messages may take, in one worker.")
    ] = "256MiB",
    reregister_after: Annotated[
        str,
        typer.Option(
            envvar="MESH_REREGISTER_AFTER",
            metavar="SECONDS|never",
            help="Time after which an id may be registered with other attributes although a pod that is cut off from "
            "etcd may still answer for its former registration, in seconds, or 'never'.",
        ),
    ] = "600",
    drain_timeout: Annotated[
        float, typer.Option(envvar="MESH_DRAIN_TIMEOUT", min=0.0, help="For calls in flight when it stops, s.")
    ] = 20.0,
    log_format: Annotated[str, typer.Option(envvar="MESH_LOG_FORMAT", help="text or json.")] = "text",
    log_level: Annotated[str, typer.Option(envvar="MESH_LOG_LEVEL", help="debug, info, warning, error.")] = "info",
) -> None:
    """Runs a router: one endpoint in front of all models of a mesh."""
    if edge not in ("envoy", "grpc"):
        raise typer.BadParameter(f"{edge!r} is neither envoy nor grpc", param_hint="--edge")
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("give both --tls-cert and --tls-key, or neither", param_hint="--tls-cert")
    if tls_client_ca is not None and tls_cert is None:
        raise typer.BadParameter("it needs --tls-cert and --tls-key", param_hint="--tls-client-ca")
    if tls_client_auth not in ("", "require", "optional"):
        raise typer.BadParameter(f"{tls_client_auth!r} is neither require nor optional", param_hint="--tls-client-auth")
    if tls_client_auth and tls_client_ca is None:
        raise typer.BadParameter("it needs --tls-client-ca: whose certificates count?", param_hint="--tls-client-auth")
    if edge == "grpc" and (tls_cert is not None or connection_age):
        raise typer.BadParameter("TLS and --connection-age need Envoy: use --edge envoy", param_hint="--edge")
    try:
        logs.configure(level=log_level, fmt=log_format, process="router")  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with startup.refusals(log):
        internal = tlsoptions.check(internal_tls)
        reached, base = etcdoptions.reach(
            base=base,
            urls=etcd,
            config=etcd_config,
            user=etcd_user,
            password_file=etcd_password_file,
            ca=etcd_ca,
            cert=etcd_cert,
            key=etcd_key,
        )
        settings = RouterSettings(
            name=name or socket.gethostname(),
            base=base,
            install_id=install_id,
            listen=_address(listen),
            edge=edge,
            tls_certificate=str(tls_cert.absolute()) if tls_cert else "",
            tls_key=str(tls_key.absolute()) if tls_key else "",
            tls_client_ca=str(tls_client_ca.absolute()) if tls_client_ca else "",
            tls_client_auth=tls_client_auth or "require",
            internal_tls=str(internal) if internal else "",
            connection_age=connection_age,
            rest_listen=_address(rest_listen),
            probe=_address(probe),
            workers=_workers(workers),
            run_dir=run_dir and os.path.abspath(run_dir),
            etcd=reached,
            max_message=_size(max_message),
            max_body_bytes=_body_bytes(max_body_bytes, max_message),
            min_body_rate=_size(min_body_rate),
            edge_memory=_size(edge_memory),
            max_connections_per_pod=max_connections_per_pod,
            load_wait=load_wait,
            unload_wait=unload_wait,
            max_waiters=max_waiters,
            max_waiters_per_model=max_waiters_per_model,
            max_waiting_bytes=_size(max_waiting_bytes),
            reregister_after=_span(reregister_after),
            drain=drain_timeout,
            log_format=log_format,
            log_level=log_level,
        )
    try:
        uvloop.run(pod.run(settings))
    except (pod.StartError, ValueError) as error:
        typer.echo(f"router: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()

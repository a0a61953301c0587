"""The limits of `mesh up`: options of the router and of runtime pods, passed on to them under the same names.

Defaults and checks are those of the parts (`mesh router --help`, `mesh runtime --help`); `docs/limits.md` explains what
each limit bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from mesh.options.values import parse_bytes

_PANEL = "Limits"


def _size(name: str, help: str) -> typer.models.OptionInfo:
    return _option(name, "SIZE", help, callback=_checked)


def _option(
    name: str, metavar: str, help: str, *, callback: Callable[[str], str] | None = None
) -> typer.models.OptionInfo:
    made: typer.models.OptionInfo = typer.Option(
        name, metavar=metavar, help=help, rich_help_panel=_PANEL, show_default=False, callback=callback
    )
    return made


def _checked(text: str) -> str:
    if text and text != "auto":
        try:
            parse_bytes(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return text


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """The limits given on the command line. Each is passed on to the routers or pods that have an option of this
    name."""

    max_message: Annotated[
        str, _size("--max-message", "Size of the largest request or reply, in bytes; default 16MiB.")
    ] = ""
    max_forwarded_message: Annotated[
        str,
        _size(
            "--max-forwarded-message",
            "Size of the largest message that is forwarded in pieces (over 1 MiB, model id in the metadata), in bytes; "
            "default no limit.",
        ),
    ] = ""
    max_body_bytes: Annotated[
        str,
        _size(
            "--max-body-bytes",
            "Bytes of requests and replies that a router worker (default 256MiB) and a model server (default "
            "512MiB) may hold.",
        ),
    ] = ""
    min_body_rate: Annotated[
        str, _size("--min-body-rate", "Lowest rate at which a body may arrive, in bytes a second; default 32KiB.")
    ] = ""
    edge_memory: Annotated[str, _size("--edge-memory", "Memory that Envoy may use, in bytes; default 384MiB.")] = ""
    max_connections_per_pod: Annotated[
        int | None,
        _option("--max-connections-per-pod", "N", "Number of connections of a router worker to one pod; default 1024."),
    ] = None
    load_wait: Annotated[
        float | None, _option("--load-wait", "SECONDS", "Longest wait of a caller for a load, in seconds; default 120.")
    ] = None
    max_waiters: Annotated[
        int | None,
        _option("--max-waiters", "N", "Number of calls of a router worker that may wait for loads; default 20000."),
    ] = None
    max_waiters_per_model: Annotated[
        int | None,
        _option(
            "--max-waiters-per-model",
            "N",
            "Number of calls of a router worker that may wait for one model; default 2000.",
        ),
    ] = None
    max_waiting_bytes: Annotated[
        str,
        _size(
            "--max-waiting-bytes", "Total bytes of the calls of a router worker that wait for loads; default 256MiB."
        ),
    ] = ""
    load_timeout: Annotated[
        float | None,
        _option("--load-timeout", "SECONDS", "Longest time for one load in a model server, in seconds; default 90."),
    ] = None
    load_concurrency: Annotated[
        int | None,
        _option(
            "--load-concurrency", "N", "Number of concurrent loads of a pod; default one for each CPU, at least 2."
        ),
    ] = None
    pull_bandwidth: Annotated[
        str, _size("--pull-bandwidth", "Bandwidth of all pulls of a pod, in bytes a second; default unlimited.")
    ] = ""
    pull_connections: Annotated[
        int | None, _option("--pull-connections", "N", "Number of connections of a pod to stores; default 32.")
    ] = None
    hang_timeout: Annotated[
        float | None,
        _option("--hang-timeout", "SECONDS", "Silence after which a model server is replaced, in seconds; default 12."),
    ] = None

    def of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the command-line arguments for those options in `names` that were given."""
        argv: list[str] = []
        for name in names:
            value = getattr(self, name)
            if value not in (None, ""):
                argv += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
        return tuple(argv)


ROUTER = (
    *("max_message", "max_forwarded_message", "max_body_bytes", "min_body_rate", "edge_memory"),
    *("max_connections_per_pod", "load_wait", "max_waiters", "max_waiters_per_model", "max_waiting_bytes"),
)
RUNTIME = (
    *("max_message", "max_body_bytes", "load_timeout", "load_concurrency"),
    *("pull_bandwidth", "pull_connections", "hang_timeout"),
)

"""The limits of `mesh up`: those of the router and of runtime pods, under the same names and handed on to them.

Their defaults and their checks are the parts' own (`mesh router --help`, `mesh runtime --help`); what bounds what is in
`docs/limits.md`.
"""

from collections.abc import Callable, Mapping
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


MaxMessage = Annotated[str, _size("--max-message", "Largest request or reply; default 16MiB.")]
MaxBodyBytes = Annotated[
    str, _size("--max-body-bytes", "Bytes of requests and replies that a router worker holds; default 256MiB.")
]
MinBodyRate = Annotated[str, _size("--min-body-rate", "Bytes a second that a body has to come with; default 32KiB.")]
EdgeMemory = Annotated[str, _size("--edge-memory", "Bytes that Envoy may hold; default 384MiB.")]
MaxConnections = Annotated[
    int | None,
    _option("--max-connections-per-pod", "N", "Connections of a router worker to one pod; default 1024."),
]
LoadWait = Annotated[
    float | None, _option("--load-wait", "SECONDS", "Longest wait of a caller for a load, in seconds; default 120.")
]
MaxWaiters = Annotated[int | None, _option("--max-waiters", "N", "Calls of a worker that wait for loads; 20000.")]
MaxWaitersPerModel = Annotated[
    int | None, _option("--max-waiters-per-model", "N", "Calls that wait for one model; default 2000.")
]
MaxWaitingBytes = Annotated[
    str, _size("--max-waiting-bytes", "Bytes of the calls of a worker that wait for loads; default 256MiB.")
]
LoadTimeout = Annotated[
    float | None, _option("--load-timeout", "SECONDS", "Time for one load in a model server, in seconds; default 90.")
]
LoadConcurrency = Annotated[
    int | None, _option("--load-concurrency", "N", "Loads of a pod at once; default one for each CPU, at least 2.")
]
PullBandwidth = Annotated[str, _size("--pull-bandwidth", "Bytes a second for all pulls of a pod; default no limit.")]
PullConnections = Annotated[int | None, _option("--pull-connections", "N", "Connections of a pod to stores; 32.")]
HangTimeout = Annotated[
    float | None,
    _option("--hang-timeout", "SECONDS", "Silence after which a model server is replaced, in seconds; default 10."),
]


def given(values: Mapping[str, object]) -> tuple[str, ...]:
    """Returns the command line for those that were given a value."""
    argv: list[str] = []
    for name, value in values.items():
        if value not in (None, ""):
            argv += [name, f"{value:g}" if isinstance(value, float) else str(value)]
    return tuple(argv)

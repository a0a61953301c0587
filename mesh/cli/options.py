"""Options that many commands share, and the functions that run a command's coroutine with these options."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

from mesh.cli import contexts, output
from mesh.cli.client import DEFAULT_ENDPOINT, Client, normalize
from mesh.cli.exits import CommandError, Exit
from mesh.cli.trust import SYSTEM, Trust

T = TypeVar("T")

ENDPOINT_HELP = (
    f"Endpoint of the mesh's REST interface. Default: MESH_ENDPOINT, else the context's, else {DEFAULT_ENDPOINT}."
)

Endpoint = Annotated[
    str, typer.Option("--endpoint", "-e", metavar="URL", help=ENDPOINT_HELP, show_default=False, rich_help_panel="Mesh")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Time limit of the command, in seconds.")
]
ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="The model's id.", show_default=False)]
ModelOrAlias = Annotated[str, typer.Argument(metavar="MODEL", help="Id of a model or an alias.", show_default=False)]

# Of the commands that the chart's Jobs run, which write into a Secret.
KubeTimeout = Annotated[
    float,
    typer.Option(
        "--timeout", metavar="SECONDS", min=0.1, help="Time limit of a call to the Kubernetes API, in seconds."
    ),
]
SecretNamespace = Annotated[
    str, typer.Option("--namespace", metavar="NAME", help="Namespace of the Secret. Default: the pod's own.")
]
KubeApi = Annotated[
    str, typer.Option("--kube-api", metavar="URL", hidden=True, help="URL of the Kubernetes API, for tests.")
]
KubeAccount = Annotated[
    Path | None,
    typer.Option("--kube-account", metavar="DIR", hidden=True, help="Folder with token and ca.crt, for tests."),
]

MODELS = "Models"
MESH = "The mesh"
PROCESSES = "Processes"
ADMIN = "For admins"


@dataclass(frozen=True, slots=True)
class Defaults:
    """The options before the command's name and those of the environment, kept as typer's context object."""

    endpoint: str = ""
    trust: Trust = SYSTEM
    context: str = ""  # the name of a mesh; "": the current one, if there is one

    def resolved(self) -> "Defaults":
        """Returns a copy in which missing options have the values of the context. Reads the file of contexts. Raises
        CommandError."""
        found = contexts.read()
        name = self.context or found.current
        if not name:
            return self
        context = found.get(name)
        files = (context.ca, context.cert, context.key, context.api_key_file)
        ca, certificate, key, api_key_file = (Path(text) if text else None for text in files)
        trust = self.trust
        # A certificate and its key come from the same source.
        pair = (trust.certificate, trust.private_key) if trust.certificate else (certificate, trust.private_key or key)
        if trust.api_key or trust.api_key_file is not None:
            api_key_file = trust.api_key_file
        trusted = Trust(trust.ca or ca, *pair, api_key_file, trust.api_key)
        return Defaults(self.endpoint or context.endpoint, trusted, self.context)


def text_or_file(text: str) -> str:
    """Returns a value given on the command line, or the contents of the file if it is @FILE. Raises CommandError if the
    file cannot be read."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text().strip()
    except OSError as error:
        raise CommandError(f"{text[1:]} cannot be read: {error.strerror}", code=Exit.USAGE) from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{text[1:]} cannot be read: it is not UTF-8 text", code=Exit.USAGE) from error


def endpoint_of(context: typer.Context, endpoint: str) -> str:
    """Returns the endpoint: the command's --endpoint, or else that of the global option, the environment, the context,
    or the default, in this order.

    Raises BadParameter, and CommandError for a context that cannot be used."""
    chosen = endpoint or _defaults(context).endpoint or DEFAULT_ENDPOINT
    try:
        return normalize(chosen)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--endpoint") from error


def trust_of(context: typer.Context) -> Trust:
    """Returns the TLS files and the API key of the global options, the environment or the context.

    Raises CommandError for a context that cannot be used."""
    return _defaults(context).trust


def _defaults(context: typer.Context) -> Defaults:
    return (context.find_object(Defaults) or Defaults()).resolved()


def run(
    context: typer.Context,
    command: Callable[[Client], Awaitable[T]],
    *,
    endpoint: str = "",
    as_json: bool = False,
    timeout: float = 30.0,
) -> T:
    """Runs a command's coroutine with a client. A CommandError is printed and ends the process with its code."""

    async def session() -> T:
        async with Client(endpoint_of(context, endpoint), timeout=timeout, trust=trust_of(context)) as client:
            return await command(client)

    return guarded(lambda: asyncio.run(session()), as_json=as_json)


def refuse(error: CommandError, *, as_json: bool = False) -> NoReturn:
    """Prints the error and ends the process with its code."""
    output.print_error(error, as_json=as_json)
    raise typer.Exit(error.code) from error


def guarded(command: Callable[[], T], *, as_json: bool = False) -> T:
    """Calls `command`, and returns its result. After a CommandError or Ctrl-C, ends the process with the fitting exit
    code."""
    try:
        return command()
    except CommandError as error:
        refuse(error, as_json=as_json)
    except (KeyboardInterrupt, asyncio.CancelledError):
        # asyncio.run cancels its task on Ctrl-C and then raises KeyboardInterrupt, but lets the cancellation
        # through if the signal comes just before the task begins (`Runner.run` sets its counter after its handler).
        raise typer.Exit(Exit.INTERRUPTED) from None

"""`mesh context`: the named meshes of this user. `contexts` reads and writes the file."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from mesh.cli import contexts, options, output
from mesh.cli.client import normalize
from mesh.cli.exits import CommandError, Exit

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the context.", show_default=False)]


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    group = typer.Typer(
        no_args_is_help=True, help="Manages contexts: named meshes, each with its endpoint, TLS files and API key."
    )
    group.command("set")(set_context)
    group.command("use")(use)
    group.command("ls")(ls)
    group.command("rm")(remove)
    app.add_typer(group, name="context", rich_help_panel=options.ADMIN)


def set_context(
    name: Name,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", "-e", metavar="URL", help="Endpoint of the mesh.")
    ] = None,
    ca: Annotated[
        str | None,
        typer.Option("--ca", metavar="FILE", help="PEM file of the authorities to trust for an https endpoint."),
    ] = None,
    cert: Annotated[
        str | None,
        typer.Option(
            "--cert", metavar="FILE", help="PEM file of the client certificate, for a mesh that requires one."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="FILE", help="PEM file of the private key of --cert.")
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option("--api-key-file", metavar="FILE", help="File with the API key to send.")
    ] = None,
) -> None:
    """Creates a context, or changes an existing one. Options that are not given keep their values. To remove a file
    from a context, give '' as its value. The first context becomes the current one.

    Example: `mesh context set prod --endpoint https://mesh.example:8033 --ca ca.crt`
    """

    def command() -> None:
        if not contexts.NAME.fullmatch(name):
            text = (
                f"{name!r} is not a valid name for a context: use at most 63 letters, digits, dots, dashes and "
                "underscores, beginning with a letter or digit"
            )
            raise CommandError(text, code=Exit.USAGE)
        files = {"ca": ca, "cert": cert, "key": key, "api_key_file": api_key_file}
        given = {name: _file(text) for name, text in files.items() if text is not None}
        if endpoint is not None:
            given["endpoint"] = _endpoint(endpoint)
        with contexts.changed() as found:
            context = replace(found.named.get(name, contexts.Context()), **given)
            if not context.endpoint:
                raise CommandError(f"there is no context {name} yet: give --endpoint to create it", code=Exit.USAGE)
            found.named[name] = context
            found.current = found.current or name
            current = found.current == name
        text = f"{name} is {context.endpoint}" + (", and the current one" if current else "")
        output.console().print(output.plain(text), soft_wrap=True)

    options.guarded(command)


def use(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the context.", show_default=False)] = "",
    none: Annotated[bool, typer.Option("--none", help="Unset the current context.")] = False,
) -> None:
    """Makes a context the current one, which commands use unless --context names another.

    Example: `mesh context use prod`
    """

    def command() -> None:
        if bool(name) == none:
            raise CommandError("give either the name of a context or --none, not both", code=Exit.USAGE)
        with contexts.changed() as found:
            if name:
                found.get(name)
            found.current = name
        output.console().print(output.plain(f"{name} is the current context" if name else "no context is current"))

    options.guarded(command)


def ls(as_json: options.Json = False) -> None:
    """Lists the contexts; an asterisk marks the current one.

    Example: `mesh context ls`
    """

    def command() -> None:
        found = contexts.read()
        if as_json:
            named = [{"name": name, **asdict(context)} for name, context in sorted(found.named.items())]
            output.print_json({"current": found.current or None, "contexts": named})
            return
        if not found.named:
            output.remarks().print("there are no contexts; `mesh context set NAME --endpoint URL` creates one")
            return
        table = output.table("", "NAME", "ENDPOINT", "CA", "CERT")
        for name, context in sorted(found.named.items()):
            star = "*" if name == found.current else ""
            table.add_row(star, *(output.plain(text) for text in (name, context.endpoint, context.ca, context.cert)))
        output.console().print(table)

    options.guarded(command, as_json=as_json)


def remove(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Names of the contexts to remove.", show_default=False)
    ],
) -> None:
    """Removes contexts, but not the files that they name.

    Example: `mesh context rm old`
    """

    def command() -> None:
        with contexts.changed() as found:
            for name in names:
                found.get(name)
            for name in names:
                found.named.pop(name, None)
            if found.current in names:
                found.current = ""
        output.console().print(output.plain(f"removed {', '.join(names)}"))

    options.guarded(command)


def _endpoint(text: str) -> str:
    try:
        return normalize(text)
    except ValueError as error:
        raise CommandError(str(error), code=Exit.USAGE) from error


def _file(text: str) -> str:
    """Returns the absolute path, because commands use a context in any current folder."""
    if not text:
        return ""
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise CommandError(f"there is no file {path}", code=Exit.USAGE)
    return str(path)

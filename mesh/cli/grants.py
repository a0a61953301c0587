"""`mesh grants`: gives callers and groups roles on models, one grant at a time or all from a file."""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from mesh.cli import options, output
from mesh.cli.client import Client
from mesh.cli.exits import CommandError, Exit
from mesh.schema import grantsfile
from mesh.statuses import Reason

PATH = "/mesh/v1/grants"

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the grant.", show_default=False)]


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    group = typer.Typer(no_args_is_help=True, help="Manages grants: roles on models, for callers and groups.")
    group.command("ls")(ls)
    group.command("add")(put)
    group.command("rm")(remove)
    group.command("apply")(apply)
    app.add_typer(group, name="grants", rich_help_panel=options.ADMIN)


def ls(context: typer.Context, endpoint: options.Endpoint = "", as_json: options.Json = False) -> None:
    """Lists all grants: those in etcd, and those in the file that the routers follow (`mesh router --grants-file`).

    Example: `mesh grants ls`
    """

    async def command(client: Client) -> None:
        answer = await client.get(PATH)
        if as_json:
            output.print_json(answer)
            return
        filed = answer.get("file") or {}
        found = {**answer["grants"], **{f"{name} (file)": one for name, one in (filed.get("grants") or {}).items()}}
        if error := filed.get("error"):
            text = f"the file {filed.get('source')} cannot be used, so its previous content applies"
            text += f" ({filed.get('age'):.0f} s old): {error}"
            output.remarks().print(output.plain(text), soft_wrap=True)
        if not found:
            output.remarks().print("there are no grants; `mesh grants add` creates one")
            return
        table = output.table("GRANT", "ROLE", "MODELS", "TO")
        for name, one in found.items():
            cells = (name, str(one.get("role")), ", ".join(one.get("models") or ()), ", ".join(one.get("to") or ()))
            table.add_row(*map(output.plain, cells))
        output.console().print(table)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def put(
    context: typer.Context,
    name: Name,
    role: Annotated[
        str, typer.Option("--role", metavar="infer|read|register|admin", help="Role to give.", show_default=False)
    ],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="SUBJECT",
            help="Receiver, such as key:ci, user:anna, serviceaccount:team-a:batch, group:team-a or everyone; may be "
            "repeated.",
            show_default=False,
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models", metavar="PATTERN", help="Models and aliases that the role is for; may be repeated. Default: *."
        ),
    ] = None,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Gives callers and groups a role on models and aliases. Replaces a grant of the same name.

    The role `infer` allows calls of models, and the role `read` allows status and lists. The role `register` includes
    `read`, and allows changes: to register, change, load and unregister models, and to set aliases. The role `admin`
    allows everything. A pattern is an id, or a string in which each `*` stands for any characters. A pattern for an
    alias also covers its versions.

    Example: `mesh grants add team-a --role register --models 'fraud/*' --to group:team-a`
    """

    async def command(client: Client) -> None:
        body = {"role": role, "models": models or ["*"], "to": to}
        answer = await client.request("PUT", _path(name), body=body)
        if as_json:
            output.print_json(answer)
        else:
            text = f"{', '.join(to)}: {role} on {', '.join(models or ['*'])}"
            output.console().print(output.plain(text), soft_wrap=True)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def remove(context: typer.Context, name: Name, endpoint: options.Endpoint = "", as_json: options.Json = False) -> None:
    """Removes a grant. The callers and groups that the grant names lose its role immediately.

    Example: `mesh grants rm team-a`
    """

    async def command(client: Client) -> None:
        answer = await client.request("DELETE", _path(name))
        if as_json:
            output.print_json(answer)
        elif answer.get("existed"):
            output.console().print(f"removed {output.plain(name)}")
        if not answer.get("existed"):
            text = f"there is no grant {name}"
            raise CommandError(text, code=Exit.NOT_FOUND, reason=Reason.UNKNOWN_MODEL.name, answered=True)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def apply(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Option("--file", "-f", metavar="FILE", help="TOML or JSON file with all grants.", show_default=False),
    ],
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Replaces all grants with those in a file, except grants created by `mesh keys create --role`.

    The file has one table per grant, such as `[grants.team-a]`, with `role`, `models` and `to`.

    Example: `mesh grants apply -f grants.toml`
    """
    wanted = options.guarded(lambda: read(file), as_json=as_json)

    async def command(client: Client) -> None:
        answer = await client.request("PUT", PATH, body={"grants": wanted})
        if as_json:
            output.print_json(answer)
            return
        for what in ("written", "removed"):
            if names := answer.get(what):
                output.console().print(output.plain(f"{what}: {', '.join(names)}"), soft_wrap=True)
        if not any(answer.get(what) for what in ("written", "removed")):
            output.remarks().print("nothing to change")

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def read(file: Path) -> dict[str, Any]:
    """Returns the grants in a file by their names. Raises CommandError if the file cannot be read or is not valid."""
    try:
        return grantsfile.document(file.read_text())
    except (OSError, ValueError) as error:  # bad UTF-8 is a ValueError
        why = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"{file} cannot be used: {why}", code=Exit.USAGE) from error


def _path(name: str) -> str:
    return f"{PATH}/{quote(name, safe='')}"

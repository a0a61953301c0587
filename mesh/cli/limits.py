"""`mesh set`, for the limits of a model's copies, and `mesh settings`, for limits and pods of whole types."""

import json
from typing import Annotated, Any

import typer

from mesh.cli import options, output
from mesh.cli.client import Client, model_path
from mesh.cli.exits import CommandError, Exit
from mesh.cli.serving import show_status


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("set", rich_help_panel=options.MODELS)(set_limits)
    app.command("settings", rich_help_panel=options.MESH)(settings)


def set_limits(
    context: typer.Context,
    model: options.ModelId,
    minimum: Annotated[str, typer.Option("--min", metavar="N|none", help="Minimum number of copies.")] = "",
    maximum: Annotated[str, typer.Option("--max", metavar="N|none", help="Maximum number of copies.")] = "",
    pinned: Annotated[
        str,
        typer.Option(
            "--pinned", metavar="yes|no|none", help="Protect copies from eviction, and keep at least one loaded."
        ),
    ] = "",
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Sets how many copies a model has.

    The value `none` removes a limit, so that the limit of the model's type applies, if the type has one. Missing copies
    are loaded within seconds if pods have enough memory. A model without limits gets a copy when it is called, and
    further copies while it gets many calls.

    Examples:

    - `mesh set fraud/de --min 2 --max 4`
    - `mesh set fraud/de --pinned yes`
    """
    body: dict[str, Any] = {}
    for name, option, text in (("min_copies", "--min", minimum), ("max_copies", "--max", maximum)):
        if text == "none":
            body[name] = None
        elif text:
            if not text.isdecimal():
                raise typer.BadParameter(f"{text!r} is neither a number of copies nor none", param_hint=option)
            body[name] = int(text)
    if pinned:
        answers = {"yes": True, "no": False, "none": None}
        if pinned not in answers:
            raise typer.BadParameter(f"{pinned!r} is unknown: use yes, no or none", param_hint="--pinned")
        body["pinned"] = answers[pinned]

    async def command(client: Client) -> None:
        if not body:
            text = "nothing to set: give --min, --max or --pinned; `mesh status` shows what is set"
            raise CommandError(text, code=Exit.USAGE)
        show_status(await client.request("PATCH", model_path(model), body=body), as_json=as_json)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def settings(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the setting.")] = "",
    value: Annotated[
        str, typer.Argument(metavar="JSON|@FILE", help="New value: JSON, or @FILE for a file with it.")
    ] = "",
    clear: Annotated[bool, typer.Option("--clear", help="Remove the setting.")] = False,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Shows and changes settings of the whole mesh while it runs.

    `type_constraints` are the labels of pods that a model type requires or prefers, in ModelMesh's JSON. If a pod is no
    longer allowed, its copies are moved to other pods. `type_limits` are the limits on the number of copies of each
    model of a type.

    Examples:

    - `mesh settings`
    - `mesh settings type_constraints '{"big": {"required": ["gpu"]}, "_default": {"preferred": ["cpu"]}}'`
    - `mesh settings type_limits '{"_default": {"max": 8}}'`
    - `mesh settings type_limits --clear`
    """

    async def command(client: Client) -> None:
        if (value or clear) and not name:
            raise CommandError("name the setting to change; `mesh settings` lists them", code=Exit.USAGE)
        if value or clear:
            body = {} if clear else _object(value)
            answer = await client.request("PUT", f"/mesh/v1/settings/{name}", body=body)
            if as_json:
                output.print_json(answer)
            else:
                output.console().print(f"{output.plain(name)} is {'cleared' if clear else 'set'}")
            return
        found = (await client.get("/mesh/v1/settings"))["settings"]
        if name and name not in found:
            text = f"there is no setting {name}; there are {', '.join(found)}"
            raise CommandError(text, code=Exit.USAGE)
        shown = {key: text for key, text in found.items() if not name or key == name}
        if as_json:
            output.print_json({key: json.loads(text) if text else None for key, text in shown.items()})
            return
        table = output.table("SETTING", "VALUE")
        for key, text in shown.items():
            table.add_row(output.plain(key), output.plain(text) or "[dim]not set[/]")
        output.console().print(table)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(options.text_or_file(text))
    except ValueError as error:
        raise CommandError(f"the value is not JSON: {error}", code=Exit.USAGE) from error
    if not isinstance(found, dict) or not found:
        raise CommandError(
            "the value is not a JSON object with entries; use --clear to remove the setting", code=Exit.USAGE
        )
    return found

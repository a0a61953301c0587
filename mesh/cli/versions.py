"""Versions of a model under one name: `register --version`, `rollback`, `versions`.

Each version is a model, `NAME@VERSION`, and `NAME` is an alias that points at one of them. `registry` has the options
of `register`.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from mesh.cli import aliasview, moves, options, output
from mesh.cli.client import Client, model_path
from mesh.cli.exits import CommandError, Exit, MeshRefusal
from mesh.cli.moves import Patience
from mesh.cli.serving import LOAD_SECONDS
from mesh.schema import versions as plain
from mesh.schema.modelstatus import ModelStatus
from mesh.statuses import Reason

Alias = Annotated[str, typer.Argument(metavar="NAME", help="Name of the alias.", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the alias has moved.")]


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("rollback", rich_help_panel=options.MODELS)(rollback)
    app.command("versions", rich_help_panel=options.MODELS)(versions)


async def register(
    client: Client, name: str, version: str, model: Mapping[str, Any], keep: int | None, patience: Patience
) -> None:
    """Registers a version of a model, and moves the alias to it once it is loaded. Raises CommandError as
    `moves.carry_out` does, and if a model of the alias's name is registered as this version."""
    if await aliasview.find(client, name) is None:
        await _adopt(client, name, version)
    body = {"version": version, "model": model} | ({} if keep is None else {"keep": keep})
    await moves.carry_out(client, name, body, patience, load=True)


async def _adopt(client: Client, name: str, version: str) -> None:
    """Makes the model that is registered under the alias's name the alias's first version. This model gets the calls
    until the new version is loaded. Raises CommandError."""
    try:
        registered = await client.get(model_path(name))
    except MeshRefusal as error:
        if error.reason == Reason.UNKNOWN_MODEL.name:
            return
        raise
    first = plain.own(str(registered.get("path") or ""))
    if first == version:
        text = f"model {name} is already registered and answers as version {first}: give the new one another version"
        raise CommandError(text, reason=Reason.CONFLICT.name)
    body = {"target": name, "version": first, "expected_target": name}
    await client.request("PUT", aliasview.alias_path(name), body=body)


def rollback(
    context: typer.Context,
    name: Alias,
    version: Annotated[
        str, typer.Option("--version", metavar="VERSION", help="Version to go back to. Default: the previous one.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Move the alias immediately, even if that version is not loaded.")
    ] = False,
    wait: Wait = True,
    timeout: options.Timeout = LOAD_SECONDS,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Moves an alias back to the previous version. Calls go to that version once it is loaded. No call fails meanwhile.

    If the alias is moving to a new version, the command cancels the move: calls continue to go to the present version.

    Examples:

    - `mesh rollback fraud`
    - `mesh rollback fraud --version 6`
    """

    async def command(client: Client) -> None:
        body = {"force": force} | ({"version": version} if version else {})
        patience = Patience(wait, timeout, as_json)
        await moves.carry_out(client, name, body, patience, method="POST", rest="/rollback")

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def versions(
    context: typer.Context, name: Alias, endpoint: options.Endpoint = "", as_json: options.Json = False
) -> None:
    """Lists the versions of an alias, oldest first, and shows which one serves calls. The word `next` marks the version
    that the alias is moving to.

    Example: `mesh versions fraud`
    """

    async def command(client: Client) -> None:
        alias = await aliasview.find(client, name)
        if alias is None:
            alias = await _only(client, name)
        found: dict[str, str] = alias.get("versions") or {}
        statuses = await asyncio.gather(*(_status(client, model) for model in found.values()))
        listed = [
            {"version": version, "model": model, "status": status, "calls": _calls(alias, model)}
            for (version, model), status in zip(found.items(), statuses, strict=True)
        ]
        if as_json:
            output.print_json({"id": name, "keep": alias.get("keep"), "versions": listed})
            return
        if not listed:
            text = f"{name} has no versions; its calls go to {aliasview.calls(alias)}"
            output.remarks().print(output.plain(text), soft_wrap=True)
            return
        table = output.table("VERSION", "MODEL", "STATUS", "CALLS")
        for one in listed:
            cells = (output.plain(one["version"]), output.plain(one["model"]), output.status(one["status"]))
            table.add_row(*cells, output.plain(one["calls"]))
        output.console().print(table)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


async def _only(client: Client, name: str) -> dict[str, Any]:
    """Returns a model without an alias as if it were an alias with a single version. Raises CommandError."""
    try:
        model = await client.get(model_path(name))
    except MeshRefusal as error:
        if error.reason != Reason.UNKNOWN_MODEL.name:
            raise
        text = f"there is no alias and no model {name}"
        raise CommandError(text, code=Exit.NOT_FOUND, reason=error.reason) from error
    return {"active": name, "target": name, "versions": {plain.own(str(model.get("path") or "")): name}}


async def _status(client: Client, model: str) -> str:
    try:
        return str((await client.get(model_path(model))).get("status", "UNKNOWN"))
    except MeshRefusal as error:
        if error.reason == Reason.UNKNOWN_MODEL.name:
            return ModelStatus.NOT_FOUND
        raise


def _calls(alias: Mapping[str, Any], model: str) -> str:
    """Returns the share of an alias's calls that a model gets, or `next` for the target of a move."""
    weights = alias.get("weights") or {}
    if total := sum(weights.values()):
        return f"{100 * weights[model] / total:.4g} %" if weights.get(model) else ""
    if model == alias.get("active"):
        return "all"
    return "next" if model == alias.get("target") else ""

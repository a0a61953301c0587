"""`mesh alias`: names for models, which can be moved to other models or divide calls among several."""

from typing import Annotated, Any

import typer

from mesh.cli import aliasview, moves, options, output
from mesh.cli.client import Client
from mesh.cli.exits import CommandError, Exit
from mesh.cli.moves import Patience
from mesh.cli.serving import LOAD_SECONDS
from mesh.cli.versions import Alias, Wait
from mesh.schema.modelstatus import VModelStatus
from mesh.statuses import Reason

NONE = "none"
"""The value that removes a header or a shadow."""


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Manages aliases: names that callers use like ids of models, and that can be moved to other models.",
    )
    group.command("set")(set_alias)
    group.command("ls")(ls)
    group.command("show")(show)
    group.command("rm")(remove)
    app.add_typer(group, name="alias", rich_help_panel=options.MODELS)


def set_alias(
    context: typer.Context,
    name: Alias,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET[=WEIGHT]", help="Model to point at, or several with their weights, such as fraud@8=10."
        ),
    ] = None,
    version: Annotated[
        str,
        typer.Option(
            "--version",
            metavar="VERSION",
            help=("Version name for the target; without a target, the version to move to."),
        ),
    ] = "",
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep",
            metavar="N",
            min=0,
            help="Number of earlier versions to keep for a rollback. Default: unchanged, or 2 for a new alias.",
        ),
    ] = None,
    sticky: Annotated[
        str | None,
        typer.Option(
            "--sticky",
            metavar="HEADER|none",
            help="Header whose value determines the model of a call; none: a random model for each call.",
        ),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            "--mirror",
            metavar="TARGET[=PERCENT]|none",
            help="Model that also gets a share of the calls, in percent, by default 100; its answers are dropped. "
            "none: no such model.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Move the alias immediately, even if the target is not loaded.")
    ] = False,
    wait: Wait = True,
    timeout: options.Timeout = LOAD_SECONDS,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Creates an alias, moves it to another model, or divides its calls among several.

    Calls go to a new target once it has as many loaded copies as the active model. No call fails meanwhile. With
    several targets, each call goes to one of them, chosen by weight. If the chosen target cannot answer, another one
    does. To end a split, name a single target.

    Examples:

    - `mesh alias set fraud fraud-2026-11`
    - `mesh alias set fraud fraud@7=90 fraud@8=10 --sticky x-user`
    - `mesh alias set fraud --mirror fraud@9=5`
    """
    body: dict[str, Any] = {"force": force, "ready": True, "load": False} | _targets(targets or [])
    body |= {"version": version} if version else {}
    body |= {"keep": keep} if keep is not None else {}
    body |= {"sticky": "" if sticky == NONE else sticky.lower()} if sticky is not None else {}
    body |= {"mirror": None if mirror == NONE else _mirror(mirror)} if mirror is not None else {}

    async def command(client: Client) -> None:
        if body.keys() == {"force", "ready", "load"}:
            raise CommandError("nothing to set: name a target, a version or an option", code=Exit.USAGE)
        await moves.carry_out(client, name, body, Patience(wait, timeout, as_json))

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def _targets(texts: list[str]) -> dict[str, Any]:
    """Returns the request's fields for the targets: one model, or several models with their weights. Raises
    BadParameter."""
    if not texts:
        return {}
    weights: dict[str, int] = {}
    for text in texts:
        model, separator, weight = text.rpartition("=")
        if not (separator and model and weight.isascii() and weight.isdigit()):
            if len(texts) > 1:
                raise typer.BadParameter(f"{text!r} has no weight: write {text}=10", param_hint="TARGET")
            return {"target": text, "weights": {}}
        if model in weights:
            raise typer.BadParameter(f"{model!r} is named twice: name each target once", param_hint="TARGET")
        weights[model] = int(weight)
    return {"weights": weights}


def _mirror(text: str) -> dict[str, Any]:
    model, separator, share = text.rpartition("=")
    if separator and model:
        try:
            return {"target": model, "share": float(share)}
        except ValueError:
            pass  # the `=` is part of the model's id
    return {"target": text, "share": 100}


def ls(
    context: typer.Context,
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Prefix of the names to list.")] = "",
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Lists aliases by name. Shows the models that get an alias's calls, and the reason if its move is stuck.

    Example: `mesh alias ls fraud`
    """

    async def command(client: Client) -> None:
        found = [alias async for alias in aliasview.listed(client, prefix)]
        if as_json:
            output.print_json({"aliases": found})
            return
        if not found:
            output.remarks().print("no aliases" + (f" whose names begin with {output.plain(prefix)}" if prefix else ""))
            return
        table = output.table("ALIAS", "CALLS", "MOVES TO", "MIRROR", "WHY NOT YET")
        for alias in found:
            mirror = alias.get("mirror") or {}
            cells = (
                str(alias.get("id", "")),
                aliasview.calls(alias),
                str(alias.get("target", "")) if alias.get("status") != VModelStatus.DEFINED else "",
                f"{mirror['share']:g} % {mirror['target']}" if mirror else "",
                aliasview.why(alias),
            )
            table.add_row(*map(output.plain, cells))
        output.console().print(table)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def show(context: typer.Context, name: Alias, endpoint: options.Endpoint = "", as_json: options.Json = False) -> None:
    """Shows an alias: where its calls go, its versions, and the progress of its move.

    The exit code is 5 if the alias's target cannot be loaded. Example: `mesh alias show fraud`
    """

    async def command(client: Client) -> None:
        answer = await client.get(aliasview.alias_path(name))
        aliasview.show(answer, as_json=as_json)
        if answer.get("status") == VModelStatus.TRANSITION_FAILED:
            text = f"{answer.get('target')} cannot be loaded; calls still go to {answer.get('active')}"
            raise CommandError(text, code=Exit.LOAD_FAILED, reason=Reason.LOAD_FAILED.name, answered=True)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def remove(
    context: typer.Context,
    name: Alias,
    missing_ok: Annotated[bool, typer.Option("--missing-ok", help="Succeed even if the alias does not exist.")] = False,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Deletes an alias, and its versions that `mesh register --version` registered, unless another alias names them.
    Other models that the alias names stay registered.

    Example: `mesh alias rm fraud`
    """

    async def command(client: Client) -> None:
        answer = await client.request("DELETE", aliasview.alias_path(name))
        if as_json:
            output.print_json(answer)
        elif answer.get("existed"):
            output.console().print(f"deleted alias {output.plain(name)}")
        if not answer.get("existed") and not missing_ok:
            text = f"there is no alias {name}"
            raise CommandError(text, code=Exit.NOT_FOUND, reason=Reason.UNKNOWN_MODEL.name, answered=True)

    options.run(context, command, endpoint=endpoint, as_json=as_json)

"""`mesh unregister`: unregisters models by id, prefix or type, after a confirmation that counts them.

Many models are unregistered in chunks of a few thousand, as `import` registers them. If the command ends early, running
it again continues.
"""

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from mesh.cli import options, output, parallel
from mesh.cli.client import Client, model_path
from mesh.cli.exits import CommandError, Exit, MeshRefusal

REMOVAL_PATH = "/mesh/v1/models:unregister"
CHUNK = 2000
IN_FLIGHT = 2  # a worker takes no more at a time
CHUNK_SECONDS = 120.0

SHOWN = 20
"""Number of failures listed for people; --json has all that the mesh reported."""


@dataclass(slots=True)
class Removals:
    """Counts of the models of a removal so far, by outcome."""

    unregistered: int = 0
    missing: int = 0
    failed: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("unregister", rich_help_panel=options.MODELS)(unregister)


def unregister(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Ids of the models to unregister.", show_default=False),
    ] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="PREFIX", help="Prefix of the ids of all models to unregister.")
    ] = "",
    kind: Annotated[str, typer.Option("--all-of-type", metavar="TYPE", help="Type of all models to unregister.")] = "",
    yes: Annotated[
        bool,
        typer.Option(
            "--yes",
            "-y",
            help="Do not ask for confirmation. Required with --prefix or --all-of-type if there is no terminal.",
        ),
    ] = False,
    missing_ok: Annotated[bool, typer.Option("--missing-ok", help="Ignore ids that are not registered.")] = False,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Unregisters models and unloads their copies. Their files stay where they are.

    With both --prefix and --all-of-type, only models that match both are unregistered. Models that an alias names stay
    registered.

    Examples:

    - `mesh unregister fraud/de fraud/fr`
    - `mesh unregister --prefix fraud/`
    - `mesh unregister --prefix test/ --all-of-type onnx --yes`
    """
    if bool(models) == bool(prefix or kind):
        raise typer.BadParameter(
            "give either ids of models or a filter (--prefix, --all-of-type), not both", param_hint="MODEL"
        )

    async def command(client: Client) -> Removals:
        if models:
            await _each(client, models, missing_ok=missing_ok, as_json=as_json)
            return Removals()
        ids = [str(m["id"]) async for m in client.models(prefix) if not kind or m.get("type") == kind]
        what = f"{len(ids)} {'model' if len(ids) == 1 else 'models'}" + _described(prefix, kind)
        if ids:
            _ask(f"Unregister {what}?", yes=yes)
        totals = await _many(client, ids)
        _tell(totals, what, as_json=as_json)
        return totals

    totals = options.run(context, command, endpoint=endpoint, as_json=as_json, timeout=CHUNK_SECONDS)
    if totals.failed:
        raise typer.Exit(Exit.FAILED)


async def _each(client: Client, models: list[str], *, missing_ok: bool, as_json: bool) -> None:
    answers = [await client.request("DELETE", model_path(model)) for model in models]
    missing = [model for model, answer in zip(models, answers, strict=True) if not answer.get("existed")]
    if as_json:
        output.print_json({"unregistered": [m for m in models if m not in missing], "missing": missing})
    else:
        for model in models:
            if model not in missing:
                output.console().print(f"unregistered {output.plain(model)}")
    if missing and not missing_ok:
        text = f"not registered: {', '.join(missing)}"
        raise CommandError(text, code=Exit.NOT_FOUND, reason="UNKNOWN_MODEL", answered=True)


def _described(prefix: str, kind: str) -> str:
    return (f" of type {kind}" if kind else "") + (f" whose ids begin with {prefix}" if prefix else "")


def _ask(question: str, *, yes: bool) -> None:
    """Asks for confirmation. Raises CommandError if the answer is no, or if there is no terminal to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{question} There is no terminal to ask: use --yes", code=Exit.USAGE)
    if not typer.confirm(question, err=True):
        raise CommandError("nothing was changed", reason="REFUSED")


async def _many(client: Client, ids: list[str]) -> Removals:
    """Unregisters the models in chunks, a few at a time. If a request fails, sends no further chunks, and raises the
    request's error."""
    totals = Removals()
    chunks: Iterator[list[str]] = iter([ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)])

    async def sender() -> None:
        for chunk in chunks:  # one shared iterator: each sender takes the next chunk when its own is done
            await parallel.admitted(functools.partial(_send, client, chunk, totals))

    try:
        await parallel.run(sender, IN_FLIGHT, CommandError)
    except CommandError as error:
        error.text += f" (after {totals.unregistered} models; run the same command again to continue)"
        raise
    return totals


async def _send(client: Client, chunk: list[str], totals: Removals) -> None:
    trouble: CommandError | None = CommandError(
        "the mesh ended its answer in the middle of the removal: run the same command again"
    )
    data = "".join(json.dumps({"id": model}) + "\n" for model in chunk).encode()
    async for line in client.lines(REMOVAL_PATH, data):
        error = line.get("error")
        if isinstance(error, dict) and error.get("line"):
            totals.errors.append({"id": error.get("id"), "reason": error.get("reason"), "text": error.get("text")})
        elif isinstance(error, dict):  # an error of the whole chunk: the registry is unavailable
            trouble = MeshRefusal(str(error.get("text", "")), reason=str(error.get("reason", "")))
        elif "finished" in line:
            if line["finished"]:
                trouble = None
            totals.unregistered += int(line.get("unregistered", 0))
            totals.missing += int(line.get("missing", 0))
            totals.failed += int(line.get("failed", 0))
    if trouble is not None:
        raise trouble


def _tell(totals: Removals, what: str, *, as_json: bool) -> None:
    if as_json:
        answer = {"unregistered": totals.unregistered, "missing": totals.missing, "failed": totals.failed}
        output.print_json({**answer, "errors": totals.errors})
        return
    screen = output.remarks()
    for error in totals.errors[:SHOWN]:
        screen.print(f"[red]{output.plain(str(error['id']))}:[/] {output.plain(str(error['text']))}", soft_wrap=True)
    if totals.failed > SHOWN:
        screen.print(f"and {totals.failed - SHOWN} more (--json lists them)")
    text = f"unregistered {totals.unregistered} of {what}"
    text += f"; {totals.failed} stay" if totals.failed else ""
    output.console().print(output.plain(text), soft_wrap=True)

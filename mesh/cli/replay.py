"""`mesh replay`: repeats a pod's decisions about memory for models, with the code installed here."""

import json
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from mesh.cli import options, output
from mesh.cli.client import Client
from mesh.cli.exits import CommandError, Exit
from placement import replay as replays

SHOWN = 20
"""Largest number of differences that are shown. All are counted."""


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("replay", rich_help_panel=options.MESH)(replay)


def replay(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="POD|FILE", help="Name of a running pod, or a file written by --save.", show_default=False
        ),
    ],
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE", help="File to write the decisions to.")] = None,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Repeats the decisions behind a pod's latest evictions and refusals, from their recorded inputs.

    The same version of Mesh makes the same decisions; another version may not, and the output shows the differences.
    The exit code is 1 if any decision differs.

    Examples:

    - `mesh replay pod-1 --save decisions.ndjson`
    - `mesh replay decisions.ndjson`
    """
    if Path(source).is_file():
        options.guarded(lambda: _report(_read(Path(source)), as_json=as_json), as_json=as_json)
        return

    async def command(client: Client) -> None:
        answer = await client.get(f"/mesh/v1/pods/{quote(source, safe='')}/decisions")
        lines = [json.dumps(decision) for decision in answer["decisions"]]
        if save is not None:
            try:
                save.write_text("".join(f"{line}\n" for line in lines))
            except OSError as error:
                raise CommandError(f"{save} cannot be written: {error.strerror}", code=Exit.USAGE) from error
            output.remarks().print(f"{len(lines)} decisions written to {save}")
        _report(lines, as_json=as_json)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}", code=Exit.USAGE) from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text: give a file written by --save", code=Exit.USAGE) from error


def _report(lines: list[str], *, as_json: bool) -> None:
    try:
        count, differences = replays.replay(lines)
    except ValueError as error:
        raise CommandError(f"the input is not a list of a pod's decisions: {error}", code=Exit.USAGE) from error
    if as_json:
        output.print_json(
            {
                "decisions": count,
                "different": [
                    {"line": d.line, "model": d.question.model_id, "was": list(d.victims), "now": list(d.now.victims)}
                    for d in differences
                ],
            }
        )
    else:
        output.console().print(f"{count} decisions, {len(differences)} would now be different")
        for one in differences[:SHOWN]:
            was = f"{one.verdict.value} {', '.join(one.victims)}".strip()
            now = f"{one.now.verdict.value} {', '.join(one.now.victims)}".strip()
            text = f"line {one.line}, for {one.question.model_id}: {was} then, {now} now: {one.now.why}"
            output.console().print(output.plain(text), soft_wrap=True)
    if differences:
        raise CommandError(f"{len(differences)} of {count} decisions differ", code=Exit.FAILED, answered=True)

"""`mesh import`: registers many models at once, from lines of JSON or from a folder of model files.

The lines are sent in chunks, a few at a time. Each chunk is a request of its own. Therefore no connection has to last
for the whole import, and only a few chunks are in memory at the same time. After a failure, running the command again
continues the import, because models that are already registered stay unchanged. A bad line is reported with its number,
and the others are still sent.
"""

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from mesh.cli import layout, options, output, parallel
from mesh.cli.client import Client
from mesh.cli.exits import CommandError, Exit, MeshRefusal

IMPORT_PATH = "/mesh/v1/models:import"
CHUNK_LINES = 2000
CHUNK_BYTES = 2**20
IN_FLIGHT = 2  # a worker takes no more at a time
CHUNK_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Lines that are sent in one request. `numbers[i]` is the number of line i in the source, counted from 1."""

    data: bytes
    numbers: tuple[int, ...]


@dataclass(slots=True)
class Totals:
    """Counts of an import so far, in models."""

    created: int = 0
    existing: int = 0
    failed: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)  # kept only for --json
    untaken: Counter[tuple[str, str]] = field(default_factory=Counter)  # models by type, and why no pod takes it

    @property
    def done(self) -> int:
        """Number of lines that the mesh has answered."""
        return self.created + self.existing + self.failed


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("import", rich_help_panel=options.MODELS)(import_models)


def import_models(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="File with lines of JSON, - for standard input, a folder of model files, or a manifest.json.",
        ),
    ],
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="PREFIX", help="Prefix to put before every id of a folder or a manifest.")
    ] = "",
    kind: Annotated[
        str, typer.Option("--type", "-t", metavar="TYPE", help="Type of the models, for a folder or a manifest.")
    ] = "onnx",
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Registers many models at once.

    In a file or on standard input, each line is a model:
    `{"id": "fraud/de", "type": "onnx", "path": "/models/fraud-de.onnx"}`. If the model is in a store of the storage
    secret, add `"key": {"storage_key": "STORE"}`, with the store's name there. With `"sha256"`, pods load only a file
    with this digest.

    If the source is a folder without a `manifest.json`, every .onnx file below it is registered. A model's id is the
    file's path in the folder, without the suffix. If a model has external data, its folder is registered instead of the
    file. A folder of versions (`dense/1/model.onnx`, `dense/2/model.onnx`) is one model, `dense`. If the folder has a
    `manifest.json`, or the source is one, only the models that it lists are registered:
    `{"models": [{"id": "a", "file": "a.onnx"}]}`. The manifest may give a model a `"type"`, a `"key"`, and a `"path"`
    (a URI) instead of a `"file"` beside the manifest.

    Models already registered with the same attributes stay unchanged. The exit code is 1 if any line failed.

    Examples:

    - `mesh import models.ndjson`
    - `mesh import ./models --prefix fraud/`
    - `generate | mesh import -`
    """

    async def command(client: Client) -> Totals:
        return await _import(client, source, prefix, kind, as_json=as_json)

    totals = options.run(context, command, endpoint=endpoint, as_json=as_json, timeout=CHUNK_SECONDS)
    if totals.failed:
        raise typer.Exit(Exit.FAILED)


async def _import(client: Client, source: str, prefix: str, kind: str, *, as_json: bool) -> Totals:
    totals = Totals()
    started = time.monotonic()
    screen = output.remarks()
    shown = Progress(
        SpinnerColumn(), TextColumn("registering"), BarColumn(), MofNCompleteColumn(), _Rate(), console=screen
    )
    with shown if screen.is_terminal else nullcontext():
        task = shown.add_task("import", total=count_lines(source))

        def bad(number: int, model_id: str, why: str) -> None:
            totals.failed += 1
            report({"line": number, "id": model_id, "reason": "BAD_REQUEST", "text": why})

        def report(error: dict[str, Any]) -> None:
            if as_json:
                totals.errors.append(error)
            where = f"line {error['line']}" + (f" ({output.plain(str(error['id']))})" if error.get("id") else "")
            why = output.plain(f"{error.get('reason', '')}: {error.get('text', '')}")
            screen.print(f"[red]{where}:[/] {why}", soft_wrap=True)

        try:
            await _send_all(
                client,
                chunks(lines_of(source, prefix, kind, bad)),
                totals,
                report,
                lambda: shown.update(task, completed=totals.done),
            )
        except CommandError as error:
            error.text += f" (after {totals.done} lines; run the same command again to continue)"
            raise
    seconds = max(time.monotonic() - started, 1e-9)
    answer = {"created": totals.created, "existing": totals.existing, "failed": totals.failed}
    if as_json:
        untaken = [{"type": kind, "models": count, "text": why} for (kind, why), count in totals.untaken.items()]
        output.print_json({**answer, "seconds": round(seconds, 3), "errors": totals.errors, "untaken": untaken})
    else:
        for (kind, why), count in totals.untaken.items():
            what = output.plain(f"{count} of the registered models have type {kind}, so no call can load them: {why}")
            screen.print(f"[yellow]note:[/] {what}", soft_wrap=True)
        text = ", ".join(f"{number} {name}" for name, number in answer.items())
        output.console().print(f"{text}, in {seconds:.1f} s ({totals.done / seconds:.0f}/s)")
    return totals


async def _send_all(client: Client, source: Iterator[Chunk], totals: Totals, report: Any, progress: Any) -> None:
    """Sends the chunks, a few at a time. If a request fails, sends no further chunks, and raises the request's
    error."""

    async def sender() -> None:
        for chunk in source:  # one shared iterator: each sender takes the next chunk when its own is sent
            await parallel.admitted(functools.partial(_send, client, chunk, totals, report))
            progress()

    await parallel.run(sender, IN_FLIGHT, CommandError)


async def _send(client: Client, chunk: Chunk, totals: Totals, report: Any) -> None:
    trouble: CommandError | None = CommandError(
        "the mesh ended its answer in the middle of the import: run the same command again; models already "
        "registered stay unchanged"
    )
    async for line in client.lines(IMPORT_PATH, chunk.data):
        error = line.get("error")
        if isinstance(error, dict):
            number = error.get("line")
            if isinstance(number, int) and 0 < number <= len(chunk.numbers):
                report({**error, "line": chunk.numbers[number - 1]})
            else:  # an error of the whole chunk: the registry is unavailable
                trouble = MeshRefusal(str(error.get("text", "")), reason=str(error.get("reason", "")))
        elif "finished" in line:
            if line["finished"]:
                trouble = None
            totals.created += int(line.get("created", 0))
            totals.existing += int(line.get("existing", 0))
            totals.failed += int(line.get("failed", 0))
            for one in line.get("untaken", ()):
                totals.untaken[str(one["type"]), str(one["text"])] += int(one["models"])
    if trouble is not None:
        raise trouble


def chunks(lines: Iterable[tuple[int, bytes]]) -> Iterator[Chunk]:
    """Yields the numbered lines in chunks of bounded size, without blank lines."""
    data: list[bytes] = []
    numbers: list[int] = []
    size = 0
    for number, line in lines:
        line = line.strip()
        if not line:
            continue
        if data and (len(data) >= CHUNK_LINES or size + len(line) > CHUNK_BYTES):
            yield Chunk(b"\n".join(data) + b"\n", tuple(numbers))
            data, numbers, size = [], [], 0
        data.append(line)
        numbers.append(number)
        size += len(line) + 1
    if data:
        yield Chunk(b"\n".join(data) + b"\n", tuple(numbers))


def lines_of(source: str, prefix: str, kind: str, bad: Callable[[int, str, str], None]) -> Iterator[tuple[int, bytes]]:
    """Yields the numbered lines of a file or of standard input, or a line for each model in a folder. Calls `bad` with
    the number, id and reason of each model that could never be loaded."""
    if source == "-":
        yield from enumerate(sys.stdin.buffer, 1)
        return
    path = Path(source)
    try:
        manifest = path / "manifest.json" if path.is_dir() else path
        if manifest.suffix == ".json" and manifest.is_file():
            yield from _listed(manifest, prefix, kind, bad)
        elif path.is_dir():
            number = 0
            for number, found in enumerate(layout.models(path, _skipped), 1):
                if found.problem:
                    bad(number, prefix + found.id, found.problem)
                    continue
                model = {"id": prefix + found.id, "type": kind, "path": str(found.path.resolve())}
                yield number, json.dumps(model).encode()
            if not number:
                raise CommandError(
                    f"{path} has no .onnx files: name another folder, or one with a manifest.json", code=Exit.USAGE
                )
        else:
            with path.open("rb") as stream:
                yield from enumerate(stream, 1)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror or error}", code=Exit.USAGE) from error


def _skipped(folder: Path, why: str) -> None:
    output.remarks().print(f"{output.plain(str(folder))} skipped: {output.plain(why)}", soft_wrap=True)


def _listed(
    manifest: Path, prefix: str, kind: str, bad: Callable[[int, str, str], None]
) -> Iterator[tuple[int, bytes]]:
    """Yields a numbered line for each model of a manifest. Its file names are relative to the manifest."""
    try:
        for number, model in enumerate(json.loads(manifest.read_bytes())["models"], 1):
            model_id, path, problem = prefix + str(model["id"]), str(model.get("path", "")), ""
            if "path" not in model:
                file = manifest.parent / model["file"]
                placed, problem = layout.placed(file) if file.is_file() else (file, "")
                path = str(placed.resolve())
            if problem:
                bad(number, model_id, problem)
                continue
            line = {"id": model_id, "type": model.get("type", kind), "path": path}
            yield number, json.dumps(line | ({"key": model["key"]} if model.get("key") else {})).encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, KeyError):
            why = f"{error} is missing"
        else:
            why = (
                f"{error}"
                if isinstance(error, ValueError)
                else 'it must be like {"models": [{"id": ..., "file": ...}]}'
            )
        raise CommandError(f"{manifest} is not a manifest of models: {why}", code=Exit.USAGE) from error


def count_lines(source: str) -> int | None:
    """Returns the number of lines, for the progress bar, or None if the number is not known in advance."""
    path = Path(source)
    if source == "-" or path.suffix == ".json" or not path.is_file():
        return None
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(2**20), b""))


class _Rate(ProgressColumn):
    """A column of the progress bar with the current rate, in models a second."""

    def render(self, task: Task) -> Text:
        """Returns the column's cell for a task."""
        return Text(f"{task.speed:.0f}/s" if task.speed else "", style="dim")

"""Commands that register models one by one, and list them: `register`, `ls`."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from mesh.cli import aliasview, options, output, servers, versions
from mesh.cli.client import PAGE, Client, model_path
from mesh.cli.exits import CommandError, Exit
from mesh.cli.moves import Patience
from mesh.cli.serving import LOAD_SECONDS, show_status
from mesh.local.lines import one_line
from mesh.modelfiles import guessing, sniffing
from mesh.modelservers import environments, kinds
from mesh.schema.modelstatus import ModelStatus
from placement import modeltypes

_ONNX = "onnx"
_WHY = 160  # characters shown of a reason; `mesh status` shows all of it


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("register", rich_help_panel=options.MODELS)(register)
    app.command("ls", rich_help_panel=options.MODELS)(ls)


def register(
    context: typer.Context,
    model: options.ModelId,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="File or URI of the model, as the pods see it (https:, s3:, gs:, azure:, hf:, pvc:)."
        ),
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            "-t",
            metavar="TYPE",
            help="The model's type, such as onnx or sklearn. Default: guessed from its file, else onnx.",
        ),
    ] = "",
    key: Annotated[
        str,
        typer.Option(
            "--key",
            help="Store of the model: a key of the storage secret, a JSON object, or @FILE for a file with one.",
        ),
    ] = "",
    sha256: Annotated[
        str, typer.Option("--sha256", metavar="HEX", help="SHA-256 digest that the model's file must have.")
    ] = "",
    version: Annotated[
        str,
        typer.Option(
            "--version", metavar="VERSION", help="Version of the model: MODEL becomes an alias, which moves to it."
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
    load: Annotated[bool, typer.Option("--load", help="Load the model now instead of on its first call.")] = False,
    wait: Annotated[
        bool | None,
        typer.Option(
            "--wait/--no-wait",
            help="Load the model now, and wait until it is loaded. Default with --version: --wait, else --no-wait.",
            show_default=False,
        ),
    ] = None,
    timeout: options.Timeout = LOAD_SECONDS,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Registers a model. The model needs no memory until it is called.

    Registering a model again with the same attributes changes nothing. To replace the file of a model that is being
    called, give the new file a version: Mesh registers it as MODEL@VERSION, loads it, and then moves the alias MODEL to
    it. No call fails meanwhile, and `mesh rollback` undoes the move.

    Without --type, the type is guessed from the file, and printed.

    Examples:

    - `mesh register fraud/de ./fraud-de.onnx --wait`
    - `mesh register fraud/fr s3://models/fraud-fr.onnx --key my-store`
    - `mesh register fraud ./new.onnx --version 8`
    """
    if keep is not None and not version:
        raise typer.BadParameter("--keep is a number of versions: give --version too", param_hint="--keep")

    async def command(client: Client) -> kinds.ServerKind | None:
        """Returns a server that is not installed, and without which no pod here can take the model."""
        named = _key(key)
        inside = isinstance(named, dict) and not {"storage_key", "storage_params", "bucket"}.isdisjoint(named)
        described = {"path": path if inside else located(path), "key": named}
        described["type"] = kind or _guessed(str(described["path"]))
        if not inside and (mistaken := _mistaken(str(described["path"]), str(described["type"]))):
            output.remarks().print(f"[yellow]{output.plain(mistaken)}[/]", soft_wrap=True)
        if sha256:
            described["sha256"] = sha256
        if version:
            patience = Patience(wait is not False, timeout, as_json)
            await versions.register(client, model, version, described, keep, patience)
            return None
        body = described | {"load": load or bool(wait), "sync": bool(wait)}
        answer = await client.request("PUT", model_path(model), body=body, timeout=timeout)
        show_status(answer, as_json=as_json)
        taker = _taker(str(described["type"])) if answer.get("notes") else None
        installs = taker is not None and taker.installs and environments.installed(taker.name) is None
        if taker is not None:
            hint = _hint(taker, str(described["type"]), install=installs)
            output.remarks().print(f"[yellow]{output.plain(hint)}[/]", soft_wrap=True)
        if wait and answer.get("status") != ModelStatus.LOADED:
            raise CommandError(
                f"{model} is registered but not loaded: `mesh explain` says why",
                code=Exit.LOAD_FAILED,
                reason="LOAD_FAILED",
                answered=True,
            )
        here = urlsplit(client.endpoint).hostname in ("127.0.0.1", "::1", "localhost")
        return taker if installs and here and not as_json else None

    if (taker := options.run(context, command, endpoint=endpoint, as_json=as_json)) is not None:
        options.guarded(lambda: servers.offer(taker))


def ls(
    context: typer.Context,
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Prefix of the ids to list.")] = "",
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=1000, help="Maximum number of models to list.")
    ] = 100,
    after: Annotated[str, typer.Option("--after", metavar="ID", help="Id to continue after.")] = "",
    everything: Annotated[bool, typer.Option("--all", "-a", help="List all models, page by page.")] = False,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Lists registered models by id. Shows the pods that have loaded a model, or the reason why it cannot be loaded,
    and the aliases that name the model.

    Examples:

    - `mesh ls fraud/`
    - `mesh ls --all --json | jq -r '.models[].id'`
    """

    async def command(client: Client) -> None:
        if everything:
            await _list_all(client, prefix, after, as_json=as_json)
            return
        page = await client.get("/mesh/v1/models", prefix=prefix, after=after, limit=limit)
        if as_json:
            output.print_json(page)
            return
        if page["models"]:
            _print(page["models"], await _aliases_of(client))
        else:
            output.remarks().print("no models" + (f" whose ids begin with {output.plain(prefix)}" if prefix else ""))
        if page.get("next"):
            output.remarks().print(f"[dim]there are more: use --all, or --after {output.plain(page['next'])}[/]")

    options.run(context, command, endpoint=endpoint, as_json=as_json)


async def _list_all(client: Client, prefix: str, after: str, *, as_json: bool) -> None:
    """Prints all models, page by page, so that only one page is in memory at a time."""
    if as_json:
        separator = '{"models": ['
        async for model in client.models(prefix, after):
            sys.stdout.write(separator + json.dumps(model))
            separator = ",\n"
        sys.stdout.write(("]" if separator.startswith(",") else '{"models": []') + ', "next": null}\n')
        return
    rows: list[dict[str, Any]] = []
    aliases = await _aliases_of(client)
    async for model in client.models(prefix, after):
        rows.append(model)
        if len(rows) == PAGE:
            _print(rows, aliases)
            rows.clear()
    if rows:
        _print(rows, aliases)


async def _aliases_of(client: Client) -> dict[str, list[str]]:
    """Returns the aliases that name each model. Returns nothing if the aliases fill more than one page."""
    found: dict[str, list[str]] = {}
    page = await client.get("/mesh/v1/aliases", limit=PAGE)
    if page.get("next"):
        output.remarks().print(f"[dim]there are more than {PAGE} aliases, which are not shown: see mesh alias ls[/]")
        return found
    for alias in page["aliases"]:
        for model in aliasview.roles(alias):
            found.setdefault(model, []).append(str(alias.get("id", "")))
    return found


def _print(models: list[dict[str, Any]], aliases: dict[str, list[str]]) -> None:
    """Prints plain aligned lines, because rich takes over a minute for a table of a hundred thousand rows."""
    named = any(str(model["id"]) in aliases for model in models)
    header = ["MODEL", "TYPE", "PODS", *(["ALIASES"] if named else []), "PATH"]
    rows = [[*header, "WHY" if any(map(_trouble, models)) else ""]]
    for model in models:
        trouble = _trouble(model)
        pods = ",".join(str(pod) for pod in model.get("pods", ())) or trouble.partition(":")[0] or "-"
        why = one_line(trouble)
        why = why if len(why) <= _WHY else why[: _WHY - 1] + "…"
        row = [str(model["id"]), str(model.get("type", "")), pods]
        row += [",".join(aliases.get(str(model["id"]), ["-"]))] if named else []
        rows.append([*row, str(model.get("path", "")), why])
    shown = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(header))]
    for row in shown:
        aligned = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        sys.stdout.write("  ".join([*aligned, row[-1]]).rstrip() + "\n")


def _trouble(model: dict[str, Any]) -> str:
    """Returns the reason why a model cannot be loaded, such as `failed: no such file`, or "" if it can."""
    errors = model.get("errors") or []
    if not errors and not model.get("quarantined"):
        return ""
    return f"{'quarantined' if model.get('quarantined') else 'failed'}: {errors[0] if errors else 'servers died of it'}"


def _guessed(path: str) -> str:
    """Returns the type of a model whose type is not given, and prints how the type was guessed."""
    try:
        file = Path(path.removeprefix("file://"))
        guess = guessing.of_file(file) if file.exists() else guessing.of_name(path)
    except OSError:  # the pods will say why
        guess = None
    if guess is None or guess.type == _ONNX:
        return _ONNX
    text = f"type {guess.type}: {guess.because} (--type names another one)"
    output.remarks().print(f"[dim]{output.plain(text)}[/]", soft_wrap=True)
    return guess.type


def _taker(model_type: str) -> kinds.ServerKind | None:
    """Returns the kind of server that pods can start for a model type, or None if Mesh has none."""
    return next(iter(kinds.takers(modeltypes.name_of(model_type))), None)


def _hint(taker: kinds.ServerKind, model_type: str, *, install: bool) -> str:
    """Returns a sentence with the command that starts a pod for a model type. With `install`, it begins with the
    installation."""
    code = " --allow-code" if kinds.runs_code(model_type) else ""
    why = "; such models run code when they are loaded" if code else ""
    first = f"mesh servers install {taker.name}, then " if install else ""
    return f"{taker.what} takes models of type {model_type}: {first}mesh up --server {taker.name}=1{code}{why}"


def _mistaken(path: str, kind: str) -> str:
    """Returns a remark if a model is registered as ONNX but its file, on this machine, obviously is not. Returns ""
    otherwise."""
    if not modeltypes.takes(frozenset({"onnx"}), kind):
        return ""
    try:
        file = Path(path)
        found = sniffing.look(file) if file.is_file() else None
    except OSError:  # the pods will say why
        return ""
    if found is None or found is sniffing.ONNX:
        return ""
    return f"{path} is {found.what}, not an ONNX model, so it cannot be loaded: {found.way_out}"


def located(path: str) -> str:
    """Returns a path that pods understand: the absolute path of a file on this machine, or a URI unchanged. Raises
    CommandError for any other relative path, because pods do not share this command's current folder."""
    scheme, colon, rest = path.partition(":")
    is_uri = bool(colon) and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) is not None
    if path.startswith("/") or (is_uri and (scheme.lower() != "file" or rest.startswith("/"))):
        return path
    local = Path(rest if is_uri else path)
    if path and local.exists():
        return str(local.resolve())
    raise CommandError(
        f"{path!r} is neither a file here nor an absolute path or URI. If it is in a store, name the store with --key "
        "(--key default for the pods' default store)",
        code=Exit.USAGE,
    )


def _key(text: str) -> Any:
    """Returns a storage key: the JSON object in the text, or an object that names the store if the text is a name."""
    text = options.text_or_file(text)
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise CommandError(f"--key is not valid JSON: {error}", code=Exit.USAGE) from error
    return {"storage_key": text} if text else text

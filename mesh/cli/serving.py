"""Commands about one model and its copies: `status`, `load`, `reload`, `release`, `explain`."""

import asyncio
import time
from typing import Annotated, Any

import typer

from mesh.cli import aliasview, options, output
from mesh.cli.client import Client, model_path
from mesh.cli.exits import CommandError, Exit, MeshRefusal
from mesh.schema.modelstatus import ModelStatus, VModelStatus
from mesh.statuses import Reason

_LOOK = 0.3  # seconds between two requests for the state of a reload

LOAD_SECONDS = 300.0
"""Default time limit of a load, enough to pull and warm up large models."""


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("status", rich_help_panel=options.MODELS)(status)
    app.command("load", rich_help_panel=options.MODELS)(load)
    app.command("reload", rich_help_panel=options.MODELS)(reload)
    app.command("release", rich_help_panel=options.MODELS)(release)
    app.command("explain", rich_help_panel=options.MODELS)(explain)


def status(
    context: typer.Context, model: options.ModelOrAlias, endpoint: options.Endpoint = "", as_json: options.Json = False
) -> None:
    """Shows a model: its registration, its copies, and the reason if it cannot be loaded. For an alias, shows the
    models that get its calls, its versions, and the reason if a move is stuck.

    The exit code is 5 if loading failed. Example: `mesh status fraud/de`
    """

    async def command(client: Client) -> None:
        if (alias := await aliasview.find(client, model)) is not None:
            aliasview.show(alias, as_json=as_json)
            _end_with_alias(alias)
            return
        answer = await client.get(model_path(model))
        show_status(answer, as_json=as_json)
        _end_with(answer)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def load(
    context: typer.Context,
    model: options.ModelId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the model is loaded.")] = True,
    timeout: options.Timeout = LOAD_SECONDS,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Loads a model before its first call. The exit code is 5 if the model cannot be loaded.

    Example: `mesh load fraud/de --timeout 60`
    """

    async def command(client: Client) -> None:
        answer = await client.request("POST", model_path(model, "/load"), body={"sync": wait}, timeout=timeout)
        show_status(answer, as_json=as_json)
        _end_with(answer)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def reload(
    context: typer.Context,
    model: options.ModelId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until all copies are replaced.")] = True,
    timeout: options.Timeout = LOAD_SECONDS,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Replaces a model's copies with copies of the content now at its path. No call fails meanwhile.

    All copies of a registration have the content that its first load found. If the content at its path has been
    replaced since, this command loads the new content beside each old copy, and unloads the old copy once the new one
    can answer. Until all copies are replaced, old and new copies answer. If the new content cannot be loaded, the old
    copies stay, and the exit code is 5.

    Example: `mesh reload fraud/de`
    """

    async def command(client: Client) -> None:
        end = time.monotonic() + timeout
        answer = await client.request("POST", model_path(model, "/reload"))
        generation = answer.get("generation") or 0
        while wait and (move := answer.get("reload")) and not move.get("why") and time.monotonic() < end:
            await asyncio.sleep(_LOOK)
            answer = await client.get(model_path(model))
        show_status(answer, as_json=as_json)
        move = answer.get("reload")
        if wait and move and (answer.get("generation") or 0) <= generation:
            why = move.get("why") or f"its copies were not replaced within {timeout:g} s"
            raise CommandError(
                f"{model} still answers from its old content: {why}",
                code=Exit.LOAD_FAILED,
                reason="LOAD_FAILED",
                answered=True,
            )

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def release(
    context: typer.Context, model: options.ModelId, endpoint: options.Endpoint = "", as_json: options.Json = False
) -> None:
    """Ends a model's quarantine, and forgets its failed loads.

    A model whose loads or calls killed model servers repeatedly is quarantined: it is not loaded again until it is
    released or registered again.

    Example: `mesh release fraud/de`
    """

    async def command(client: Client) -> None:
        answer = await client.request("POST", model_path(model, "/release"))
        if as_json:
            output.print_json(answer)
        else:
            output.console().print(f"released {output.plain(model)}")

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def explain(
    context: typer.Context, model: options.ModelOrAlias, endpoint: options.Endpoint = "", as_json: options.Json = False
) -> None:
    """Explains which pods have loaded a model, or would load it, and why. For an alias, explains which models get its
    calls, and then each model that it uses. Versions that are only kept for a rollback are left out.

    Example: `mesh explain fraud/de`
    """

    async def command(client: Client) -> None:
        if (alias := await aliasview.find(client, model)) is not None:
            await _explain_alias(client, alias, as_json=as_json)
            return
        answer = await client.get(model_path(model, "/explain"))
        if as_json:
            output.print_json(answer)
        else:
            _show_explanation(answer)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


async def _explain_alias(client: Client, alias: dict[str, Any], *, as_json: bool) -> None:
    """Explains an alias, and then each model that it names as a destination, target or shadow."""
    explained: list[dict[str, Any]] = []
    lines = aliasview.sentences(alias)
    for name, roles in aliasview.roles(alias).items():
        if all(role.startswith("version ") for role in roles):
            continue  # kept for a rollback
        try:
            explained.append(await client.get(model_path(name, "/explain")))
        except MeshRefusal as error:
            if error.reason != Reason.UNKNOWN_MODEL.name:
                raise
            lines.append(f"It names {name} ({', '.join(roles)}), which is not registered.")
    if as_json:
        output.print_json({"alias": alias, "lines": lines, "models": explained})
        return
    for line in lines:
        output.console().print(output.plain(line), soft_wrap=True)
    for answer in explained:
        output.console().print(f"\n[bold]{output.plain(str(answer.get('id', '')))}[/]", soft_wrap=True)
        _show_explanation(answer)


def _show_explanation(answer: dict[str, Any]) -> None:
    screen = output.console()
    for line in answer.get("lines", ()):
        screen.print(output.plain(str(line)), soft_wrap=True)
    ranking = answer.get("ranking") or []
    if ranking:
        made = output.table(">", "POD", "WHY")
        for place, entry in enumerate(ranking, 1):
            made.add_row(str(place), output.plain(str(entry.get("pod", ""))), output.plain(str(entry.get("why", ""))))
        screen.print()
        screen.print(made)


def show_status(answer: dict[str, Any], *, as_json: bool) -> None:
    """Prints a model's status, which is the mesh's answer to every command about a model."""
    if as_json:
        output.print_json(answer)
        return
    screen = output.console()
    made = output.table("", "")
    made.show_header = False
    sizes = [
        f"{output.size(answer.get(key))} {where}"
        for key, where in (("host_bytes", "host"), ("device_bytes", "device"))
        if output.size(answer.get(key))
    ]
    rows = {
        "model": f"[bold]{output.plain(str(answer.get('id', '')))}[/]",
        "status": output.status(str(answer.get("status", "UNKNOWN"))),
        "type": output.plain(str(answer.get("type") or "")),
        "path": output.plain(str(answer.get("path") or "")),
        "key": output.plain(str(answer.get("key") or "")),
        "sha256": output.plain(str(answer.get("sha256") or "")),
        "digest": output.plain(str(answer.get("digest") or "")),
        "generation": str(answer.get("generation") or ""),
        "size": ", ".join(sizes),
        "copies": _limits(answer),
        "load took": output.duration(answer.get("load_ms") or None),
    }
    for name, value in rows.items():
        if value:
            made.add_row(f"[dim]{name}[/]", value)
    for text in answer.get("errors") or ():
        made.add_row("[dim]error[/]", f"[red]{output.plain(str(text))}[/]")
    for text in answer.get("notes") or ():
        made.add_row("[dim]note[/]", f"[yellow]{output.plain(str(text))}[/]")
    for text in answer.get("killed") or ():
        made.add_row("[dim]a server died[/]", f"[red]{output.plain(str(text))}[/]")
    if answer.get("quarantined"):
        made.add_row(
            "[dim]quarantined[/]", "[red]not loaded again until it is released (mesh release) or registered again[/]"
        )
    if (move := answer.get("reload")) is not None:
        text = f"its copies are being replaced by generation {move.get('generation')}"
        why = f"; [red]this failed: {output.plain(str(move['why']))}[/]" if move.get("why") else ""
        made.add_row("[dim]reload[/]", text + why)
    screen.print(made)
    copies = answer.get("copies") or []
    if copies:
        listed = output.table("POD", "COPY", ">SIZE", "CONTENT")
        for copy in copies:
            older = copy.get("digest") and (copy.get("generation") or 0) < (answer.get("generation") or 0)
            listed.add_row(
                output.plain(str(copy.get("pod", ""))),
                output.status(str(copy.get("status", ""))) + queued(copy.get("load")) + pulling(copy.get("pull")),
                output.size(copy.get("bytes")),
                short(copy.get("digest")) + (" (before the reload)" if older else ""),
            )
        screen.print()
        screen.print(listed)


def short(digest: Any) -> str:
    """Returns the beginning of a digest, which is enough to tell digests apart."""
    return output.plain(str(digest or "")[:12])


def _limits(answer: dict[str, Any]) -> str:
    """Returns the limits of copies in words: `at least 2, at most 4, pinned`."""
    words = [f"at least {answer['min_copies']}"] if answer.get("min_copies") else []
    words += [f"at most {answer['max_copies']}"] if answer.get("max_copies") else []
    words += [{True: "pinned", False: "not pinned"}[answer["pinned"]]] if answer.get("pinned") is not None else []
    return ", ".join(words)


def queued(load: dict[str, Any] | None) -> str:
    """Returns the state of a load in words, such as ` waits for 3 others, about 2.5 s`, or ` about 2.5 s` once it runs.
    Returns "" if the state is not known."""
    if not load:
        return ""
    words = []
    if load.get("state") in ("queued", "waiting"):
        ahead = load.get("ahead") or 0
        words.append(f"waits for {ahead} {'other' if ahead == 1 else 'others'}" if ahead else "waits")
    if load.get("expected_ms"):
        words.append(f"about {output.duration(load['expected_ms'])}")
    return f" {', '.join(words)}" if words else ""


def pulling(pull: dict[str, Any] | None) -> str:
    """Returns the progress of a pull, such as ` 120 MiB of 1.0 GiB, 85 MiB/s`. Returns "" if there is no pull."""
    if not pull:
        return ""
    text = f" {output.size(pull.get('bytes')) or '0 B'}"
    if pull.get("of"):
        text += f" of {output.size(pull['of'])}"
    return text + (f", {output.size(pull['rate'])}/s" if pull.get("rate") else "")


def _end_with_alias(alias: dict[str, Any]) -> None:
    """Raises CommandError if the target of an alias, or the model that gets its calls, cannot be loaded."""
    failed = alias.get("status") == VModelStatus.TRANSITION_FAILED
    model = alias.get("target") if failed else alias.get("active")
    broken = any(
        one.get("id") == model and one.get("status") == ModelStatus.LOADING_FAILED for one in alias.get("models") or ()
    )
    if failed or broken:
        text = f"{model} cannot be loaded" + (f"; calls still go to {alias.get('active')}" if failed else "")
        raise CommandError(text, code=Exit.LOAD_FAILED, reason=Reason.LOAD_FAILED.name, answered=True)


def _end_with(answer: dict[str, Any]) -> None:
    """Raises CommandError if the model is not registered or cannot be loaded. The answer must have been printed
    before."""
    if answer.get("status") == ModelStatus.NOT_FOUND:
        text = f"{answer.get('id')} is not registered"
        raise CommandError(text, code=Exit.NOT_FOUND, reason="UNKNOWN_MODEL", answered=True)
    if answer.get("status") == ModelStatus.LOADING_FAILED or answer.get("quarantined"):
        text = f"{answer.get('id')} cannot be loaded"
        raise CommandError(text, code=Exit.LOAD_FAILED, reason="LOAD_FAILED", answered=True)

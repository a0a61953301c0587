"""Requests for aliases, and their display: the models that get an alias's calls, the versions, and the progress of a
move."""

from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

from mesh.cli import output
from mesh.cli.client import PAGE, Client
from mesh.cli.exits import MeshRefusal
from mesh.schema.modelstatus import VModelStatus
from mesh.statuses import Reason


def alias_path(alias: str, rest: str = "") -> str:
    """Returns the path of an alias's resource; names are percent-encoded, slashes included."""
    return f"/mesh/v1/aliases/{quote(alias, safe='')}{rest}"


async def find(client: Client, alias: str) -> dict[str, Any] | None:
    """Returns the alias of that name, or None."""
    try:
        return await client.get(alias_path(alias))
    except MeshRefusal as error:
        if error.reason == Reason.UNKNOWN_MODEL.name:
            return None
        raise


async def listed(client: Client, prefix: str = "") -> AsyncIterator[dict[str, Any]]:
    """Yields every alias whose name begins with `prefix`, page by page."""
    after = ""
    while True:
        page = await client.get("/mesh/v1/aliases", prefix=prefix, after=after, limit=PAGE)
        for alias in page.get("aliases") or ():
            yield alias
        if not (after := page.get("next") or ""):
            return


def roles(alias: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the models that an alias names, each with its roles: `calls`, `target`, `mirror`, `version 7`."""
    found: dict[str, list[str]] = {}

    def add(model: object, role: str) -> None:
        found.setdefault(str(model), []).append(role)

    weights = alias.get("weights") or {}
    for model in [one for one, weight in weights.items() if weight] or [alias.get("active")]:
        add(model, "calls")
    if alias.get("active") not in found:
        add(alias.get("active"), "active")
    if alias.get("target") != alias.get("active"):
        add(alias.get("target"), "target")
    if mirror := alias.get("mirror"):
        add(mirror.get("target"), "mirror")
    for version, model in (alias.get("versions") or {}).items():
        add(model, f"version {version}")
    return found


def why(alias: Mapping[str, Any]) -> str:
    """Returns the reason why an alias's target could not be loaded, or "" if none is known."""
    errors = [str(text) for model in alias.get("models") or () for text in model.get("errors") or ()]
    return str(alias.get("why") or next(iter(errors), ""))


def calls(alias: Mapping[str, Any]) -> str:
    """Returns the models that get an alias's calls, in words, such as `fraud@8 (version 8)` or
    `90 % fraud@7, 10 % fraud@8, by x-user`."""
    weights = {str(model): int(weight) for model, weight in (alias.get("weights") or {}).items()}
    total = sum(weights.values())
    if not total:
        return _named(alias, "active")
    parts = ", ".join(f"{100 * weight / total:.4g} % {model}" for model, weight in weights.items() if weight)
    return parts + (f", by {alias['sticky']}" if alias.get("sticky") else "")


def sentences(alias: Mapping[str, Any]) -> list[str]:
    """Returns sentences that say which models get an alias's calls, and why."""
    name, target = alias.get("id"), _named(alias, "target")
    lines = [f"{name} is an alias: its calls go to {calls(alias)}."]
    if alias.get("status") == VModelStatus.TRANSITIONING:
        lines.append(f"It moves to {target} when that model has as many loaded copies as {alias.get('active')}.")
    elif alias.get("status") == VModelStatus.TRANSITION_FAILED:
        lines.append(f"It has not moved to {target}, because that model could not be loaded: {why(alias)}.")
        lines.append(f"The mesh tries again; `mesh alias set {name} {alias.get('active')}` cancels the move.")
    if mirror := alias.get("mirror"):
        lines.append(f"A copy of {mirror.get('share'):g} % of its calls goes to {mirror.get('target')}, as a shadow.")
    if versions := alias.get("versions"):
        lines.append(
            f"It has the versions {', '.join(versions)}, and keeps {alias.get('keep')} before the present one."
        )
    return lines


def show(alias: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints an alias with the models that get its calls."""
    if as_json:
        output.print_json(alias)
        return
    made = output.table("", "")
    made.show_header = False
    mirror = alias.get("mirror")
    rows = {
        "alias": f"[bold]{output.plain(str(alias.get('id', '')))}[/]",
        "owner": output.plain(str(alias.get("owner") or "")),
        "status": output.status(str(alias.get("status", "UNKNOWN"))),
        "calls": output.plain(calls(alias)),
        "moves to": output.plain(_named(alias, "target")) if alias.get("active") != alias.get("target") else "",
        "why not yet": f"[red]{output.plain(why(alias))}[/]" if why(alias) else "",
        "mirror": output.plain(f"{mirror.get('share'):g} % also to {mirror.get('target')}") if mirror else "",
        "versions": output.plain(", ".join(map(str, alias.get("versions") or {}))),
    }
    for name, value in rows.items():
        if value:
            made.add_row(f"[dim]{name}[/]", value)
    output.console().print(made)
    models = alias.get("models") or []
    if models:
        listed = output.table("MODEL", "STATUS", ">COPIES")
        for model in models:
            listed.add_row(
                output.plain(str(model.get("id", ""))),
                output.status(str(model.get("status", ""))),
                str(model.get("copies", "")),
            )
        output.console().print()
        output.console().print(listed)


def _named(alias: Mapping[str, Any], role: str) -> str:
    version = alias.get("version" if role == "active" else "target_version")
    return f"{alias.get(role, '')}" + (f" (version {version})" if version else "")

"""`mesh pods`: lists the runtime pods, and shows the current state of one."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from mesh.cli import options, output
from mesh.cli.client import Client
from mesh.cli.serving import pulling, queued, short


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("pods", rich_help_panel=options.MESH)(pods)


def pods(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="POD|forget", help="Pod to show in detail, or the word forget.")] = "",
    forgotten: Annotated[str, typer.Argument(metavar="POD", help="Pod to forget.")] = "",
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Lists the runtime pods, shows the copies of one pod, or forgets a pod that will not return.

    A pod that is cut off from etcd may still answer calls. As long as this is possible, the pod is listed as cut off,
    and the models that it had loaded cannot be registered again with other attributes. `forget` lifts this restriction
    immediately. Use `forget` only when the pod is certainly down.

    OLDEST USE is the time since the last use of the copy that would be evicted next. A suspect pod has disappeared from
    etcd without draining. For pods with a foreign model server, OBSERVED is the measured memory of its models, and
    FACTOR its ratio to the models' sizes.

    Examples:

    - `mesh pods`
    - `mesh pods pod-1`
    - `mesh pods forget pod-1`
    """
    if forgotten and name != "forget":
        raise typer.BadParameter(f"this command shows one pod: to forget one, use `mesh pods forget {forgotten}`")
    pod = forgotten or name

    async def forget(client: Client) -> None:
        answer = await client.request("DELETE", f"/mesh/v1/pods/{quote(pod, safe='')}/lives")
        if as_json:
            output.print_json(answer)
        else:
            gone = ", ".join(map(str, answer["incarnations"]))
            output.remarks().print(f"forgot {output.plain(pod)} (incarnation {output.plain(gone)})")

    if forgotten:
        options.run(context, forget, endpoint=endpoint, as_json=as_json)
        return

    async def command(client: Client) -> None:
        answer = await client.get(f"/mesh/v1/pods/{quote(pod, safe='')}" if pod else "/mesh/v1/pods")
        if as_json:
            output.print_json(answer)
        elif pod:
            _show(answer)
        elif answer["pods"] or answer.get("open"):
            output.console().print(overview(answer["pods"]))
            if cut_off := answer.get("open"):
                output.console().print(_cut_off(cut_off))
        else:
            output.remarks().print("no runtime pods: models cannot be loaded until one has started")

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def overview(found: list[dict[str, Any]]) -> Any:
    """Returns the table of all pods."""
    device = any(pod.get("device_capacity") for pod in found)
    foreign = any(pod.get("factor") for pod in found)
    made = output.table(
        *("POD", "STATE", ">USED", ">CAPACITY", ">"),
        *((">DEVICE", ">") if device else ()),
        *((">OBSERVED", ">FACTOR") if foreign else ()),
        *(">COPIES", ">LOADING", ">CALLS/MIN", "OLDEST USE", "LABELS"),
    )
    for pod in sorted(found, key=lambda pod: str(pod.get("pod"))):
        capacity, on_device = pod.get("capacity") or 0, pod.get("device_capacity") or 0
        state = output.status(str(pod.get("state", "")))
        made.add_row(
            output.plain(str(pod.get("pod", ""))),
            f"{state} [red]suspect[/]" if pod.get("suspect") else state,
            output.size(pod.get("used")) or "0 B",
            output.size(capacity),
            _share(pod.get("used"), capacity),
            *((output.size(on_device), _share(pod.get("device_used"), on_device)) if device else ()),
            *(_observed(pod) if foreign else ()),
            str(pod.get("copies", "")),
            str(pod.get("loading", "")),
            str(pod.get("rate", "")),
            _oldest(pod),
            output.plain(" ".join(_marks(pod))),
        )
    return made


def _observed(pod: dict[str, Any]) -> tuple[str, str]:
    """Returns the observed memory of a foreign server's models, and the pod's factor, each in words. Both are "" for
    Mesh's own server."""
    if not (factor := pod.get("factor")):
        return "", ""
    return ("no" if pod.get("unobserved") else output.size(pod.get("observed")) or "0 B"), f"{factor:.1f}"


def _marks(pod: dict[str, Any]) -> list[str]:
    """Returns the pod's labels, its zone, and the types of models that it takes, one text for each."""
    zone = [f"zone={pod['zone']}"] if pod.get("zone") else []
    return [*(pod.get("labels") or ()), *zone, *(f"type={one}" for one in pod.get("types") or ())]


def _cut_off(lives: list[dict[str, Any]]) -> Any:
    made = output.table("CUT OFF", "INCARNATION", "DATA PORT", ">FOR", ">WAITED FOR")
    for life in lives:
        left = life.get("left_s")
        made.add_row(
            output.plain(str(life.get("pod", ""))),
            output.plain(str(life.get("incarnation", ""))),
            output.plain(str(life.get("data", ""))),
            output.duration(number(life, "open_s") * 1000),
            "until forgotten" if left is None else output.duration(left * 1000),
        )
    return made


def _oldest(pod: dict[str, Any]) -> str:
    """Returns the time since the last use of the copy that would be evicted next, in words. Says so if the copy has not
    been used yet."""
    if not pod.get("oldest_idle_ms"):
        return ""
    return "not used yet" if pod.get("oldest_unused") else f"{output.duration(pod['oldest_idle_ms'])} ago"


def _share(used: Any, capacity: int) -> str:
    return f"{100 * (used or 0) / capacity:.0f} %" if capacity else ""


def _show(pod: dict[str, Any]) -> None:
    screen = output.console()
    used, capacity = number(pod, "used_bytes"), number(pod, "capacity_bytes")
    on_device = number(pod, "device_capacity_bytes")
    device = f"{output.size(number(pod, 'device_used_bytes')) or '0 B'} of {output.size(on_device)} of the device's, "
    screen.print(
        f"[bold]{output.plain(str(pod.get('pod', '')))}[/] {output.status(str(pod.get('state', '')))}, "
        f"{output.size(used) or '0 B'} of {output.size(capacity)} used, {device if on_device else ''}"
        f"server resident {output.size(number(pod, 'resident_bytes')) or 'unknown'}, "
        f"incarnation {output.plain(str(pod.get('incarnation', '')))}"
    )
    if factor := pod.get("factor"):
        observed = (
            f"{output.size(number(pod, 'observed_bytes')) or '0 B'} observed ({output.plain(_text(pod, 'observed'))})"
        )
        if why := _text(pod, "unobserved"):
            observed = f"not observed: {output.plain(why)}"
        accounted = output.size(number(pod, "accounted_bytes")) or "0 B"
        screen.print(f"models: {accounted} by their sizes, factor {factor:.2f}, {observed}", soft_wrap=True)
    counters = pod.get("counters") or {}
    if counters:
        screen.print(
            ", ".join(f"{output.plain(str(name))} {count}" for name, count in sorted(counters.items())), soft_wrap=True
        )
    made = output.table("MODEL", "STATE", ">SIZE", ">CALLS", ">IN FLIGHT", ">BUSY", "LAST USE", "CONTENT")
    for copy in sorted(pod.get("copies") or (), key=lambda copy: number(copy, "idle_ms")):
        made.add_row(
            output.plain(str(copy.get("model_id", ""))),
            output.status(str(copy.get("state", ""))) + queued(copy.get("load")) + pulling(copy.get("pull")),
            output.size(number(copy, "host_bytes") + number(copy, "device_bytes")),
            str(number(copy, "calls")),
            str(number(copy, "in_flight")),
            output.duration(number(copy, "busy_us") / 1000),
            f"{output.duration(number(copy, 'idle_ms'))} ago" if was_used(copy) else "not used yet",
            short(copy.get("digest")) + (f" (generation {g})" if (g := number(copy, "generation")) else ""),
        )
    screen.print()
    screen.print(made)


def _text(record: dict[str, Any], name: str) -> str:
    return str(record.get(name) or "")


def was_used(copy: dict[str, Any]) -> bool:
    """Returns whether a copy has been called since it was loaded."""
    return bool(number(copy, "calls") or number(copy, "in_flight"))


def number(record: dict[str, Any], name: str) -> int:
    """Returns a number from an answer, in which protobuf's JSON writes 64-bit numbers as strings and omits zeros."""
    try:
        return int(record.get(name) or 0)
    except (TypeError, ValueError):
        return 0

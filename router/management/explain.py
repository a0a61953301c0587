"""Answers for people: where a model is and why, what the pods look like. Plain data, ready for JSON; no I/O."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mesh.options.values import format_bytes
from mesh.pb import agent_pb2
from placement import words
from placement.choice import Choice
from router.state.registry import Registration
from router.state.view import View

if TYPE_CHECKING:
    from router.management.models import ModelStatus


def pods(view: View) -> list[dict[str, Any]]:
    """Every pod that has published itself, by name."""
    found = []
    for pod in sorted(view.pods.values(), key=lambda pod: pod.name):
        record = pod.record
        if record is None:
            continue
        found.append(
            {
                "pod": pod.name,
                "state": record.state,
                "suspect": pod.suspect,
                "incarnation": record.incarnation,
                "data": record.data_address,
                "control": record.control_address,
                "probe": record.probe_address,
                "labels": list(record.labels),
                "zone": record.zone,
                "capacity": record.capacity_bytes,
                "used": record.used_bytes,
                "device_capacity": record.device_capacity_bytes,
                "device_used": record.device_used_bytes,
                "oldest_idle_ms": record.oldest_idle_ms,
                "oldest_unused": record.oldest_unused,
                "copies": record.copies,
                "loading": record.loads_in_progress,
                "threads": record.loading_threads,
                "rate": record.rate,
                "in_flight": pod.in_flight,
                "load": pod.load,
            }
        )
    return found


def described(reply: agent_pb2.DescribeReply) -> dict[str, Any]:
    """An agent's description of itself."""
    copies = [
        {
            "model_id": copy.model_id,
            "create_revision": copy.create_revision,
            "state": copy.state,
            "host_bytes": copy.host_bytes,
            "device_bytes": copy.device_bytes,
            "idle_ms": copy.idle_ms,
            "calls": copy.calls,
            "in_flight": copy.in_flight,
            "busy_us": copy.busy_us,
            "load_ms": copy.load_ms,
            "age_ms": copy.age_ms,
            "generation": copy.generation,
            "digest": copy.digest,
            "pull": pull(copy),
            "load": load(copy),
        }
        for copy in reply.copies
    ]
    return {
        "pod": reply.pod,
        "incarnation": reply.incarnation,
        "state": reply.state,
        "capacity_bytes": reply.capacity_bytes,
        "used_bytes": reply.used_bytes,
        "device_capacity_bytes": reply.device_capacity_bytes,
        "device_used_bytes": reply.device_used_bytes,
        "resident_bytes": reply.resident_bytes,
        "copies": copies,
        "decisions": [_decision(text) for text in reply.decisions],
        "counters": dict(reply.counters),
    }


def load(copy: agent_pb2.CopyState) -> dict[str, Any] | None:
    """How far a load is: its state, how many have their turn before it, and ms until it should be done (0: unknown)."""
    if copy.state in ("loaded", "unloading"):
        return None
    return {"state": copy.state, "ahead": copy.ahead, "expected_ms": copy.expected_ms}


def pull(copy: agent_pb2.CopyState) -> dict[str, int] | None:
    """How far the pull of a model's files is: bytes here, of how many (0: not known), bytes a second."""
    if copy.state != "pulling":
        return None
    return {"bytes": copy.pulled_bytes, "of": copy.pull_bytes, "rate": copy.pull_rate}


def model(
    registration: Registration,
    status: "ModelStatus",
    chosen: Callable[[Mapping[str, str]], Choice],
    *,
    size: int,
    decisions: dict[str, list[str]],
) -> dict[str, Any]:
    """Why a model is where it is, in sentences, and where a load would go now. `chosen` gives the choice that would be
    made without some pods."""
    record = registration.record
    lines = []
    holders = {info.pod for info in status.copies if info.status in ("LOADED", "LOADING")}
    for info in status.copies:
        if info.status == "LOADED":
            older = f", of the content before the reload ({info.digest})" if info.generation < record.generation else ""
            lines.append(f"It is loaded in {info.pod} and takes {format_bytes(info.bytes)} there{older}.")
        elif info.status == "LOADING":
            lines.append(f"It is being loaded in {info.pod}.")
        else:
            lines.append(f"A load in {info.pod} has failed lately; that pod is passed over until this expires.")
    if record.digest:
        lines.append(f"Its content has the digest {record.digest}, by its first load.")
    if status.reload is not None:
        why = f"; they have not, because {status.reload.why}" if status.reload.why else ""
        lines.append(f"Its content was reloaded, its copies move to generation {status.reload.generation}{why}.")
    if not holders:
        lines.append("It has no copy: the first call loads it.")
    lines += _history(registration.model_id, decisions, holders)
    lines += [f"Error: {text}" for text in status.errors]
    if record.quarantined:
        lines.append("It is quarantined: it is not loaded until it is released or registered anew.")
    known = "measured by an earlier load" if record.host_bytes else "a guess, it was never loaded"
    lines.append(f"A load is reckoned with {format_bytes(size)} ({known}).")
    if record.load_ms:
        lines.append(f"Its last load took {record.load_ms} ms.")
    excluded = dict.fromkeys(holders, "holds a copy already")
    made = chosen(excluded)
    lines.append(f"Another copy would go nowhere: {made.why}." if made.pod is None else f"The next load: {made.why}.")
    ranking = [{"pod": ranked.pod, "why": ranked.why} for ranked in made.ranking]
    ranking += [{"pod": refused.pod, "why": refused.why} for refused in made.refused]
    return {
        "id": registration.model_id,
        "status": status.status,
        "lines": lines,
        "ranking": ranking,
        "copies": [
            {
                "pod": info.pod,
                "status": info.status,
                "time_ms": info.time_ms,
                "bytes": info.bytes,
                "generation": info.generation,
                "digest": info.digest,
            }
            for info in status.copies
        ],
        "decisions": [
            {"pod": pod, "decision": _decision(text)} for pod, texts in sorted(decisions.items()) for text in texts
        ],
    }


def _history(model_id: str, decisions: dict[str, list[str]], holders: set[str]) -> list[str]:
    """Why each copy is where it is, and why the last one that went had to, as the agents remember it."""
    lines: list[str] = []
    gone: list[tuple[int, str]] = []
    for pod, texts in sorted(decisions.items()):
        told = [
            one for one in map(_decision, texts) if isinstance(one, dict) and one.get("models", [""])[0] == model_id
        ]
        loads = [one for one in told if one.get("what") == "load"]
        if loads and pod in holders:
            lines.append(f"It was loaded in {pod} {words.span(loads[0]['ago_ms'])} ago: {loads[0]['why']}.")
        for one in told:
            if one.get("what") in ("evict", "unload"):
                cause = f", for {one['models'][1]}" if len(one["models"]) > 1 else ""
                verb = "evicted from" if one["what"] == "evict" else "let go in"
                gone.append(
                    (one["ago_ms"], f"It was last {verb} {pod} {words.span(one['ago_ms'])} ago{cause}: {one['why']}.")
                )
                break
    return [*lines, *(text for _, text in sorted(gone)[:1])]


def _decision(text: str) -> Any:
    """An agent's decision is a line of JSON; whatever else it is stands as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text

"""Explanations, in sentences: which pods have a model, and why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.options.values import format_bytes
from mesh.schema.modelstatus import ModelStatus
from placement import words
from placement.choice import Choice, ChoiceVerdict
from router.management.descriptions import decision
from router.management.status import CopyInfo, StatusInfo
from router.state.registry import Registration


@dataclass(frozen=True, slots=True)
class Ranked:
    """A pod, with the reason why a load would choose it first, later, or not at all."""

    pod: str
    why: str


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision of a pod's agent about the model: JSON of `mesh.runtime.cache.books.decisions`, or a text."""

    pod: str
    decision: Any


@dataclass(frozen=True, slots=True)
class Explanation:
    """The pods of a model, the reasons, and the pod that a load would choose now."""

    id: str
    status: ModelStatus
    lines: tuple[str, ...]  # sentences
    ranking: tuple[Ranked, ...]  # best first, then the excluded pods
    copies: tuple[CopyInfo, ...]
    decisions: tuple[Decided, ...]


def explained(
    registration: Registration,
    status: StatusInfo,
    chosen: Callable[[Mapping[str, str]], Choice],
    *,
    size: int,
    decisions: dict[str, list[str]],
) -> Explanation:
    """Returns sentences that explain the places of a model's copies, and the pod that a load would choose now. `chosen`
    makes this choice, excluding the given pods. `size` is the estimate for a load, in bytes. `decisions` are the
    agents' decisions about the model, by pod."""
    record = registration.record
    lines = []
    holders = {info.pod for info in status.copies if info.status in (ModelStatus.LOADED, ModelStatus.LOADING)}
    for info in status.copies:
        if info.status is ModelStatus.LOADED:
            older = f", of the content before the reload ({info.digest})" if info.generation < record.generation else ""
            lines.append(f"It is loaded in {info.pod} and uses {format_bytes(info.bytes)} there{older}.")
        elif info.status is ModelStatus.LOADING:
            lines.append(f"It is being loaded in {info.pod}.")
        else:
            lines.append(f"A load in {info.pod} has failed recently; this pod is skipped until the failure expires.")
    if record.digest:
        lines.append(f"Its content has the digest {record.digest}, by its first load.")
    if status.reload is not None:
        why = f"; they have not, because {status.reload.why}" if status.reload.why else ""
        lines.append(f"Its content was reloaded; its copies move to generation {status.reload.generation}{why}.")
    made = chosen(dict.fromkeys(holders, "holds a copy already"))
    nowhere = made.verdict is ChoiceVerdict.NOWHERE
    if not holders and nowhere:
        lines.append(f"It has no copy, and no call can load it: {made.why}.")
    elif not holders:
        lines.append("It has no copy: the first call loads it.")
    lines += [f"Note: {text}." for text in status.notes]
    lines += _history(registration.model_id, decisions, holders)
    lines += [f"Error: {text}" for text in status.errors]
    if record.quarantined:
        lines.append("It is quarantined: it is not loaded until it is released or registered again.")
    known = "measured by an earlier load" if record.host_bytes else "no load of it has been measured"
    lines.append(f"A load is estimated at {format_bytes(size)} ({known}).")
    if record.load_ms:
        lines.append(f"Its last load took {record.load_ms} ms.")
    if made.pod is not None:
        lines.append(f"The next load: {made.why}.")
    elif holders or not nowhere:
        lines.append(f"Another copy cannot be loaded: {made.why}.")
    ranking = [Ranked(ranked.pod, ranked.why) for ranked in made.ranking]
    ranking += [Ranked(refused.pod, refused.why) for refused in made.refused]
    return Explanation(
        id=registration.model_id,
        status=status.status,
        lines=tuple(lines),
        ranking=tuple(ranking),
        copies=status.copies,
        decisions=tuple(Decided(pod, decision(text)) for pod, texts in sorted(decisions.items()) for text in texts),
    )


def _history(model_id: str, decisions: dict[str, list[str]], holders: set[str]) -> list[str]:
    """Returns, from the agents' decisions, why each copy was loaded, and why the most recently removed copy was
    removed."""
    lines: list[str] = []
    gone: list[tuple[int, str]] = []
    for pod, texts in sorted(decisions.items()):
        told = [one for one in map(decision, texts) if isinstance(one, dict) and one.get("models", [""])[0] == model_id]
        loads = [one for one in told if one.get("what") == "load"]
        if loads and pod in holders:
            lines.append(f"It was loaded in {pod} {words.span(loads[0]['ago_ms'])} ago: {loads[0]['why']}.")
        for one in told:
            if one.get("what") in ("evict", "unload"):
                cause = f", for {one['models'][1]}" if len(one["models"]) > 1 else ""
                verb = "evicted from" if one["what"] == "evict" else "unloaded from"
                gone.append(
                    (one["ago_ms"], f"It was last {verb} {pod} {words.span(one['ago_ms'])} ago{cause}: {one['why']}.")
                )
                break
    return [*lines, *(text for _, text in sorted(gone)[:1])]

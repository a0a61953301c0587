"""Records of an agent's questions for room, which can be asked again later.

An agent's evictions depend on the facts at that moment: sizes, ages, calls in flight, spare copies elsewhere. Each
question is kept as one line of JSON with its answer. It can then be put to this version of the library, or to a changed
one, to see how that version decides.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from placement.footprint import Footprint
from placement.room import Need, ResidentCopy, RoomDecision, RoomVerdict, make_room

_KINDS: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Question:
    """A question for room: which copies to evict for a number of bytes. `held` are the copies that were examined."""

    model_id: str
    need: Need
    idle_ms: int
    held: tuple[ResidentCopy, ...] = ()

    def ask(self) -> RoomDecision:
        """Answers the question with the installed code."""
        return make_room(self.need, self.held, idle_ms=self.idle_ms)


@dataclass(frozen=True, slots=True)
class Difference:
    """A question that the installed code answers differently."""

    line: int
    question: Question
    verdict: RoomVerdict  # as recorded
    victims: tuple[str, ...]  # as recorded
    now: RoomDecision


def render(question: Question, answer: RoomDecision) -> str:
    """Renders a question and its answer as one line."""
    need = question.need
    device = {
        "need": need.size.device_bytes,
        "free": need.free.device_bytes,
        "capacity": need.capacity.device_bytes,
    }
    return json.dumps(
        {
            "model": question.model_id,
            "need": need.size.host_bytes,
            "free": need.free.host_bytes,
            "capacity": need.capacity.host_bytes,
            **({"device": device} if any(device.values()) else {}),
            "idle_ms": question.idle_ms,
            "held": [
                {key: value for key, value in asdict(held).items() if value not in (0, "", False, None)}
                for held in question.held
            ],
            "verdict": answer.verdict.value,
            "victims": list(answer.victims),
            "why": answer.why,
        },
        separators=(",", ":"),
    )


def parse(line: str) -> tuple[Question, RoomVerdict, tuple[str, ...]]:
    """Parses a line into the question and the answer that it got. Raises ValueError if the line is not a record."""
    try:
        loaded = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError("it is not a JSON object")
    data = _RecordFields(loaded)
    device = _RecordFields(data.get("device", dict, {}), "device.")
    question = Question(
        data.get("model", str),
        Need(
            Footprint(data.get("need", int), device.get("need", int, 0)),
            Footprint(data.get("free", int), device.get("free", int, 0)),
            Footprint(data.get("capacity", int), device.get("capacity", int, 0)),
        ),
        data.get("idle_ms", int),
        tuple(_held(item, f"held[{index}]") for index, item in enumerate(data.get("held", list))),
    )
    word, verdicts = data.get("verdict", str), [verdict.value for verdict in RoomVerdict]
    if word not in verdicts:
        raise ValueError(f"the field verdict must be one of {', '.join(verdicts)}, not {word!r:.60}")
    return question, RoomVerdict(word), tuple(str(victim) for victim in data.get("victims", list))


class _RecordFields:
    """The fields of a JSON object, with errors that name the field."""

    def __init__(self, data: dict[str, Any], prefix: str = "") -> None:
        self._data = data
        self._prefix = prefix

    def get(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        """Returns a field's value. If the field is missing or null, returns the default, or without one raises
        ValueError. Raises ValueError if the value has another type than `kind`."""
        value = self._data.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not kind:
            raise ValueError(f"the field {self._prefix}{name} must be {_KINDS[kind]}")
        return value


def _held(item: object, name: str) -> ResidentCopy:
    if not isinstance(item, dict):
        raise ValueError(f"the field {name} must be an object")
    data = _RecordFields(item, f"{name}.")
    standing = data.get("standing", list, [])
    if standing and not (len(standing) == 2 and all(type(part) in (int, float) for part in standing)):
        raise ValueError(f"the field {name}.standing must be a list of two numbers")
    return ResidentCopy(
        data.get("key", str, ""),
        data.get("bytes", int, 0),
        data.get("idle_ms", int, 0),
        in_flight=data.get("in_flight", int, 0),
        busy_reason=data.get("busy_reason", str, ""),
        other_copies=data.get("other_copies", int, 0),
        device_bytes=data.get("device_bytes", int, 0),
        standing=(standing[0], standing[1]) if standing else None,
        fresh=data.get("fresh", bool, False),
    )


def replay(lines: Iterable[str]) -> tuple[int, list[Difference]]:
    """Returns the number of questions, and those that are now answered differently. Raises ValueError, with the line's
    number, if a line is not a record."""
    count, found = 0, []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question, verdict, victims = parse(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        count += 1
        now = question.ask()
        if (now.verdict, now.victims) != (verdict, victims):
            found.append(Difference(number, question, verdict, victims, now))
    return count, found

"""Records of an agent's questions for room, which can be asked again later.

An agent's evictions depend on the facts at that moment: sizes, ages, calls in flight, spare copies elsewhere. Each
question is kept as one line of JSON with its answer. It can then be put to this version of the library, or to a changed
one, to see how that version decides.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from placement.footprint import Footprint
from placement.room import Need, ResidentCopy, RoomDecision, RoomVerdict, make_room


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
        data = json.loads(line)
        held = tuple(_held(item) for item in data["held"])
        device = data.get("device") or {}
        question = Question(
            str(data["model"]),
            Need(
                Footprint(int(data["need"]), int(device.get("need", 0))),
                Footprint(int(data["free"]), int(device.get("free", 0))),
                Footprint(int(data["capacity"]), int(device.get("capacity", 0))),
            ),
            int(data["idle_ms"]),
            held,
        )
        return question, RoomVerdict(data["verdict"]), tuple(str(victim) for victim in data["victims"])
    except KeyError as error:
        raise ValueError(f"the decision lacks the field {error.args[0]}") from error
    except (AttributeError, TypeError, RecursionError) as error:
        raise ValueError("a field of the decision has a value of the wrong type") from error


def _held(item: dict[str, Any]) -> ResidentCopy:
    standing = item.get("standing")
    return ResidentCopy(
        str(item.get("key", "")),
        int(item.get("bytes", 0)),
        int(item.get("idle_ms", 0)),
        in_flight=int(item.get("in_flight", 0)),
        busy_reason=str(item.get("busy_reason", "")),
        other_copies=int(item.get("other_copies", 0)),
        device_bytes=int(item.get("device_bytes", 0)),
        standing=(int(standing[0]), standing[1]) if standing is not None else None,
        fresh=bool(item.get("fresh", False)),
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

"""The story of a flight: its latest events and instructions, for errors."""

from collections import deque
from dataclasses import fields

from placement.choice import Choice
from placement.coldstart.events import Event
from placement.coldstart.instructions import Instruction

_LENGTH = 64  # steps that are kept
_WORDS = 200  # characters of one field's value

_EVIDENT = frozenset({"cause", "model_id", "now_ms"})  # fields that are part of each line, or of the story's head


class Story:
    """The latest steps of one flight. Waiters that join and leave are not recorded, because there may be thousands."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: deque[tuple[int, int, Event | Instruction]] = deque(maxlen=_LENGTH)

    def add(self, number: int, now_ms: int, step: Event | Instruction) -> None:
        """Adds an event with its number, or an instruction with the number of its cause."""
        self._steps.append((number, now_ms, step))

    def __str__(self) -> str:
        began = self._steps[0][1] if self._steps else 0
        return "\n".join(
            f"#{number} +{now_ms - began} ms {'  -> ' if isinstance(step, Instruction) else ''}{brief(step)}"
            for number, now_ms, step in self._steps
        )


class Impossible(Exception):
    """The error for an event that cannot happen. The machine has not changed."""

    def __init__(self, event: Event, why: str, story: Story | None = None) -> None:
        text = f"{brief(event)}: {why}"
        super().__init__(text if story is None else f"{text}\n{story}")
        self.event = event


def brief(step: Event | Instruction) -> str:
    """Returns an event or an instruction in one line, without fields that have their defaults."""
    words = []
    for field in fields(step):
        value = getattr(step, field.name)
        if field.name not in _EVIDENT and value != field.default:
            text = value.why if isinstance(value, Choice) else repr(value)
            words.append(f"{field.name}={text if len(text) <= _WORDS else text[:_WORDS] + '...'}")
    return f"{type(step).__name__}({', '.join(words)})"

"""The record of what clients saw of a mesh: changes of registrations and calls, each with its start and its end on one
clock.

The record holds only what a client can know. Times are seconds of the recorder's monotonic clock: a start is taken
before the request is sent, an end after its answer was read, so each true moment of effect lies between them.

Each registration has a separate file, which answers a number that no other file answers. An answer therefore shows
which registration it came from.
"""

import enum
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_FILE = re.compile(rb"\.(\d+)\.onnx")


def file_name(model: str, number: int) -> str:
    return f"{model}.{number}.onnx"


def number_of(record: bytes) -> int:
    """Returns the number of the file that a model's record names, or 0 if the file is not one of the test's."""
    found = _FILE.search(record)
    return int(found[1]) if found else 0


class Outcome(enum.Enum):
    """The effect of a change as far as the client knows it."""

    DONE = "done"  # acknowledged
    REFUSED = "refused"  # answered with a status that proves that nothing was changed
    UNKNOWN = "unknown"  # failed or timed out: the change may have been made, or may still be made


@dataclass(frozen=True, slots=True)
class Change:
    """One attempt to register a model (`value` is its file's number) or to unregister it (`value` is None)."""

    model: str
    value: int | None
    began: float
    ended: float
    outcome: Outcome
    router: str = ""
    text: str = ""

    def may_act_after(self, moment: float) -> bool:
        """Returns whether the change can have taken effect after `moment`."""
        if self.outcome is Outcome.REFUSED:
            return False
        return self.outcome is Outcome.UNKNOWN or self.ended > moment

    def __str__(self) -> str:
        what = "unregister" if self.value is None else f"register {self.value}"
        why = f": {self.text}" if self.text else ""
        return f"{what} by {self.router}, from {self.began:.3f}: {self.outcome.value}{why}"


@dataclass(frozen=True, slots=True)
class Call:
    """One inference call: the number in its answer, or its status."""

    model: str
    router: str
    began: float
    ended: float
    value: float | None
    code: str = "OK"
    text: str = ""

    def __str__(self) -> str:
        answer = f"answer {self.value:g}" if self.value is not None else f"{self.code} {self.text}"
        return f"call by {self.router}, from {self.began:.3f}: {answer}"


@dataclass(frozen=True, slots=True)
class Event:
    at: float
    text: str


@dataclass
class History:
    """Everything that was seen in one run."""

    changes: list[Change] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def note(self, at: float, text: str) -> None:
        self.events.append(Event(at, text))

    def story(self, model: str, end: float, *, before: float = 30.0) -> Iterator[str]:
        """Yields what happened to a model in the last `before` seconds until `end`: the faults injected into the mesh,
        the model's changes, and its answers.

        Equal consecutive answers of one router are merged into one line.
        """
        start = end - before
        lines = [(event.at, event.text) for event in self.events if start <= event.at <= end]
        lines += [
            (change.ended, str(change))
            for change in self.changes
            if change.model == model and start <= change.ended and change.began <= end
        ]
        lines += _runs(call for call in self.calls if call.model == model and start <= call.ended <= end)
        for at, text in sorted(lines):
            yield f"{at:10.3f}  {text}"


def _runs(calls: Iterable[Call]) -> Iterator[tuple[float, str]]:
    by_router: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        by_router[call.router].append(call)
    for made in by_router.values():
        made.sort(key=lambda call: call.ended)
        run: list[Call] = []
        for call in [*made, None]:
            if run and (call is None or (call.value, call.code) != (run[-1].value, run[-1].code)):
                more = f" ({len(run)} such answers, the last at {run[-1].ended:.3f})" if len(run) > 1 else ""
                yield run[0].ended, f"{run[0]}{more}"
                run = []
            if call is not None:
                run.append(call)

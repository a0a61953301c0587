"""A judge of histories, which finds the answers that no correct mesh can have given.

The judge knows nothing of how the mesh works. Its input is what clients saw (`history`) and, for each model, the order
in which the registry changed. That order says which registration succeeded which, and whether a change that was never
acknowledged took effect. The judge compares it with the acknowledgements. The judge accuses only if no order of effects
within the recorded intervals explains what was seen: a slow recorder makes it milder, never wrong.

The kinds of faults:

- wrong: an answer of a file with which the id had not been registered when the call ended
- stale: an answer of a registration whose successor was acknowledged before the call began
- lost: NOT_FOUND for an id that was registered throughout the call
- forgotten: an acknowledged change that the registry does not have, or has in another order than acknowledged
- status: a call that failed with a status that no fault injected into the mesh explains

An answer after an acknowledged unregistering is no fault until a successor is acknowledged: Mesh withdraws the copies,
but does not fence them as long as no other registration may answer for the id.
"""

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.chaos.history import Call, Change, History, Outcome

NOT_FOUND = "NOT_FOUND"


@dataclass(frozen=True, slots=True)
class Fault:
    """An answer or an acknowledgement that cannot be right."""

    kind: str
    model: str
    at: float  # seconds, as in the history
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.model}: {self.text}"


def judge(
    history: History,
    registry: Mapping[str, Sequence[int | None]],
    *,
    legitimate: Callable[[Call], bool] = lambda call: True,
) -> list[Fault]:
    """Returns all faults of a history, sorted by time.

    `registry` has, by model, the state of its record after each change, in order: the number of the registered file, or
    None if the record was removed. `legitimate` says of a failed call (with any status but NOT_FOUND) whether the
    faults injected into the mesh explain it.
    """
    changes: dict[str, list[Change]] = defaultdict(list)
    for change in history.changes:
        changes[change.model].append(change)
    faults: list[Fault] = []
    past: dict[str, _Past] = {}
    for model in {*changes, *registry, *(call.model for call in history.calls)}:
        past[model] = _Past(model, changes.get(model, []), registry.get(model, ()))
        faults += past[model].forgotten()
    for call in history.calls:
        if (found := past[call.model].judge(call)) is not None:
            faults.append(found)
        elif call.value is None and call.code != NOT_FOUND and not legitimate(call):
            faults.append(Fault("status", call.model, call.ended, str(call)))
    return sorted(faults, key=lambda fault: fault.at)


class _Past:
    def __init__(self, model: str, changes: Sequence[Change], registry: Sequence[int | None]) -> None:
        self._model = model
        self._changes = changes
        self._registry = registry
        self._began: dict[int, float] = {}  # start of the first attempt, by value
        self._acknowledged: dict[int, float] = {}  # end of the first acknowledged attempt, by value
        self._removals = [change for change in changes if change.value is None]
        for change in changes:
            if change.value is None:
                continue
            self._began[change.value] = min(change.began, self._began.get(change.value, math.inf))
            if change.outcome is Outcome.DONE:
                known = self._acknowledged.get(change.value, math.inf)
                self._acknowledged[change.value] = min(change.ended, known)
        self._first: dict[int, int] = {}  # first place in `registry`, by value
        self._last: dict[int, int] = {}
        for place, value in enumerate(registry):
            if value is not None:
                self._first.setdefault(value, place)
                self._last[value] = place
        # By place: when the first registration at this place or a later one was acknowledged. A registration that took
        # effect twice does not count at its second place: the acknowledgement may have been for the first.
        self._superseded = [math.inf] * (len(registry) + 1)
        for place in range(len(registry) - 1, -1, -1):
            value = registry[place]
            acknowledged = math.inf
            if value is not None and self._first[value] == place:
                acknowledged = self._acknowledged.get(value, math.inf)
            self._superseded[place] = min(acknowledged, self._superseded[place + 1])
        self._standing = sorted((ended, value) for value, ended in self._acknowledged.items())

    # --- calls ---

    def judge(self, call: Call) -> Fault | None:
        """Returns the fault of one answer, or None if the answer may be right."""
        if call.value is not None:
            return self._answer(call, call.value)
        if call.code == NOT_FOUND:
            return self._not_found(call)
        return None

    def _answer(self, call: Call, answer: float) -> Fault | None:
        value = int(answer) if answer.is_integer() else -1
        if value not in self._began or self._began[value] > call.ended:
            return self._fault("wrong", call, f"no registration with the answer {answer:g} had been asked for")
        if value not in self._last:
            return self._fault("wrong", call, f"a registration with the answer {answer:g} never was in the registry")
        since = self._superseded[self._last[value] + 1]
        if since < call.began:
            heirs = [
                heir
                for heir in self._registry[self._last[value] + 1 :]
                if heir is not None and self._acknowledged.get(heir, math.inf) < call.began
            ]
            text = f"its successor {heirs[0]} was acknowledged at {since:.3f}, {call.began - since:.3f} s before"
            return self._fault("stale", call, text)
        return None

    def _not_found(self, call: Call) -> Fault | None:
        known = bisect.bisect_left(self._standing, (call.began, -1)) - 1
        if known < 0:
            return None
        acknowledged, value = self._standing[known]
        for removal in self._removals:
            if removal.began < call.ended and removal.may_act_after(self._began[value]):
                return None
        return self._fault("lost", call, f"{value} was acknowledged at {acknowledged:.3f} and nobody had removed it")

    def _fault(self, kind: str, call: Call, text: str) -> Fault:
        return Fault(kind, self._model, call.ended, f"{call}; {text}")

    # --- the registry ---

    def forgotten(self) -> Iterator[Fault]:
        """Yields a fault for each acknowledgement that the registry contradicts."""
        for change in self._changes:
            if change.outcome is Outcome.DONE and change.value is not None and change.value not in self._first:
                yield Fault("forgotten", self._model, change.ended, f"{change}; the registry never had it")
        done = sorted((ended, value) for value, ended in self._acknowledged.items() if value in self._first)
        for (ended, value), (later, heir) in itertools.pairwise(done):
            if ended < self._began[heir] and self._last[heir] < self._first[value]:
                text = f"{heir} was asked for after {value} was acknowledged, and stands before it in the registry"
                yield Fault("forgotten", self._model, later, text)
        for change in self._removals:
            if change.outcome is not Outcome.DONE:
                continue
            before = [value for ended, value in done if ended < change.began]
            if before and None not in self._registry[self._first[before[-1]] :]:
                yield Fault("forgotten", self._model, change.ended, f"{change}; the registry still has {before[-1]}")


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of one run, for its report."""

    calls: int
    answered: int
    failed: dict[str, int]  # by status
    faults: dict[str, int]  # by kind
    acknowledged: int  # registrations
    refused: int  # refused attempts to register
    unknown: int

    @classmethod
    def of(cls, history: History, faults: Sequence[Fault]) -> "Summary":
        failed: dict[str, int] = defaultdict(int)
        for call in history.calls:
            if call.value is None:
                failed[call.code] += 1
        kinds: dict[str, int] = defaultdict(int)
        for fault in faults:
            kinds[fault.kind] += 1
        registering = [change for change in history.changes if change.value is not None]
        return cls(
            calls=len(history.calls),
            answered=sum(call.value is not None for call in history.calls),
            failed=dict(failed),
            faults={"wrong": 0, "stale": 0, "lost": 0, "forgotten": 0, "status": 0} | kinds,
            acknowledged=len(
                {(change.model, change.value) for change in registering if change.outcome is Outcome.DONE}
            ),
            refused=sum(change.outcome is Outcome.REFUSED for change in registering),
            unknown=sum(change.outcome is Outcome.UNKNOWN for change in registering),
        )

    def __str__(self) -> str:
        failed = ", ".join(f"{code} {count}" for code, count in sorted(self.failed.items())) or "none"
        faults = ", ".join(f"{count} {kind}" for kind, count in self.faults.items())
        return (
            f"{self.calls} calls, {self.answered} answered, failed: {failed}; {faults}; "
            f"{self.acknowledged} registrations acknowledged ({self.refused} attempts refused, {self.unknown} unclear)"
        )

"""A carrier without I/O for the state machine of cold starts: tests decide what is read and what agents answer."""

from collections.abc import Hashable
from typing import Any, TypeVar

from placement import choice
from placement.coldstart import events, instructions
from placement.coldstart.events import Record, Sighting
from placement.coldstart.instructions import Instruction, Request
from placement.coldstart.machine import Machine
from placement.coldstart.problems import Problem
from placement.coldstart.rules import Rules
from placement.pod import Candidate

RECORD = Record(7)
I = TypeVar("I", bound=Instruction)  # noqa: E741


class Carrier:
    """A carrier that answers the machine at once from memory: remembered records, copies in view, the pod for a load.

    `read` and `says` answer the machine's other requests. `given` has all instructions so far.
    """

    def __init__(self, *pods: str, rules: Rules | None = None) -> None:
        self.machine = Machine(rules)
        self.now_ms = 0
        self.pods = {name: Candidate(name, 1 << 30) for name in pods}
        self.copies: dict[str, list[Sighting]] = {}
        self.remembered: dict[str, Record] = {}
        self.size = 0  # bytes of every model
        self.given: list[Instruction] = []
        self.outstanding: dict[str, Request] = {}
        self.wanted_ms: int | None = None  # the time that the machine wants to be told next

    def feed(self, event: events.Event) -> list[Instruction]:
        """Feeds an event, and then the carrier's own answers, to the machine. Returns all resulting instructions."""
        given = self.machine.handle(event)
        self.given += given
        return [*given, *(more for instruction in given for more in self._carry(instruction))]

    def _carry(self, instruction: Instruction) -> list[Instruction]:
        now = self.now_ms
        match instruction:
            case instructions.Recall(cause, model_id):
                return self.feed(events.Recalled(now, model_id, cause, self.remembered.get(model_id)))
            case instructions.Look(cause, model_id):
                copies = tuple(self.copies.get(model_id, ()))
                return self.feed(events.Seen(now, model_id, cause, copies, tuple(self.pods)))
            case instructions.Choose(cause, model_id, excluded, idle_ms):
                chosen = choice.choose(model_id, self.size, self.pods.values(), excluded=excluded, idle_ms=idle_ms)
                return self.feed(events.Chosen(now, model_id, cause, chosen))
            case instructions.WaitUntil(_, at_ms):
                self.wanted_ms = at_ms
            case Request(_, model_id):
                self.outstanding[model_id] = instruction
        return []

    # --- what happens ---

    def join(self, waiter: Hashable = "w", model_id: str = "m", **more: Any) -> list[Instruction]:
        return self.feed(events.Joined(self.now_ms, model_id, waiter, **more))

    def leave(self, waiter: Hashable = "w", model_id: str = "m") -> list[Instruction]:
        return self.feed(events.Left(self.now_ms, model_id, waiter))

    def read(self, record: Record | None = RECORD, model_id: str = "m") -> list[Instruction]:
        """Answers the machine's read of a record. None says that the record does not exist."""
        asked = self.outstanding.pop(model_id)
        assert isinstance(asked, instructions.Read), asked
        if record is None:
            return self.feed(events.RecordMissing(self.now_ms, model_id, asked.cause))
        return self.feed(events.RecordRead(self.now_ms, model_id, asked.cause, record))

    def says(self, answer: type[events.Answer], model_id: str = "m", **more: Any) -> list[Instruction]:
        """Answers the machine's request in place of an agent, or of another process that it asked."""
        asked = self.outstanding.pop(model_id)
        return self.feed(answer(self.now_ms, model_id, asked.cause, **more))

    def after(self, ms: int) -> list[Instruction]:
        """Advances the clock, and tells the machine the time whenever it has asked for that."""
        given, end = [], self.now_ms + ms
        while self.wanted_ms is not None and self.wanted_ms <= end:
            self.now_ms, self.wanted_ms = max(self.now_ms, self.wanted_ms), None
            given += self.feed(events.TimePassed(self.now_ms))
        self.now_ms = end
        return given

    def changed(self, model_id: str = "m") -> list[Instruction]:
        """Tells the machine that the view of the model's copies has changed."""
        return self.feed(events.CopiesChanged(self.now_ms, model_id))

    # --- what was given ---

    def every(self, kind: type[I]) -> list[I]:
        return [given for given in self.given if isinstance(given, kind)]

    @property
    def asked(self) -> list[str]:
        """The pods that were asked to load so far."""
        return [ask.pod for ask in self.every(instructions.Ask)]

    @property
    def served(self) -> list[Hashable]:
        """The waiters that got a copy."""
        return [told.waiter for told in self.every(instructions.TellCopy)]

    @property
    def problems(self) -> dict[Hashable, Problem]:
        """The problems that the other waiters got."""
        return {told.waiter: told.problem for told in self.every(instructions.TellProblem)}

"""One model's way to a copy.

| phase | it waits for | next |
| --- | --- | --- |
| recalling | the remembered record | looking; reading if there is none, or it is marked |
| reading | the record | looking; over if there is none; waiting or over if it is unchanged but called stale |
| looking | the view | over if there is a copy, or loads are forbidden; asking a pod that has or loads one; choosing |
| choosing | a choice of a pod | asking; over if no pod can take the model; waiting if one may be able to soon |
| asking | an agent's answer | over, looking, reading or waiting, by the answer |
| waiting | a change of the view, or a moment | reading |
| over | nothing | |
"""

import enum
from collections.abc import Hashable, Mapping
from typing import Any

from placement.coldstart import events
from placement.coldstart.alarms import Alarm
from placement.coldstart.problems import ProblemReason
from placement.coldstart.story import Story
from placement.coldstart.waiters import Place
from placement.failures import Eligibility


class Phase(enum.Enum):
    """The phase of a flight, by what it waits for."""

    RECALLING = "recalling"
    READING = "reading"
    LOOKING = "looking"
    CHOOSING = "choosing"
    ASKING = "asking"
    WAITING = "waiting"
    OVER = "over"


EXPECTED: Mapping[Phase, tuple[type[events.Answer], ...]] = {
    Phase.RECALLING: (events.Recalled, events.Broke),
    Phase.READING: (events.RecordRead, events.RecordMissing, events.ReadFailed, events.Broke),
    Phase.LOOKING: (events.Seen, events.Broke),
    Phase.CHOOSING: (events.Chosen, events.Broke),
    Phase.ASKING: (
        events.Loaded,
        events.Elsewhere,
        events.Refused,
        events.Failed,
        events.Stale,
        events.Unreachable,
        events.TimedOut,
        events.Garbled,
        events.Broke,
    ),
    Phase.WAITING: (),
    Phase.OVER: (),
}
"""The answers that may come in each phase."""


class Flight:
    """The state of one flight. Only the machine changes it."""

    __slots__ = (
        "asked_ms",
        "awaits",
        "changed",
        "doubted",
        "excluded",
        "expected_ms",
        "failed_in",
        "fresh",
        "held_up",
        "idle_ms",
        "joined",
        "looked_ms",
        "model_id",
        "pause",
        "phase",
        "places",
        "pod",
        "quiet",
        "read_after",
        "record",
        "refusals",
        "stale",
        "standing",
        "story",
        "stuck_ms",
        "why",
    )

    def __init__(self, model_id: str, idle_ms: int) -> None:
        self.model_id = model_id
        self.phase = Phase.RECALLING
        self.awaits = 0  # the cause of the request that is outstanding; 0: none is
        self.places: dict[Hashable, Place] = {}  # of the waiters, in the order of arrival
        self.idle_ms = idle_ms  # since the model's last use; 0 once a call waits
        self.story = Story()

        self.record: events.Record | None = None
        self.fresh = False  # the read under way must begin after the request for it
        self.read_after = 0  # how many waiters had arrived, in all flights, when the read began
        self.doubted = ""  # the pod that called the record stale, while it is read again
        self.stale = 0  # times in a row that a pod called a record stale that had just been read

        self.looked_ms = 0  # when the view was last looked at
        self.changed = False  # the view has changed since then
        self.standing: Eligibility | None = None  # where the model has failed, as of the last look
        self.held_up = ""  # why no agent can be asked at present
        self.stuck_ms: int | None = None  # when it first had to wait, without progress since
        self.pause: Alarm[Any] | None = None  # while waiting

        self.pod = ""  # that was asked last, or is being asked
        self.asked_ms: int | None = None  # when that was
        self.quiet = False  # it was asked while no call was waiting
        self.why = ""  # why the model is loaded, and why there
        self.expected_ms: int | None = None  # when the load should be done
        self.joined = ""  # the pod to ask next, because it is said to have the copy or to be loading it
        self.excluded: dict[str, str] = {}  # pods not to choose, and why
        self.failed_in: set[str] = set()  # pods in which it has failed
        self.refusals: list[tuple[ProblemReason, str]] = []

    def __repr__(self) -> str:
        return f"<flight of {self.model_id}: {self.phase.value}, {len(self.places)} waiting>"

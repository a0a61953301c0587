"""Instructions of the cold-start machine to its carrier.

Each carries its cause, the number of the event that led to it. A `Request` is answered by one event that names that
cause. A `Release` ends the wait of one waiter: each waiter gets exactly one, as the last instruction about it.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from placement.coldstart.problems import Problem


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction: something that the carrier must do."""

    cause: int


# --- for one model ---


@dataclass(frozen=True, slots=True)
class Request(Instruction):
    """An instruction that needs an answer. A flight has at most one outstanding."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Recall(Request):
    """The request to recall the remembered record, for a flight that begins. Its answer, `Recalled`, must be fed to the
    machine after the call that fed `Joined` has returned: a waiter never gets its answer while it joins."""


@dataclass(frozen=True, slots=True)
class Read(Request):
    """The request to read the record. Its answer is `RecordRead`, `RecordMissing` or `ReadFailed`."""

    fresh: bool = False  # a read that began earlier is no answer, even if it finds a registration


@dataclass(frozen=True, slots=True)
class Look(Request):
    """The request to look up the model's copies in the view. Its answer is `Seen`."""


@dataclass(frozen=True, slots=True)
class Choose(Request):
    """The request to choose a pod for the load. Its answer is `Chosen`."""

    excluded: Mapping[str, str]  # pods not to use, each with the reason as it follows the pod's name
    idle_ms: int


@dataclass(frozen=True, slots=True)
class Ask(Request):
    """The request to ask the pod's agent to load the model. `flight.EXPECTED` lists the possible answers."""

    pod: str
    idle_ms: int  # more than 0: no call waits, so the load takes no room from models used more recently
    why: str  # why it is loaded, and why there, for people


@dataclass(frozen=True, slots=True)
class Hurry(Instruction):
    """The instruction to tell an agent that is loading the model that a call now waits for it. The agent applies this
    to the request that it already has, and sends no answer."""

    model_id: str
    pod: str
    why: str


@dataclass(frozen=True, slots=True)
class ForgetRecord(Instruction):
    """The instruction to forget the remembered record of a model, because it is wrong."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Ended(Instruction):
    """The notice that the flight of the model is over."""

    model_id: str


# --- for waiters ---


@dataclass(frozen=True, slots=True)
class Release(Instruction):
    """The end of a waiter's wait, which lasted `waited_ms`."""

    waiter: Hashable
    waited_ms: int


@dataclass(frozen=True, slots=True)
class TellCopy(Release):
    """The answer to a waiter that there is a copy that may be called."""


@dataclass(frozen=True, slots=True)
class TellAsked(Release):
    """The answer to a waiter that only waited until an agent was asked."""


@dataclass(frozen=True, slots=True)
class TellProblem(Release):
    """The answer to a waiter that gets no copy, with the reason."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class Departed(Release):
    """The end of the wait of a waiter that has left, and gets no answer."""


# --- time ---


@dataclass(frozen=True, slots=True)
class WaitUntil(Instruction):
    """The instruction to feed `TimePassed` at that time, which replaces the time of an earlier `WaitUntil`. It comes
    before all other instructions."""

    at_ms: int

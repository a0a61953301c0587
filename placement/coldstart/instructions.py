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
    """A request for information. A flight has at most one outstanding."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Recall(Request):
    """Recall the remembered record for a flight that begins. Answered by `Recalled`, which must be fed to the machine
    after the call that fed `Joined` has returned: a waiter never gets its answer while it joins."""


@dataclass(frozen=True, slots=True)
class Read(Request):
    """Read the record. Answered by `RecordRead`, `RecordMissing` or `ReadFailed`."""

    fresh: bool = False  # a read that began earlier is no answer, even if it finds a registration


@dataclass(frozen=True, slots=True)
class Look(Request):
    """Look at the view. Answered by `Seen`."""


@dataclass(frozen=True, slots=True)
class Choose(Request):
    """Choose a pod for the load. Answered by `Chosen`."""

    excluded: Mapping[str, str]  # pods not to use, each with the reason as it follows the pod's name
    idle_ms: int


@dataclass(frozen=True, slots=True)
class Ask(Request):
    """Ask the pod's agent to load the model. Answered by whatever the agent says."""

    pod: str
    idle_ms: int  # more than 0: no call waits, so the load takes no room from models used more recently
    why: str  # why it is loaded, and why there, for people


@dataclass(frozen=True, slots=True)
class Hurry(Instruction):
    """Tell the agent that is being asked that a call waits now. The agent applies this to the request that it already
    has, and sends no answer."""

    model_id: str
    pod: str
    why: str


@dataclass(frozen=True, slots=True)
class ForgetRecord(Instruction):
    """The instruction to forget the remembered record of a model, because it is wrong."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Ended(Instruction):
    """The flight of the model is over."""

    model_id: str


# --- for waiters ---


@dataclass(frozen=True, slots=True)
class Release(Instruction):
    """A waiter's wait ends."""

    waiter: Hashable
    waited_ms: int


@dataclass(frozen=True, slots=True)
class TellCopy(Release):
    """A waiter gets its answer: there is a copy that may be called."""


@dataclass(frozen=True, slots=True)
class TellAsked(Release):
    """A waiter that only waited until an agent was asked gets its answer."""


@dataclass(frozen=True, slots=True)
class TellProblem(Release):
    """A waiter gets no copy."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class Departed(Release):
    """A waiter has left by itself, and gets no answer."""


# --- time ---


@dataclass(frozen=True, slots=True)
class WaitUntil(Instruction):
    """Feed `TimePassed` at that time. This replaces the time of an earlier `WaitUntil`, and comes before all other
    instructions."""

    at_ms: int

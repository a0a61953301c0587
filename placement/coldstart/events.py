"""Events of cold starts: everything that the machine can be told.

Every event has the time, in milliseconds on any clock that does not go back. An `Answer` names the instruction that it
answers: `answers` is that instruction's `cause`. Each instruction that needs an answer gets exactly one.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass

from placement.choice import Choice
from placement.coldstart.problems import Problem, ProblemReason
from placement.failures import Failure, FailureKind


@dataclass(frozen=True, slots=True)
class Event:
    """An event: something that has happened, and when."""

    now_ms: int


# --- waiters ---


@dataclass(frozen=True, slots=True)
class Joined(Event):
    """A waiter's request for a copy of the model."""

    model_id: str
    waiter: Hashable  # opaque to the machine; it may wait for a model only once at a time
    size: int = 0  # bytes that it holds meanwhile
    deadline_ms: int | None = None
    idle_ms: int = 0  # since the model's last use; 0: a call waits for it now
    until_asked: bool = False  # it waits only until an agent was asked to load the model


@dataclass(frozen=True, slots=True)
class Left(Event):
    """The departure of a waiter. It has no effect if the waiter has already been answered."""

    model_id: str
    waiter: Hashable


@dataclass(frozen=True, slots=True)
class TimePassed(Event):
    """The arrival of the time that the last `WaitUntil` named."""


@dataclass(frozen=True, slots=True)
class Closed(Event):
    """The end of the router: all waiters get an error, and so does each that joins later."""


# --- the view ---


@dataclass(frozen=True, slots=True)
class CopiesChanged(Event):
    """A change of the model's copies in the view."""

    model_id: str


@dataclass(frozen=True, slots=True)
class PodChanged(Event):
    """A change of a pod: it was published, became suspect, or disappeared (`gone`)."""

    pod: str
    gone: bool = False


# --- answers ---


@dataclass(frozen=True, slots=True)
class Answer(Event):
    """The answer to an instruction."""

    model_id: str
    answers: int  # the instruction's cause


@dataclass(frozen=True, slots=True)
class Record:
    """The part of a model's registration that matters to a cold start."""

    created: int  # create revision: distinguishes registrations of one id
    load_ms: int = 0  # duration of the last load; 0: never loaded
    quarantine: str = ""  # error text for callers of a quarantined model; empty: not quarantined
    failures: tuple[Failure, ...] = ()  # those that have not expired, on the machine's clock
    marked: bool = False  # it contains failed loads or deaths, expired or not


@dataclass(frozen=True, slots=True)
class Recalled(Answer):
    """The record as the router remembers it from an earlier read; None if it remembers none."""

    record: Record | None


@dataclass(frozen=True, slots=True)
class RecordRead(Answer):
    """The record, from a read that began after the instruction, or from an earlier one still in progress that found a
    registration."""

    record: Record


@dataclass(frozen=True, slots=True)
class RecordMissing(Answer):
    """The absence of the record, from a read that began after the instruction."""


@dataclass(frozen=True, slots=True)
class ReadFailed(Answer):
    """A failure to read the record."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class Sighting:
    """A copy of the model in the view, loaded or being loaded."""

    pod: str
    created: int  # of the registration that it is a copy of
    usable: bool  # it may be called, and its pod's data port has not just failed
    present: bool  # its pod has published itself in the copy's own incarnation, and is not suspect
    agent_failed_ms: int | None = None  # when the pod's agent failed to answer; None: it answered


@dataclass(frozen=True, slots=True)
class Seen(Answer):
    """The part of the view that concerns the model, as it is now."""

    copies: tuple[Sighting, ...]
    pods: Collection[str]  # the names of all pods that accept the model: its type and labels


@dataclass(frozen=True, slots=True)
class Chosen(Answer):
    """The pod that placement chooses for the load."""

    choice: Choice


@dataclass(frozen=True, slots=True)
class Loaded(Answer):
    """The agent's answer that it has the copy."""

    believed: bool = True  # False: the answer comes from another incarnation of the pod than the view knows


@dataclass(frozen=True, slots=True)
class Elsewhere(Answer):
    """The agent's answer that another pod has the copy, or the claim to load it."""

    pod: str
    there: bool = True  # the pod is in view, with its address
    agent_failed_ms: int | None = None  # when its agent failed to answer; None: it answered


@dataclass(frozen=True, slots=True)
class Refused(Answer):
    """The agent's refusal to begin a load."""

    reason: ProblemReason
    text: str


@dataclass(frozen=True, slots=True)
class Failed(Answer):
    """The agent's answer that it tried the load, which failed."""

    text: str
    kind: FailureKind = FailureKind.LASTING
    asked_ms: int = 0  # pause that the store asked for; 0: none
    reason: ProblemReason = ProblemReason.LOAD_FAILED


@dataclass(frozen=True, slots=True)
class Stale(Answer):
    """The agent's answer that it knows another registration of the model than the one that it was asked to load."""


@dataclass(frozen=True, slots=True)
class Unreachable(Answer):
    """The lack of an answer: the agent could not be reached."""


@dataclass(frozen=True, slots=True)
class TimedOut(Answer):
    """The lack of an answer in time. The agent is most likely still loading."""


@dataclass(frozen=True, slots=True)
class Garbled(Answer):
    """An answer of the agent that this router does not understand."""


@dataclass(frozen=True, slots=True)
class Broke(Answer):
    """A failure of the carrier itself, which could not carry out the instruction. The carrier's log says why."""

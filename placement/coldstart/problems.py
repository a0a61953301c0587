"""Problems: the reasons why a waiter gets no copy, as data. The carrier maps each reason to an error by its name."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from placement.failures import Eligibility, Failure, FailureKind, hint


class ProblemReason(enum.Enum):
    """A reason why a model was not loaded, or why a waiter may not wait for it."""

    UNKNOWN_MODEL = enum.auto()
    QUARANTINED = enum.auto()
    LOAD_FAILED = enum.auto()
    """The load failed, and the model itself is at fault."""
    NOT_FETCHED = enum.auto()
    """The model's files cannot be fetched, for a temporary reason."""
    CONTENT_CHANGED = enum.auto()
    NOWHERE = enum.auto()
    """No pod can ever hold the model."""
    NO_ROOM = enum.auto()
    OVERLOADED = enum.auto()
    """Too many calls wait, or they hold too many bytes."""
    NOT_IN_TIME = enum.auto()
    """The load cannot end by the deadline, or did not end within the longest wait. It continues."""
    DEADLINE = enum.auto()
    REGISTRY_AWAY = enum.auto()
    UNAVAILABLE = enum.auto()
    INTERNAL = enum.auto()

    @classmethod
    def named(cls, name: str) -> "ProblemReason":
        """Returns the reason with that name, or UNAVAILABLE for a name that cold starts do not use."""
        return cls.__members__.get(name, cls.UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a waiter gets no copy, with a text for the caller."""

    reason: ProblemReason
    text: str
    retry_ms: int | None = None  # time until a retry makes sense, if known
    details: Mapping[str, str] = field(default_factory=dict)  # short strings for programs


STOPPING = Problem(ProblemReason.UNAVAILABLE, "this router is stopping")
PASSED = Problem(ProblemReason.DEADLINE, "the call's deadline had passed before its model's load was requested")


def soon(reason: ProblemReason, text: str) -> Problem:
    """Returns a problem that tells the caller to retry in a second."""
    return Problem(reason, text, 1000)


def unknown(model_id: str) -> Problem:
    """Returns the problem of a model that is not registered."""
    return Problem(ProblemReason.UNKNOWN_MODEL, "model not found", details={"model": model_id[:200]})


def failed(model_id: str, standing: Eligibility, failure: Failure) -> Problem:
    """Returns the problem of a model that failed to load: its own error, the pods in which it failed, and the way
    out."""
    passing = failure.kind is FailureKind.PASSING
    text = failure.why or "the model could not be loaded"
    return Problem(
        ProblemReason.NOT_FETCHED
        if passing
        else ProblemReason.NO_ROOM
        if failure.kind is FailureKind.MEMORY
        else ProblemReason.LOAD_FAILED,
        f"{text} ({hint(model_id, failure.kind, standing.retry_ms)})",
        max(standing.retry_ms, 100) if passing else None,
        {"pods": ", ".join(standing.pods)[:500]},
    )

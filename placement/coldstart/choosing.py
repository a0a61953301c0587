"""The consequences of a look at the view and of a choice: ask a pod, give up, or wait a little."""

from dataclasses import dataclass

from placement.choice import Choice, ChoiceVerdict
from placement.coldstart import problems
from placement.coldstart.events import Seen
from placement.coldstart.flight import Flight
from placement.coldstart.problems import Problem, ProblemReason
from placement.coldstart.rules import Rules
from placement.failures import Eligibility


@dataclass(frozen=True, slots=True)
class Go:
    """The outcome that names a pod to ask."""

    pod: str
    why: str


@dataclass(frozen=True, slots=True)
class Stuck:
    """The outcome that nothing can be done now, although time or a change of the view may help. `why` is the error for
    callers if neither helps."""

    why: str


def usable(created: int, seen: Seen) -> bool:
    """Returns whether the view shows a copy of the registration `created` that may be called, in a pod that has not
    just failed."""
    return any(copy.usable and copy.created == created for copy in seen.copies)


def claimed(flight: Flight, created: int, seen: Seen, standing: Eligibility, rules: Rules) -> str:
    """Returns a pod that is known to have a copy of the registration `created`, or to be loading one, or "" if there is
    none. A request to that pod's agent joins the load. Pods in which the load has failed are left out: their claims are
    deleted, or about to be, although the view still shows them. So are pods that have refused the load, and pods whose
    agents failed to answer a moment ago."""
    for copy in seen.copies:
        silent = copy.agent_failed_ms is not None and seen.now_ms - copy.agent_failed_ms < rules.pause_ms
        passed_over = copy.pod in flight.excluded or copy.pod in standing.excluded
        if copy.created == created and copy.present and not silent and not passed_over:
            return copy.pod
    return ""


def outcome(flight: Flight, choice: Choice, standing: Eligibility, rules: Rules) -> Go | Problem | Stuck:
    """Returns what follows from a choice. May clear the flight's refusals and excluded pods.

    If no pod is left to be asked, the caller gets the most telling answer: the model's own error, else the sizes of
    pods, else the agents' reasons for refusing. The flight only waits if there is no such answer; the refusals then no
    longer count, because their causes may have passed when it looks again."""
    if choice.pod is not None and len(flight.refusals) < rules.max_refusals:
        cause = "a call needs it" if not flight.idle_ms else "its load was asked for"
        return Go(choice.pod, f"{cause}: {choice.why}")
    if standing.newest is not None:
        return problems.failed(flight.model_id, standing, standing.newest)
    if choice.verdict is ChoiceVerdict.NOWHERE:
        return Problem(ProblemReason.NOWHERE, choice.why)
    if choice.verdict is ChoiceVerdict.NO_ROOM:
        return problems.soon(ProblemReason.NO_ROOM, f"Nowhere available to load: {choice.why}")
    refusals, flight.refusals = flight.refusals, []
    for reason, text in refusals:
        if reason in (ProblemReason.NO_ROOM, ProblemReason.OVERLOADED):
            return problems.soon(reason, text)
    if refusals and all(reason is ProblemReason.NOWHERE for reason, _ in refusals):
        return Problem(ProblemReason.NOWHERE, refusals[-1][1])
    if not choice.refused:
        return problems.soon(ProblemReason.UNAVAILABLE, choice.why)
    flight.excluded.clear()
    return Stuck(refusals[-1][1] if refusals else choice.why)

"""The consequences of answers to instructions: a table that maps each type of answer to the next step of its flight."""

from collections.abc import Callable, Mapping
from typing import Any

from placement.coldstart import choosing, events, problems
from placement.coldstart.choosing import Go
from placement.coldstart.flight import Flight
from placement.coldstart.flights import Flights
from placement.coldstart.instructions import ForgetRecord
from placement.coldstart.problems import Problem, ProblemReason

_FINAL = frozenset({ProblemReason.QUARANTINED, ProblemReason.NOWHERE, ProblemReason.CONTENT_CHANGED})
"""Reasons for which a load fails in every other pod too."""

# --- the record ---


def _recalled(flights: Flights, flight: Flight, event: events.Recalled) -> None:
    if event.record is None or event.record.marked:  # a marked one may have been released through another router
        flights.read(flight)
        return
    flight.record = event.record
    flights.look(flight)


def _record_read(flights: Flights, flight: Flight, event: events.RecordRead) -> None:
    before, flight.record = flight.record, event.record
    flights.failures.recall(flight.model_id, event.record.created, event.record.failures)
    pod, flight.doubted = flight.doubted, ""
    if not pod:
        flights.look(flight)
        return
    same = before is not None and before.created == event.record.created
    flight.stale = flight.stale + 1 if same else 0
    if flight.stale > flights.rules.max_stale:
        text = f"{pod} does not accept the current registration of {flight.model_id}"
        flights.end(flight, problems.soon(ProblemReason.UNAVAILABLE, text))
    elif flight.stale:
        flights.wait(flight, f"{pod} has an older view of the registry")
    else:
        flights.go_on(flight)


def _record_missing(flights: Flights, flight: Flight, event: events.RecordMissing) -> None:
    """Tells all waiters who joined before the read began that the model is unknown. For later waiters the record is
    read again, because the model may have been registered in between."""
    problem = problems.unknown(flight.model_id)
    early = [place for place in flight.places.values() if place.number <= flight.read_after]
    if len(early) == len(flight.places):
        flights.end(flight, problem)
        return
    for place in early:
        flights.tell_problem(flight, place, problem)
    flights.read(flight, fresh=flight.fresh)


def _read_failed(flights: Flights, flight: Flight, event: events.ReadFailed) -> None:
    flights.end(flight, event.problem)


# --- the view and the choice ---


def _seen(flights: Flights, flight: Flight, event: events.Seen) -> None:
    record, failures = flight.record, flights.failures
    assert record is not None, "a flight looks once it has a record"
    if choosing.usable(record.created, event):
        flights.end(flight)
        return
    standing = flight.standing = failures.standing(
        flight.model_id, event.pods, event.now_ms, created=record.created, tried=flight.failed_in
    )
    pod, flight.joined = flight.joined, ""
    if pod or (pod := choosing.claimed(flight, record.created, event, standing, flights.rules)):
        flights.ask(flight, pod)
    elif record.quarantine:
        flights.end(flight, Problem(ProblemReason.QUARANTINED, record.quarantine))
    elif standing.answer is not None:
        flights.end(flight, problems.failed(flight.model_id, standing, standing.answer))
    else:
        avoided = failures.avoided(event.pods, event.now_ms)
        flights.choose(flight, {**avoided, **standing.excluded, **flight.excluded})


def _chosen(flights: Flights, flight: Flight, event: events.Chosen) -> None:
    assert flight.standing is not None, "a flight looks before it chooses"
    found = choosing.outcome(flight, event.choice, flight.standing, flights.rules)
    if isinstance(found, Go):
        flight.why = found.why
        flights.ask(flight, found.pod)
    elif isinstance(found, Problem):
        flights.end(flight, found)
    else:
        flights.wait(flight, found.why)


# --- an agent's ---


def _loaded(flights: Flights, flight: Flight, event: events.Loaded) -> None:
    flights.failures.loaded(flight.model_id, flight.pod, event.now_ms)
    if event.believed:
        flights.end(flight)
    else:
        flights.wait(flight, f"{flight.pod} has just restarted")


def _elsewhere(flights: Flights, flight: Flight, event: events.Elsewhere) -> None:
    failed_ms = event.agent_failed_ms
    if not event.there or event.pod == flight.pod:
        flights.wait(flight, f"{flight.model_id} is claimed by {event.pod or 'an unknown pod'}, which is not in view")
    elif failed_ms is not None and event.now_ms - failed_ms < flights.rules.pause_ms:
        flights.wait(flight, f"{flight.model_id} is claimed by {event.pod}, which does not answer")
    else:
        flight.joined = event.pod
        flights.go_on(flight)


def _refused(flights: Flights, flight: Flight, event: events.Refused) -> None:
    assert flight.asked_ms is not None, "an agent refuses what it was asked"
    waited = event.now_ms - flight.asked_ms > flights.rules.waited_ms
    flight.excluded[flight.pod] = f"refuses it: {event.text}"
    flight.refusals.append((event.reason, event.text))
    if event.reason in (ProblemReason.QUARANTINED, ProblemReason.UNKNOWN_MODEL):
        flights.end(flight, Problem(event.reason, event.text))
    elif event.reason is ProblemReason.NO_ROOM and waited and not flight.places:
        flights.end(flight, problems.soon(event.reason, event.text))  # no pod makes room unless a call waits
    elif event.reason is ProblemReason.NOWHERE:
        flight.stuck_ms = None
        flights.read_again(flight)  # its record now has its size, so that only larger pods are asked
    else:
        flights.go_on(flight)


def _failed(flights: Flights, flight: Flight, event: events.Failed) -> None:
    assert flight.record is not None, "a flight asks once it has a record"
    # The agent has written the failure into the record, where the next flight reads it.
    flights.say(ForgetRecord(flights.number, flight.model_id), flight)
    if event.reason in _FINAL:
        flights.end(flight, Problem(event.reason, event.text))
        return
    flight.failed_in.add(flight.pod)
    flights.failures.failed(
        flight.model_id,
        flight.pod,
        event.now_ms,
        event.text,
        created=flight.record.created,
        kind=event.kind,
        asked_ms=event.asked_ms,
    )
    flights.go_on(flight)


def _stale(flights: Flights, flight: Flight, event: events.Stale) -> None:
    flight.doubted = flight.pod
    flights.read_again(flight)


def _silent(flights: Flights, flight: Flight, event: events.Unreachable | events.TimedOut) -> None:
    """Looks at the view again. A pod whose agent cannot be reached is passed over for a while; an agent that took too
    long is asked again, and the request joins the load in progress."""
    flights.look(flight)


def _garbled(flights: Flights, flight: Flight, event: events.Garbled) -> None:
    flights.wait(flight, f"{flight.pod} gave an answer that this router does not understand")


# --- the carrier's own ---


def _broke(flights: Flights, flight: Flight, event: events.Broke) -> None:
    text = f"loading {flight.model_id} failed inside the router, whose log has the cause"
    flights.end(flight, Problem(ProblemReason.INTERNAL, text))


FOLLOW: Mapping[type[events.Event], Callable[[Flights, Flight, Any], None]] = {
    events.Recalled: _recalled,
    events.RecordRead: _record_read,
    events.RecordMissing: _record_missing,
    events.ReadFailed: _read_failed,
    events.Seen: _seen,
    events.Chosen: _chosen,
    events.Loaded: _loaded,
    events.Elsewhere: _elsewhere,
    events.Refused: _refused,
    events.Failed: _failed,
    events.Stale: _stale,
    events.Unreachable: _silent,
    events.TimedOut: _silent,
    events.Garbled: _garbled,
    events.Broke: _broke,
}

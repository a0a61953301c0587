"""The state machine of cold starts: it takes one event at a time, and returns the instructions that the event leads
to."""

from dataclasses import dataclass

from placement.coldstart import answers, events, problems
from placement.coldstart.events import Answer, Event
from placement.coldstart.flight import EXPECTED, Flight, Phase
from placement.coldstart.flights import Flights
from placement.coldstart.instructions import Departed, Hurry, Instruction, TellAsked, TellProblem, WaitUntil
from placement.coldstart.rules import Rules
from placement.coldstart.story import Impossible
from placement.coldstart.waiters import Place


@dataclass(frozen=True, slots=True)
class MachineStatistics:
    """The numbers of flights and waiters at one moment."""

    flights: int
    waiters: int
    bytes: int  # of the messages that waiters hold


class Machine:
    """All cold starts of one router worker."""

    __slots__ = ("_closed", "_flights", "_wanted_ms")

    def __init__(self, rules: Rules | None = None) -> None:
        self._flights = Flights(rules or Rules())
        self._wanted_ms: int | None = None  # when the carrier was last told to feed the time
        self._closed = False

    def handle(self, event: Event) -> list[Instruction]:
        """Handles an event and returns the instructions that it leads to. Raises Impossible, and changes nothing, if
        the event cannot have happened."""
        flights = self._flights
        flight = self._expecting(event) if isinstance(event, Answer) else None
        if isinstance(event, events.Joined):
            self._check(event)
        flights.number += 1
        flights.now_ms = event.now_ms
        flights.out = []
        if flight is not None:
            flight.awaits, flight.quiet = 0, False
            flight.story.add(flights.number, event.now_ms, event)
            answers.FOLLOW[type(event)](flights, flight, event)
        elif not isinstance(event, Answer):
            self._happened(event)
        self._want_time()
        given, flights.out = flights.out, []  # so that the waiters in it are not kept until the next event
        return given

    def loading(self, model_id: str) -> bool:
        """Returns whether a flight of this model is under way."""
        return model_id in self._flights.by_model

    def statistics(self) -> MachineStatistics:
        """Returns the current numbers of flights and waiters, and the bytes that the waiters hold."""
        waiters = self._flights.waiters
        return MachineStatistics(len(self._flights.by_model), waiters.count, waiters.bytes)

    def _happened(self, event: Event) -> None:
        match event:
            case events.Joined():
                self._joined(event)
            case events.Left():
                self._left(event)
            case events.TimePassed():
                self._time_passed()
            case events.CopiesChanged():
                if (flight := self._flights.by_model.get(event.model_id)) is not None:
                    self._changed(flight, event)
            case events.PodChanged():
                self._pod_changed(event)
            case events.Closed():
                self._close()

    # --- waiters ---

    def _joined(self, event: events.Joined) -> None:
        flights = self._flights
        flight = flights.by_model.get(event.model_id)
        place = flights.waiters.place(event)
        waiting = 0 if flight is None else len(flight.places)
        problem = problems.STOPPING if self._closed else flights.waiters.refusal(event, waiting, flights.rules)
        if problem is None and flight is not None:
            problem = place.too_late(flight.expected_ms, event.now_ms)
        if problem is not None:
            flights.say(TellProblem(flights.number, event.waiter, 0, problem))
            return
        if flight is None:
            flight = flights.begin(event.model_id, event.idle_ms)
        flight.idle_ms = min(flight.idle_ms, event.idle_ms)
        if flight.quiet and not flight.idle_ms:
            flight.quiet = False
            flights.say(Hurry(flights.number, flight.model_id, flight.pod, flight.why), flight)
        if event.until_asked and flight.asked_ms is not None:
            flights.say(TellAsked(flights.number, event.waiter, 0))
            return
        flight.places[event.waiter] = place
        flights.waiters.add(place)
        until_ms = event.now_ms + flights.rules.load_wait_ms
        if event.deadline_ms is not None:
            until_ms = min(until_ms, event.deadline_ms)
        place.alarm = flights.alarms.set(until_ms, place)

    def _left(self, event: events.Left) -> None:
        flights = self._flights
        flight = flights.by_model.get(event.model_id)
        place = None if flight is None else flight.places.get(event.waiter)
        if flight is not None and place is not None:
            flights.say(Departed(flights.number, event.waiter, flights.release(flight, place)))

    def _close(self) -> None:
        self._closed = True
        for flight in list(self._flights.by_model.values()):
            self._flights.end(flight, problems.STOPPING)

    # --- time ---

    def _time_passed(self) -> None:
        flights = self._flights
        self._wanted_ms = None
        while (whose := flights.alarms.ring(flights.now_ms)) is not None:
            if isinstance(whose, Place):
                flight = flights.by_model[whose.model_id]
                flights.tell_problem(flight, whose, whose.expired(flights.now_ms, flights.rules, flight.held_up))
            else:
                flights.read(whose)

    def _want_time(self) -> None:
        flights = self._flights
        earliest_ms = flights.alarms.earliest_ms()
        if earliest_ms is not None and (self._wanted_ms is None or earliest_ms < self._wanted_ms):
            self._wanted_ms = earliest_ms
            # First, because carrying out the others may feed an event that leads to an earlier time.
            flights.out.insert(0, WaitUntil(flights.number, earliest_ms))

    # --- the view ---

    def _pod_changed(self, event: events.PodChanged) -> None:
        if event.gone:
            self._flights.failures.forget_pod(event.pod)
        for flight in self._flights.by_model.values():
            self._changed(flight, event)

    def _changed(self, flight: Flight, event: Event) -> None:
        if flight.changed:
            return
        flight.changed = True
        flight.story.add(self._flights.number, event.now_ms, event)
        if flight.phase is Phase.WAITING:
            self._flights.read(flight)

    # --- impossible events ---

    def _expecting(self, answer: Answer) -> Flight | None:
        """Returns the flight that waits for the answer, or None if the flight has ended meanwhile."""
        flight = self._flights.by_model.get(answer.model_id)
        if flight is not None and flight.awaits == answer.answers:
            if type(answer) not in EXPECTED[flight.phase]:
                raise Impossible(answer, f"the flight is {flight.phase.value}", flight.story)
            return flight
        orphan = answer.model_id, answer.answers
        if orphan not in self._flights.orphans:
            raise Impossible(answer, "nothing was asked that it answers", None if flight is None else flight.story)
        self._flights.orphans.discard(orphan)
        return None

    def _check(self, event: events.Joined) -> None:
        flight = self._flights.by_model.get(event.model_id)
        if flight is not None and event.waiter in flight.places:
            raise Impossible(event, "it waits already", flight.story)

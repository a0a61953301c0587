"""The flights under way, and the steps that a flight can take: read, look, ask, wait, end.

What the flights share is kept here too: the totals of waiters, the alarms, the memory of failures, and the instructions
that the current event has led to so far.
"""

from placement.coldstart import problems
from placement.coldstart.alarms import Alarms
from placement.coldstart.flight import Flight, Phase
from placement.coldstart.instructions import (
    Ask,
    Choose,
    Ended,
    ForgetRecord,
    Instruction,
    Look,
    Read,
    Recall,
    Request,
    TellAsked,
    TellCopy,
    TellProblem,
)
from placement.coldstart.problems import Problem, ProblemReason
from placement.coldstart.rules import Rules
from placement.coldstart.waiters import Place, Waiters
from placement.failures import Failures


class Flights:
    """The flights of one machine, and the event that is being handled."""

    __slots__ = ("alarms", "by_model", "failures", "now_ms", "number", "orphans", "out", "rules", "waiters")

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.by_model: dict[str, Flight] = {}  # none is over
        self.waiters = Waiters()
        self.alarms: Alarms[Place | Flight] = Alarms()
        self.failures = Failures(expiry_ms=rules.failure_expiry_ms)
        self.orphans: set[tuple[str, int]] = set()  # requests of flights that ended before they were answered
        self.number = 0  # of the event: the cause of its instructions
        self.now_ms = 0  # its time
        self.out: list[Instruction] = []  # its instructions so far

    # --- steps of a flight ---

    def begin(self, model_id: str, idle_ms: int) -> Flight:
        """Begins the flight of a model that has none, and instructs the carrier to recall the record."""
        flight = self.by_model[model_id] = Flight(model_id, idle_ms)
        self._request(flight, Phase.RECALLING, Recall(self.number, model_id))
        return flight

    def read(self, flight: Flight, *, fresh: bool = False) -> None:
        """Instructs the carrier to read the record. With `fresh`, the read must begin after this instruction."""
        if flight.pause is not None:
            self.alarms.call_off(flight.pause)
            flight.pause = None
        flight.fresh = fresh
        flight.read_after = self.waiters.arrivals
        self._request(flight, Phase.READING, Read(self.number, flight.model_id, fresh))

    def read_again(self, flight: Flight) -> None:
        """Instructs the carrier to read the record again, because an answer has shown that the record has changed."""
        self.say(ForgetRecord(self.number, flight.model_id), flight)
        self.read(flight, fresh=True)

    def look(self, flight: Flight) -> None:
        """Instructs the carrier to look up the model's copies in the view."""
        flight.changed = False
        flight.looked_ms = self.now_ms
        self._request(flight, Phase.LOOKING, Look(self.number, flight.model_id))

    def go_on(self, flight: Flight) -> None:
        """Looks at the view again after an answer that made progress. The flight then no longer counts as stuck."""
        flight.stuck_ms = None
        self.look(flight)

    def choose(self, flight: Flight, excluded: dict[str, str]) -> None:
        """Instructs the carrier to choose a pod. `excluded` maps pods not to use to the reason."""
        self._request(flight, Phase.CHOOSING, Choose(self.number, flight.model_id, excluded, flight.idle_ms))

    def ask(self, flight: Flight, pod: str) -> None:
        """Instructs the carrier to ask an agent to load the model. Waiters whose deadline comes before the expected end
        of the load get their error now, and waiters that only wait until an agent is asked get their answer."""
        assert flight.record is not None, "a flight asks once it has a record"
        self.failures.tried(pod, self.now_ms)
        flight.pod, flight.asked_ms, flight.quiet = pod, self.now_ms, flight.idle_ms > 0
        flight.held_up = ""
        ask = Ask(self.number, flight.model_id, pod, flight.idle_ms, flight.why)
        self._request(flight, Phase.ASKING, ask)
        if flight.record.load_ms and flight.expected_ms is None:
            flight.expected_ms = self.now_ms + flight.record.load_ms
        for place in list(flight.places.values()):
            if (late := place.too_late(flight.expected_ms, self.now_ms)) is not None:
                self.tell_problem(flight, place, late)
            elif place.until_asked:
                self.say(TellAsked(self.number, place.waiter, self.release(flight, place)))

    def wait(self, flight: Flight, why: str) -> None:
        """Waits for a change of the view, or for a moment. A flight that has been stuck too long gives up, for the
        reason `why`.

        Claims of dead pods end with their leases, and pods come back; the limit keeps waiters from waiting without end.
        """
        rules = self.rules
        flight.held_up = why
        if flight.stuck_ms is None:
            flight.stuck_ms = flight.looked_ms
        patience_ms = min(rules.load_wait_ms if flight.places else rules.patience_ms, 3 * rules.patience_ms)
        if flight.looked_ms - flight.stuck_ms > patience_ms:
            self.end(flight, problems.soon(ProblemReason.UNAVAILABLE, why))
        elif flight.changed:
            self.read(flight)
        else:
            flight.phase = Phase.WAITING
            flight.pause = self.alarms.set(self.now_ms + rules.pause_ms, flight)

    def end(self, flight: Flight, problem: Problem | None = None) -> None:
        """Ends the flight, and gives all its waiters the copy or the problem."""
        if flight.awaits:
            self.orphans.add((flight.model_id, flight.awaits))
        if flight.pause is not None:
            self.alarms.call_off(flight.pause)
        flight.phase = Phase.OVER
        del self.by_model[flight.model_id]
        self.say(Ended(self.number, flight.model_id), flight)
        for place in list(flight.places.values()):
            if problem is None:
                self.say(TellCopy(self.number, place.waiter, self.release(flight, place)))
            else:
                self.tell_problem(flight, place, problem)

    # --- waiters ---

    def release(self, flight: Flight, place: Place) -> int:
        """Ends one waiter's wait, and returns its length in milliseconds. The caller instructs the carrier to
        answer."""
        del flight.places[place.waiter]
        self.waiters.remove(place)
        if place.alarm is not None:
            self.alarms.call_off(place.alarm)
            place.alarm = None
        return self.now_ms - place.joined_ms

    def tell_problem(self, flight: Flight, place: Place, problem: Problem) -> None:
        """Ends one waiter's wait with a problem."""
        self.say(TellProblem(self.number, place.waiter, self.release(flight, place), problem))

    # --- instructions ---

    def say(self, instruction: Instruction, flight: Flight | None = None) -> None:
        """Gives an instruction, and adds it to the flight's story."""
        self.out.append(instruction)
        if flight is not None:
            flight.story.add(self.number, self.now_ms, instruction)

    def _request(self, flight: Flight, phase: Phase, request: Request) -> None:
        flight.phase = phase
        flight.awaits = request.cause
        self.say(request, flight)

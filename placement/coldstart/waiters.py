"""Waiters: the calls that wait for a model, with limits on their number and their bytes.

Waiters, and the bytes of the messages that they hold, are limited for each model and in total, so that a slow store
cannot fill the router's memory.
"""

from collections.abc import Hashable
from typing import Any

from placement.coldstart.alarms import Alarm
from placement.coldstart.events import Joined
from placement.coldstart.problems import PASSED, Problem, ProblemReason, soon
from placement.coldstart.rules import Rules


class Place:
    """One waiter's place in the flight of a model."""

    __slots__ = ("alarm", "deadline_ms", "joined_ms", "model_id", "number", "size", "until_asked", "waiter")

    def __init__(self, event: Joined, number: int) -> None:
        self.model_id = event.model_id
        self.waiter: Hashable = event.waiter
        self.number = number  # in the order of arrival
        self.joined_ms = event.now_ms
        self.size = event.size  # bytes
        self.deadline_ms = event.deadline_ms
        self.until_asked = event.until_asked
        self.alarm: Alarm[Any] | None = None  # rings once the waiter has waited long enough; None: it does not wait yet

    def too_late(self, expected_ms: int | None, now_ms: int) -> Problem | None:
        """Returns a problem if the waiter's deadline comes before the expected end of the load, or None."""
        if expected_ms is None or self.deadline_ms is None or self.deadline_ms >= expected_ms:
            return None
        left_ms = expected_ms - now_ms
        if left_ms <= 0:
            return None  # the load takes longer than expected: its end is unknown
        due_ms = self.deadline_ms - now_ms
        text = (
            f"loading {self.model_id} takes {left_ms / 1000:.1f} s more, but the deadline is in {due_ms / 1000:.1f} s"
        )
        return Problem(ProblemReason.NOT_IN_TIME, text, left_ms)

    def expired(self, now_ms: int, rules: Rules, held_up: str = "") -> Problem:
        """Returns the problem for a waiter whose time has run out. `held_up` says why no pod can be asked to load the
        model, if none can."""
        if self.deadline_ms is not None and self.deadline_ms <= now_ms:
            text = f"{self.model_id} was not loaded by the call's deadline"
            return Problem(ProblemReason.DEADLINE, f"{text}: {held_up}" if held_up else text)
        rest = f": {held_up}" if held_up else "; its load continues"
        text = f"{self.model_id} was not loaded within {rules.load_wait_ms / 1000:g} s{rest}"
        return Problem(ProblemReason.NOT_IN_TIME, text, 5000)


class Waiters:
    """The totals of waiters over all flights, and their limits."""

    __slots__ = ("arrivals", "bytes", "count")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.arrivals = 0  # how many have come so far

    def refusal(self, event: Joined, waiting: int, rules: Rules) -> Problem | None:
        """Returns why another call may not wait, or None if it may. `waiting` is the number of calls that already wait
        for the same model."""
        if event.deadline_ms is not None and event.deadline_ms <= event.now_ms:
            return PASSED
        if self.count >= rules.max_waiters:
            return soon(
                ProblemReason.OVERLOADED,
                f"{self.count} calls wait for models to load, the largest number that is allowed: try again",
            )
        if self.bytes + event.size > rules.max_waiting_bytes:
            return soon(
                ProblemReason.OVERLOADED,
                f"calls that wait for models to load hold {self.bytes} of {rules.max_waiting_bytes} bytes: try again",
            )
        if waiting >= rules.max_waiters_per_model:
            return soon(
                ProblemReason.OVERLOADED,
                (
                    f"{waiting} calls wait for model {event.model_id} to load, the largest number that is "
                    "allowed: try again"
                ),
            )
        return None

    def place(self, event: Joined) -> Place:
        """Creates the place of a new waiter. It is not counted until it is added."""
        self.arrivals += 1
        return Place(event, self.arrivals)

    def add(self, place: Place) -> None:
        """Counts a waiter."""
        self.count += 1
        self.bytes += place.size

    def remove(self, place: Place) -> None:
        """Stops counting a waiter."""
        self.count -= 1
        self.bytes -= place.size

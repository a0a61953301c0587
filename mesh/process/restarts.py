"""Decisions on restarts of processes and tasks: a state machine without clock or I/O, which receives events.

A life consists of a start, which may fail, and the time from readiness to the end. After the first end the pause is the
shortest. After each further end the pause doubles, up to a maximum. A life that is long enough resets the pause. The
number of failed starts in a row can be limited; at the limit, restarts stop.

`supervisor` applies the decisions to processes, `tasks` to tasks.
"""

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The pauses before restarts. Times are in seconds."""

    first: float = 0.1  # the shortest pause
    longest: float = 5.0
    steady: float = 30.0  # a life of at least this length ends a row of ends
    at_once: int = 0  # ends in a row, from the first, that are followed by a restart without a pause
    give_up: int = 0  # failed starts in a row after which restarts stop; 0: no limit
    spread: float = 0.2  # share by which a pause is randomly longer or shorter, so that many restarts do not coincide


@dataclass(frozen=True, slots=True)
class Again:
    """The decision to start again after `pause` seconds."""

    pause: float
    row: int  # ends in a row, this one included


@dataclass(frozen=True, slots=True)
class GivenUp:
    """The decision to stop restarting."""

    tries: int  # failed starts in a row


class Phase(enum.Enum):
    """The phase of the current life."""

    ENDED = "ended"  # also the phase before the first start
    STARTING = "starting"
    READY = "ready"


class Impossible(Exception):
    """An event that is impossible in this phase; the text lists the last events."""


class Restarts:
    """The successive lives of one process or task. All times come from one clock, of any kind."""

    __slots__ = ("_failed", "_ready", "_row", "_story", "phase", "policy")

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self.phase = Phase.ENDED
        self._row = 0  # ends since the last steady life
        self._failed = 0  # starts since the last one that succeeded
        self._ready = 0.0  # when this life became ready
        self._story: tuple[str, ...] = ()  # the last events

    def began(self, now: float) -> None:
        """Records a start."""
        self._move("began", now, Phase.ENDED, to=Phase.STARTING)

    def ready(self, now: float) -> None:
        """Records that the start succeeded."""
        self._move("ready", now, Phase.STARTING, to=Phase.READY)
        self._ready = now
        self._failed = 0

    def ended(self, now: float, *, luck: float = 0.5) -> Again | GivenUp:
        """Records the end of a start or of a life, and returns the decision. `luck` is a random number from 0 to 1."""
        served = self.phase is Phase.READY
        self._move("ended", now, Phase.STARTING, Phase.READY, to=Phase.ENDED)
        policy = self.policy
        if served and now - self._ready >= policy.steady:
            self._row = 0
        self._row += 1
        self._failed += not served
        if policy.give_up and self._failed >= policy.give_up:
            return GivenUp(self._failed)
        if self._row <= policy.at_once:
            return Again(0.0, self._row)
        doubled = policy.first * 2.0 ** min(self._row - policy.at_once - 1, 64)
        return Again(min(doubled, policy.longest) * (1 + policy.spread * (2 * luck - 1)), self._row)

    def _move(self, event: str, now: float, *phases: Phase, to: Phase) -> None:
        self._story = (*self._story[-9:], f"{event} at {now:g}")
        if self.phase not in phases:
            raise Impossible(f"{event} while {self.phase.value}: {', '.join(self._story)}")
        self.phase = to

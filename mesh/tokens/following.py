"""The keys of an issuer, kept current.

The keys are read at the start, every few minutes, and when a token names an unknown key. Most issuers publish a new key
before they sign with it, but they do not have to. A token with an unknown key therefore waits for a reading that begins
after the token has arrived, so that no call fails while keys are rotated.

Anybody can send tokens with unknown keys. Between two readings there is therefore a pause, which grows while readings
find nothing new, and only a limited number of calls may wait for a reading.

While the keys cannot be read, the keys of the last reading stay valid.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mesh.process.tasks import Tasks
from mesh.telemetry import logs
from mesh.tokens import keyset
from mesh.tokens.keyset import KeySet
from mesh.tokens.locations import KeyDocument, Location, LocationError
from mesh.tokens.settings import ALGORITHMS

log = logs.get(__name__)

PERIOD = 300.0
"""Seconds between two readings, unless a token causes one earlier."""

PAUSES = (1.0, 10.0)
"""Shortest and longest pause, in seconds, between the starts of two readings that tokens cause. The pause grows while
readings find nothing new."""

MAX_WAITING = 256
"""Largest number of calls that may wait for a reading."""

_RETRY = (2.0, 60.0)  # seconds before another reading after a failure, the first and the longest


class Busy(Exception):
    """The refusal of a wait, because too many calls wait already."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """The state of the keys."""

    keys: int
    age: float | None  # seconds since the last reading that succeeded; None: there was none
    trouble: str  # why the last reading failed; empty: it did not
    readings: int
    failures: int
    waiting: int  # calls that wait for a reading


class Following:
    """The keys at one location. Call `look()` once a second."""

    def __init__(
        self,
        location: Location,
        *,
        algorithms: Iterable[str] = ALGORITHMS,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        pauses: tuple[float, float] = PAUSES,
    ) -> None:
        """Makes an empty set of keys. `changed` is called when the keys have changed. `clock` returns seconds."""
        self.keys: KeySet | None = None
        self.issuer = ""  # as the location states it
        self.ahead: float | None = None  # seconds by which this machine's clock is ahead of the location's
        self.changed = changed
        self._location = location
        self._algorithms = tuple(algorithms)
        self._clock = clock
        self._pauses = pauses
        self._pause = pauses[0]
        self._tasks = Tasks()
        self._reading: asyncio.Task[None] | None = None
        self._begun = float("-inf")
        self._read = float("-inf")
        self._due = float("-inf")
        self._trouble = ""
        self._readings = self._failures = self._failed = self._waiting = 0

    def look(self) -> None:
        """Begins a reading if one is due."""
        if self._reading is None and (self._clock() >= self._due or self._location.changed()):
            self._begin()

    async def newer(self) -> None:
        """Waits for a reading that begins after this call, unless the location is known not to have changed. Raises
        LocationError if the reading fails, and Busy if too many calls wait already."""
        if self._waiting >= MAX_WAITING:
            raise Busy
        asked = self._clock()
        self._waiting += 1
        try:
            while self._reading is not None or (self._begun < asked and self._may_be_old()):
                if self._reading is not None:
                    await asyncio.wait((self._reading,))
                elif (wait := self._begun + self._pause - self._clock()) > 0 and not self._location.changed():
                    await asyncio.sleep(wait)
                else:
                    self._begin()
        finally:
            self._waiting -= 1
        if self._trouble:
            raise LocationError(self._trouble)

    async def close(self) -> None:
        """Ends a reading that is under way."""
        await self._tasks.close()

    def statistics(self) -> Statistics:
        """Returns the state of the keys."""
        age = None if self.keys is None else self._clock() - self._read
        count = 0 if self.keys is None else len(self.keys.keys)
        return Statistics(count, age, self._trouble, self._readings, self._failures, self._waiting)

    def _may_be_old(self) -> bool:
        return self.keys is None or self._location.changed() is not False

    def _begin(self) -> None:
        self._begun = self._clock()
        self._reading = self._tasks.start(self._try(), "read the keys of an issuer")

    async def _try(self) -> None:
        try:
            published = await self._location.read()
            self._take(published, keyset.parse(published.raw, self._algorithms))
        except (LocationError, ValueError) as error:
            self._fail(
                str(error) if isinstance(error, LocationError) else f"the issuer's key set cannot be used: {error}"
            )
        finally:
            self._reading = None

    def _take(self, published: KeyDocument, keys: KeySet) -> None:
        if self._trouble:
            log.info("the keys of an issuer of tokens can be read again", issuer=published.issuer)
        self._readings, self._failed, self._trouble = self._readings + 1, 0, ""
        self.issuer, self.ahead = published.issuer, published.ahead
        self._read = self._clock()
        self._due = self._read + PERIOD * random.uniform(0.9, 1.1)
        if keys == self.keys:
            self._pause = min(2 * self._pause, self._pauses[1])
            return
        log.info("the keys of an issuer of tokens are new", issuer=published.issuer, keys=len(keys.keys))
        self.keys, self._pause = keys, self._pauses[0]
        self.changed()

    def _fail(self, why: str) -> None:
        if why != self._trouble:
            log.error("the keys of an issuer of tokens cannot be read; keys that were read before stay in use", why=why)
        self._failures, self._failed, self._trouble = self._failures + 1, self._failed + 1, why
        self._pause = min(2 * self._pause, self._pauses[1])
        retry = min(_RETRY[0] * 2 ** min(self._failed - 1, 10), _RETRY[1])
        self._due = self._clock() + retry * random.uniform(0.5, 1.0)
